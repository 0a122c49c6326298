"""Who runs: the caches of ComfyUI, of diffusers and of cache-dit, fewer steps, and ours.

Every peer is set up as its own documentation says, and swept over its own main knob so that it computes about a half, a
third and a fifth. `at_scale` is the setting for the random model in FLUX.1's shape, where thresholds mean something
else and only time counts.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_extras import nodes_easycache

from dit_toolkit.host.accelerate.accelerate import QUALITIES
from dit_toolkit.nodes import step_cache
from dit_toolkit.nodes.accelerate import AccelerateDiT

from .arena import Arena, Heat
from .diffusers_flux import cached

COMFYUI, DIFFUSERS, CACHE_DIT = "ComfyUI", "diffusers", "cache-dit"


@dataclass(frozen=True)
class Task:
    """What is to be sampled. `evaluations`: how often the sampler asks the model in so many steps."""

    arena: Arena
    sampler: str
    steps: int
    evaluations: int
    cfg: float = 1.0

    @property
    def key(self) -> tuple:
        """What a calibration holds for."""
        return self.arena.name, self.sampler, self.steps, self.cfg

    @property
    def calibration(self) -> list[Heat]:
        return self.arena.calibration or self.arena.heats[:1]


Entry = tuple[ModelPatcher, int]  # a MODEL, and the steps it is sampled with


@dataclass(frozen=True)
class Contender:
    """`peer`: whose it is, None for ours. `setting`: words for a knob. `twin`: held to diffusers' modules, uncached."""

    name: str
    peer: str | None
    knobs: tuple
    setting: str
    run: Callable[[Task, Any], Entry]
    at_scale: tuple = ()
    twin: bool = False

    def method(self, knob: Any) -> str:
        """A name for the table. What comes before the first comma names the method, the rest its setting."""
        return f"{self.name}, {self.setting.format(knob)}" if self.setting else self.name

    def scaled(self) -> Contender:
        return replace(self, knobs=self.at_scale)


# Fewer steps: what every cache has to beat


def fewer_steps(task: Task, share: float) -> Entry:
    return task.arena.model, max(1, round(task.steps * share))


FEWER_STEPS = Contender("Fewer steps", COMFYUI, (1 / 2, 1 / 3, 1 / 5), "{:.2f} of them", fewer_steps, (1 / 3,))
NO_CACHE = Contender("No cache", DIFFUSERS, (None,), "", lambda task, _: (task.arena.twin, task.steps), (None,))


# ComfyUI's own


def easycache(task: Task, threshold: float, start: float = 0.15) -> Entry:
    return with_easycache(task.arena.model, threshold, start), task.steps


def with_easycache(model: ModelPatcher, threshold: float, start: float = 0.15) -> ModelPatcher:
    """EasyCache with its input copied. It adds in place, and on 0.30.0 that spoils float32 runs."""

    def copy_input(executor, x, *args, **kwargs):
        return executor(x.clone(), *args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "race.copy", copy_input)  # first added, outermost
    return core_node(nodes_easycache.EasyCacheNode, model, threshold, start)


def lazycache(task: Task, threshold: float, start: float = 0.15) -> Entry:
    return core_node(nodes_easycache.LazyCacheNode, task.arena.model, threshold, start), task.steps


def core_node(node: Any, model: ModelPatcher, threshold: float, start: float) -> ModelPatcher:
    output = node.execute(model, reuse_threshold=threshold, start_percent=start, end_percent=0.95, verbose=False)
    return output.args[0]


# diffusers


def diffusers_cache(config: Callable[[Task, Any], Any]) -> Callable[[Task, Any], Entry]:
    """A cache of diffusers, switched on with `config(task, knob)`."""

    def run(task: Task, knob: Any) -> Entry:
        transformer, made = task.arena.transformer, config(task, knob)

        @contextmanager
        def enabled() -> Iterator[None]:
            transformer.enable_cache(made)
            try:
                yield
            finally:
                transformer.disable_cache()

        return cached(task.arena.twin, enabled, task.arena.transformer.place), task.steps

    return run


