"""Pick a step cache for a model: from a table of presets, or by trying.

Every number in the table names its source. Thresholds and intervals of papers hold for the number of steps they name.
Shorter runs change more from step to step, and need gentler settings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Literal

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...models.accelerate.cg_taylor import FirstBlockGate
from ...models.accelerate.delta_dit import Stages
from ...models.accelerate.policies import Guard, Interval, Policy, Spread
from ...models.accelerate.taylorseer import FORECASTS
from ..families import family_of, flux
from ..transformer import core_name, transformer_of
from .step_cache import attach
from .step_cache_report import StepCacheReport
from .step_cache_settings import StepCache, Tap
from .step_cache_taps import LastBlockTap, PredictionTap, SpanTap, in_reach, require_blocks

Quality = Literal["quality", "balanced", "fast"]
QUALITIES: tuple[Quality, ...] = ("quality", "balanced", "fast")
Method = Literal["none", "TaylorSeer", "Confidence-Gated Taylor", "Delta-DiT"]


@dataclass(frozen=True)
class Setting:
    """A step cache in the numbers of its node."""

    method: Method
    amount: float = 1.0  # interval, or the threshold of the gate
    order: int = 1
    forecast: str = "Taylor (paper)"
    first_full: int = 3
    last_full: int = 0
    spread: bool = True  # over noise and step
    source: str = ""

    @property
    def words(self) -> str:
        """The setting as a person would type it into the method's own node."""
        if self.method == "none":
            return "nothing"
        if self.method == "Confidence-Gated Taylor":
            return (
                f"{self.method}, threshold {self.amount:.3g}, warm_up {self.first_full}, {self.forecast} {self.order}"
            )
        return f"{self.method}, interval {self.amount:.0f}, first_full {self.first_full}, {self.forecast} {self.order}"


def gate(threshold: float, source: str, first_full: int = 5) -> Setting:
    return Setting("Confidence-Gated Taylor", threshold, first_full=first_full, last_full=1, source=source)


def every(interval: int, source: str, order: int = 2) -> Setting:
    return Setting("TaylorSeer", interval, order, "Newton, damped", first_full=1, source=source)


GUESS = "a guess, nobody has measured it"
ELSEWHERE = "a plan that wins on the embedded FLUX.1 model; nobody has measured it on this one"
PRESETS: dict[str, tuple[Setting, Setting, Setting]] = {  # quality, balanced, fast
    "FLUX.1": (every(2, ELSEWHERE), every(3, ELSEWHERE), every(5, ELSEWHERE)),
    "FLUX.1 schnell": (
        Setting("none", source="4 steps leave nothing to forecast from"),
        Setting("Delta-DiT", 2, 0, first_full=1, spread=False, source=GUESS),
        Setting("Delta-DiT", 2, 0, first_full=1, spread=False, source=GUESS),
    ),
    "Wan": (every(2, ELSEWHERE), every(3, ELSEWHERE), every(4, ELSEWHERE)),
    "HunyuanVideo": (every(3, GUESS), every(4, GUESS), every(5, GUESS)),
    "QwenImage": (every(3, GUESS), every(4, GUESS), every(5, GUESS)),
    "SD3": (every(2, GUESS), every(3, GUESS), every(4, GUESS)),
    "HiDream": (every(2, GUESS), every(3, GUESS), every(4, GUESS)),
}
OTHERS = (every(2, GUESS), every(3, GUESS), every(4, GUESS))
HERE = "measured here, on the embedded model with 28 steps"
EMBEDDED = (every(2, HERE), every(3, HERE), every(5, HERE))


def family_name(model: ModelPatcher) -> str:
    """The name under which `PRESETS` knows a model, or what ComfyUI calls it."""
    if core_name(model) == "FluxSchnell":
        return "FLUX.1 schnell"
    family = family_of(model)
    if not family.kinds:
        return core_name(model)
    return "Wan" if family.name.startswith("Wan") else family.name


def is_embedded(model: ModelPatcher) -> bool:
    """The tiny FLUX.1 that ships with the pack: its one attention head gives it away."""
    return family_of(model) is flux.FLUX1 and transformer_of(model).params.num_heads == 1


def preset(model: ModelPatcher, quality: Quality) -> Setting:
    """The setting for a model of this family. If its blocks are out of reach, a setting that needs no blocks."""
    table = EMBEDDED if is_embedded(model) else PRESETS.get(family_name(model), OTHERS)
    setting = table[QUALITIES.index(quality)]
    if setting.method == "Delta-DiT" and not in_reach(model):
        return OTHERS[QUALITIES.index(quality)]
    return setting


def schedule(setting: Setting) -> Policy:
    return (Spread if setting.spread else Interval)(int(setting.amount), setting.first_full)


