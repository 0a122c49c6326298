"""DynamiCtrl on CUDA: half precision, fp8, and a model that does not fit.

`pytest -m gpu` runs these alone, because ComfyUI chooses its device once per process.
"""

from __future__ import annotations

import comfy.model_management
import pytest
import torch
from safetensors.torch import save_file

pytestmark = [pytest.mark.comfy, pytest.mark.gpu]

from dit_toolkit.host.animate import dynamictrl_files  # noqa: E402
from dit_toolkit.tests.host.animate.tiny_dynamictrl import close, latent, prompt, published, sample  # noqa: E402

POSE = latent(20)
ROUNDING = 2**-5  # of bfloat16, over some layers


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> str:
    """In bfloat16, as the published ones are."""
    path = tmp_path_factory.mktemp("dynamictrl") / "tiny.safetensors"
    save_file({key: tensor.bfloat16() for key, tensor in published().items()}, path)
    return str(path)


def drawn(model) -> torch.Tensor:
    return sample(model, positive=prompt(3, pose=POSE), negative=prompt(4, pose=POSE), cfg=3.0)


@pytest.mark.parametrize("dtype", ["default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"])
def test_it_acts_and_stays_finite(file, dtype):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA")
    model = dynamictrl_files.load(file, dtype).model
    assert model.load_device.type == "cuda"
    out = drawn(model)
    assert out.isfinite().all()
    assert (out - sample(model, cfg=3.0)).abs().mean() > 0.01


def test_weights_that_stay_in_main_memory_give_the_same_video(file, monkeypatch):
    """ComfyUI's --novram: every layer of the model and of the pose norms comes over when it is used."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA")
    expected = drawn(dynamictrl_files.load(file).model)
    comfy.model_management.unload_all_models()
    monkeypatch.setattr(comfy.model_management, "vram_state", comfy.model_management.VRAMState.NO_VRAM)
    close(drawn(dynamictrl_files.load(file).model), expected, atol=ROUNDING)
    comfy.model_management.unload_all_models()
