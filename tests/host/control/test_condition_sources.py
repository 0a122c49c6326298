"""What keys and values of a condition depend on: they are made anew when any of it differs, and only then."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from comfy.patcher_extension import WrappersMP

from dit_toolkit.host.control.conditions_run import Source
from dit_toolkit.tests.host.tiny import controlled, sample

pytestmark = pytest.mark.comfy

SOURCE = Source(torch.ones(1, 16, 4, 4), torch.ones(1, 8), torch.tensor([3.5]), ((4, 4), (), 16))


def test_the_same_numbers_are_the_same_source():
    copy = replace(SOURCE, latent=SOURCE.latent.clone(), pooled=SOURCE.pooled.clone(), guidance=torch.tensor([3.5]))
    assert SOURCE.same_as(copy)
    without = replace(SOURCE, pooled=None, guidance=None)
    assert without.same_as(replace(without))


@pytest.mark.parametrize(
    "change",
    [
        {"latent": torch.zeros(1, 16, 4, 4)},
        {"pooled": torch.zeros(1, 8)},
        {"pooled": None},
        {"guidance": torch.tensor([1.0])},
        {"guidance": None},
        {"rest": ((4, 6), (), 16)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_source_that_differs_in_anything_is_another(change):
    other = replace(SOURCE, **change)
    assert not SOURCE.same_as(other)
    assert not other.same_as(SOURCE)
    assert not SOURCE.same_as(None)


@pytest.mark.parametrize("what", ["guidance", "y"])
def test_what_jumps_during_a_run_is_encoded_again(tiny_flux, file, encodings, what):
    calls = [0]

    def jump(executor, x, t, *args, **conds):
        calls[0] += 1
        if calls[0] == 3:
            conds[what] = conds[what] + 1
        return executor(x, t, *args, **conds)

    plain = tiny_flux.clone()
    plain.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "jump", jump)
    sample(controlled(plain, file=file), 4)
    assert len(encodings) == 3  # at the start, at the jump, and back
