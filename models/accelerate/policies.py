"""When a step cache computes an evaluation: policies that need only numbers, and the guard that overrules them.

A *policy* decides from plain numbers. Its choice for an evaluation is to compute it, to forecast it, or to look at the
model's activations or input first (`PROBE`). `cg_taylor.py` and `input_change.py` have the gates that look;
`taylorseer.py` makes the forecasts.

Units: evaluations, counted from the start of a run or from the last reset.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Protocol


class Choice(Enum):
    COMPUTE = "compute"
    FORECAST = "forecast"
    PROBE = "probe"  # the model's activations, or its input, decide


COMPUTE, FORECAST, PROBE = Choice.COMPUTE, Choice.FORECAST, Choice.PROBE


@dataclass(frozen=True)
class Moment:
    """The numbers that a policy decides from, for one evaluation."""

    index: int  # of this evaluation, from 0
    since_full: int  # evaluations since the last computed one, at least 1; 0 if there was none
    left: int | None = None  # steps of the schedule after this one; None if the schedule does not tell
    total: int | None = None  # evaluations of the whole run; None if unknown
    planned: bool | None = None  # whether the plan of this run computes it; None without a plan: see `Spread`


class Policy(Protocol):
    """Frozen numbers that decide. A lane is forecast once it holds `min_full` computed evaluations."""

    @property
    def min_full(self) -> int: ...

    def choose(self, moment: Moment) -> tuple[Choice, str]:
        """The choice, and one word why, for the report."""
        ...


@dataclass(frozen=True)
class Interval:
    """Compute the first few evaluations, then one in every `every`.

    Source: the fixed interval of TaylorSeer. Unit: evaluations. Neutral value: `every=1` computes everything.
    Published: every 6, first 3 on FLUX.1 with 50 steps; every 5, first 1 on HunyuanVideo and Wan 2.1.

    to_end: ours, not the paper's. Stretch or shrink the interval a little, so that the last evaluation of the run is
        computed and all gaps are alike. No later evaluation could correct a forecast at the end.
    """

    every: int
    first_full: int = 3
    to_end: bool = False

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"interval must be at least 1, got {self.every}.")
        if self.first_full < 1:
            raise ValueError(
                f"first_full must be at least 1, got {self.first_full}: a forecast needs a computed evaluation."
            )

    @property
    def min_full(self) -> int:
        return self.first_full

    def choose(self, moment: Moment) -> tuple[Choice, str]:
        if moment.index < self.first_full:
            return COMPUTE, "first"
        if self.to_end and self.every > 1 and moment.total is not None and moment.index < moment.total:
            return (COMPUTE if moment.index in self.spread(moment.total) else FORECAST), "interval"
        return (COMPUTE if moment.since_full >= self.every else FORECAST), "interval"

    def spread(self, total: int) -> set[int]:
        """The computed evaluations of a run of `total`, with the last one among them."""
        start, stop = self.first_full - 1, total - 1
        gaps = max(1, round((stop - start) / self.every))
        return set(range(self.first_full)) | {start + round(i * (stop - start) / gaps) for i in range(gaps + 1)}


@dataclass(frozen=True)
class Spread:
    """Compute one evaluation in every `every`, spread over step and noise level: `schedules.spread`.

    The plan is made at the start of a run, from its noise levels. Where they are not known, as after a restart in the
    middle, the evaluations are those of `Interval`. Neutral value: `every=1` computes everything.

    first_full: evaluations computed at the start, whatever the plan says.
    """

    every: int
    first_full: int = 1

    def __post_init__(self):
        Interval(self.every, self.first_full)  # the same limits, and the same sentences

    @property
    def min_full(self) -> int:
        return self.first_full

    def count(self, total: int) -> int:
        """How many of `total` evaluations the plan computes."""
        return min(total, max(2, round(total / self.every)))

    def choose(self, moment: Moment) -> tuple[Choice, str]:
        if moment.planned is None or moment.index < self.first_full:
            return Interval(self.every, self.first_full).choose(moment)
        return (COMPUTE if moment.planned else FORECAST), "planned"


@dataclass(frozen=True)
class Listed:
    """Compute exactly the listed evaluations. Neutral value: all of them.

    full: one bool per evaluation, True is computed; repeats if the run is longer.
    """

    full: tuple[bool, ...]

    def __post_init__(self):
        if not self.full or not self.full[0]:
            raise ValueError("A schedule must begin with a computed evaluation: there is nothing to forecast from yet.")

    @property
    def min_full(self) -> int:
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
    """Evaluations to compute, whatever the policy says. Neutral values: 0 and None.

    last_full: number of last steps to compute, if the schedule is known.
    max_consecutive: most forecasts in a row; None for no limit.
    """

    last_full: int = 0
    max_consecutive: int | None = None

    def __post_init__(self):
        if self.last_full < 0:
            raise ValueError(f"last_full must not be negative, got {self.last_full}.")
        if self.max_consecutive is not None and self.max_consecutive < 1:
            raise ValueError(f"max_consecutive must be at least 1, got {self.max_consecutive}.")

    def reason(self, moment: Moment) -> str | None:
        """Why this evaluation must be computed, or None."""
        if self.last_full and moment.left is not None and moment.left < self.last_full:
            return "last"
        if self.max_consecutive is not None and moment.since_full > self.max_consecutive:
            return "gap"
        return None
