"""Folders of sets; and that ComfyUI's own loader puts a published In-Context LoRA where it belongs."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

pytestmark = pytest.mark.comfy

import folder_paths  # noqa: E402

from dit_toolkit.host.control.in_context_lora import EXAMPLE, fingerprint, folders, read_sets  # noqa: E402
from dit_toolkit.models.control.panel_layout import panel_layout  # noqa: E402
from dit_toolkit.models.control.panel_pictures import split  # noqa: E402
from dit_toolkit.tests.host import tiny  # noqa: E402
from dit_toolkit.tests.host.control.dense_flux import random_transformer  # noqa: E402


def layout(rows=1, columns=2, prefix="", tags="auto"):
    return panel_layout("custom", rows, columns, 32, 16, tags, prefix, "")


def save(path, colour, size=(32, 16), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """`input/sets` with one good set of two."""
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path))
    place = tmp_path / "sets"
    save(place / "first" / "1.png", (255, 0, 0))
    save(place / "first" / "2.png", (0, 0, 255))
    (place / "first" / "caption.txt").write_text("  two colours\n", encoding="utf-8")
    return place


def colours(found):
    return [tuple((panel[8, 16] * 255).round().int().tolist()) for panel in split(layout(), found.canvas)]


RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def test_a_set_is_a_canvas_and_its_caption(folder):
    (found,) = read_sets("sets", layout(prefix="[PAIR]"), "crop")
    assert found.canvas.shape == (1, 16, 64, 3)
    assert colours(found) == [RED, BLUE]
    assert found.caption == "two colours"  # as it is: no prefix, no tags


def test_captions_of_single_pictures_are_joined_as_prompts_are(folder):
    place = folder / "second"
    save(place / "a.JPG", GREEN)
    save(place / "b.webp", RED)
    (place / "a.txt").write_text("grass.", encoding="utf-8")
    (place / "b.txt").write_text("\ufeffa rose", encoding="utf-8")  # as some editors save it
    assert read_sets("sets", layout(prefix="[PAIR]"), "crop")[1].caption == "[PAIR] [LEFT] grass; [RIGHT] a rose."
    (place / "summary.txt").write_text("A garden", encoding="utf-8")
    assert read_sets("sets", layout(), "crop")[1].caption == "A garden; [LEFT] grass; [RIGHT] a rose."


def test_sets_and_pictures_come_in_the_order_of_their_names(folder):
    for name in ("set 10", "set 9"):
        save(folder / name / "picture 10.png", BLUE)
        save(folder / name / "picture 9.png", GREEN)
        (folder / name / "caption.txt").write_text(name, encoding="utf-8")
    (folder / ".hidden").mkdir()
    (folder / "notes.txt").write_text("not a set", encoding="utf-8")
    found = read_sets("sets", layout(), "crop")
    assert [each.caption for each in found] == ["two colours", "set 9", "set 10"]
    assert colours(found[1]) == [GREEN, BLUE]


def test_pictures_of_any_kind_and_size_fit(folder):
    place = folder / "first"
    save(place / "1.png", (0, 255, 0, 128), size=(100, 300), mode="RGBA")
    Image.fromarray(np.full((7, 9), 65535, np.uint16)).save(place / "2.png")
    (found,) = read_sets("sets", layout(), "crop")
    assert colours(found) == [GREEN, (255, 255, 255)]


def test_photographs_are_turned_upright(folder):
    picture = Image.new("RGB", (16, 32), RED)
    picture.paste(BLUE, (0, 16, 16, 32))  # below; upright it is on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by a quarter
    picture.save(folder / "first" / "1.png", exif=exif)
    panel = split(layout(), read_sets("sets", layout(), "crop")[0].canvas)[0]
    assert panel.shape == (16, 32, 3)
    assert tuple(panel[8, 4].tolist()) == (0, 0, 1)
    assert tuple(panel[8, 28].tolist()) == (1, 0, 0)


def remove_caption(place):
    (place / "first" / "caption.txt").unlink()


def caption_only_the_first(place):
    remove_caption(place)
    (place / "first" / "1.txt").write_text("red", encoding="utf-8")


def empty_caption(place):
    (place / "first" / "caption.txt").write_text(" \n", encoding="utf-8")


def foreign_caption(place):
    (place / "first" / "caption.txt").write_bytes("größe".encode("latin-1"))


def one_too_many(place):
    save(place / "first" / "3.png", GREEN)


def one_too_few(place):
    (place / "first" / "2.png").unlink()


def broken(place):
    (place / "first" / "2.png").write_bytes(b"not a picture")


def half_a_png(place):
    """Core's Load Image fills the rest with grey."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(place / "first" / "2.png")
    halve(place / "first" / "2.png")


