"""A node's report on the runs of samplers, which the node Acceleration Report reads as text and as values.

A report belongs to one node and holds its latest runs. The reader chooses among them: the runs of the samplers that are
wired to it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from ..execution import Origin

NO_RUN = "No sampler has run with this model yet."
NOT_BEFORE = "No sampler that 'after' leads back to has run with this model. Connect what the sampler made."


class ReportedRun(Protocol):
    """A report's record of one run of a sampler."""

    @property
    def origin(self) -> Origin: ...

    def text(self) -> str: ...

    def values(self) -> dict[str, Any]: ...


RunT = TypeVar("RunT", bound=ReportedRun)


@dataclass(eq=False)
class NodeReport(Generic[RunT]):
    """One node's settings in words, and its latest runs. A link carries it to the node Acceleration Report."""

    method: str
    settings: str = ""
    node: str | None = None  # its id in the workflow, under which the page shows its runs
    off: bool = False  # the node gave its model back as it came
    runs: list[RunT] = field(default_factory=list)
    most_runs = 16

    def record(self, run: RunT) -> RunT:
        self.runs = [*self.runs[1 - self.most_runs :], run]
        return run

    def text(self, runs: Sequence[RunT] | None = None) -> str:
        """The settings and these runs; by default the latest run."""
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
