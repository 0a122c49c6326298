"""DiT4SR on a MODEL that core has spread over several devices reaches all of them. Here both are the CPU."""

from __future__ import annotations

import comfy.sd
import pytest
import torch
from safetensors.torch import save_file

pytestmark = pytest.mark.comfy

from dit_toolkit.host.restore import dit4sr, dit4sr_files  # noqa: E402
from dit_toolkit.host.restore.dit4sr_settings import DiT4SR  # noqa: E402
from dit_toolkit.tests.host.restore.tiny_dit4sr import base, latent, published, sample  # noqa: E402

SIZE = (12, 12)  # 4 windows


@pytest.fixture
def file(tmp_path):
    """A file on disk, so that core can read it again for another device."""
    save_file(published(), path := str(tmp_path / "photo.safetensors"))
    state, metadata = dit4sr_files.contents(path, "photo.safetensors")
    return dit4sr_files.from_state(state, "photo.safetensors", "auto", path, metadata)


@pytest.fixture
def spread():
    """A MODEL with a clone for a second device, as MultiGPU CFG Split leaves it."""

    def again(disable_dynamic=False):
        return comfy.sd.load_diffusion_model_state_dict({key: w.clone() for key, w in published().items()})

    model = base().clone()
    model.cached_patcher_init = (again, ())
    other = model.deepclone_multigpu(new_load_device=torch.device("cpu"))
    other.is_multigpu_base_clone = True
    model.set_additional_models("multigpu", [other])
    return model


def restored(model, file):
    settings = DiT4SR(None, file.name, latent(12, SIZE), tile=8, overlap=4)
    return dit4sr.attach(model, file.patcher, file.made_for, settings)


def on_the_second(model):
    """The clone that core makes for the second device when sampling starts."""
    model.match_multigpu_clones()
    (clone,) = model.get_additional_models_with_key("multigpu")
    return clone


def test_the_patch_reaches_every_device(spread, file):
    both = restored(spread, file)
    first = both.clone()
    first.remove_additional_models("multigpu")
    expected = sample(first, size=SIZE)
    assert torch.equal(sample(on_the_second(both), size=SIZE), expected)
    assert (expected - sample(base(), size=SIZE)).abs().mean() > 0.01


def test_a_patch_that_did_not_come_along_is_an_error(spread, file):
    clone = on_the_second(restored(spread, file))
    for key in list(clone.additional_models):
        clone.remove_additional_models(key)
    with pytest.raises(RuntimeError, match=r"^Apply DiT4SR: the patch photo\.safetensors did not reach cpu\. Put "):
        sample(clone, size=SIZE)


def test_the_patch_goes_to_the_device_of_its_model(file):
    elsewhere = base().clone()
    elsewhere.load_device = torch.device("meta", 1)
    (patch,) = restored(elsewhere, file).get_additional_models()
    assert patch.load_device == torch.device("meta", 1)
    assert patch.model is not file.patcher.model
    assert file.patcher.load_device == base().load_device


def test_each_tensor_of_a_file_keeps_its_dtype():
    state = dict(published())
    for part, dtype in (("to_q_control", torch.float16), ("to_v_control", torch.bfloat16)):
        state = {key: weight.to(dtype) if part in key else weight for key, weight in state.items()}
    mixed = dit4sr_files.from_state(state, "mixed")
    assert {weight.dtype for weight in mixed.patcher.model.parameters()} == {
        torch.float16,
        torch.bfloat16,
        torch.float32,
    }
    assert sample(restored(base(), mixed), size=SIZE).isfinite().all()
