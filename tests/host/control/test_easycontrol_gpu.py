"""EasyControl on CUDA: where the keys lie, that it does not show, and a model that does not fit.

`pytest -m gpu` runs these alone, because ComfyUI chooses its device once per process.
"""

from __future__ import annotations

import comfy.model_management
import pytest
import torch

from dit_toolkit.host.control.conditions_run import Encoder
from dit_toolkit.host.part_of_run import PartOfRun
from dit_toolkit.tests.host.tiny import close, controlled, latent, load_flux, sample

pytestmark = [pytest.mark.comfy, pytest.mark.gpu]

# Keys are the same numbers wherever they are kept, and most kernels add them in the same order. Where one does not,
# latents of order 1 are off by a few roundings of bfloat16, 2^-8 each.
ROUNDING = 2**-5


@pytest.fixture(scope="module")
def model(tiny_state):
    """In bfloat16, on the device that ComfyUI puts it on."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA")
    model = load_flux(tiny_state, dtype=torch.bfloat16)
    assert model.load_device.type == "cuda"
    return model


@pytest.fixture
def places(monkeypatch):
    """Device and dtype of all keys and values that were made."""
    seen, encode = set(), Encoder.encode

    def watched(self, *given):
        keys = encode(self, *given)
        seen.update((x.device.type, x.dtype) for pair in keys.values() for x in pair)
        return keys

    monkeypatch.setattr(Encoder, "encode", watched)
    return seen


@pytest.mark.parametrize("kind", ["spatial", "subject"])
@pytest.mark.parametrize(("cache", "place"), [("offload to CPU", "cpu"), ("off", "cuda")])
def test_how_keys_are_kept_does_not_show(model, file, places, kind, cache, place):
    kept = sample(controlled(model, file=file, kind=kind), cfg=2.0)
    assert places == {("cuda", torch.bfloat16)}
    places.clear()
    close(sample(controlled(model, file=file, kind=kind, cache=cache), cfg=2.0), kept, atol=ROUNDING)
    assert places == {(place, torch.bfloat16)}
    assert (kept - sample(model, cfg=2.0)).abs().mean() > 0.01


@pytest.mark.parametrize("off", [{"strength": 0.0}, {"influence": 0.0}, {"part": PartOfRun(start=0.9999)}])
def test_off_is_the_model_without_the_node(model, file, off):
    plain = sample(model)
    assert torch.equal(sample(controlled(model, file=file, **off)), plain)


def test_two_conditions_over_a_batch_with_guidance(model, file):
    """Masks, rows of the batch, and keys from both memories meet in one call."""
    both = controlled(controlled(model, file=file, cache="offload to CPU"), seed=2, kind="subject", influence=0.5)
    noise = latent(7, (8, 8), 2)
    together = sample(both, noise=noise, cfg=2.0)
    assert torch.isfinite(together).all()
    assert (together - sample(model, noise=noise, cfg=2.0)).abs().mean() > 0.01


@pytest.mark.parametrize("cache", ["on GPU", "offload to CPU"])
def test_weights_that_stay_in_main_memory_give_the_same_picture(model, file, monkeypatch, cache):
    """ComfyUI's --novram: every layer of the model and of the LoRA comes over when it is used."""
    expected = sample(controlled(model, file=file, cache=cache))
    comfy.model_management.unload_all_models()
    monkeypatch.setattr(comfy.model_management, "vram_state", comfy.model_management.VRAMState.NO_VRAM)
    out = sample(controlled(model, file=file, cache=cache))
    loaded, whole = model.loaded_size(), model.model_size()
    comfy.model_management.unload_all_models()
    assert loaded < 0.1 * whole
    close(out, expected, atol=ROUNDING)
