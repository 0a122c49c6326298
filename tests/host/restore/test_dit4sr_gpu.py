"""DiT4SR on CUDA: half precision, tiles, and a model that does not fit.

`pytest -m gpu` runs these alone, because ComfyUI chooses its device once per process.
"""

from __future__ import annotations

import comfy.model_management
import comfy.sd
import pytest
import torch

pytestmark = [pytest.mark.comfy, pytest.mark.gpu]

from dit_toolkit.tests.host.restore.tiny_dit4sr import (  # noqa: E402
    VARIANTS,
    close,
    file,
    latent,
    published,
    restored,
    sample,
)

SIZE = (12, 20)
LR = latent(12, SIZE)

# The same numbers in the same order, but for a kernel that adds in another: latents of order 1 are then off by a few
# roundings of bfloat16, 2^-8 each.
ROUNDING = 2**-5


@pytest.fixture(scope="module")
def model():
    """In bfloat16, on the device that ComfyUI puts it on."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA")
    loaded = comfy.sd.load_diffusion_model_state_dict(
        {key: weight.clone() for key, weight in published().items()}, model_options={"dtype": torch.bfloat16}
    )
    assert loaded is not None
    assert loaded.load_device.type == "cuda"
    return loaded


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("settings", [{}, {"tile": 0}, {"tile_batch": 3}, {"strength": 0.5}])
def test_it_acts_and_stays_finite(model, variant, settings):
    out = sample(restored(model, variant, LR, **settings), size=SIZE, cfg=3.0)
    assert out.isfinite().all()
    assert (out - sample(model, size=SIZE, cfg=3.0)).abs().mean() > 0.01


def test_tiles_side_by_side_are_those_one_after_the_other(model):
    one = sample(restored(model, lr=LR), size=SIZE, cfg=3.0)
    close(sample(restored(model, lr=LR, tile_batch=8), size=SIZE, cfg=3.0), one, atol=ROUNDING)


def test_weights_that_stay_in_main_memory_give_the_same_picture(model, monkeypatch):
    """ComfyUI's --novram: every layer of the model and of the patch comes over when it is used."""
    expected = sample(restored(model, lr=LR), size=SIZE)
    comfy.model_management.unload_all_models()
    monkeypatch.setattr(comfy.model_management, "vram_state", comfy.model_management.VRAMState.NO_VRAM)
    out = sample(restored(model, lr=LR), size=SIZE)
    patch = file().patcher
    held = [(each.loaded_size(), each.model_size()) for each in (model, patch)]
    comfy.model_management.unload_all_models()
    assert all(loaded < 0.1 * whole for loaded, whole in held)
    close(out, expected, atol=ROUNDING)
