"""CLEAR's weights on a FLUX.1 that ComfyUI samples: the model with those weights, whatever else patches it."""

import pytest
import safetensors.torch
import torch

pytestmark = pytest.mark.comfy

import comfy.sd  # noqa: E402
import folder_paths  # noqa: E402

from dit_toolkit.host import model_files  # noqa: E402
from dit_toolkit.host.accelerate import clear_files  # noqa: E402
from dit_toolkit.host.accelerate.clear_files import ClearFile, load, with_weights  # noqa: E402
from dit_toolkit.models.accelerate.clear import Variant  # noqa: E402
from dit_toolkit.models.accelerate.clear_keys import parse  # noqa: E402
from dit_toolkit.tests.host import tiny  # noqa: E402
from dit_toolkit.tests.host.families import FAMILIES  # noqa: E402
from dit_toolkit.tests.models.accelerate.test_clear_keys import applied, published  # noqa: E402


def random_file(name="clear_local_16.safetensors", **sizes) -> ClearFile:
    state = published(tiny.DOUBLE, tiny.SINGLE, dim=tiny.HIDDEN, **sizes)
    return ClearFile(name, parse({key: value * 0.04 for key, value in state.items()}, name))


@pytest.fixture(scope="module")
def replaced(tiny_state):
    """A model that was loaded with the file's weights in it."""
    return applied(random_file().weights, tiny_state)


def test_it_is_the_model_with_those_weights(tiny_flux, replaced):
    found = tiny.sample(with_weights(tiny_flux, random_file()))
    assert torch.equal(found, tiny.sample(tiny.load_flux(replaced)))
    assert not torch.allclose(found, tiny.sample(tiny_flux), atol=1e-2)


def test_the_model_that_was_given_stays_as_it_was(tiny_flux):
    before = tiny.sample(tiny_flux)
    tiny.sample(with_weights(tiny_flux, random_file()))
    assert not tiny_flux.patches
    assert torch.equal(tiny.sample(tiny_flux), before)


def with_lora(model):
    """An ordinary LoRA on layers that CLEAR replaces: a whole one, and the one of which it replaces a part."""
    generator = torch.Generator().manual_seed(5)
    lora = {}
    for name, rows in (("double_blocks_0_img_attn_qkv", 3 * tiny.HIDDEN), ("single_blocks_1_linear1", 7 * tiny.HIDDEN)):
        lora[f"lora_unet_{name}.lora_up.weight"] = torch.randn(rows, 4, generator=generator) * 0.1
        lora[f"lora_unet_{name}.lora_down.weight"] = torch.randn(4, tiny.HIDDEN, generator=generator) * 0.1
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)
    return patched


def test_a_lora_before_or_after_acts_on_top(tiny_flux, replaced):
    expected = tiny.sample(with_lora(tiny.load_flux(replaced)))
    tiny.close(tiny.sample(with_lora(with_weights(tiny_flux, random_file()))), expected)
    tiny.close(tiny.sample(with_weights(with_lora(tiny_flux), random_file())), expected)
    assert not torch.allclose(expected, tiny.sample(tiny.load_flux(replaced)), atol=1e-2)


def test_an_fp8_model_gets_the_weights_rounded_as_its_own(tiny_state, replaced):
    """Core rounds patched weights at random between the two neighbours in fp8: as close as those, not equal."""
    fp8 = tiny.load_flux(tiny_state, dtype=torch.float8_e4m3fn)
    found = tiny.sample(with_weights(fp8, random_file()))
    rounded = tiny.sample(tiny.load_flux(replaced, dtype=torch.float8_e4m3fn))
    exact, other = tiny.sample(tiny.load_flux(replaced)), tiny.sample(fp8)
    error = (found - exact).norm()
    assert error < 2.5 * (rounded - exact).norm()
    assert error < 0.5 * (other - exact).norm()


def test_weights_in_another_packing_are_refused(tiny_state):
    model = tiny.load_flux(tiny_state)
    layer = model.model.diffusion_model.double_blocks[0].img_attn.qkv
    layer.weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"quantised like this .*torch.uint8 \(4, 4\).*choose 'none \(mask only\)'"):
        with_weights(model, random_file())


def test_a_file_for_another_size_is_refused(tiny_flux):
    small = ClearFile("f", parse(published(2, 2, dim=8), "f"))
    with pytest.raises(ValueError, match=r"f is made for hidden size 8 and 2\+2 blocks, the model has 128 and 2\+2"):
        with_weights(tiny_flux, small)


def test_another_family_is_refused():
    with pytest.raises(ValueError, match=r"Apply CLEAR needs a FLUX\.1 model, got Chroma"):
        with_weights(FAMILIES["chroma"].load(), random_file())


def test_the_pattern_is_what_the_file_was_trained_for():
    file = random_file("clear_local_8_down_4.safetensors", factor=4)
    assert file.variant(0, 0) == Variant(8, 4)
    assert file.variant(12, 4) == Variant(12, 4)
    assert random_file("mine.safetensors").variant(7, 0) == Variant(7, 0)


@pytest.mark.parametrize(
    ("name", "sizes", "asked", "words"),
    [
        ("mine.safetensors", {}, (0, 0), "The name of mine.safetensors does not say its radius. Set 'radius'"),
        ("clear_local_8.safetensors", {}, (0, 4), "was trained without pooled cells, 'pooling' is 4. Set it to 0"),
        ("clear_local_8_down_4.safetensors", {"factor": 4}, (0, 2), "was trained for cells of 4, 'pooling' is 2"),
    ],
)
def test_what_the_file_cannot_do_is_refused(name, sizes, asked, words):
    with pytest.raises(ValueError, match=words):
        random_file(name, **sizes).variant(*asked)


def test_files_are_found_beside_loras_and_in_a_folder_of_their_own(tmp_path, monkeypatch):
    loras, own = tmp_path / "loras", tmp_path / "clear"
    for folder in (loras, own):
        folder.mkdir()
        safetensors.torch.save_file(published(1, 1), folder / f"clear_local_16_{folder.name}.safetensors")
    (own / "notes.ckpt").touch()
    known = folder_paths.folder_names_and_paths
    monkeypatch.setitem(known, "loras", ([str(loras)], {".safetensors"}))
    monkeypatch.setitem(known, clear_files.FOLDER, ([], set()))
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    found = ["clear_local_16_clear.safetensors", "clear_local_16_loras.safetensors"]
    assert sorted(model_files.names(clear_files.FOLDER)) == found
    assert load(found[1]).weights.summary == "1+1 blocks, hidden size 12, 14 tensors"
    with pytest.raises(FileNotFoundError, match=r"gone.safetensors is not in models/clear or models/loras"):
        load("gone.safetensors")
