"""The try-on nodes: what they offer, what they refuse, and that the four of them are one workflow."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import folder_paths
import pytest
import torch
from comfy import supported_models
from safetensors.torch import save_file

from dit_toolkit.models.control.mc_vton_keys import Checkpoint, Settings, write, write_metadata
from dit_toolkit.nodes.try_on import ApplyTryOn, LoadTryOn, TryOnComposite, TryOnPrepare
from dit_toolkit.tests.host import tiny
from dit_toolkit.tests.host.control.test_try_on import file_of, random_branch
from dit_toolkit.tests.nodes.calling import run_node

pytestmark = pytest.mark.comfy


def prepare(**values):
    values = {"person": image(60, 44), "mask": hole(60, 44), "garment": image(30, 30, seed=1), **values}
    return run_node(TryOnPrepare, **values)


def composite(result, person, crop, feather, mask=None):
    return TryOnComposite.execute(result=result, person=person, crop=crop, feather=feather, mask=mask).args[0]


def apply(model, file, **values):
    given = {"vae": Vae(), "person": image(64, 64), "garment": image(64, 48, seed=1), **values}
    return run_node(ApplyTryOn, model=model, try_on=file, **given)[0]


def image(height, width, batch=1, channels=3, seed=0):
    return torch.rand(batch, height, width, channels, generator=torch.Generator().manual_seed(seed))


def hole(height, width, count=1):
    mask = torch.zeros(count, height, width)
    mask[:, height // 3 : height // 2, width // 4 : width // 2] = 1
    return mask


class Vae:
    """Encodes as a VAE does: 8 pixels to one latent pixel, 16 channels. Keeps what it was given."""

    def __init__(self):
        self.seen = []

    def encode(self, pixels):
        self.seen.append(pixels)
        small = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
        return small.repeat(1, 6, 1, 1)[:, :16]


@pytest.fixture(scope="module")
def file():
    return file_of()


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Model folders of our own, with nothing in them."""
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    loras = tmp_path / "loras"
    loras.mkdir()
    known = {**folder_paths.folder_names_and_paths, "loras": ([str(loras)], folder_paths.supported_pt_extensions)}
    known.pop("try_on", None)
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def test_inputs_keep_their_places():
    """Saved workflows hold widget values by position: adding at the end is free, everything else is not."""
    ids = {
        node.define_schema().node_id: [i.id for i in node.define_schema().inputs] for node in (TryOnPrepare, ApplyTryOn)
    }
    assert ids["DiTTryOnPrepare"] == [
        "person", "mask", "garment", "garment_mask", "size", "megapixels", "width", "height", "crop", "dilation",
        "margin", "fill",
    ]  # fmt: skip
    assert ids["DiTTryOnApply"] == [
        "model", "try_on", "vae", "person", "garment", "person_strength", "garment_strength", "start_percent",
        "end_percent", "garment_position", "person_size", "garment_size", "kv_cache",
    ]  # fmt: skip
    types = {node: [o.io_type for o in node.define_schema().outputs] for node in (TryOnPrepare, LoadTryOn)}
    assert types[TryOnPrepare] == ["IMAGE", "IMAGE", "MASK", "INT", "INT", "INT", "DIT_CROP"]
    assert types[LoadTryOn][0] == ApplyTryOn.define_schema().inputs[1].io_type
    assert types[TryOnPrepare][6] == TryOnComposite.define_schema().inputs[2].io_type


def test_nodes_say_what_they_are():
    for node in (LoadTryOn, ApplyTryOn):
        assert "A reconstruction after the MC-VTON paper, whose code and weights are not public." in (
            node.define_schema().description
        )


# Prepare and Composite


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("name", ["mask", "garment_mask"])
def test_a_mask_of_the_background_is_noticed(caplog, name, background):
    """As core's Load Image gives it of a cut-out person or garment: 1 where the picture is transparent."""
    mask = torch.zeros(1, 30, 30)
    mask[:, 8:22, 8:22] = 1
    prepare(person=image(30, 30), **{"mask": mask, name: 1 - mask if background else mask})
    prepare(garment_mask=torch.ones(1, 30, 30))
    prepare(garment=image(1, 1), garment_mask=torch.ones(1, 1, 1))
    said = [record.getMessage() for record in caplog.records if "put Invert Mask between" in record.getMessage()]
    assert len(said) == background
    assert all(text.startswith(f"Try-On Prepare: '{name}' covers all corners") for text in said)


