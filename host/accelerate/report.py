"""What a step cache did, for people: live events for the page, a summary for the log and the report output.

A report belongs to one node and keeps its latest runs. It is filled while samplers run. Who reads it says of which
runs: those of the samplers that are wired to the reader.

The page receives `dit_toolkit.run_start`, `dit_toolkit.evaluation` and `dit_toolkit.run_end`, each with the id of the
node that asked for the cache and of the prompt that runs. Only the page that sent the prompt receives them.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Generic, Protocol, TypeVar

from ..execution import NOBODY, Origin, running

logger = logging.getLogger(__name__)

NO_RUN = "No sampler has run with this model yet."
NOT_BEFORE = "No sampler that 'after' leads back to has run with this model. Connect what the sampler made."


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
class RunReport:
    """One run of a sampler."""

    number: int
    method: str
    planned: int | None  # evaluations, as far as the schedule and the sampler tell
    notes: list[str] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    bytes_held: int = 0  # most at any time
    started: float = field(default_factory=time.perf_counter)
    seconds: float | None = None  # of the whole run, once it is over
    interrupted: bool = False
    origin: Origin = NOBODY  # who runs the sampler

    @property
    def computed(self) -> int:
        return sum(entry.computed for entry in self.entries)

    @property
    def speedup(self) -> float | None:
        """Time that all evaluations would have taken, over the time they took. None before there is a computed one.

        The first evaluation is left out of the median, as it warms up. An evaluation lasts until the next one begins:
        the sampler's own work and previews are part of it.
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
        """For scripts, every evaluation of it."""
        return {
            "method": self.method,
            "summary": self.summary,
            "notes": self.notes,
            "computed": self.computed,
            "speedup": self.speedup,
            "bytes_held": self.bytes_held,
            "evaluations": [asdict(entry) for entry in self.entries],
        }

    def text(self) -> str:
        """Several lines: the summary, then what a reader needs to set the knobs."""
        lines = [f"{self.method}: {self.summary}"]
        lines.append("evaluations: " + "".join("#" if entry.computed else "." for entry in self.entries))
        reasons = Counter(entry.reason for entry in self.entries if entry.computed)
        lines.append("computed because of: " + ", ".join(f"{name} {count}" for name, count in reasons.items()))
        if self.errors:
            low, middle, high = min(self.errors), median(self.errors), max(self.errors)
            threshold = next(e.threshold for e in self.entries if e.error is not None)
            lines.append(f"gate error: {low:.3g} to {high:.3g}, median {middle:.3g}; threshold {threshold:.3g}")
        lines.append(f"memory held: {self.bytes_held / 2**20:.1f} MiB at most")
        lines += self.notes
        return "\n".join(lines)


class ReportedRun(Protocol):
    """What a report keeps of one run of a sampler."""

    @property
    def origin(self) -> Origin: ...

    def text(self) -> str: ...

    def values(self) -> dict[str, Any]: ...


RunT = TypeVar("RunT", bound=ReportedRun)


@dataclass(eq=False)
class NodeReport(Generic[RunT]):
    """Of one node: its settings in words, and its latest runs. This is what travels to the node Acceleration Report."""

    method: str
    settings: str = ""
    node: str | None = None  # its id in the workflow, where the page shows its runs
    off: bool = False  # the node gave its model back as it came
    runs: list[RunT] = field(default_factory=list)
    kept = 16

    def keep(self, run: RunT) -> RunT:
        self.runs = [*self.runs[1 - self.kept :], run]
        return run

    def text(self, runs: Sequence[RunT] | None = None) -> str:
        """Settings, and these runs; the latest one if it is not said which."""
        if self.off:
            return f"{self.method} is off: the model is as it came."
        runs = self.runs[-1:] if runs is None else runs
        nothing = NOT_BEFORE if self.runs else NO_RUN
        return "\n".join([*filter(None, [self.settings]), *([run.text() for run in runs] or [nothing])])

    def json(self, runs: Sequence[RunT] | None = None) -> str:
        """The last of these runs, for scripts."""
        runs = self.runs[-1:] if runs is None else runs
        about = {"method": self.method, "settings": self.settings, "evaluations": []}
        return json.dumps(about | (runs[-1].values() if runs else {}))


@dataclass(eq=False)
class Report(NodeReport[RunReport]):
    """Of a step cache."""

    def start(self, planned: int | None) -> RunReport:
        number = self.runs[-1].number + 1 if self.runs else 1
        run = self.keep(RunReport(number, self.method, planned, origin=running()))
        self._send("run_start", run, planned=planned, method=self.method)
        return run

    def add(self, run: RunReport, entry: Entry) -> None:
        run.entries.append(entry)
        self._send("evaluation", run, speedup=run.speedup, **asdict(entry))

    def end(self, run: RunReport, completed: bool) -> None:
        run.seconds = time.perf_counter() - run.started
        run.interrupted = not completed
        forecast = len(run.entries) - run.computed
        values = {"computed": run.computed, "forecast": forecast, "speedup": run.speedup}
        self._send("run_end", run, summary=run.summary, interrupted=run.interrupted, **values)
        logger.info("%s: %s", run.method, run.summary)

    def _send(self, event: str, run: RunReport, **values: Any) -> None:
        server = page_server()
        if self.node is None or run.origin.prompt is None or server is None or not server.client_id:
            return  # sent to nobody, it would reach every page
        data = {"node": self.node, "prompt_id": run.origin.prompt, "run": run.number, **values}
        server.send_sync(f"dit_toolkit.{event}", data, server.client_id)


def page_server() -> Any:
    """ComfyUI's server, or None where there is no page to tell: in scripts and tests."""
    import sys

    server = sys.modules.get("server")  # never started by us
    return getattr(getattr(server, "PromptServer", None), "instance", None)
