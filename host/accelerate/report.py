"""What a node's report keeps of the runs of samplers, and the words and values that the node Acceleration Report reads.

A report belongs to one node and keeps its latest runs. Who reads it says of which runs: those of the samplers that are
wired to the reader.
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