def test_prepared_pictures_have_one_size():
    person, garment, mask, width, height, batch, _ = prepare(garment=image(30, 50, 3), megapixels=0.006)
    assert person.shape == (1, height, width, 3)
    assert garment.shape == (3, height, width, 3)
    assert mask.shape == (1, height, width)
    assert batch == 3
    assert 0.004e6 < width * height < 0.008e6
    assert prepare(size="fixed", width=64, height=32)[3:5] == (64, 32)
    assert prepare(person=image(60, 44, 2))[5] == 2


def test_settings_of_prepare_reach_the_picture():
    base = {"size": "fixed", "width": 32, "height": 48, "dilation": 0}
    one = prepare(**base)
    assert prepare(**base, fill="black")[0][one[2] > 0.5].max() == 0
    assert prepare(**{**base, "dilation": 6})[2].sum() > one[2].sum()
    assert prepare(**base, margin=2.0)[2].sum() < one[2].sum()  # the mask is a smaller part of the crop
    whole = prepare(**base, crop="whole picture")
    assert not torch.equal(whole[0], one[0])
    assert torch.equal(whole[0], prepare(**base, crop="whole picture", margin=0.0)[0])
    masked = prepare(**base, garment_mask=hole(30, 30))
    assert not torch.equal(masked[1], one[1])
    assert torch.equal(masked[0], one[0])


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("crop", ["around the mask", "whole picture"])
def test_what_is_pasted_back_leaves_the_rest_bit_for_bit(channels, crop):
    person = image(75, 53, channels=channels)
    prepared = prepare(person=person, mask=hole(75, 53), crop=crop, megapixels=0.01, garment=image(9, 9, 2))
    result = image(prepared[4], prepared[3], 2, seed=3)
    pasted = composite(result, person, prepared[6], 5)
    changed = (pasted != person.expand(2, -1, -1, max(channels, 3))).any(-1)
    allowed = torch.nn.functional.max_pool2d(hole(75, 53)[None], 17, 1, 8)[0] > 0  # 8 pixels of dilation
    assert not (changed & ~allowed).any()
    assert changed.sum() > 0.5 * (hole(75, 53) > 0).sum()


@pytest.mark.parametrize("dilation", [0, 3])
def test_the_feather_stays_within_the_dilation_and_says_so(caplog, dilation):
    crop = prepare(size="fixed", width=32, height=48, dilation=dilation)[6]
    result, person = image(48, 32, seed=3), image(60, 44)
    with caplog.at_level(logging.INFO):
        wide = composite(result, person, crop, 8)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"Try-On Composite: feather is 8 and the mask grew by {dilation} pixels, so the feather is")
    caplog.clear()
    assert torch.equal(wide, composite(result, person, crop, dilation))
    assert not caplog.records
    hard = composite(result, person, crop, 0)
    assert torch.equal(wide, hard) == (dilation == 0)


