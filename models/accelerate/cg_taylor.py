"""Confidence-gated Taylor: the first block tells whether the last block can be forecast.

Source: "Forecasting When to Forecast" (CG-Taylor), arXiv:2508.02240. Each evaluation runs block 0, and also forecasts
its output h from its own history. With

    error = mean |h^ - h| / mean |h|        over pictures, tokens and channels

it skips blocks 1 and above if `error < threshold` (strictly), and forecasts their output instead. Otherwise it computes
everything, and both histories get a new point. A batch has one error, because the evaluation is computed for all of its
pictures or for none. `Reduce` says how to combine them.

With `compare="residual"` the gate is that of First Block Cache and DBCache. It compares the change that block 0 makes
with the change it made at the last full evaluation.

Limits: a threshold holds for one model and one number of steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Literal

from torch import Tensor

from .policies import COMPUTE, PROBE, Choice, Moment

Compared = Literal["output", "residual"]
# Over the pictures of a batch. "cond" is an old name of "mean" in saved workflows.
Reduce = Literal["max", "cond", "mean", "published"]


@dataclass(frozen=True)
class FirstBlockGate:
    """A gate on block 0. Neutral value: `threshold=0`, which never opens.

    Published: threshold 0.13 (fast) and 0.03 on FLUX.1-dev with 50 steps, warm-up 5; 0.36 and 0.18 on Wan 2.1, warm-up
    6; 0.008 on DiT-XL/2.
    """

    threshold: float
    warm_up: int = 5  # evaluations computed at the start
    order: int = 1  # of the forecast of block 0
    compare: Compared = "output"
    reduce: Reduce = "max"

    def __post_init__(self):
        if not self.threshold >= 0:
            raise ValueError(f"threshold must be 0 or more, got {self.threshold}.")
        if self.order < 0:
            raise ValueError(f"first_order must be 0 or more, got {self.order}.")
        if self.warm_up < 1:
            raise ValueError(f"warm_up must be at least 1, got {self.warm_up}: a forecast needs a computed evaluation.")

    @property
    def min_full(self) -> int:
        return min(self.warm_up, self.order + 1)

    def choose(self, moment: Moment) -> tuple[Choice, str]:
        if moment.index < self.warm_up:
            return COMPUTE, "first"
        return (PROBE if self.threshold > 0 else COMPUTE), "gate"

    def opens(self, error: float) -> bool:
        """Whether to forecast the evaluation. A NaN or infinite error keeps the gate shut."""
        return isfinite(error) and error < self.threshold


def gate_error(forecast: Tensor, actual: Tensor, how: Reduce) -> float:
    """The error of a forecast, for pictures of one prompt: `[B, ...]` twice. Sums in float32.

    Args:
        how: "published" is the paper's ratio of means over all pictures together. "max" is the ratio of the worst
            picture, "mean" the average of the ratios. For one picture all three agree.
    """
    forecast, actual = forecast.float().flatten(1), actual.float().flatten(1)
    off, size = (forecast - actual).abs().mean(1), actual.abs().mean(1)
    if how == "published":
        return float(off.mean() / size.mean())
    errors = off / size
    return float(errors.max() if how == "max" else errors.mean())
