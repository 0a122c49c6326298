"""What a cache costs beside what it saves, at FLUX.1's full depth: time and memory, no picture.

Every method skips about two of three evaluations of random weights. Its **efficiency** is the measured speed-up over
the ideal one, `1 / computed`: 1 if what it does between the evaluations costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from dit_toolkit.nodes import step_cache
from dit_toolkit.nodes.accelerate import AccelerateDiT

from .arena import Arena, Heat
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
from .measure import Pace, Seen, evaluations_of, look, speedup, timed

MB = 1e6


@dataclass(frozen=True)
class Contender:
    """`peer`: whose it is, None for ours. `twin`: held to diffusers' modules, uncached."""

    name: str
    peer: str | None
    run: Callable[[Task], Entry]
    twin: bool = False


def ours(name: str, kind: Any, **values: Any) -> Contender:
    knob, *_ = values
    return Contender(name, None, lambda task: node(kind, knob, **values)(task, values[knob]))


def of_diffusers(name: str, config: Callable[..., Any], *knobs: Any, **which: Any) -> Contender:
    def run(task: Task) -> Entry:
        return diffusers_cache(lambda task, _: config(task, *knobs, **which))(task, None)

    return Contender(name, DIFFUSERS, run, twin=True)


# Thresholds mean nothing on random weights: these are the ones that skip about two of three there.
CONTENDERS = [
    Contender("Fewer steps", COMFYUI, lambda task: fewer_steps(task, 1 / 3)),
    Contender("EasyCache", COMFYUI, lambda task: easycache(task, 0.5)),
    Contender("LazyCache", COMFYUI, lambda task: lazycache(task, 0.5)),
    of_diffusers("TaylorSeer", taylorseer_config, 3, 1, **EVERY_MODULE),
    of_diffusers("TaylorSeer Lite", taylorseer_config, 3, 1, use_lite_mode=True),
    of_diffusers("FirstBlockCache", first_block_cache, 1.0),
    of_diffusers("MagCache", mag_cache, 0.1),
    Contender(
        "DBCache + Taylor", CACHE_DIT, lambda task: with_dbcache(task, "order 1", residual_diff_threshold=1.0), True
    ),
    ours("Accelerate DiT, balanced", AccelerateDiT, quality="balanced"),
    ours("TaylorSeer, prediction", step_cache.TaylorSeer, interval=3),
    ours("TaylorSeer, last block", step_cache.TaylorSeer, interval=3, tap="last block"),
    ours("TaylorSeer, every module", step_cache.TaylorSeer, interval=3, tap="every module"),
    ours("Confidence-Gated Taylor", step_cache.ConfidenceGatedTaylor, threshold=0.3),
    ours("Delta-DiT", step_cache.DeltaDiT, interval=3),
]


def chosen(only: Iterable[str]) -> list[Contender]:
    """All, or those whose name begins with one of `only`."""
    starts = tuple(only) or ("",)
    return [each for each in CONTENDERS if each.name.startswith(starts)]


def race(
    arena: Arena,
    contenders: Iterable[Contender],
    steps: int,
    rounds: int,
    fresh: int,
    tell: Callable[[dict], None],
    sampler: str = "euler",
) -> None:
    """Tell the row of every contender as soon as it is measured.

    Args:
        rounds: timed runs of each; the median counts.
        fresh: contenders' runs to each run without a cache that they are compared with.
    """
    task = Task(arena, sampler, steps, evaluations_of(arena, steps, sampler))
    own: dict[bool, tuple[Seen, Pace]] = {}  # without a cache: in ComfyUI's modules, and in diffusers'

    def without(twin: bool) -> tuple[Seen, Pace]:
        if twin not in own:
            model = arena.twin if twin else arena.model
            pace = Pace(lambda heat: timed(arena, model, heat, steps, sampler), fresh)
            own[twin] = look(arena, model, steps, sampler), pace
        return own[twin]

    for contender in contenders:
        model, taken = contender.run(task)
        base, pace = without(contender.twin)
        seen = look(arena, model, taken, sampler)
        gain = speedup(pace, partial(_clocked, arena, model, taken, sampler), arena.heats, rounds)
        computed = seen.multiplications / base.multiplications
        tell(
            {
                "method": contender.name,
                "peer": contender.peer,
                "computed": round(computed, 4),
                "speedup": round(gain, 3),
                "efficiency": round(gain * computed, 3),
                "extra_mb": round((seen.peak - base.peak) / MB, 3),
            }
        )


def _clocked(arena: Arena, model: Any, steps: int, sampler: str, heat: Heat) -> float:
    return timed(arena, model, heat, steps, sampler)


def table(rows: list[dict]) -> str:
    """Markdown, in the order of the race."""
    head = "| method | whose | computed | speed-up | efficiency | extra MB |\n|---|---|---:|---:|---:|---:|"
    return "\n".join(
        [
            head,
            *(
                f"| {row['method']} | {row['peer'] or 'ours'} | {row['computed']:.2f} | {row['speedup']:.2f} | "
                f"{row['efficiency']:.2f} | {row['extra_mb']:.1f} |"
                for row in rows
            ),
        ]
    )
