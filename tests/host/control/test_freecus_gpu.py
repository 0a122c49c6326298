"""FreeCus on CUDA: where the keys are made, a batch with guidance, and a model that does not fit.

`pytest -m gpu` runs these alone, because ComfyUI chooses its device once per process.
"""

from __future__ import annotations

import comfy.model_management
import pytest
import torch

from dit_toolkit.host import embedded
from dit_toolkit.host.control import freecus
from dit_toolkit.host.control.freecus_run import ReferencePass
from dit_toolkit.tests.host.tiny import close, latent, load_flux, sample

pytestmark = [pytest.mark.comfy, pytest.mark.gpu]

ROUNDING = 2**-5  # latents of order 1, a few roundings of bfloat16, 2^-8 each


@pytest.fixture(scope="module")
def model(tiny_state):
    """In bfloat16, on the device that ComfyUI puts it on."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA")
    model = load_flux(tiny_state, dtype=torch.bfloat16)
    assert model.load_device.type == "cuda"
    return model


@pytest.fixture
def freed(model):
    """With a reference and a mask in main memory, as core's nodes give them."""
    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(20))
    mask = torch.zeros(1, 64, 64)
    mask[:, 16:48, 16:48] = 1
    vae = embedded.load_vae()
    return lambda **settings: freecus.attach(model, image, mask, vae, layers="all", **settings)


def test_keys_are_made_where_the_model_runs(model, freed, monkeypatch):
    places, compute = set(), ReferencePass.compute

    def watched(self):
        keys = compute(self)
        places.update((x.device.type, x.dtype) for pair in keys.values() for x in pair)
        return keys

    monkeypatch.setattr(ReferencePass, "compute", watched)
    out = sample(freed())
    assert places == {("cuda", torch.bfloat16)}
    assert (out - sample(model)).abs().mean() > 0.01


def test_a_batch_with_guidance_has_a_mask_for_the_negative_prompt(freed):
    noise = latent(7, (8, 8), 2)
    together = sample(freed(), noise=noise, cfg=2.0)
    for i in range(2):
        close(together[[i]], sample(freed(), noise=noise[[i]], cfg=2.0), atol=2 * ROUNDING)


def test_weights_that_stay_in_main_memory_give_the_same_picture(model, freed, monkeypatch):
    """ComfyUI's --novram: every layer of the model comes over when it is used, for either pass."""
    expected = sample(freed())
    comfy.model_management.unload_all_models()
    monkeypatch.setattr(comfy.model_management, "vram_state", comfy.model_management.VRAMState.NO_VRAM)
    out = sample(freed())
    loaded, whole = model.loaded_size(), model.model_size()
    comfy.model_management.unload_all_models()
    assert loaded < 0.1 * whole
    close(out, expected, atol=ROUNDING)
