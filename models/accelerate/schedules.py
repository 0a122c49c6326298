"""Which evaluations of a run to compute, when only their number is given.

`spread` puts them evenly over a mix of the step and of the noise level, so that more of them lie where the noise falls
fastest. `damping_of` says how far a forecast between them may follow the slope and the bend of what was computed.

Source: ours, no paper. Found on the embedded FLUX.1 model (20 to 50 steps, euler, dpmpp_2m and heun, CFG 1 to 4, on
prompts that no benchmark judges), and looked at on the embedded SD3.5 model. `docs/benchmarks.md` says where it loses.
Schedules by plain steps are `policies.Interval`.

Units: evaluations, counted from the start of a run; noise levels as the sampler gives them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MIX = 0.5  # of the step; the rest is of the noise level
MULTISTEP = 1.4  # of the stiffness, for samplers that remember earlier evaluations
ENOUGH = 7  # with so many computed evaluations the last one of the run is among them


@dataclass(frozen=True)
class Damping:
    """The share of the slope and of the bend that a forecast follows, 0 to 1. Neutral value: 1 and 1, all of it."""

    slope: float = 1.0
    bend: float = 1.0


UNDAMPED = Damping()


def stiffness(count: int, guidance: float, multistep: bool = False) -> float:
    """How hard a run is to forecast: the mean gap as a share of the run, times the scale of its guidance.

    multistep: the sampler follows slopes by itself, and follows those of the forecasts once more.
    """
    return max(guidance, 1.0) / max(count, 1) * (MULTISTEP if multistep else 1.0)


def damping_of(count: int, guidance: float, multistep: bool = False) -> Damping:
    """The damping for a run with `count` computed evaluations.

    Args:
        guidance: scale of classifier-free guidance (CFG); 1 is none. It multiplies what the forecasts of the two
            prompts have wrong.
        multistep: see `stiffness`.
    """
    return Damping(
        slope=_share((0.8 - stiffness(count, guidance, multistep)) / 0.35),
        bend=_share((2.5 - max(guidance, 1.0)) / 1.5),
    )


def spread(
    levels: Sequence[float], count: int, guidance: float = 1.0, multistep: bool = False, mix: float = MIX
) -> tuple[int, ...]:
    """The evaluations to compute, rising, with 0 among them.

    Where few are computed, the last evaluation of the run is worth more elsewhere: half a gap is left behind the last
    computed one, a whole gap if the run is stiff.

    Args:
        levels: noise level of every evaluation, none above the first.
        count: how many to compute, 1 to `len(levels)`.
        mix: 1 spreads evenly over the steps, 0 over the noise levels.
    """
    total = len(levels)
    if not 1 <= count <= total:
        raise ValueError(f"count must be between 1 and {total}, the evaluations of the run, got {count}.")
    behind = 0.0 if count >= ENOUGH else 0.5 if stiffness(count, guidance, multistep) <= 0.6 else 1.0
    progress = progress_of(levels, mix)
    gap = progress[-1] / (count - 1 + behind) if count > 1 else 0.0
    chosen = [0]
    for number in range(1, count):
        first, last = chosen[-1] + 1, total - (count - number)  # room for those that follow
        chosen.append(
            min(range(first, last + 1), key=lambda i: round(abs(progress[i] - number * gap), 9))
        )  # ties: first
    return tuple(chosen)


def progress_of(levels: Sequence[float], mix: float = MIX) -> list[float]:
    """How far the run is at each evaluation, from 0: `mix * step + (1 - mix) * noise that is gone`."""
    last, top = max(len(levels) - 1, 1), levels[0]
    return [mix * i / last + (1 - mix) * ((top - level) / top if top else 0.0) for i, level in enumerate(levels)]


def _share(value: float) -> float:
    return min(max(value, 0.0), 1.0)