# TaylorSeer's paper caches the attention and the feed-forward parts of every block.
EVERY_MODULE = {
    "cache_identifiers": [
        r"transformer_blocks\.\d+\.(attn|ff|ff_context)",
        r"single_transformer_blocks\.\d+\.proj_out",
    ],
    "skip_predict_identifiers": [r"single_transformer_blocks\.\d+\.(attn|proj_mlp)"],
}


def taylorseer(order: int, **which: Any) -> Callable[[Task, Any], Entry]:
    return diffusers_cache(lambda task, interval: taylorseer_config(task, interval, order, **which))


def taylorseer_config(task: Task, interval: int, order: int, **which: Any):
    from diffusers import TaylorSeerCacheConfig

    dtype = task.arena.transformer.dtype  # its default of bfloat16 would handicap it on a float32 model
    return TaylorSeerCacheConfig(interval, max_order=order, taylor_factors_dtype=dtype, **which)


def first_block_cache(task: Task, threshold: float):
    from diffusers import FirstBlockCacheConfig

    return FirstBlockCacheConfig(threshold)


_ratios: dict[tuple, list[float]] = {}  # MagCache's calibration, by `Task.key`


def mag_cache(task: Task, threshold: float, most: int = 5, retention: float = 0.1):
    from diffusers import MagCacheConfig

    return MagCacheConfig(threshold, most, retention, task.evaluations, ratios_of(task))


def ratios_of(task: Task) -> list[float]:
    if task.key not in _ratios:
        _ratios[task.key] = calibrate(task)
    return _ratios[task.key]


def calibrate(task: Task) -> list[float]:
    """MagCache's ratios for this model and schedule. Its calibration prints them, and that is how one gets them."""
    from diffusers import MagCacheConfig

    transformer, said = task.arena.transformer, io.StringIO()
    transformer.enable_cache(MagCacheConfig(num_inference_steps=task.evaluations, calibrate=True))
    try:
        with contextlib.redirect_stdout(said):
            task.arena.sample(task.arena.twin, task.calibration[0], task.steps, task.sampler, task.cfg)
    finally:
        transformer.disable_cache()
    return json.loads(next(line for line in said.getvalue().splitlines() if line.startswith("[1")))


# cache-dit


def dbcache(calibrator: str) -> Callable[[Task, Any], Entry]:
    return lambda task, threshold: with_dbcache(task, calibrator, residual_diff_threshold=threshold)


def with_dbcache(task: Task, calibrator: str, warm_up: int = 4, **values: Any) -> Entry:
    """DBCache with one block in front, the smallest it knows. `calibrator`: of the forecast, `calibrators` has them."""
    import cache_dit

    transformer = task.arena.transformer

    @contextmanager
    def enabled() -> Iterator[None]:
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            max_warmup_steps=min(warm_up, task.evaluations // 4),
            num_inference_steps=task.evaluations,
            enable_separate_cfg=task.cfg > 1,
            **values,
        )
        attributes, children = dict(vars(transformer)), dict(transformer._modules)
        cache_dit.enable_cache(transformer, cache_config=config, calibrator_config=calibrators()[calibrator])
        try:
            yield
        finally:
            cache_dit.disable_cache(transformer)
            # It leaves a forward of its own behind, and the lists of blocks in another order: First Block Cache
            # would take the last block for the first.
            transformer._modules.clear()
            transformer._modules.update(children)
            vars(transformer).clear()
            vars(transformer).update(attributes)

    return cached(task.arena.twin, enabled, transformer.place), task.steps


def calibrators() -> dict[str, Any]:
    import cache_dit

    return {
        "held": None,
        "order 1": cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1),
        "order 2": cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=2),
        "FoCa": cache_dit.FoCaCalibratorConfig(),
        "DMD": cache_dit.DMDCalibratorConfig(),
    }


# Ours, as the nodes make them


def node(kind: Any, knob: str, **values: Any) -> Callable[[Task, Any], Entry]:
    """The node with its defaults, `values`, and the knob at the input of that name."""

    def run(task: Task, value: Any) -> Entry:
        inputs = kind.GET_SCHEMA().inputs
        given = {each.id: each.default for each in inputs if hasattr(each, "default")}
        given |= {**values, knob: value, "model": task.arena.model}
        return kind.PREPARE_CLASS_CLONE(None).execute(**given).args[0], task.steps

    return run


