"""The report of a step cache, filled while samplers run: live events for the page, a summary for the log, and a text.

The page receives `dit_toolkit.run_start`, `dit_toolkit.evaluation` and `dit_toolkit.run_end`, each with the ids of the
step cache's node and of the running prompt, and with the workflow that it was queued from. Only the page that sent the
prompt receives them.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from ..execution import NOBODY, NOWHERE, Origin, Sender, running, sender_of
from ..memory import Usage
from .report import NodeReport

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One evaluation."""

    index: int
    sigma: float
    computed: bool
    reason: str  # one word: "first", "interval", "gate", ...
    error: float | None  # of the gate
    threshold: float | None
    seconds: float


@dataclass
class StepCacheRunReport:
    """One run of a sampler."""

    number: int
    method: str
    planned: int | None  # evaluations, if schedule and sampler tell
    notes: list[str] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    bytes_held: int = 0  # by histories, the most between two evaluations
    memory: Usage = field(default_factory=Usage)  # asked of core from shapes, and the most that was held at any time
    started: float = field(default_factory=time.perf_counter)
    seconds: float | None = None  # of the whole run; None until it is over
    interrupted: bool = False
    origin: Origin = NOBODY  # the node that runs the sampler
    sender: Sender = NOWHERE  # where the page has the step cache's node

    @property
    def computed(self) -> int:
        return sum(entry.computed for entry in self.entries)

    @property
    def speedup(self) -> float | None:
        """Time that computing all evaluations would have taken / time they took. None before the first computed one.

        The median leaves out the first evaluation, which warms up. An evaluation lasts until the next one begins, so it
        includes the sampler's own work and previews.
        """
        full = [entry.seconds for entry in self.entries if entry.computed]
        spent = sum(entry.seconds for entry in self.entries)
        if not full or not spent:
            return None
        typical = median(full[1:] or full)
        return (full[0] + typical * (len(self.entries) - 1)) / spent

    @property
    def summary(self) -> str:
        """One line."""
        total, computed = len(self.entries), self.computed
        parts = [f"{total} evaluations", f"{computed} computed", f"{total - computed} forecast"]
        if self.speedup is not None:
            parts.append(f"{self.speedup:.2f} x faster")
        if self.interrupted:
            parts.append("interrupted")
        return ", ".join(parts)

    @property
    def errors(self) -> list[float]:
        return [entry.error for entry in self.entries if entry.error is not None]

    def values(self) -> dict[str, Any]:
        """For scripts, with every evaluation."""
        return {
            "method": self.method,
            "summary": self.summary,
            "notes": self.notes,
            "computed": self.computed,
            "speedup": self.speedup,
            "bytes_held": self.bytes_held,
            "bytes_asked": self.memory.asked.device,
            "bytes_at_most": self.memory.held.device + self.memory.held.main,
            "evaluations": [asdict(entry) for entry in self.entries],
        }

    def text(self) -> str:
        """Several lines: the summary, then numbers that help to choose the settings."""
        lines = [f"{self.method}: {self.summary}"]
        lines.append("evaluations: " + "".join("#" if entry.computed else "." for entry in self.entries))
        reasons = Counter(entry.reason for entry in self.entries if entry.computed)
        lines.append("computed because of: " + ", ".join(f"{name} {count}" for name, count in reasons.items()))
        if self.errors:
            low, middle, high = min(self.errors), median(self.errors), max(self.errors)
            threshold = next(e.threshold for e in self.entries if e.error is not None)
            lines.append(f"gate error: {low:.3g} to {high:.3g}, median {middle:.3g}; threshold {threshold:.3g}")
        lines.append(f"memory: {self.memory}")
        lines += self.notes
        return "\n".join(lines)


@dataclass(eq=False)
class StepCacheReport(NodeReport[StepCacheRunReport]):
    """The report of one step cache node."""

    def start(self, planned: int | None) -> StepCacheRunReport:
        number = self.runs[-1].number + 1 if self.runs else 1
        origin, server = running(), page_server()
        isolated = server is None or origin.prompt is None  # a script
        sender = NOWHERE if isolated else sender_of(server, origin.prompt, self.node)
        run = self.record(StepCacheRunReport(number, self.method, planned, origin=origin, sender=sender))
        self._send("run_start", run, planned=planned, method=self.method)
        return run

    def add(self, run: StepCacheRunReport, entry: Entry) -> None:
        run.entries.append(entry)
        self._send("evaluation", run, speedup=run.speedup, **asdict(entry))

    def end(self, run: StepCacheRunReport, completed: bool) -> None:
        run.seconds = time.perf_counter() - run.started
        run.interrupted = not completed
        forecast = len(run.entries) - run.computed
        values = {"computed": run.computed, "forecast": forecast, "speedup": run.speedup}
        self._send("run_end", run, summary=run.summary, interrupted=run.interrupted, **values)
        logger.info("%s: %s", run.method, run.summary)

    def _send(self, event: str, run: StepCacheRunReport, **values: Any) -> None:
        server = page_server()
        if self.node is None or run.origin.prompt is None or server is None or not server.client_id:
            return  # without a receiver, the event would reach every page
        ids = {"node": self.node, "prompt_id": run.origin.prompt, "run": run.number}
        data = {**ids, **run.sender._asdict(), **values}
        server.send_sync(f"dit_toolkit.{event}", data, server.client_id)


def page_server() -> Any:
    """ComfyUI's server, or None without a page, as in scripts and tests."""
    import sys

    server = sys.modules.get("server")  # we never start it
    return getattr(getattr(server, "PromptServer", None), "instance", None)