def cache_for(
    model: ModelPatcher, setting: Setting, report: StepCacheReport, node: str = "Accelerate DiT"
) -> StepCache:
    """The step cache of a setting. `node` is the display name of the node that asks, for errors."""
    forecaster = replace(FORECASTS[setting.forecast], order=setting.order)
    policy: Policy
    tap: Tap
    if setting.method == "Confidence-Gated Taylor":
        policy, tap = (
            FirstBlockGate(setting.amount, setting.first_full),
            LastBlockTap(*require_blocks(model, node), gated=True),
        )
    elif setting.method == "Delta-DiT":
        policy = schedule(setting)
        tap = SpanTap(*require_blocks(model, node), stages=Stages())
    else:
        policy, tap = schedule(setting), PredictionTap()
    return StepCache(setting.method, policy, tap, forecaster, Guard(setting.last_full), report=report)


def accelerated(
    model: ModelPatcher, setting: Setting, report: StepCacheReport, node: str = "Accelerate DiT"
) -> ModelPatcher:
    """A clone of `model` with the step cache of a setting; the model itself for the method "none"."""
    if setting.method == "none":
        return model
    return attach(model, cache_for(model, setting, report, node))


# By trying


@dataclass(frozen=True)
class Trial:
    """The result of one setting. `psnr_db` is infinite if nothing differs."""

    setting: Setting
    evaluations: int  # of the run, computed or not
    computed: float  # fraction of them
    speedup: float | None  # measured, of the evaluations
    psnr_db: float


Sample = Callable[[ModelPatcher], Tensor]  # samples a MODEL and returns what we compare, [B, ...]


def tune(
    model: ModelPatcher, sample: Sample, floor_db: float, trials: int, tell: Callable[[int], None] = lambda done: None
) -> tuple[Setting, list[Trial]]:
    """Try settings, and take the one that computes least without falling below the floor.

    The first run computes everything. If the model has block hooks, that run also measures the errors of the gate, and
    the gates to try get quantiles of them as thresholds.

    Args:
        floor_db: lowest PSNR allowed, in dB, averaged over the pictures.
        trials: how many settings to try.
        tell: called with the number of runs done.

    Returns:
        The setting (method "none" if nothing keeps the floor), and every trial, in the order they ran.
    """
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}.")
    if not isfinite(floor_db):
        raise ValueError(f"floor must be a finite number of dB, got {floor_db}.")
    watch = StepCacheReport("calibration")
    if not in_reach(model):
        reference, errors = sample(model), []
    else:
        probe = cache_for(model, gate(CLOSED, "", first_full=2), watch)
        reference = sample(attach(model, probe))
        errors = watch.runs[-1].errors if watch.runs else []
    tell(1)
    if not torch.isfinite(reference).all():
        raise ValueError(
            "Autotune cannot compare anything: the picture without a cache has pixels that are no numbers. "
            "Check model, VAE and their precision."
        )

    found: list[Trial] = []
    for number, setting in enumerate(candidates(errors)[:trials]):
        report = StepCacheReport(setting.method)
        result = sample(accelerated(model, setting, report))
        run = report.runs[-1]
        fraction = run.computed / max(len(run.entries), 1)
        found.append(Trial(setting, len(run.entries), fraction, run.speedup, psnr_db(result, reference)))
        tell(number + 2)
    good = [trial for trial in found if trial.psnr_db >= floor_db and trial.computed < 1]
    best = min(good, key=lambda trial: (trial.computed, -trial.psnr_db), default=None)
    if best is None:
        return Setting("none", source="no setting that was tried keeps the floor"), found
    return replace(best.setting, source="tried here"), found


CLOSED = 1e-12  # a threshold above 0 that no error falls below: the gate measures and never opens


def candidates(errors: Sequence[float]) -> list[Setting]:
    """The settings to try, the most promising first: intervals, and gates at quantiles of the measured errors."""
    tried = "tried here"
    settings = [every(3, tried), every(5, tried), every(2, tried), every(4, tried)]
    if errors:
        quantiles = torch.tensor(sorted(errors)).quantile(torch.tensor([0.9, 0.7, 0.5]), interpolation="higher")
        gates = [gate(float(q) * 1.01, tried, first_full=3) for q in quantiles]
        settings = [settings[0], gates[1], settings[1], gates[0], settings[2], gates[2], settings[3]]
    return [*settings, every(7, tried), every(10, tried)]


def psnr_db(a: Tensor, b: Tensor) -> float:
    """Mean over the pictures of the peak signal-to-noise ratio; the peak is the range of `b`."""
    peak = float(b.max() - b.min()) or 1.0
    errors = (a.float() - b.float()).square().flatten(1).mean(1)
    return float((20 * torch.log10(torch.tensor(peak)) - 10 * torch.log10(errors)).mean())
