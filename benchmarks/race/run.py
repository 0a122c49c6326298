"""One race: every contender at every setting, on one arena, with one sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from .arena import Arena
from .contenders import COMFYUI, Contender, Task
from .measure import Pace, Seen, evaluations_of, judge, look, speedup, timed
from .report import Row


def race(
    arena: Arena,
    contenders: Iterable[Contender],
    sampler: str,
    steps: int,
    rounds: int,
    fresh: int,
    tell: Callable[[Row], None],
    cfg: float = 1.0,
) -> None:
    """Tell the row of every contender as soon as it is measured, that of no cache first.

    Args:
        rounds: timed runs of each setting; the median counts.
        fresh: contenders' runs to each run without a cache that they are compared with.
    """
    task = Task(arena, sampler, steps, evaluations_of(arena, steps, sampler), cfg)
    plain = look(arena, arena.model, steps, sampler, cfg)
    tell(row_of(task, "No cache", COMFYUI, steps, plain, plain, plain, 1.0))

    own: dict[bool, tuple[Seen, Pace]] = {}  # without a cache: in ComfyUI's modules, and in diffusers'

    def without(twin: bool) -> tuple[Seen, Pace]:
        if twin not in own:
            model = arena.twin if twin else arena.model
            seen = look(arena, model, steps, sampler, cfg) if twin else plain
            own[twin] = seen, Pace(lambda heat: timed(arena, model, heat, steps, sampler, cfg), fresh)
        return own[twin]

    for contender in contenders:
        for knob in contender.knobs:
            model, taken = contender.run(task, knob)
            base, pace = without(contender.twin)
            seen = look(arena, model, taken, sampler, cfg)
            clock = partial(clocked, arena, model, taken, sampler, cfg)
            gain = speedup(pace, clock, arena.heats, rounds)
            tell(row_of(task, contender.method(knob), contender.peer, taken, seen, base, plain, gain))


def clocked(arena, model, steps, sampler, cfg, heat) -> float:
    return timed(arena, model, heat, steps, sampler, cfg)


def row_of(
    task: Task, method: str, peer: str | None, steps: int, seen: Seen, base: Seen, plain: Seen, gain: float
) -> Row:
    """`base`: the same modules without a cache; `plain`: the pictures that are wanted."""
    quality = judge(seen.pictures, plain.pictures)
    return Row(
        method,
        peer,
        task.arena.name,
        task.sampler,
        steps,
        seen.multiplications / base.multiplications,
        gain,
        quality.psnr_db,
        quality.foreground_db,
        quality.ssim,
        seen.peak - base.peak,
        task.steps,
        task.cfg,
    )
