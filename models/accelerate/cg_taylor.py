"""Confidence-gated Taylor: the first block tells whether the last block can be forecast.

Source: "Forecasting When to Forecast" (CG-Taylor), arXiv:2508.02240. At each evaluation block 0 is run, and its output
h is also forecast from its own history. With

    error = mean |h^ - h| / mean |h|        over pictures, tokens and channels

blocks 1 and above are skipped where `error < threshold` (strictly), and their output is forecast instead. Otherwise
everything is computed, and both histories get a new point. A batch has one error, as the evaluation is computed for
all of its pictures or for none: `Reduce` says how it is made.

With `compare="residual"` the gate is that of First Block Cache and DBCache: the change that block 0 makes, against the
change it made at the last full evaluation.

Limits: thresholds do not carry over between models, nor between numbers of steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Literal

from torch import Tensor

from .policies import COMPUTE, PROBE, Choice, Moment

Compared = Literal["output", "residual"]
# Over the pictures of a batch. "cond" is another name of "mean", which saved workflows have.
Reduce = Literal["max", "cond", "mean", "published"]


@dataclass(frozen=True)
class FirstBlockGate:
    """Neutral value: `threshold=0`, which never opens.

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
    def first(self) -> int:
        return min(self.warm_up, self.order + 1)

    def choose(self, moment: Moment) -> tuple[Choice, str]:
        if moment.index < self.warm_up:
            return COMPUTE, "first"
        return (PROBE if self.threshold > 0 else COMPUTE), "gate"

    def opens(self, error: float) -> bool:
        """Whether the evaluation may be forecast. An error that is no number keeps the gate shut."""
        return isfinite(error) and error < self.threshold


def gate_error(forecast: Tensor, actual: Tensor, how: Reduce) -> float:
    """How far a forecast is off, for pictures of one prompt: `[B, ...]` twice. Summed in float32.

    Args:
        how: "published" is the paper's ratio, of means over all pictures together. "max" is the ratio of the worst
            picture, "mean" the average of their ratios. They are one for one picture.
    """
    forecast, actual = forecast.float().flatten(1), actual.float().flatten(1)
    off, size = (forecast - actual).abs().mean(1), actual.abs().mean(1)
    if how == "published":
        return float(off.mean() / size.mean())
    errors = off / size
    return float(errors.max() if how == "max" else errors.mean())
