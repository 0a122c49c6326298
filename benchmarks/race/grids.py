"""Who runs in the tuned race, each with the settings it documents and a grid of settings to choose from.

A setting is a tuple of the method's knobs. Grids hold the knobs that a method's documentation names, at values that
compute from a half down to a seventh, with an early start where there is one to choose: for peers as for ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

from dit_toolkit.host.accelerate.accelerate import QUALITIES
from dit_toolkit.nodes import step_cache
from dit_toolkit.nodes.accelerate import AccelerateDiT

from . import teacache
from .contenders import (
    CACHE_DIT,
    COMFYUI,
    DIFFUSERS,
    EVERY_MODULE,
    Entry,
    Task,
    diffusers_cache,
    easycache,
    fewer_steps,
    first_block_cache,
    lazycache,
    mag_cache,
    node,
    taylorseer_config,
    with_dbcache,
)
from .diffusers_flux import cached

OFFICIAL = "official code"  # that is in no package

Knobs = tuple
INTERVALS = (2, 3, 4, 5, 7)
FORECASTS = ("order 1", "order 2", "FoCa", "DMD")


@dataclass(frozen=True)
class Method:
    """One that runs.

    peer: whose it is, None for ours. setting: words for the knobs. grid: settings to choose from, empty if there is no
    choice. twin: it runs in diffusers' modules. planned: what it skips does not depend on the picture.
    """

    name: str
    peer: str | None
    setting: str
    run: Callable[..., Entry]
    documented: tuple[Knobs, ...]
    grid: tuple[Knobs, ...] = ()
    twin: bool = False
    planned: bool = False

    def words(self, knobs: Knobs) -> str:
        return self.setting.format(*knobs)


def grid(*values: Iterable) -> tuple[Knobs, ...]:
    return tuple(product(*values))


def single(*values: Any) -> tuple[Knobs, ...]:
    return grid(values)


# diffusers


def of_diffusers(config: Callable[..., Any]) -> Callable[..., Entry]:
    def run(task: Task, *knobs: Any) -> Entry:
        return diffusers_cache(lambda task, knobs: config(task, *knobs))(task, knobs)

    return run


def taylor_of_diffusers(**which: Any) -> Callable[..., Entry]:
    """`start`: evaluations before it are computed, and the one after it. `last`: whether the last one is computed."""

    def config(task: Task, interval: int, order: int, start: int, last: str):
        after = task.evaluations - 1 if last == "computed" else None
        edges = {"disable_cache_before_step": start, "disable_cache_after_step": after}
        return taylorseer_config(task, interval, order, **edges, **which)

    return of_diffusers(config)


DIFFUSERS_TAYLOR = "interval {}, order {}, caches from {}, last {}"
DOCUMENTED_TAYLOR = grid(INTERVALS, (1,), (3,), ("forecast",))
TAYLOR_GRID = grid((*INTERVALS, 10, 14), (1, 2), (1,), ("computed", "forecast"))


def sea_cache(task: Task, threshold: float, most: int, power: float) -> Entry:
    """It knows no layout of FLUX.1's; the latents that it compares are unpacked for it."""
    from diffusers import SeaCacheConfig

    def latents(module, args, kwargs) -> list:
        return [teacache.unpacked(kwargs["hidden_states"], kwargs["img_ids"])]

    config = SeaCacheConfig(threshold, max_consecutive_cached=most, power_exp=power, raw_vision_callback=latents)
    model, steps = diffusers_cache(lambda task, _: config)(task, None)
    task.arena.transformer.place.evaluations = task.evaluations
    return model, steps


# No package


_polynomials: dict[tuple, Any] = {}


def tea_cache(task: Task, threshold: float) -> Entry:
    transformer = task.arena.transformer
    transformer.place.evaluations = task.evaluations
    if task.key not in _polynomials:
        _polynomials[task.key] = teacache.fit(task.arena, task.calibration, task.steps, task.sampler, task.cfg)
    cache = teacache.TeaCache(transformer, _polynomials[task.key], threshold)
    return cached(task.arena.twin, cache.on, transformer.place), task.steps


# cache-dit


def db_cache(calibrator: str | None = None) -> Callable[..., Entry]:
    def run(task: Task, threshold: float, warm_up: int, own: str | None = None) -> Entry:
        return with_dbcache(task, own or calibrator or "held", warm_up, residual_diff_threshold=threshold)

    return run


def masked(task: Task, plan: str | int, calibrator: str) -> Entry:
    """cache-dit's SCM. `plan`: one of its own by name, or an interval, the first and the last evaluation computed."""
    import cache_dit

    total = task.evaluations
    if isinstance(plan, str):
        mask = cache_dit.steps_mask(total_steps=total, mask_policy=plan)
    else:
        mask = [int(i % plan == 0 or i in (1, total - 1)) for i in range(total)]
    return with_dbcache(task, calibrator, steps_computation_mask=mask, steps_computation_policy="static")


PLANS = ("slow", "medium", "fast", "ultra")
THRESHOLDS = (0.06, 0.12, 0.3, 0.6, 1.2)

# Ours


def own(kind: Any, *inputs: str, **values: Any) -> Callable[..., Entry]:
    """The node with its defaults, `values`, and the knobs at `inputs`."""

    def run(task: Task, *knobs: Any) -> Entry:
        first, *rest = zip(inputs, knobs, strict=True)
        return node(kind, first[0], **values, **dict(rest))(task, first[1])

    return run


TAYLOR = step_cache.TaylorSeer.GET_SCHEMA()
ORDER, TAP = (next(each.default for each in TAYLOR.inputs if each.id == name) for name in ("order", "tap"))