def test_a_mask_narrows_what_composite_changes():
    prepared = prepare(size="fixed", width=32, height=48)
    person, result = image(60, 44), image(48, 32, seed=3)
    whole = composite(result, person, prepared[6], 0)
    same = composite(result, person, prepared[6], 0, prepared[2])
    assert torch.equal(same, whole)  # the working mask covers the mask
    none = composite(result, person, prepared[6], 4, torch.zeros(1, 60, 44))
    assert torch.equal(none, person)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mask": torch.zeros(1, 60, 44)}, r"The mask is empty\. Paint over the garment"),
        ({"mask": torch.ones(1, 64, 64)}, "The mask is 64 x 64 pixels and the person 44 x 60"),
        ({"garment_mask": torch.zeros(1, 30, 30)}, "The mask is empty"),
        ({"garment_mask": torch.ones(1, 30, 60)}, "The mask is 60 x 30 pixels and the garment 30 x 30"),
        ({"person": image(60, 44, 2), "garment": image(30, 30, 3)}, r"Got 2 persons and 3 garments\. Give one of"),
        ({"person": image(60, 44, channels=2)}, "Try-On Prepare: 'person' must have 1, 3 or 4 channels .* got 2"),
        ({"size": "fixed", "width": 40}, "'width' must be a multiple of 16 pixels, got 40"),
        ({"megapixels": float("nan")}, r"'megapixels' must be a number from 0\.001 to 16\.0, got nan"),
        ({"margin": float("inf")}, r"'margin' must be a number from 0\.0 to 4\.0, got inf"),
        ({"dilation": -1}, "'dilation' must be a whole number from 0 to 512, got -1"),
    ],
)
def test_wrong_inputs_of_prepare_are_answered_with_a_sentence(values, message):
    with pytest.raises(ValueError, match=message):
        prepare(**values)


