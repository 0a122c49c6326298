"""Skip evaluations until the model's input has moved far enough to change its output.

Source: EasyCache, arXiv:2507.02860. With x the input and v the output, the ratio

    k = mean |v - v'| / mean |x - x'|        between the last two computed evaluations

says how strongly the output follows the input. Every evaluation adds `k * mean |x - x_previous| / mean |v|` to a sum.
The evaluation is skipped while the sum is below the threshold. A computed evaluation sets the sum to 0.

Works on every model, because it looks at inputs and outputs only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
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
    """The sum above, over one run. Tensors may have any shape, the same at each evaluation.

    Reading a number from a GPU stops the program until the GPU has caught up. So means stay tensors without axes, and
    `total` reads all that it needs in one go, for evaluations that nobody asked about too.
    """

    before: Tensor | None = field(default=None, repr=False)  # x at the previous evaluation
    full: tuple[Tensor, Tensor] | None = field(default=None, repr=False)  # x and v at the last computed one
    ratio: tuple[Tensor, Tensor] | None = field(default=None, repr=False)  # numerator and denominator of k
    norm: Tensor | None = field(default=None, repr=False)  # mean |v| at the last computed evaluation
    steps: list[Tensor] = field(default_factory=list, repr=False)  # mean |x - x_previous| of each evaluation since then
    comparable: bool = False  # this evaluation's input has a previous one of its shape

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in (self.before, *(self.full or ())) if x is not None)

    def moved(self, x: Tensor) -> None:
        """Take an evaluation's input."""
        before, self.before = self.before, x.clone()
        self.comparable = before is not None and before.shape == x.shape
        if before is not None and self.comparable and self.ratio is not None:
            self.steps.append(distance(x, before))

    def total(self) -> float | None:
        """The sum with the last input taken, or None while the ratio is unknown."""
        if not self.comparable or self.ratio is None or self.norm is None:
            return None
        change, moved, norm, *steps = torch.stack([x.float() for x in (*self.ratio, self.norm, *self.steps)]).tolist()
        if moved == 0 or norm == 0:
            return None
        total = 0.0
        for step in steps:
            total += change / moved * step / norm
        return total

    def computed(self, x: Tensor, v: Tensor) -> None:
        """Take input and output of a computed evaluation: renew the ratio, set the sum to 0."""
        if self.full is not None and self.full[0].shape == x.shape:
            moved, change = distance(x, self.full[0]), distance(v, self.full[1])
            if self.ratio is None:
                self.ratio = change, moved
            else:  # the ratio of before holds where the input stands still
                renewed = moved > 0
                self.ratio = torch.where(renewed, change, self.ratio[0]), torch.where(renewed, moved, self.ratio[1])
        self.norm = v.abs().mean()
        self.full = (x.clone(), v.clone())
        self.steps = []


def distance(a: Tensor, b: Tensor) -> Tensor:
    """mean |a - b|, without axes."""
    return (a - b).abs().mean()