METHODS = [
    Method(
        "Fewer steps", COMFYUI, "{:.2f} of them", fewer_steps, single(1 / 2, 1 / 3, 1 / 4, 1 / 5, 1 / 7), planned=True
    ),
    Method("Accelerate DiT", None, "{}", own(AccelerateDiT, "quality"), single(*QUALITIES), planned=True),
    Method(
        "TaylorSeer",
        None,
        "interval {}, order {}, tap {}",
        own(step_cache.TaylorSeer, "interval", "order", "tap"),
        grid(INTERVALS, (ORDER,), (TAP,)),
        grid(INTERVALS, (1, 2), ("last block", "prediction")),
        planned=True,
    ),
    Method(
        "TaylorSeer Lite",
        DIFFUSERS,
        DIFFUSERS_TAYLOR,
        taylor_of_diffusers(use_lite_mode=True),
        DOCUMENTED_TAYLOR,
        TAYLOR_GRID,
        True,
        planned=True,
    ),
    Method(
        "MagCache",
        DIFFUSERS,
        "threshold {:g}, at most {} in a row, retention {:g}",
        of_diffusers(mag_cache),
        grid((0.1, 0.2, 0.6, 2.0), (5,), (0.1,)),
        (*grid((0.1, 0.4, 9.0), (1, 2, 3, 4, 6), (0.1,)), *grid((0.4, 9.0), (2, 3, 4, 6, 9), (0.04,))),
        True,
        planned=True,
    ),
    Method(
        "DBCache + Taylor",
        CACHE_DIT,
        "threshold {:g}, warm-up {}, {}",
        db_cache(),
        grid(THRESHOLDS, (4,), ("order 1",)),
        grid(THRESHOLDS, (2,), ("order 1", "order 2")),
        True,
    ),
    Method(
        "DBCache with steps_mask",
        CACHE_DIT,
        "{}, {}",
        masked,
        grid(PLANS, ("order 1",)),
        (*grid(("medium", "ultra"), ("FoCa", "DMD")), *grid((2, 3, 5, 7), FORECASTS)),
        True,
        planned=True,
    ),
    Method(
        "TeaCache",
        OFFICIAL,
        "threshold {:g}",
        tea_cache,
        single(0.25, 0.4, 0.6, 0.8),
        single(0.02, 0.04, 0.07, 0.1, 0.15, 0.2),
        True,
    ),
    Method(
        "TaylorSeer",
        DIFFUSERS,
        DIFFUSERS_TAYLOR,
        taylor_of_diffusers(**EVERY_MODULE),
        DOCUMENTED_TAYLOR,
        grid((2, 3, 5, 7, 10, 14), (1, 2), (1,), ("computed",)),
        True,
        planned=True,
    ),
    Method(
        "EasyCache",
        COMFYUI,
        "threshold {:g}, from {:g}",
        easycache,
        grid((0.05, 0.3, 2.0), (0.15,)),
        grid((0.03, 0.1, 0.3, 0.8, 2.0), (0.05,)),
    ),
    Method(
        "LazyCache",
        COMFYUI,
        "threshold {:g}, from {:g}",
        lazycache,
        grid((0.03, 0.2, 2.0), (0.15,)),
        grid((0.03, 0.1, 0.3, 0.8, 2.0), (0.05,)),
    ),
    Method(
        "FirstBlockCache",
        DIFFUSERS,
        "threshold {:g}",
        of_diffusers(first_block_cache),
        single(0.1, 0.25, 0.6),
        single(0.06, 0.15, 0.4, 1.0),
        True,
    ),
    Method(
        "SeaCache",
        DIFFUSERS,
        "threshold {:g}, at most {} in a row, power {:g}",
        sea_cache,
        grid((0.1, 0.25, 0.5), (2,), (3.0,)),
        grid((0.25, 0.6, 1.2), (1, 2, 4, 6, 9), (2.0, 3.0)),
        True,
    ),
    Method(
        "DBCache + FoCa",
        CACHE_DIT,
        "threshold {:g}, warm-up {}",
        db_cache("FoCa"),
        grid((0.12, 0.3, 0.6), (4,)),
        grid((0.06, 0.12, 0.3, 0.6), (2,)),
        True,
    ),
    Method(
        "DBCache + DMD",
        CACHE_DIT,
        "threshold {:g}, warm-up {}",
        db_cache("DMD"),
        grid((0.12, 0.3, 0.6), (4,)),
        grid((0.06, 0.12, 0.3, 0.6), (2,)),
        True,
    ),
    Method(
        "Confidence-Gated Taylor",
        None,
        "threshold {:g}, by {}, warm-up {}",
        own(step_cache.ConfidenceGatedTaylor, "threshold", "compare", "warm_up"),
        grid((0.04, 0.1, 0.3, 1.0), ("output",), (5,)),
        grid((0.04, 0.1, 0.3, 1.0), ("output", "residual", "input change"), (3,)),
    ),
    Method(
        "Delta-DiT",
        None,
        "interval {}, order {}, share {:g}",
        own(step_cache.DeltaDiT, "interval", "order", "share"),
        grid((2, 3, 4, 6), (0,), (0.75,)),
        grid((2, 3, 5, 8), (0, 1), (0.75, 1.0)),
        planned=True,
    ),
]


def chosen(only: Iterable[str]) -> list[Method]:
    """All, or those whose name begins with one of `only`.

    Raises:
        ValueError: one of `only` is the beginning of no name.
    """
    for start in only:
        if not any(each.name.startswith(start) for each in METHODS):
            names = ", ".join(dict.fromkeys(each.name for each in METHODS))
            raise ValueError(f"No method is called {start!r}. There are: {names}.")
    starts = tuple(only) or ("",)
    return [each for each in METHODS if each.name.startswith(starts)]
