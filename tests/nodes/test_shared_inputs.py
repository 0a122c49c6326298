"""What several nodes ask for: their choices are those that their code takes, and what is unproven says so."""

from __future__ import annotations

import asyncio
import typing

import pytest

pytestmark = pytest.mark.comfy

from comfy_api.latest import io  # noqa: E402

from dit_toolkit.nodes import DiTToolkit  # noqa: E402
from dit_toolkit.nodes.inputs import bytes_of, choice  # noqa: E402
from dit_toolkit.nodes.try_on import RECONSTRUCTION  # noqa: E402

NODES = asyncio.run(DiTToolkit().get_node_list())
Word = typing.Literal["one", "two"]


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.__name__)
def test_choices_are_the_values_of_the_type_that_execute_takes(node):
    hints = typing.get_type_hints(node.execute)
    choices = [entry for entry in node.define_schema().inputs if isinstance(entry, io.Combo.Input)]
    for entry in choices:
        if hints[entry.id] is not str:  # a table, or files that are there
            assert entry.options == list(typing.get_args(hints[entry.id])), entry.id


@pytest.mark.parametrize("options", [Word, {"one": 1, "two": 2}, ["one", "two"]])
def test_a_choice_is_over_a_type_a_table_or_a_list(options):
    entry = choice("word", options, "two", "Which.")
    assert (entry.options, entry.default) == (["one", "two"], "two")


def test_a_choice_of_nothing_is_empty():
    """As that of files is where there are none."""
    assert choice("file", [], "", "Which.").options == []


@pytest.mark.parametrize(("gib", "count"), [(0.0, None), (0.5, 2**29), (3, 3 * 2**30)])
def test_a_memory_limit_is_in_gib_and_0_is_none(gib, count):
    assert bytes_of(gib) == count


def test_reconstructions_and_what_was_not_measured_on_a_gpu_are_marked():
    marked = {node.__name__ for node in NODES if node.define_schema().is_experimental}
    reconstructed = {node.__name__ for node in NODES if RECONSTRUCTION in node.define_schema().description}
    assert marked == reconstructed | {"ApplyReTtention"}
    assert reconstructed == {"LoadTryOn", "ApplyTryOn"}
