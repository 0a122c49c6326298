"""Skip evaluations until the model's input has moved far enough to change its output.

Source: EasyCache, arXiv:2507.02860. With x the input and v the output, the ratio

    k = mean |v - v'| / mean |x - x'|        between the last two computed evaluations

says how strongly the output follows the input. Every evaluation adds `k * mean |x - x_previous| / mean |v|` to a sum.
The evaluation is skipped while the sum is below the threshold. A computed evaluation sets the sum to 0.

Works on every model, because it looks at inputs and outputs only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .policies import COMPUTE, PROBE, Choice, Moment


@dataclass(frozen=True)
class InputChange:
    """Neutral value: `threshold=0`, which computes everything."""

    threshold: float
    warm_up: int = 3  # evaluations computed at the start; k needs two

    def __post_init__(self):
        if not self.threshold >= 0:
            raise ValueError(f"threshold must be 0 or more, got {self.threshold}.")
        if self.warm_up < 2:
            raise ValueError(f"warm_up must be at least 2, got {self.warm_up}: the rule compares two evaluations.")

    @property
    def min_full(self) -> int:
        return 2

    def choose(self, moment: Moment) -> tuple[Choice, str]:
        if moment.index < self.warm_up:
            return COMPUTE, "first"
        return (PROBE if self.threshold > 0 else COMPUTE), "input"


@dataclass
class Change:
    """The sum above, over one run. Tensors may have any shape, the same at each evaluation."""

    total: float = 0.0
    ratio: float | None = None
    norm: float = 0.0
    before: Tensor | None = field(default=None, repr=False)  # x at the previous evaluation
    full: tuple[Tensor, Tensor] | None = field(default=None, repr=False)  # x and v at the last computed one

    def grown(self, x: Tensor) -> float | None:
        """The sum with this evaluation's input, or None while the ratio is unknown."""
        before, self.before = self.before, x.clone()
        if before is None or self.ratio is None or self.norm == 0 or before.shape != x.shape:
            return None
        self.total += self.ratio * float((x - before).abs().mean()) / self.norm
        return self.total

    def computed(self, x: Tensor, v: Tensor) -> None:
        """Take input and output of a computed evaluation: renew the ratio, set the sum to 0."""
        if self.full is not None and self.full[0].shape == x.shape:
            moved = float((x - self.full[0]).abs().mean())
            if moved > 0:
                self.ratio = float((v - self.full[1]).abs().mean()) / moved
        self.norm = float(v.abs().mean())
        self.full = (x.clone(), v.clone())
        self.total = 0.0
