"""How a contender is measured: what it computed, how long it took, what it held, and how far its picture went."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from skimage.metrics import structural_similarity
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dit_toolkit.training.score import ground_of

from .arena import Arena, Heat

KEY = "race.measure"
CEILING = 100.0  # dB: pictures that differ by less than that are told apart by rounding only
APART = 34 / 255  # from the ground's colour: foreground, as `training.score` has it


class Multiplications(TorchFunctionMode):
    """Counts the multiplications of all linear layers that run, whoever calls them: `total`."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear:
            self.total += args[0].numel() * args[1].shape[0]
        return func(*args, **(kwargs or {}))


class Memory(TorchDispatchMode):
    """Bytes of the tensors that are made and alive: `peak`. The same on every device; kernels' scratch is not seen."""

    def __init__(self):
        super().__init__()
        self.peak = self.held = 0
        self.alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in (out,) if isinstance(out, torch.Tensor) else tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive and not is_among(storage, (args, kwargs)):
                    self.hold(storage)
        return out

    def hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def release(_):
            del self.alive[key]
            self.held -= size

        self.alive[key] = weakref.ref(storage, release)
        self.held += size
        self.peak = max(self.peak, self.held)


def is_among(storage: torch.UntypedStorage, given: tuple) -> bool:
    """Whether it belongs to one of the tensors in `given`: views and results in place are nothing new."""
    tensors = (x for x in tree_iter(given) if isinstance(x, torch.Tensor))
    return any(x.untyped_storage()._cdata == storage._cdata for x in tensors)


def timed(arena: Arena, model: ModelPatcher, heat: Heat, steps: int, sampler: str, cfg: float = 1.0) -> float:
    """Seconds of the sampler's loop, from the first evaluation to the last."""
    seconds = []

    def clock(executor, *args, **kwargs):
        start = now(arena)
        out = executor(*args, **kwargs)
        seconds.append(now(arena) - start)
        return out

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, clock)  # innermost: a cache is set up before
    arena.sample(model, heat, steps, sampler, cfg)
    return seconds[0]


def now(arena: Arena) -> float:
    if arena.device.type == "cuda":
        torch.cuda.synchronize(arena.device)
    return time.perf_counter()


def evaluations_of(arena: Arena, steps: int, sampler: str) -> int:
    """How often `sampler` asks the model."""
    count = 0

    def counted(executor, *args, **kwargs):
        nonlocal count
        count += 1
        return executor(*args, **kwargs)

    model = arena.model.clone()
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, counted)
    arena.sample(model, arena.heats[0], steps, sampler)
    return count


@dataclass(frozen=True)
class Seen:
    """All pictures of one contender, without a clock. `multiplications`: of all; `peak`: bytes, of the first."""

    pictures: list[np.ndarray]
    multiplications: int
    peak: int


def look(
    arena: Arena,
    model: ModelPatcher,
    steps: int,
    sampler: str,
    cfg: float = 1.0,
    heats: list[Heat] | None = None,
    memory: bool = True,
) -> Seen:
    """`heats`: all of the arena's if None. Counting `memory` takes time."""
    pictures, work, peak = [], 0, 0
    heats = arena.heats if heats is None else heats
    for heat in heats:
        with Multiplications() as counter:
            if memory and heat is heats[0]:
                with Memory() as counted:
                    latent = arena.sample(model, heat, steps, sampler, cfg)
                peak = counted.peak
            else:
                latent = arena.sample(model, heat, steps, sampler, cfg)
        work += counter.total
        if arena.decode is not None:
            pictures += [arena.decode(each) for each in latent.split(1)]
    return Seen(pictures, work, peak)


class Pace:
    """Seconds without a cache, measured anew after every `fresh` uses: whatever slows the machine slows both."""

    def __init__(self, measure: Callable[[Heat], float], fresh: int):
        self.measure, self.fresh, self.uses, self.seconds = measure, fresh, 0, 0.0

    def __call__(self, heat: Heat) -> float:
        if self.uses % self.fresh == 0:
            self.seconds = self.measure(heat)
        self.uses += 1
        return self.seconds


def speedup(pace: Pace, measure: Callable[[Heat], float], heats: list[Heat], rounds: int) -> float:
    """Median over the rounds of: seconds without a cache, over seconds of the contender."""
    ratios = []
    for i in range(rounds):
        heat = heats[i % len(heats)]
        ratios.append(pace(heat) / measure(heat))
    return statistics.median(ratios)


def psnr(picture: np.ndarray, wanted: np.ndarray, where: np.ndarray | None = None) -> float:
    """Peak signal to noise, dB, of pictures `[H, W, 3]` in 0..1; at most `CEILING`. `where`: `[H, W]` bool."""
    error = (picture.astype(np.float64) - wanted) ** 2
    mean = float(error.mean() if where is None else error[where].mean())
    return CEILING if mean == 0 else min(CEILING, -10 * np.log10(mean))


def foreground(picture: np.ndarray) -> np.ndarray:
    """Where a picture of the world is not its ground, `[H, W]` bool."""
    ground = np.array(ground_colour(picture), np.float32) / 255
    return np.abs(picture - ground).max(-1) > APART


def ground_colour(picture: np.ndarray) -> tuple[int, int, int]:
    from dit_toolkit.training.world import GROUNDS

    return GROUNDS[ground_of((picture * 255).round().astype(np.uint8))]


def ssim(picture: np.ndarray, wanted: np.ndarray) -> float:
    """Structural similarity with Wang's Gaussian window of 11 pixels."""
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(structural_similarity(picture, wanted, data_range=1.0, channel_axis=-1, **window))


@dataclass(frozen=True)
class Quality:
    """Means over the pictures. `psnr_db` and `foreground_db`: None when no picture differs at all."""

    psnr_db: float | None
    foreground_db: float | None
    ssim: float | None


def judge(pictures: list[np.ndarray], wanted: list[np.ndarray]) -> Quality:
    if not pictures:
        return Quality(None, None, None)
    pairs = list(zip(pictures, wanted, strict=True))
    likeness = statistics.fmean(ssim(a, b) for a, b in pairs)
    if all(np.array_equal(a, b) for a, b in pairs):
        return Quality(None, None, likeness)
    inside = [psnr(a, b, where) for a, b in pairs if (where := foreground(a) | foreground(b)).any()]
    whole = statistics.fmean(psnr(a, b) for a, b in pairs)
    return Quality(whole, statistics.fmean(inside) if inside else None, likeness)
