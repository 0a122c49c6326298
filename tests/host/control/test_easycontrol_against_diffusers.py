"""The whole chain against another implementation of FLUX.1: diffusers' modules, driven with condition tokens by hand.

ComfyUI loads the same weights through its own conversion.
"""

from __future__ import annotations

import pytest
import torch

from dit_toolkit.tests.host.control.dense_flux import Image, grid, random_transformer, velocity
from dit_toolkit.tests.host.tiny import WIDE, close, latent, lora_state, prompt, sample

pytestmark = pytest.mark.comfy
diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def transformer():
    return random_transformer(diffusers)


@pytest.fixture(scope="module")
def flux(transformer):
    from dit_toolkit.tests.host.tiny import load_flux

    model = load_flux(transformer.state_dict())
    assert type(model.model).__name__ == "Flux"
    return model


class Condition(Image):
    """With an EasyControl LoRA under the published names."""

    def __init__(self, x, ids, state, strength):
        super().__init__(x, ids)
        self.state, self.strength = state, strength

    def lora(self, block, part, x):
        name = f"{block}.attn.processor.{part}_loras.0"
        return self.strength * (x @ self.state[f"{name}.down.weight"].T @ self.state[f"{name}.up.weight"].T)


@pytest.mark.parametrize("strengths", [(1.0, 1.0), (0.8, 1.3)])
def test_a_subject_and_a_spatial_condition_equal_diffusers_modules_run_by_hand(transformer, flux, strengths):
    from dit_toolkit.host.control import easycontrol, easycontrol_files

    size = (8, 12)
    noise, ((text, about),) = latent(7, size), prompt()
    subject, spatial = latent(20, (4, 6)), latent(21, (6, 6))
    states = [lora_state(5, dim=WIDE), lora_state(6, dim=WIDE)]
    scaled = flux.model.process_latent_in
    conditions = [
        Condition(scaled(subject), grid(4, 6, offset=64.0), states[0], strengths[0]),
        Condition(scaled(spatial), grid(6, 6, row_step=4 / 3, column_step=2.0), states[1], strengths[1]),
    ]
    guidance = torch.tensor([about["guidance"]])
    expected = velocity(transformer, noise, text, about["pooled_output"], guidance, conditions)
    plain = velocity(transformer, noise, text, about["pooled_output"], guidance, [])

    model = flux
    for state, image, kind, strength in zip(states, (subject, spatial), ("subject", "spatial"), strengths, strict=True):
        file = easycontrol_files.from_state(state, kind)
        model = easycontrol.attach(model, file, 0, image, kind=kind, strength=strength)
    got = noise - scaled(sample(model, 1, noise=noise))  # one step from 1 to 0 ends at noise - velocity

    assert (expected - plain).abs().mean() > 0.02 * plain.abs().mean()
    close(noise - scaled(sample(flux, 1, noise=noise)), plain)
    close(got, expected)
