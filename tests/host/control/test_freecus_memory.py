"""How much room FreeCus asks core for: by the sizes of what it will keep."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dit_toolkit.host.control.freecus_run import ReferenceRun
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
    model = SimpleNamespace(model=SimpleNamespace(
        diffusion_model=tiny_flux.model.diffusion_model,
        get_dtype_inference=tiny_flux.model.get_dtype_inference,
        memory_required=lambda shape: 1000,
    ))  # fmt: skip
    asked = []
    conds = {"positive": [1], "negative": [1]}
    run_of(prompts).reserve(lambda model, shape, conds: asked.append(shape), model, (2, 16, 8, 1000), conds)
    token = 4 * HIDDEN
    needed = 2 * times * token * (2 * BLOCKS * TOKENS + 5 * GRID[0] * GRID[1])
    assert asked == [[2, 16, 8, 1000 + needed]]
