"""Which cases `make test` runs: all but the long ones, and of every sweep a few. `make test-all` runs each of them.

`@pytest.mark.long` is for tests that take seconds and ask about what seldom changes: training, benchmarks, tracing.
`@pytest.mark.sweep` is for a test of all combinations. Of these, as many are kept as it takes for every value of every
parameter to come once, or `times` times. They are drawn with a seed, so that they are the same everywhere. Tests of a
file that are swept `together` count as values too: each runs once, and between them they meet every value.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

import pytest


def left_out(items: Sequence[pytest.Function]) -> set[pytest.Function]:
    """What of the collected cases only `make test-all` runs."""
    sweeps: dict[tuple, list[pytest.Function]] = defaultdict(list)
    gone = {item for item in items if item.get_closest_marker("long")}
    for item in items:
        marker = item.get_closest_marker("sweep")
        if marker and item not in gone:
            together = marker.kwargs.get("together", False)
            sweeps[(item.path, None if together else item.originalname, *marker.args)].append(item)
    for (_, _, *times), cases in sweeps.items():
        some = covering([values_of(case) for case in cases], *times)
        gone |= {case for number, case in enumerate(cases) if number not in some}
    return gone


def values_of(case: pytest.Function) -> tuple[Hashable, ...]:
    """Its test, and a name for each value that it has, apart by parameter."""
    values = case.callspec.params if hasattr(case, "callspec") else {}
    return (case.originalname, *((name, str(value)) for name, value in values.items()))


def covering(cases: Sequence[tuple[Hashable, ...]], times: int = 1) -> set[int]:
    """Numbers of the cases to keep, so that every value comes `times` times, or as often as there are cases with it."""
    order, seen, kept = list(range(len(cases))), Counter(), set()
    random.Random(0).shuffle(order)
    for number in order:
        if any(seen[value] < times for value in cases[number]):
            kept.add(number)
            seen.update(cases[number])
    return kept
