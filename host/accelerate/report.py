"""What a step cache did, for people: live events for the page, a summary for the log and the report output.

A `Report` belongs to one node. It is filled while a sampler runs, so its text is worth reading after the sampler.
The page receives `dit_toolkit.run_start`, `dit_toolkit.evaluation` and `dit_toolkit.run_end`, each with the id of the
node that asked for the cache and of the prompt that runs. Only the page that sent the prompt receives them.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from comfy_execution.utils import get_executing_context

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
    prompt: str | None = None  # the id of the prompt that runs the sampler

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


@dataclass(eq=False)
class Report:
    """Of one node: its settings in words, and its latest runs."""

    method: str
    settings: str = ""
    node: str | None = None  # its id in the workflow
    off: bool = False  # the node gave its model back as it came
    runs: list[RunReport] = field(default_factory=list)
    kept = 8

    def start(self, planned: int | None) -> RunReport:
        number = self.runs[-1].number + 1 if self.runs else 1
        run = RunReport(number, self.method, planned, prompt=running_prompt())
        self.runs = [*self.runs[1 - self.kept :], run]
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

    def text(self) -> str:
        """Settings, and the latest run if there was one."""
        if self.off:
            return f"{self.method} is off: the model is as it came."
        lines = [self.settings] if self.settings else []
        lines.append(self.runs[-1].text() if self.runs else "No sampler has run with this model yet.")
        return "\n".join(lines)

    def json(self) -> str:
        """The latest run, every evaluation of it."""
        if not self.runs:
            return json.dumps({"method": self.method, "evaluations": []})
        run = self.runs[-1]
        values: dict[str, Any] = {"method": run.method, "summary": run.summary, "notes": run.notes}
        values |= {"computed": run.computed, "speedup": run.speedup, "bytes_held": run.bytes_held}
        return json.dumps({**values, "evaluations": [asdict(entry) for entry in run.entries]})

    def _send(self, event: str, run: RunReport, **values: Any) -> None:
        server = page_server()
        if self.node is None or run.prompt is None or server is None or not server.client_id:
            return  # sent to nobody, it would reach every page
        data = {"node": self.node, "prompt_id": run.prompt, "run": run.number, **values}
        server.send_sync(f"dit_toolkit.{event}", data, server.client_id)


def running_prompt() -> str | None:
    """The id of the prompt that runs. ComfyUI knows it in the thread of its nodes only, so ask when a run starts."""
    context = get_executing_context()
    return context.prompt_id if context is not None else None


def page_server() -> Any:
    """ComfyUI's server, or None where there is no page to tell: in scripts and tests."""
    import sys

    server = sys.modules.get("server")  # never started by us
    return getattr(getattr(server, "PromptServer", None), "instance", None)
