"""The tiny models are what they stand for, and every part of them shows in what is sampled."""

from __future__ import annotations

import pytest
import torch
from comfy.ldm.lightricks.av_model import LTXAVModel
from comfy.ldm.wan.model import CameraWanModel
from comfy.patcher_extension import WrappersMP

from dit_toolkit.host import families as host
from dit_toolkit.host.families import family_of
from dit_toolkit.tests.host.families import ALL, sample

pytestmark = [pytest.mark.comfy, pytest.mark.sweep(together=True)]

every_family = pytest.mark.parametrize("family", ALL.values(), ids=ALL.keys())


@every_family
def test_it_is_loaded_as_what_it_is(family):
    base = family.load().model
    found = " ".join(type(part).__name__ for part in (base.model_config, base, base.diffusion_model))
    assert found == family.core
    assert family.load() is family.load()


@every_family
def test_its_family_is_found(family):
    model = family.load()
    assert family_of(model) is family.answers
    assert family_of(model.model) is family_of(model.model.diffusion_model) is family.answers
    assert family_of(torch.compile(model.model.diffusion_model, backend="eager")) is family.answers


def test_the_families_that_count_as_tested_are_those_with_a_tiny_model():
    assert {family.of for family in ALL.values()} == {family.name for family in host.FAMILIES if family.tested}


@pytest.mark.parametrize("relative", [LTXAVModel, CameraWanModel])
def test_the_blocks_of_relatives_that_were_not_looked_into_are_unknown(relative):
    assert not family_of(relative.__new__(relative)).kinds


def test_any_other_model_answers_nothing():
    other = family_of(torch.nn.Linear(1, 1))
    assert other is host.OTHER
    assert (other.grids, other.kinds, other.block_keys(None)) == (None, (), ())


@every_family
def test_the_seed_and_the_prompt_make_the_picture(family):
    out = sample(family)
    assert out.shape == (1, *family.latent_shape)
    assert torch.isfinite(out).all()
    assert torch.equal(out, sample(family))
    for other in (sample(family, seed=8), sample(family, positive=family.prompt(5))):
        assert (other - out).abs().mean() > 1e-2 * out.abs().mean()


@every_family
def test_guidance_and_batches_work(family):
    one, plain = sample(family, cfg=3.0), sample(family)
    assert (one - plain).abs().mean() > 1e-2 * plain.abs().mean()
    two = sample(family, cfg=3.0, batch=2)
    assert two.shape[0] == 2
    assert torch.isfinite(two).all()
    assert not torch.equal(two[0], two[1])


@every_family
def test_every_matrix_has_a_part_in_the_picture(family):
    """One call of the model, and another with each matrix set to zero in turn."""
    silent = set()

    def call(executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        for name, weight in executor.class_obj.diffusion_model.named_parameters():
            if weight.ndim == 1:
                continue
            kept = weight.detach().clone()
            weight.zero_()
            if (executor(*args, **kwargs) - out).abs().max() < 1e-4 * out.abs().max():
                silent.add(name)
            weight.copy_(kept)
        return out

    model = family.load().clone()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "silence", call)
    sample(family, model, 1)
    assert {name for name in silent if not name.startswith(family.silent)} == set()
