"""Whoever changes a model that all tests share is found, whatever was changed."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType

import pytest
import torch

from dit_toolkit.tests.host import shared
from dit_toolkit.tests.host.tiny import controlled, flux_state, load_flux, sample

pytestmark = pytest.mark.comfy


def layer_of(model):
    return model.model.diffusion_model.double_blocks[0].img_mlp[0]


def changed_weight(model):
    layer_of(model).weight.data[3, 5] += 1e-6


def changed_forward(model):
    layer = layer_of(model)
    layer.forward = MethodType(lambda self, x: x, layer)


CHANGES: dict[str, Callable] = {
    "weights": changed_weight,
    "options": lambda model: model.model_options["transformer_options"].update(mine=1),
    "patches": lambda model: model.add_patches({"diffusion_model.img_in.bias": ("diff", (torch.ones(1),))}),
    "object patches": lambda model: model.add_object_patch("model_sampling", None),
    "wrappers": lambda model: model.add_wrapper("diffusion_model", print),
    "additional models": lambda model: model.set_additional_models("mine", [model.clone()]),
    "hooks of modules": lambda model: layer_of(model).register_forward_hook(print),
    "methods of modules": changed_forward,
}


@pytest.mark.parametrize("part", CHANGES)
def test_a_change_is_found_by_its_part_and_told_once(monkeypatch, part):
    monkeypatch.setattr(shared, "SHARED", {})
    model = shared.share("mine", load_flux(flux_state(double=1, single=0)))
    assert shared.changed() == []
    assert shared.state_of(model) == shared.state_of(model)
    with monkeypatch.context() as patch:  # core would load what was broken
        CHANGES[part](model)
        patch.setattr(shared.comfy.model_management, "load_models_gpu", lambda models: None)
        assert shared.changed() == [f"mine: {part}"]
        assert shared.changed() == []


def test_what_a_clone_does_is_no_change(monkeypatch, tiny_flux):
    monkeypatch.setattr(shared, "SHARED", {})
    shared.share("mine", tiny_flux)
    patched = controlled(tiny_flux)
    patched.add_patches({"diffusion_model.img_in.bias": ("diff", (torch.ones(256),))})
    sample(patched, 2)
    assert shared.changed() == []
