"""Conditions on a MODEL that core has spread over several devices reach all of them. Here both are the CPU."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from dit_toolkit.host import model_files
from dit_toolkit.host.control import easycontrol_files, try_on
from dit_toolkit.host.control.try_on_files import TryOnFile
from dit_toolkit.tests.host import tiny
from dit_toolkit.tests.host.control.test_try_on import GARMENT, PERSON, checkpoint
from dit_toolkit.tests.host.tiny import controlled, latent, load_flux, sample

pytestmark = pytest.mark.comfy


@pytest.fixture
def file(tmp_path):
    """A LoRA in a file, so that core can read it again for another device."""
    save_file(tiny.lora_state(), path := str(tmp_path / "lora.safetensors"))
    state, _ = model_files.read(path, "lora.safetensors")
    return easycontrol_files.from_state(state, "lora.safetensors", path)


@pytest.fixture
def spread(tiny_flux, tiny_state):
    """A MODEL with a clone for a second device, as MultiGPU CFG Split leaves it."""
    model = tiny_flux.clone()
    model.cached_patcher_init = (lambda disable_dynamic=False: load_flux(tiny_state), ())
    other = model.deepclone_multigpu(new_load_device=torch.device("cpu"))
    other.is_multigpu_base_clone = True
    model.set_additional_models("multigpu", [other])
    return model


def on_the_second(model):
    """The clone that core makes for the second device when sampling starts."""
    model.match_multigpu_clones()
    (clone,) = model.get_additional_models_with_key("multigpu")
    return clone


def alone(model):
    """`model` as it computes on the first device."""
    single = model.clone()
    single.remove_additional_models("multigpu")
    return single


def test_two_conditions_of_one_file_reach_every_device(spread, file):
    both = controlled(controlled(spread, file=file, condition=latent(30)), file=file, condition=latent(31))
    expected = sample(alone(both))
    one = sample(alone(controlled(spread, file=file, condition=latent(30))))
    found = sample(on_the_second(both))
    assert torch.equal(found, expected)
    assert not torch.allclose(found, one, atol=1e-3)


def test_a_branch_without_a_lora_reaches_every_device(spread):
    file = person_file()
    adapter_of(file).cached_patcher_init = (lambda disable_dynamic=False: adapter_of(person_file()), ())
    dressed_up = try_on.attach(spread, file, PERSON, GARMENT)
    expected = sample(alone(dressed_up))
    found = sample(on_the_second(dressed_up))
    assert torch.equal(found, expected)
    without = sample(alone(try_on.attach(spread, file, PERSON, GARMENT, garment_strength=0)))
    assert not torch.allclose(found, without, atol=1e-3)


def person_file():
    return TryOnFile("person.safetensors", checkpoint(garment=None))


def adapter_of(file):
    return file.adapter("person", (tiny.DOUBLE, tiny.SINGLE))


def test_a_lora_that_did_not_come_along_is_an_error(spread, file):
    clone = on_the_second(controlled(spread, file=file))
    for key in list(clone.additional_models):
        clone.remove_additional_models(key)
    with pytest.raises(RuntimeError, match=r"^Apply EasyControl: the LoRA lora\.safetensors did not reach cpu\. Put "):
        sample(clone)


def test_a_lora_goes_to_the_device_of_its_model(tiny_flux, file):
    elsewhere = tiny_flux.clone()
    elsewhere.load_device = torch.device("meta", 1)
    patched = controlled(elsewhere, file=file)
    (lora,) = patched.get_additional_models()
    assert lora.load_device == torch.device("meta", 1)
    assert lora.model is not file.patchers[0].model
    assert file.patchers[0].load_device == tiny_flux.load_device
    assert lora.offload_device == elsewhere.offload_device


def test_each_tensor_of_a_file_keeps_its_dtype(tiny_flux):
    state = tiny.lora_state()
    first, *_, last = state
    state[first], state[last] = state[first].half(), state[last].bfloat16()
    lora = easycontrol_files.from_state(state, "mixed.safetensors").patchers[0].model
    assert {weight.dtype for weight in lora.parameters()} == {torch.float16, torch.bfloat16, torch.float32}
    assert torch.isfinite(sample(controlled(tiny_flux, file=easycontrol_files.from_state(state, "mixed")))).all()
