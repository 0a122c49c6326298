"""Re-ttention on ComfyUI's models: settings that hang on the MODEL, and what people are told about a run.

Hooks and state are in `re_ttention_run.py`, the method in `models/accelerate/re_ttention.py`.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from comfy.model_patcher import ModelPatcher

from ...models.accelerate.re_ttention import DRIFT, Kind, Schedule, Storage, Window
from ...models.accelerate.sparse_attention import Band, Disc, FrameBand, Grid, Pattern, kept_ratio
from ..execution import Origin, running
from ..run import KEY, Run, attached
from ..run import attach as attach_description
from .own_attention import require_known_tokens
from .re_ttention_run import ReTtentionRun
from .report import NodeReport
from .sparse_attention import SparseAttention

STORAGE: dict[str, Storage] = {
    "full precision": "full",
    "16 bits": "bf16",
    "8 bits": "fp8",
    "offload to CPU": "cpu",
    "share only": "none",
}

LETTERS: dict[Kind, str] = {"full": "#", "refresh": "R", "sparse": "."}


@dataclass(eq=False)
class RunReport:
    """What was done in one run of a sampler. It is filled while that goes on."""

    kinds: dict[int, set[Kind]] = field(default_factory=dict)  # by evaluation
    patterns: dict[Grid, Pattern] = field(default_factory=dict)
    left_full: Counter[str] = field(default_factory=Counter)  # calls of attention that were not ours, by the reason
    backends: Counter[str] = field(default_factory=Counter)  # calls, by what computed the kept pairs
    pairs: int = 0  # query-key pairs computed where attention is ours
    pairs_in_full: int = 0  # what full attention would have computed there
    failed: dict[str, str] = field(default_factory=dict)  # why FlexAttention was given up, by what it was for
    planned: tuple[int, int] = (0, 0)  # most bytes to be kept between evaluations: on the device, in host memory
    held: int = 0  # bytes kept at the end of the run, on both
    origin: Origin = field(default_factory=running)  # who runs the sampler

    @property
    def evaluations(self) -> str:
        """A letter each: # full, R refresh, . sparse, - attention was not called."""
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
        """Several lines: what was kept, when, at which cost."""
        lines = []
        for grid, pattern in self.patterns.items():
            lines.append(f"{in_words(grid)}: {in_words(pattern)}, {kept_ratio(pattern, grid):.1%} of all pairs")
        if self.kinds:
            lines.append(f"evaluations: {self.evaluations}  (# full, R full and remembered, . sparse)")
            lines.append(f"attention: {self.pairs / self.pairs_in_full:.0%} of full attention's pairs computed")
            lines += [f"kept pairs: {count} calls by {name}" for name, count in self.backends.items()]
            lines += [f"FlexAttention failed for {part}: {why}" for part, why in self.failed.items()]
            device, host = (size / 2**20 for size in self.planned)
            more = f", and {host:.1f} MiB of host memory" if host else ""
            lines.append(f"memory held: {device:.1f} MiB{more} at most")
        lines += [f"left full: {count} calls, {reason}" for reason, count in self.left_full.items()]
        if not self.kinds and not self.left_full:
            lines.append("No attention of the picture's tokens was seen: nothing was changed.")
        return "\n".join(lines)

    def values(self) -> dict[str, Any]:
        """For scripts."""
        values: dict[str, Any] = {"evaluations": self.evaluations}
        values |= {"pairs": self.pairs, "pairs_in_full": self.pairs_in_full, "left_full": dict(self.left_full)}
        return values | {"bytes_planned": sum(self.planned), "bytes_held": self.held}


class Report(NodeReport[RunReport]):
    def __init__(self, settings: str = "", off: bool = False):
        super().__init__("Re-ttention", settings if off else f"Re-ttention: {settings}", off=off)

    def start(self) -> RunReport:
        return self.keep(RunReport())


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


@dataclass(frozen=True, eq=False)
class ReTtention:
    """Keep a share `keep` of the keys, in the evaluations that `schedule` leaves sparse.

    min_tokens: attention over fewer tokens stays full.
    max_bytes: refuse to keep more. None: a quarter of the memory that is free when sampling starts.
    """

    keep: float
    schedule: Schedule
    pattern: Window = "auto"
    drift: float = DRIFT
    clamp: bool = True
    storage: Storage = "full"
    min_tokens: int = 4096
    max_bytes: int | None = None
    report: Report = field(default_factory=Report)

    def __post_init__(self):
        if not 0 < self.keep < 1:
            raise ValueError(f"keep must be above 0 and below 1, got {self.keep}.")
        if not 0 <= self.drift < math.inf:
            raise ValueError(f"drift must be a finite number and at least 0, got {self.drift}.")
        if self.min_tokens < 0:
            raise ValueError(f"min_tokens must be at least 0, got {self.min_tokens}.")

    def bind(self, run: Run, model_options: dict) -> None:
        if any(isinstance(other, SparseAttention) for other in model_options["transformer_options"].get(KEY, ())):
            raise ValueError(CONFLICT)
        ReTtentionRun(self, run).install(model_options)


CONFLICT = "Apply Re-ttention: the model's attention is sparse already. Remove one of the two nodes."


def attach(model: ModelPatcher, settings: ReTtention) -> ModelPatcher:
    """A clone of `model` that is sampled with these settings.

    Raises:
        ValueError: its attention is sparse already, or out of reach.
    """
    require_known_tokens(model, "Apply Re-ttention")
    if any(isinstance(other, SparseAttention | ReTtention) for other in attached(model)):
        raise ValueError(CONFLICT)
    return attach_description(model, settings)