def half_a_jpeg(place):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    (place / "first" / "2.png").unlink()
    Image.fromarray(noise).save(place / "first" / "2.jpg")
    halve(place / "first" / "2.jpg")


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def deep(place):
    Image.fromarray(np.full((7, 9), 70000, np.int32)).save(place / "first" / "2.png", format="TIFF")


def no_sets(place):
    for file in (place / "first").iterdir():
        file.rename(place / file.name)
    (place / "first").rmdir()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (remove_caption, "Set 'first' has no caption: write caption.txt for the whole set, or one text per picture; "
         "there is no 1.txt, 2.txt."),
        (caption_only_the_first, "there is no 2.txt."),
        (empty_caption, "Set 'first' has an empty caption: caption.txt."),
        (foreign_caption, "Set 'first': caption.txt is not UTF-8 text. Save it as UTF-8."),
        (one_too_many, "Set 'first' needs 2 pictures, one per panel, and has 3: 1.png, 2.png, 3.png."),
        (one_too_few, "Set 'first' needs 2 pictures, one per panel, and has 1: 1.png."),
        (broken, "Set 'first': 2.png is no picture that can be read."),
        (half_a_png, "Set 'first': 2.png is damaged, or a part of it is missing. Save it again. (image file is trunc"),
        (half_a_jpeg, "Set 'first': 2.jpg is damaged, or a part of it is missing. Save it again. (image file is trunc"),
        (deep, "Set 'first': 2.png has more than 16 bits. Save it with 8 or 16."),
        (no_sets, "'sets' has no sets: put the pictures of each set into a folder of their own inside it."),
    ],
)  # fmt: skip
def test_what_a_set_lacks_is_said_with_its_name(folder, change, sentence):
    read_sets("sets", layout(), "crop")
    change(folder)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        read_sets("sets", layout(), "crop")


def test_a_picture_too_large_to_be_opened_is_said_with_its_set(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"Set 'first': 1\.png is no picture that can be read\. .*\(Image size"):
        read_sets("sets", layout(), "crop")


def test_only_folders_of_the_input_folder_are_read(folder):
    for outside in ("../sets", "", ".", "sets/.."):  # the input folder itself, too: it is no folder of sets
        with pytest.raises(ValueError, match="is no folder inside ComfyUI's input folder"):
            read_sets(outside, layout(), "crop")
    with pytest.raises(FileNotFoundError, match="There is no folder 'other' in ComfyUI's input folder"):
        read_sets("other", layout(), "crop")


def test_the_folder_is_read_again_when_a_file_changes(folder):
    before = fingerprint("sets")
    assert fingerprint("sets") == before
    (folder / "first" / "caption.txt").write_text("other words", encoding="utf-8")
    assert fingerprint("sets") != before
    assert fingerprint(None) == ""


def test_the_example_ships_20_sets_of_two():
    found = read_sets(EXAMPLE, panel_layout("custom", 1, 2, 96, 96, "auto", "", ""), "crop")
    assert len(found) == 20
    assert {each.canvas.shape for each in found} == {(1, 96, 192, 3)}
    assert len({each.caption for each in found}) == 20
    assert all(each.caption.startswith("[LEFT] a doll") and "; [RIGHT] the doll" in each.caption for each in found)
    assert folders()[0] == EXAMPLE


# The published files: ten LoRAs over every linear layer of FLUX.1's blocks, under diffusers' names

DOUBLE = {  # ComfyUI's fused layer: diffusers' layers, from the first row on
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
}
SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
RANK = 2


def fused_layers(double, single):
    """Every layer of ComfyUI's blocks, and the diffusers layers it holds."""
    layers = {f"double_blocks.{i}.{a}": [f"transformer_blocks.{i}.{b}" for b in bs]
              for i in range(double) for a, bs in DOUBLE.items()}  # fmt: skip
    return layers | {f"single_blocks.{i}.{a}": [f"single_transformer_blocks.{i}.{b}" for b in bs]
                     for i in range(single) for a, bs in SINGLE.items()}  # fmt: skip


