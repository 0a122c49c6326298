"""How much room FreeCus asks core for: by the sizes of what it will keep."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dit_toolkit.host.control.freecus_run import ReferenceRun
from dit_toolkit.host.memory import Bytes, Plan
from dit_toolkit.tests.host.tiny import HIDDEN

pytestmark = pytest.mark.comfy

BLOCKS, TOKENS, GRID = 3, 5, (4, 6)


def run_of(prompts: str) -> ReferenceRun:
    run = object.__new__(ReferenceRun)
    run.settings = SimpleNamespace(blocks=range(BLOCKS), prompts=prompts)
    run.tokens, run.grid = torch.arange(TOKENS), GRID
    return run


def test_the_size_is_that_of_a_key_and_a_value_for_each_token_block_and_picture(tiny_flux):
    kept = [torch.zeros(2, HIDDEN // 128, TOKENS, 128) for _ in range(2 * BLOCKS)]
    assert run_of("positive only").bytes(tiny_flux.model, 2) == sum(x.nbytes for x in kept)


@pytest.mark.parametrize(("prompts", "times"), [("positive only", 1), ("positive and negative", 2)])
def test_as_much_more_is_asked_for_as_the_pass_needs_for_its_prompts(tiny_flux, prompts, times):
    """The keys and values, and in one block the streams, queries, keys and values of the whole reference."""
    pieces, given = {(2, 16, 8, 12): 1}, {"positive": [{}], "negative": [{}]}
    asked = run_of(prompts).asked(Plan(tiny_flux, given, pieces))
    token = 4 * HIDDEN
    kept, work = 2 * times * token * 2 * BLOCKS * TOKENS, 2 * times * token * 5 * GRID[0] * GRID[1]
    assert asked == Bytes(kept, work)


def test_a_prompt_for_an_area_does_not_see_the_subject(tiny_flux):
    given = {"positive": [{}, {"area": (4, 4, 0, 0)}]}
    whole = run_of("positive only").asked(Plan(tiny_flux, {"positive": [{}]}, {(1, 16, 8, 12): 1}))
    assert run_of("positive only").asked(Plan(tiny_flux, given, {(1, 16, 8, 12): 1})) == whole
