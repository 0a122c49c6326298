"""Try-on on CUDA: where the keys lie, that it does not show, a model that does not fit, and pictures on two devices.

`pytest -m gpu` runs these alone, because ComfyUI chooses its device once per process.
"""

from __future__ import annotations

import comfy.model_management
import pytest
import torch

from dit_toolkit.host.control.conditions_run import Encoder
from dit_toolkit.host.part_of_run import PartOfRun
from dit_toolkit.models.control.try_on_image import (
    composite,
    fitted_masks,
    garments_on_white,
    masked_persons,
    placed_masks,
    plan,
)
from dit_toolkit.tests.host.control.test_try_on import SCALES, dressed, file_of
from dit_toolkit.tests.host.tiny import close, latent, load_flux, sample

pytestmark = [pytest.mark.comfy, pytest.mark.gpu]

ROUNDING = 2**-5  # as in test_easycontrol_gpu.py: a few roundings of bfloat16, 2^-8 each


@pytest.fixture(scope="module")
def model(tiny_state):
    """In bfloat16, on the device that ComfyUI puts it on."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA")
    model = load_flux(tiny_state, dtype=torch.bfloat16)
    assert model.load_device.type == "cuda"
    return model


@pytest.fixture(scope="module")
def try_on():
    """Both branches, with alphas."""
    return file_of(scales=SCALES)


@pytest.fixture
def places(monkeypatch):
    """Image, device and dtype of all keys and values that were made."""
    seen, encode = set(), Encoder.encode

    def watched(self, *given):
        keys = encode(self, *given)
        name = type(self.settings).__name__
        seen.update((name, x.device.type, x.dtype) for pair in keys.values() for x in pair)
        return keys

    monkeypatch.setattr(Encoder, "encode", watched)
    return seen


@pytest.mark.parametrize(("cache", "place"), [("offload to CPU", "cpu"), ("off", "cuda")])
def test_how_keys_are_kept_does_not_show(model, try_on, places, cache, place):
    kept = sample(dressed(model, try_on), cfg=2.0)
    assert places == {(name, "cuda", torch.bfloat16) for name in ("Person", "Garment")}
    places.clear()
    close(sample(dressed(model, try_on, cache=cache), cfg=2.0), kept, atol=ROUNDING)
    assert places == {(name, place, torch.bfloat16) for name in ("Person", "Garment")}
    assert (kept - sample(model, cfg=2.0)).abs().mean() > 0.01


@pytest.mark.parametrize("off", [{"person_strength": 0.0, "garment_strength": 0.0}, {"part": PartOfRun(start=0.9999)}])
def test_off_is_the_model_without_the_node(model, try_on, off):
    assert torch.equal(sample(dressed(model, try_on, **off)), sample(model))


@pytest.mark.parametrize("branches", [(1, 2), (1, None), (None, 2)])
def test_a_batch_of_garments_with_guidance(model, branches):
    """Plain tokens beside a LoRA, one person for all rows, a garment for each."""
    noise, garments = latent(7, (8, 8), 2), latent(40, (8, 6), 2)
    together = sample(dressed(model, file_of(*branches), garment=garments), noise=noise, cfg=2.0)
    assert torch.isfinite(together).all()
    assert (together - sample(model, noise=noise, cfg=2.0)).abs().mean() > 0.01


@pytest.mark.parametrize("cache", ["on GPU", "offload to CPU"])
def test_weights_that_stay_in_main_memory_give_the_same_picture(model, try_on, monkeypatch, cache):
    """ComfyUI's --novram: every layer of the model and of both LoRAs comes over when it is used."""
    expected = sample(dressed(model, try_on, cache=cache))
    comfy.model_management.unload_all_models()
    monkeypatch.setattr(comfy.model_management, "vram_state", comfy.model_management.VRAMState.NO_VRAM)
    out = sample(dressed(model, try_on, cache=cache))
    loaded, whole = model.loaded_size(), model.model_size()
    comfy.model_management.unload_all_models()
    assert loaded < 0.1 * whole
    close(out, expected, atol=ROUNDING)


@pytest.mark.parametrize("pictures", ["cpu", "cuda"])
@pytest.mark.parametrize("masks", ["cpu", "cuda"])
def test_masks_and_pictures_may_lie_on_two_devices(model, pictures, masks):
    """As with ComfyUI's --gpu-only, where a custom node gives its masks on the CPU."""
    person = torch.rand(1, 60, 44, 3, generator=torch.Generator().manual_seed(0)).to(pictures)
    mask = torch.zeros(1, 60, 44, device=masks)
    mask[:, 20:40, 10:30] = 1
    paste = plan(fitted_masks(mask, person, 3), 0.5, (48, 32), 3)
    shown, small = masked_persons(person, paste, "grey")
    white = garments_on_white(person, fitted_masks(mask, person), (48, 32))
    assert {x.device.type for x in (shown, small, white)} == {pictures}
    other = "cpu" if pictures == "cuda" else "cuda"
    pasted = composite(shown.to(other), person.to(other), paste, 3, placed_masks(mask, paste))
    assert pasted.device.type == other
    outside = ~paste.masks[0].to(other)
    assert torch.equal(pasted[0][outside], person[0].to(other)[outside])
    filled = (pasted[0] - 127 / 255).abs().amax(-1) < 0.02
    assert filled[~outside].float().mean() > 0.2  # beyond the feather, and the waves of the noise around the mask
