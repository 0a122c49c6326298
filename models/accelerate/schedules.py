"""Which evaluations of a run to compute, when only their number is given.

`spread` puts them evenly over a mix of the step and of the noise level, so that more of them lie where the noise falls
fastest. `damping_of` says how far a forecast between them may follow the slope and the bend of what was computed.

Source: ours, no paper. Found on the embedded FLUX.1 and SD3.5 models together (20 to 50 steps, euler, dpmpp_2m and
heun, CFG 1 to 4.5, on prompts that no benchmark judges). `docs/benchmarks.md` says where it loses.
Schedules by plain steps are `policies.Interval`.

Units: evaluations, counted from the start of a run; noise levels as the sampler gives them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

MIX = 0.65  # of the step; the rest is of the noise level
MULTISTEP = 1.4  # of the stiffness, for samplers that remember earlier evaluations
ENOUGH, PLENTY = 7, 9  # with so many computed evaluations the last one of the run is among them; stiff runs need more


@dataclass(frozen=True)
class Damping:
    """The share of the slope and of the bend that a forecast follows, 0 to 1. Neutral value: 1 and 1, all of it."""

    slope: float = 1.0
    bend: float = 1.0


UNDAMPED = Damping()


def stiffness(count: int, guidance: float, multistep: bool = False) -> float:
    """How hard a run is to forecast: the mean gap as a share of the run, times a power of the scale of its guidance.

    multistep: the sampler follows slopes by itself, and follows those of the forecasts once more.
    """
    return max(guidance, 1.0) ** 1.3 / max(count, 1) * (MULTISTEP if multistep else 1.0)


def damping_of(count: int, guidance: float, multistep: bool = False) -> Damping:
    """The damping for a run with `count` computed evaluations.

    Args:
        guidance: scale of classifier-free guidance (CFG); 1 is none. It multiplies what the forecasts of the two
            prompts have wrong.
        multistep: see `stiffness`.
    """
    return Damping(
        slope=_share((0.85 - stiffness(count, guidance, multistep)) / 0.3),
        bend=_share((2.5 - max(guidance, 1.0)) / 1.5),
    )


def mix_of(stiffness: float) -> float:
    """Stiff runs are left to the scheduler's own spacing: held predictions on it are fewer steps."""
    return MIX + (1 - MIX) * _share((stiffness - 0.42) / 0.2)


def spread(
    levels: Sequence[float], count: int, guidance: float = 1.0, multistep: bool = False, mix: float | None = None
) -> tuple[int, ...]:
    """The evaluations to compute, rising, with 0 among them.

    Where few are computed, or the run is stiff, the last evaluation of the run is worth more elsewhere: half a gap is
    left behind the last computed one.

    Args:
        levels: noise level of every evaluation, none above the first.
        count: how many to compute, 1 to `len(levels)`.
        mix: 1 spreads evenly over the steps, 0 over the noise levels. None leaves it to `mix_of`.
    """
    total = len(levels)
    if not 1 <= count <= total:
        raise ValueError(f"count must be between 1 and {total}, the evaluations of the run, got {count}.")
    stiff = stiffness(count, guidance, multistep)
    behind = 0.0 if count >= PLENTY or (count >= ENOUGH and stiff <= 0.55) else 0.5
    progress = progress_of(levels, mix_of(stiff) if mix is None else mix)
    gap = progress[-1] / (count - 1 + behind) if count > 1 else 0.0
    chosen = [0]
    for number in range(1, count):
        first, last = chosen[-1] + 1, total - (count - number)  # room for those that follow
        nearest = min(range(first, last + 1), key=lambda i: round(abs(progress[i] - number * gap), 9))  # ties: first
        chosen.append(nearest)
    return _even(chosen, [_index_at(progress, number * gap) for number in range(count)])


def _even(chosen: Sequence[int], ideal: Sequence[float]) -> tuple[int, ...]:
    """The same gaps, the widest where the ideal ones are. Rounding alone leaves 3, 2, 3, 2 for 3, 3, 2, 2."""
    gaps = sorted((b - a for a, b in pairwise(chosen)), reverse=True)
    wanted = [round(b - a, 6) for a, b in pairwise(ideal)]
    order = sorted(range(len(wanted)), key=lambda i: -wanted[i])  # ties: the first is the widest
    placed = dict(zip(order, gaps, strict=True))
    return tuple(accumulate((placed[i] for i in range(len(gaps))), initial=chosen[0]))


def _index_at(progress: Sequence[float], value: float) -> float:
    """Where rising `progress` has `value`, between the evaluations too."""
    for i, (low, high) in enumerate(pairwise(progress)):
        if value <= high:
            return i + (max(value - low, 0.0) / (high - low) if high > low else 0.0)
    return float(len(progress) - 1)


def progress_of(levels: Sequence[float], mix: float) -> list[float]:
    """How far the run is at each evaluation, from 0: `mix * step + (1 - mix) * noise that is gone`."""
    last, top = max(len(levels) - 1, 1), levels[0]
    return [mix * i / last + (1 - mix) * ((top - level) / top if top else 0.0) for i, level in enumerate(levels)]


def _share(value: float) -> float:
    return min(max(value, 0.0), 1.0)