def test_wrong_inputs_of_composite_are_answered_with_a_sentence():
    crop = prepare(size="fixed", width=32, height=48)[6]
    for values, message in (
        ((image(48, 48), image(60, 44), crop, 0), "The result is 48 x 48 pixels, the crop was 32 x 48"),
        ((image(48, 32), image(44, 60), crop, 0), r"of 44 x 60 pixels, got 1 of 60 x 44\. Connect the pictures"),
        ((image(48, 32), image(60, 44), crop, -1), "'feather' must be a whole number from 0 to 512, got -1"),
        ((image(48, 32), image(60, 44), crop, 0, torch.ones(1, 9, 9)), "'mask' must be 44 x 60 pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            composite(*values)


# Load and Apply


def test_a_loaded_file_says_what_it_holds_and_acts(folders, tiny_flux):
    branches = {"person": random_branch(1, ranks={"double_blocks.0.q": 4, "single_blocks.1.out": 8})}
    checkpoint = Checkpoint(
        branches, tiny.HIDDEN, 4 * tiny.HIDDEN, 2, 2, Settings("below", "black", steps=8, prompt="a doll")
    )
    save_file(write(checkpoint), folders / "loras" / "mine.safetensors", write_metadata(checkpoint))
    assert "mine.safetensors" in LoadTryOn.define_schema().inputs[0].options
    loaded, report = LoadTryOn.execute("mine.safetensors").args
    assert report == (
        "mine.safetensors: person rank 4 to 8: 1 double block (q), 1 single block (out); garment plain; garment below "
        "the picture, hidden size 128; fill black, 8 steps, prompt 'a doll'"
    )
    auto = tiny.sample(apply(tiny_flux, loaded), 1)
    assert torch.equal(auto, tiny.sample(apply(tiny_flux, loaded, garment_position="below"), 1))
    assert (auto - tiny.sample(apply(tiny_flux, loaded, garment_position="beside"), 1)).abs().mean() > 1e-3
    assert (auto - tiny.sample(tiny_flux, 1)).abs().mean() > 0.01


def test_a_file_that_is_missing_or_of_another_kind_is_refused(folders):
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors is not in models/try_on or models/loras"):
        LoadTryOn.execute("gone.safetensors")
    save_file(tiny.lora_state(), folders / "loras" / "canny.safetensors")
    with pytest.raises(ValueError, match=r"canny\.safetensors is no try-on LoRA: none of its \d+ keys looks like"):
        LoadTryOn.execute("canny.safetensors")


def test_pictures_are_encoded_at_the_size_that_was_asked(tiny_flux, file):
    vae = Vae()
    apply(tiny_flux, file, vae=vae, person=image(70, 50, channels=4), garment=image(64, 48, 2))
    assert [tuple(seen.shape) for seen in vae.seen] == [(1, 64, 48, 3)] * 3
    assert torch.equal(torch.cat(vae.seen[1:]), image(64, 48, 2))  # whole tokens already
    small = Vae()
    apply(tiny_flux, file, vae=small, person_size=32, garment_size=16)
    assert [tuple(seen.shape) for seen in small.seen] == [(1, 32, 32, 3), (1, 16, 16, 3)]


def test_settings_reach_the_model(tiny_flux, file):
    whole = tiny.sample(apply(tiny_flux, file), 4)
    for change in (
        {"person_strength": 0.5},
        {"garment_strength": 0.5},
        {"start_percent": 0.5},
        {"end_percent": 0.5},
        {"garment_position": "below"},
        {"person_size": 32},
        {"garment_size": 32},
    ):
        assert (tiny.sample(apply(tiny_flux, file, **change), 4) - whole).abs().mean() > 1e-4
    assert torch.equal(tiny.sample(apply(tiny_flux, file, kv_cache="offload to CPU"), 4), whole)


@pytest.mark.parametrize("off", ["person", "garment"])
def test_a_branch_of_strength_0_is_neither_encoded_nor_checked(tiny_flux, file, off):
    vae = Vae()
    odd = {off: image(64, 64, 3), f"{off}_size": 40, f"{off}_strength": 0.0}
    other = {"person": "garment", "garment": "person"}[off]
    out = tiny.sample(apply(tiny_flux, file, vae=vae, **odd, **{other: image(64, 64, 2, seed=5)}), 1, batch=2)
    assert torch.equal(torch.cat(vae.seen), image(64, 64, 2, seed=5))
    assert (out - tiny.sample(tiny_flux, 1, batch=2)).abs().mean() > 1e-3


def test_the_report_is_one_line_whatever_the_file_holds(folders):
    made = Checkpoint({"person": random_branch(1)}, 256, 1024, 2, 2, Settings(prompt="a doll\nin\r\n  red\n"))
    save_file(write(made), folders / "loras" / "mine.safetensors", write_metadata(made))
    report = LoadTryOn.execute("mine.safetensors").args[1]
    assert report.endswith("20 steps, prompt 'a doll in red'")
    assert len(report.splitlines()) == 1


def test_off_passes_the_model_on_and_encodes_nothing(tiny_flux, file):
    vae = Vae()
    assert apply(tiny_flux, file, vae=vae, person_strength=0.0, garment_strength=0.0) is tiny_flux
    assert vae.seen == []


def test_garments_of_a_batch_come_out_one_picture_each(tiny_flux, file):
    _, garments, _, width, height, batch, _ = prepare(garment=image(30, 30, 3), size="fixed", width=64, height=64)
    noise = tiny.latent(7, (height // 8, width // 8), batch)
    together = tiny.sample(apply(tiny_flux, file, garment=garments), 2, noise=noise)
    alone = [tiny.sample(apply(tiny_flux, file, garment=garments[[i]]), 2, noise=noise[[i]]) for i in range(batch)]
    tiny.close(together, torch.cat(alone), atol=1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"person_strength": float("nan")}, r"'person_strength' must be a number from 0\.0 to 4\.0, got nan"),
        ({"garment_strength": float("inf")}, "'garment_strength' must be a number from"),
        ({"start_percent": 0.6, "end_percent": 0.6}, r"start_percent \(0\.6\) must be below"),
        ({"person_size": 40}, "'person_size' must be a multiple of 16 pixels, got 40"),
        ({"garment_size": -16}, "'garment_size' must be a whole number from 0 to 4096, got -16"),
        ({"person": image(64, 64, 2), "garment": image(64, 64, 3)}, "Got 2 persons and 3 garments"),
    ],
)
def test_wrong_inputs_of_apply_are_answered_with_a_sentence(tiny_flux, file, values, message):
    with pytest.raises(ValueError, match=message):
        apply(tiny_flux, file, **values)


def test_another_model_family_is_refused(file):
    base = SimpleNamespace(model_config=supported_models.SDXL.__new__(supported_models.SDXL))
    other = SimpleNamespace(get_model_object=lambda name: torch.nn.Identity(), model=base)
    with pytest.raises(ValueError, match=r"Apply Try-On needs a FLUX\.1 model, got SDXL\. Connect one"):
        apply(other, file)
