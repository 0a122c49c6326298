"""The report of a run of Re-ttention, for people and scripts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ...models.accelerate.re_ttention import Kind
from ...models.accelerate.sparse_attention import Band, Disc, FrameBand, Grid, Pattern, kept_ratio
from ..execution import Origin, running
from ..memory import Usage
from .report import NodeReport

LETTERS: dict[Kind, str] = {"full": "#", "refresh": "R", "sparse": "."}


@dataclass(eq=False)
class ReTtentionRunReport:
    """One run of a sampler, filled while it goes on."""

    kinds: dict[int, set[Kind]] = field(default_factory=dict)  # by evaluation
    patterns: dict[Grid, Pattern] = field(default_factory=dict)
    left_full: Counter[str] = field(default_factory=Counter)  # attention calls that we passed on, by the reason
    backends: Counter[str] = field(default_factory=Counter)  # calls, by the backend that computed the kept pairs
    pairs: int = 0  # query-key pairs that we computed
    pairs_in_full: int = 0  # pairs that full attention would have computed there
    failed: dict[str, str] = field(default_factory=dict)  # why FlexAttention failed, by its task
    planned: tuple[int, int] = (0, 0)  # most bytes between evaluations: on the device, in host memory
    held: int = 0  # bytes at the end of the run, in both
    memory: Usage = field(default_factory=Usage)  # asked of core from shapes, and the most that was held
    origin: Origin = field(default_factory=running)  # the node that runs the sampler

    @property
    def evaluations(self) -> str:
        """A letter each: # full, R refresh, . sparse, - no call of attention."""
        letters = {}
        for number, kinds in self.kinds.items():
            letters[number] = LETTERS["refresh" if "refresh" in kinds else "sparse" if "sparse" in kinds else "full"]
        return "".join(letters.get(number, "-") for number in range(max(letters, default=-1) + 1))

    @property
    def summary(self) -> str:
        """One line."""
        share = f", {self.pairs / self.pairs_in_full:.0%} of the pairs" if self.pairs_in_full else ""
        return f"Re-ttention: {self.evaluations or 'nothing was sparse'}{share}"

    def text(self) -> str:
        """Several lines: kept pairs, evaluations, cost."""
        lines = []
        for grid, pattern in self.patterns.items():
            lines.append(f"{in_words(grid)}: {in_words(pattern)}, {kept_ratio(pattern, grid):.1%} of all pairs")
        if self.kinds:
            lines.append(f"evaluations: {self.evaluations}  (# full, R full and remembered, . sparse)")
            lines.append(f"attention: {self.pairs / self.pairs_in_full:.0%} of full attention's pairs computed")
            lines += [f"kept pairs: {count} calls by {name}" for name, count in self.backends.items()]
            lines += [f"FlexAttention does not compile here for {part}: {why}" for part, why in self.failed.items()]
            lines.append(f"memory: {self.memory}")
        lines += [f"left full: {count} calls, {reason}" for reason, count in self.left_full.items()]
        if not self.kinds and not self.left_full:
            lines.append("No attention of the picture's tokens was seen: nothing was changed.")
        return "\n".join(lines)

    def values(self) -> dict[str, Any]:
        """For scripts."""
        values: dict[str, Any] = {"evaluations": self.evaluations}
        values |= {"pairs": self.pairs, "pairs_in_full": self.pairs_in_full, "left_full": dict(self.left_full)}
        values |= {"bytes_planned": sum(self.planned), "bytes_held": self.held}
        return values | {"bytes_asked": self.memory.asked.device}


class ReTtentionReport(NodeReport[ReTtentionRunReport]):
    def __init__(self, settings: str = "", off: bool = False):
        super().__init__("Re-ttention", settings if off else f"Re-ttention: {settings}", off=off)

    def start(self) -> ReTtentionRunReport:
        return self.record(ReTtentionRunReport())


def in_words(thing: Grid | Pattern) -> str:
    """For people who read a report."""
    if isinstance(thing, Grid):
        frames = f"{thing.frames} x " if thing.frames > 1 else ""
        others = f" and {thing.globals} others" if thing.globals else ""
        return f"{frames}{thing.height} x {thing.width} tokens{others}"
    if isinstance(thing, FrameBand):
        return f"tube of {thing.half} tokens before and behind in every frame"
    if isinstance(thing, Band):
        return f"band of {thing.half} tokens before and behind"
    return f"disc of radius {thing.radius}" if isinstance(thing, Disc) else str(thing)
