"""Which runs of a report lie before a node."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

pytestmark = pytest.mark.comfy

from comfy_execution.utils import CurrentNodeContext  # noqa: E402

from dit_toolkit.host.execution import NOBODY, Origin, running, runs_before, samplers_before  # noqa: E402

GRAPH = {
    "load": {"model": "flux"},
    "first": {"model": ["load", 0], "seed": 1},
    "second": {"latent": ["first", 0], "words": ["not", "a link"]},
    "apart": {"model": ["load", 0]},
    "joined": {"a": ["second", 0], "b": ["apart", 0]},
    "loop": {"x": ["loop", 0], "y": ["second", 0]},
}
SAMPLERS = {"first", "second", "apart"}


@dataclass(frozen=True)
class Run:
    origin: Origin


def run(node, prompt="now", item=0):
    return Run(Origin(prompt, node, item))


BEFORE = {"first": {"first"}, "second": {"second"}, "joined": {"second", "apart"}, "loop": {"second"}, "load": set()}


@pytest.mark.parametrize(("node", "found"), BEFORE.items())
def test_each_way_back_ends_at_its_first_sampler(node, found):
    assert set(samplers_before(SAMPLERS, [node, 0], GRAPH.__getitem__)) == found


@pytest.mark.parametrize("value", [None, 3, "text", ["first"], [1, 2], {"first": 0}])
def test_what_is_no_link_leads_nowhere(value):
    assert samplers_before(SAMPLERS, value, GRAPH.__getitem__) == []


def test_a_sampler_s_run_is_its_newest():
    """One that was taken from the cache in this prompt keeps that of an earlier one."""
    runs = [
        run("first", "before"),
        run("second", "before"),
        run("first"),
        run("second", "before"),
        run("first", "then"),
    ]
    assert runs_before(runs, ["first", 0], GRAPH.__getitem__, 0) == [runs[4]]
    (found,) = runs_before(runs, ["second", 0], GRAPH.__getitem__, 0)
    assert found is runs[3]


def test_a_node_that_is_mapped_over_a_list_has_the_run_of_its_item():
    runs = [run("first", "before", 1), *(run("first", item=i) for i in range(3))]
    for item in range(3):
        assert runs_before(runs, ["first", 0], GRAPH.__getitem__, item) == [runs[item + 1]]
    assert runs_before(runs, ["first", 0], GRAPH.__getitem__, 7) == [runs[3]]  # a list of another length: the last


def test_who_runs_is_known_in_a_node_and_nowhere_else():
    assert running() == NOBODY
    with CurrentNodeContext("prompt", "7:12", 2):
        assert running() == Origin("prompt", "7:12", 2)