def taylor(name: str, knobs: tuple = (2, 4, 8), at_scale: tuple = (), **values: Any) -> Contender:
    run = node(step_cache.TaylorSeer, "interval", **values)
    return Contender(name, None, knobs, "interval {}", run, at_scale)


GATE, AT_MOST = node(step_cache.ConfidenceGatedTaylor, "threshold"), "at most {} in a row"
CAPPED = node(step_cache.ConfidenceGatedTaylor, "max_consecutive", threshold=0.3, warm_up=3)

OURS = [
    Contender("Accelerate DiT", None, tuple(QUALITIES), "{}", node(AccelerateDiT, "quality"), ("balanced",)),
    taylor("TaylorSeer order 0", order=0),
    taylor("TaylorSeer order 1", order=1, at_scale=(3,)),
    taylor("TaylorSeer order 2", order=2),
    taylor("TaylorSeer at the prediction", order=1, tap="prediction", at_scale=(3,)),
    taylor("TaylorSeer in every module", order=1, tap="every module", at_scale=(3,)),
    taylor("Newton order 2 over steps", (4, 8), order=2, forecast="Newton, steps"),
    taylor("Newton order 1 over sigma", (4, 8), order=1, forecast="Newton, sigma"),
    taylor("Newton order 1 over log sigma", (4, 8), order=1, forecast="Newton, log sigma"),
    Contender("Confidence-Gated Taylor", None, (0.04, 0.1, 0.3), "threshold {:g}", GATE, (0.3,)),
    Contender("Confidence-Gated Taylor with a cap", None, (1, 3, 6), AT_MOST, CAPPED),
    Contender("Delta-DiT", None, (2, 4, 8), "interval {}", node(step_cache.DeltaDiT, "interval"), (3,)),
]


PEERS = [
    FEWER_STEPS,
    Contender("EasyCache", COMFYUI, (0.05, 0.3, 2.0), "threshold {:g}", easycache, (0.5,)),
    Contender("LazyCache", COMFYUI, (0.03, 0.2, 2.0), "threshold {:g}", lazycache, (0.5,)),
    NO_CACHE,
    Contender("TaylorSeer of attention", DIFFUSERS, (2, 5), "interval {}", taylorseer(1), (3,), True),
    Contender("TaylorSeer", DIFFUSERS, (2, 4, 8), "interval {}", taylorseer(1, **EVERY_MODULE), (3,), True),
    Contender("TaylorSeer Lite", DIFFUSERS, (2, 4, 8), "interval {}", taylorseer(1, use_lite_mode=True), (3,), True),
    Contender(
        "FirstBlockCache",
        DIFFUSERS,
        (0.1, 0.25, 0.6),
        "threshold {:g}",
        diffusers_cache(first_block_cache),
        (1.0,),
        True,
    ),
    Contender("MagCache", DIFFUSERS, (0.1, 0.2, 0.6), "threshold {:g}", diffusers_cache(mag_cache), (0.1,), True),
    Contender("DBCache", CACHE_DIT, (0.12, 0.3, 1.0), "threshold {:g}", dbcache("held"), (1.0,), True),
    Contender("DBCache + Taylor", CACHE_DIT, (0.12, 0.3, 1.0), "threshold {:g}", dbcache("order 1"), (1.0,), True),
]


def chosen(only: Iterable[str]) -> list[Contender]:
    """All, or those whose name begins with one of `only`; fewer steps in any case.

    Raises:
        ValueError: one of `only` is the beginning of no name.
    """
    everyone = [*PEERS, *OURS]
    for start in only:
        if not any(each.name.startswith(start) for each in everyone):
            names = ", ".join(dict.fromkeys(each.name for each in everyone))
            raise ValueError(f"No method is called {start!r}. There are: {names}.")
    starts = tuple(only) or ("",)
    return [each for each in everyone if each is FEWER_STEPS or each.name.startswith(starts)]
