"""What step caches share: when an evaluation is computed, and how stored features are summed into a forecast.

A *policy* decides from plain numbers. It answers that an evaluation is computed, that it is forecast, or that only a
look at the model's own activations can tell (`PROBE`). A *forecast* is a sum of stored tensors with float weights; the
methods differ in the weights (`taylorseer.py`).

Units: evaluations are counted from the start of a run, or from the last reset.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor


class Choice(Enum):
    COMPUTE = "compute"
    FORECAST = "forecast"
    PROBE = "probe"  # the model's activations, or its input, decide


COMPUTE, FORECAST, PROBE = Choice.COMPUTE, Choice.FORECAST, Choice.PROBE


@dataclass(frozen=True)
class Moment:
    """What a policy knows of the evaluation it decides on."""

    index: int  # of this evaluation, from 0
    since_full: int  # evaluations since the last computed one, at least 1; 0 if there was none
    left: int | None = None  # steps of the schedule after this one; None if the schedule does not tell
    total: int | None = None  # evaluations of the whole run; None if nobody can tell


class Policy(Protocol):
    """Frozen numbers that decide. `first` evaluations are always computed, also in a lane that starts later."""

    @property
    def first(self) -> int: ...

    def choose(self, moment: Moment) -> tuple[Choice, str]:
        """The choice, and one word why, for the report."""
        ...


@dataclass(frozen=True)
class Listed:
    """Computed exactly where a list says so. Neutral value: everything listed.

    full: one bool per evaluation, True is computed; repeated when the run is longer.
    """

    full: tuple[bool, ...]

    def __post_init__(self):
        if not self.full or not self.full[0]:
            raise ValueError("A schedule must begin with a computed evaluation: there is nothing to forecast from yet.")

    @property
    def first(self) -> int:
        return 1

    def choose(self, moment: Moment) -> tuple[Choice, str]:
        full = self.full[moment.index % len(self.full)]
        return (COMPUTE if full else FORECAST), "listed"

    @classmethod
    def parse(cls, text: str) -> Listed:
        """A mask of 0 and 1 that repeats ("1110100"), or the numbers of the computed evaluations ("0-3, 6, 9").

        Raises:
            ValueError: neither, or evaluation 0 is not computed.
        """
        text = text.strip()
        if re.fullmatch(r"[01]{2,}", text):
            return cls(tuple(digit == "1" for digit in text))
        numbers: set[int] = set()
        for part in filter(None, re.split(r"[,\s]+", text)):
            match = re.fullmatch(r"(\d{1,20})(?:-(\d{1,20}))?", part)
            low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if low > high:
                raise ValueError(
                    f"schedule must be a mask such as 1110100, or numbers such as 0-3, 6, 9, 12; got {part[:40]!r}."
                )
            if high >= LONGEST:
                raise ValueError(f"schedule names evaluation {high}; the highest allowed is {LONGEST - 1}.")
            numbers.update(range(low, high + 1))
        if 0 not in numbers:
            raise ValueError("schedule must name evaluation 0: there is nothing to forecast from before it.")
        return cls(tuple(i in numbers for i in range(LONGEST)))


LONGEST = 1000  # evaluations in a run; longer runs repeat a list


@dataclass(frozen=True)
class Guard:
    """Evaluations that are computed whatever the policy says. Neutral value: all zero or None.

    last: the last steps of the schedule, where it is known.
    longest_gap: most forecasts in a row; None for no limit.
    """

    last: int = 0
    longest_gap: int | None = None

    def __post_init__(self):
        if self.last < 0:
            raise ValueError(f"last_full must not be negative, got {self.last}.")
        if self.longest_gap is not None and self.longest_gap < 1:
            raise ValueError(f"max_consecutive must be at least 1, got {self.longest_gap}.")

    def reason(self, moment: Moment) -> str | None:
        """Why this evaluation must be computed, or None."""
        if self.last and moment.left is not None and moment.left < self.last:
            return "last"
        if self.longest_gap is not None and moment.since_full > self.longest_gap:
            return "gap"
        return None


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`sum_k weights[k] * tensors[k]`, summed in float32, in the dtype of the tensors.

    Weights of forecasts are of order 1 to 15 with changing signs, so half precision would show its rounding. A sum
    beyond the range of float16 is clamped to it. One tensor with weight 1 comes back bit for bit.
    """
    first = tensors[0]
    total = None
    for tensor, weight in zip(tensors, weights, strict=True):
        if weight == 0:
            continue
        part = tensor.to(torch.promote_types(first.dtype, torch.float32)) * weight
        total = part if total is None else total + part
    if total is None:
        return torch.zeros_like(first)
    if first.dtype == torch.float16:
        limit = torch.finfo(torch.float16).max
        total = total.clamp(-limit, limit)
    return total.to(first.dtype)