def test_a_published_file_has_494_layers():
    assert sum(map(len, fused_layers(19, 38).values())) == 494


@pytest.fixture(scope="module")
def transformer():
    diffusers = pytest.importorskip("diffusers")
    return random_transformer(diffusers)


@pytest.fixture(scope="module")
def lora(transformer):
    """(A, B) of every linear layer in the blocks, as found in diffusers' model."""
    generator = torch.Generator().manual_seed(1)
    pairs = {}
    for name, module in transformer.named_modules():
        if "transformer_blocks" in name and isinstance(module, torch.nn.Linear):
            down = torch.randn(RANK, module.in_features, generator=generator) / module.in_features**0.5
            up = torch.randn(module.out_features, RANK, generator=generator) * 0.2
            pairs[name] = down, up
    return pairs


@pytest.fixture(scope="module")
def with_lora(transformer, lora):
    """diffusers' model with W + B A in place of every W."""
    model = copy.deepcopy(transformer)
    modules = dict(model.named_modules())
    for name, (down, up) in lora.items():
        modules[name].weight.data = modules[name].weight + up @ down
    return model


@pytest.fixture(scope="module")
def patched(transformer, lora, tmp_path_factory):
    """ComfyUI's model of the same weights, with the LoRA from a file through the stock loader."""
    from nodes import LoraLoaderModelOnly

    from dit_toolkit.tests.host.tiny import load_flux

    place = tmp_path_factory.mktemp("loras")
    state = {}
    for name, (down, up) in lora.items():
        state[f"transformer.{name}.lora_A.weight"], state[f"transformer.{name}.lora_B.weight"] = down, up
    save_file(state, place / "in_context_test.safetensors")
    folders = folder_paths.folder_names_and_paths["loras"][0]
    folders.append(str(place))
    try:
        (model,) = LoraLoaderModelOnly().load_lora_model_only(
            load_flux(transformer.state_dict()), "in_context_test.safetensors", 1.0
        )
    finally:
        folders.remove(str(place))
    return model


def test_every_fused_slice_is_the_weight_plus_its_own_lora(with_lora, transformer, lora, patched):
    import comfy.lora

    layers = fused_layers(tiny.DOUBLE, tiny.SINGLE)
    assert sorted(name for names in layers.values() for name in names) == sorted(lora)
    assert set(patched.patches) == {f"diffusion_model.{name}.weight" for name in layers}
    after, before = dict(with_lora.named_modules()), dict(transformer.named_modules())
    for name, parts in layers.items():
        key = f"diffusion_model.{name}.weight"
        plain = patched.model.state_dict()[key]
        assert torch.equal(plain, torch.cat([before[part].weight for part in parts])), name
        got = comfy.lora.calculate_weight(patched.patches[key], plain.clone(), key)
        torch.testing.assert_close(got, torch.cat([after[part].weight for part in parts]), rtol=0, atol=1e-6)


def test_the_model_with_the_lora_equals_diffusers(with_lora, transformer, patched):
    from dit_toolkit.tests.host.tiny import close, latent, prompt, sample

    h, w = 8, 12
    noise, ((text, about),) = latent(7, (h, w)), prompt()

    def velocity(model):
        tokens = noise.view(1, 16, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, h * w // 4, 64)
        places = torch.tensor([[0.0, i, j] for i in range(h // 2) for j in range(w // 2)])
        (out,) = model(
            hidden_states=tokens,
            encoder_hidden_states=text,
            pooled_projections=about["pooled_output"],
            timestep=torch.ones(1),
            img_ids=places,
            txt_ids=torch.zeros(text.shape[1], 3),
            guidance=torch.tensor([about["guidance"]]),
            return_dict=False,
        )
        return out.view(1, h // 2, w // 2, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(1, 16, h, w)

    with torch.no_grad():
        expected, plain = velocity(with_lora), velocity(transformer)
    got = noise - patched.model.process_latent_in(sample(patched, 1, noise=noise))  # one step from noise level 1 to 0
    assert (expected - plain).abs().mean() > 0.1 * plain.abs().mean()
    close(got, expected, atol=1e-5)
