"""Which worker gets which job next.

Each worker has a stretch of the ordered jobs, so that what ComfyUI keeps from one job serves the next. A worker that is
through takes the second half of the longest stretch left. A job that comes back goes to another worker first.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass
class Stretch:
    begin: int
    end: int

    def __len__(self) -> int:
        return self.end - self.begin


class Line:
    """Jobs by number, in the order they are to be done."""

    def __init__(self, order: Sequence[int], workers: int):
        self.order = order
        cuts = [len(order) * number // workers for number in range(workers + 1)]
        self._free = [Stretch(a, b) for a, b in pairwise(cuts) if b > a]
        self._owned: dict[Hashable, Stretch] = {}
        self._again: dict[int, set[Hashable]] = {}  # jobs that came back, and the workers that lost them

    def __len__(self) -> int:
        return sum(map(len, self._owned.values())) + sum(map(len, self._free)) + len(self._again)

    def take(self, worker: Hashable, others: Iterable[Hashable] = ()) -> int | None:
        """The worker's next job; None if there is none for it. `others`: workers that could take what it has lost."""
        others = set(others) - {worker}
        for job, lost_by in self._again.items():
            if worker not in lost_by or not others - lost_by:
                del self._again[job]
                return job
        own = self._owned.get(worker)
        if own is None or not own:
            own = self._owned[worker] = self._next()
        if not own:
            return None
        own.begin += 1
        return self.order[own.begin - 1]

    def give_back(self, job: int, lost_by: Iterable[Hashable]) -> None:
        self._again[job] = set(lost_by)

    def leave(self, worker: Hashable) -> None:
        """The worker will not come back: its stretch is anybody's."""
        if stretch := self._owned.pop(worker, None):
            self._free.append(stretch)

    def _next(self) -> Stretch:
        if self._free:
            return self._free.pop(0)
        longest = max(self._owned.values(), key=len, default=None)
        if longest is None or not longest:
            return Stretch(0, 0)
        middle = longest.begin + len(longest) // 2
        second = Stretch(middle, longest.end)
        longest.end = middle
        return second
