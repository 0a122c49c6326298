"""Every feature on a MODEL whose weights stay behind, as core loads it where the card has too little memory.

Each layer then brings its own weights over when it runs, changed by the LoRAs. A CPU takes the same way if core is
told that nothing fits.
"""

from __future__ import annotations

import comfy.model_management
import pytest
import torch
from comfy.model_patcher import ModelPatcher

from dit_toolkit.tests.host.test_promises import apart, close, every_feature, home, plain, sample

pytestmark = pytest.mark.comfy


@pytest.fixture
def nothing_fits(monkeypatch):
    """Core loads models as with --novram. The returned list has those that it loaded."""
    comfy.model_management.unload_all_models()
    load, loaded = ModelPatcher.load, []

    def load_nothing(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        loaded.append(self)
        return load(self, device_to, 0.1, force_patch_weights, False)

    monkeypatch.setattr(ModelPatcher, "load", load_nothing)
    yield loaded
    monkeypatch.undo()
    comfy.model_management.unload_all_models()


def with_changed_weights(model: ModelPatcher) -> ModelPatcher:
    """As a LoRA changes them: every matrix of the blocks."""
    generator, model = torch.Generator().manual_seed(5), model.clone()
    for name, weight in model.model.state_dict().items():
        if "block" in name and name.endswith(".weight") and weight.ndim == 2:
            change = 0.1 * weight.float().std() * torch.randn(weight.shape, generator=generator)
            model.add_patches({name: ("diff", (change,))}, 1.0)
    return model


@every_feature
def test_the_picture_is_the_one_of_a_model_that_fits(feature, request):
    family = home(feature)
    expected = sample(family, feature.put(with_changed_weights(family.load())))
    assert apart(expected, plain(family.name))

    loaded = request.getfixturevalue("nothing_fits")
    model = feature.put(with_changed_weights(family.load()))
    out = sample(family, model)
    assert [each for each in loaded if each.is_clone(model)]
    assert model.model.model_lowvram
    assert model.model.lowvram_patch_counter > 0, "the weights were changed beforehand"
    close(out, expected)
