"""The nodes: what they offer, what they refuse, and that they do what the host does."""

from __future__ import annotations

from types import SimpleNamespace

import folder_paths
import pytest
import torch
from comfy import supported_models
from safetensors.torch import save_file

from dit_toolkit.host import model_files
from dit_toolkit.host.control import easycontrol_files
from dit_toolkit.models.checkpoint import described
from dit_toolkit.models.control.easycontrol_keys import write_metadata
from dit_toolkit.nodes.easycontrol import ApplyEasyControl, LoadEasyControl
from dit_toolkit.tests.host import tiny
from dit_toolkit.tests.nodes.calling import run_node

pytestmark = pytest.mark.comfy


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Model folders of our own, with nothing in them."""
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    loras = tmp_path / "loras"
    loras.mkdir()
    known = {**folder_paths.folder_names_and_paths, "loras": ([str(loras)], folder_paths.supported_pt_extensions)}
    known.pop("easycontrol", None)
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


class Vae:
    """Encodes as a VAE does: 8 pixels to one latent pixel, 16 channels. Keeps what it was given."""

    def __init__(self):
        self.seen = []

    def encode(self, pixels):
        self.seen.append(pixels)
        small = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
        return small.repeat(1, 6, 1, 1)[:, :16]


def apply(model, file, **values):
    small = {"kind": "spatial", "condition_size": 64}
    return run_node(ApplyEasyControl, model=model, easycontrol=file, **{**small, **values})[0]


def image(batch=1, height=40, width=56):
    return torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(0))


def test_inputs_keep_their_places():
    """Saved workflows hold widget values by position: adding at the end is free, everything else is not."""
    loader, apply_schema = (node.define_schema() for node in (LoadEasyControl, ApplyEasyControl))
    assert [i.id for i in apply_schema.inputs] == [
        "model", "easycontrol", "image", "vae", "latent", "kind", "strength", "start_percent", "end_percent",
        "condition_size", "pad_color", "slot", "influence", "kv_cache",
    ]  # fmt: skip
    assert [i.id for i in apply_schema.inputs if getattr(i, "advanced", None)] == [
        "condition_size", "pad_color", "slot", "influence", "kv_cache",
    ]  # fmt: skip
    assert loader.outputs[0].io_type == apply_schema.inputs[1].io_type


def test_the_loader_lists_safe_files_of_every_folder(folders):
    for folder, name in (("easycontrol", "canny.safetensors"), ("loras", "sub/depth.sft"), ("loras", "bad.ckpt")):
        path = folders / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    listed = LoadEasyControl.define_schema().inputs[0].options
    assert {"canny.safetensors", "sub/depth.sft"} <= set(listed)
    assert "bad.ckpt" not in listed


def test_folders_that_the_user_set_up_stay(folders, tmp_path):
    own = tmp_path / "elsewhere"
    own.mkdir()
    (own / "mine.safetensors").touch()
    folder_paths.add_model_folder_path("easycontrol", str(own))
    assert "mine.safetensors" in model_files.names("easycontrol")
    before = folder_paths.folder_names_and_paths["easycontrol"]
    model_files.register("easycontrol")
    assert folder_paths.folder_names_and_paths["easycontrol"] == before


def test_a_loaded_file_says_what_it_holds_and_acts(folders, tiny_flux):
    save_file(tiny.lora_state(slots=2), folders / "loras" / "two.safetensors")
    loaded, report = LoadEasyControl.execute("two.safetensors").args
    assert report == (
        "two.safetensors: rank 8, slots 2, blocks 2+2, hidden size 128; kind not known, set it in Apply EasyControl"
    )
    assert all(p.cached_patcher_init[2] == slot for slot, p in enumerate(loaded.patchers))
    results = [
        tiny.sample(apply(tiny_flux, loaded, latent={"samples": tiny.latent()}, slot=slot), 1) for slot in (0, 1)
    ]
    assert (results[0] - results[1]).abs().mean() > 0.01
    factory, arguments, slot = loaded.patchers[1].cached_patcher_init
    again = factory(*arguments, disable_dynamic=True)[slot].model.state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in loaded.patchers[1].model.state_dict().items())


def test_a_file_that_is_missing_or_of_another_kind_is_refused(folders):
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors is not in models/easycontrol or models/loras"):
        LoadEasyControl.execute("gone.safetensors")
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}, folders / "loras" / "style.safetensors")
    with pytest.raises(ValueError, match=r"style\.safetensors is no EasyControl LoRA: none of its 1 keys looks like"):
        LoadEasyControl.execute("style.safetensors")
    with pytest.raises(FileNotFoundError, match="not in models/easycontrol"):
        LoadEasyControl.execute("../../secret.safetensors")


@pytest.mark.parametrize("kind", ["spatial", "subject"])
def test_an_image_is_prepared_and_encoded_as_its_kind_needs(tiny_flux, file, kind):
    vae = Vae()
    model = apply(tiny_flux, file, image=image(), vae=vae, kind=kind)
    assert vae.seen[0].shape == (1, 64, 64, 3)
    assert bool((vae.seen[0][0, 0] == 0.5).all()) == (kind == "subject")  # padded above
    same = apply(tiny_flux, file, latent={"samples": vae.encode(vae.seen[0])}, kind=kind)
    assert torch.equal(tiny.sample(model, 2), tiny.sample(same, 2))
    assert (tiny.sample(model, 2) - tiny.sample(tiny_flux, 2)).abs().mean() > 0.01


def test_settings_reach_the_model(tiny_flux, file):
    condition = {"samples": tiny.latent()}
    whole = tiny.sample(apply(tiny_flux, file, latent=condition), 4)
    for change in ({"strength": 0.5}, {"start_percent": 0.5}, {"end_percent": 0.5}, {"influence": 0.3}):
        assert (tiny.sample(apply(tiny_flux, file, latent=condition, **change), 4) - whole).abs().mean() > 1e-4
    offloaded = apply(tiny_flux, file, latent=condition, kv_cache="offload to CPU")
    assert torch.equal(tiny.sample(offloaded, 4), whole)


def test_nodes_chain(tiny_flux, file):
    first, second = {"samples": tiny.latent(1)}, {"samples": tiny.latent(2)}
    one = apply(tiny_flux, file, latent=first)
    both = apply(one, tiny.lora_file(4), latent=second, kind="subject", strength=0.8)
    assert (tiny.sample(both, 2) - tiny.sample(one, 2)).abs().mean() > 0.01


def named(name, kind=None):
    """A file of this name, which may say its kind."""
    metadata = None if kind is None else write_metadata(kind)
    return easycontrol_files.from_state(tiny.lora_state(double=1, single=1, dim=8), name, None, metadata)


@pytest.mark.parametrize(
    ("name", "said", "kind", "words"),
    [
        ("canny.safetensors", None, "spatial", "kind spatial"),
        ("flux/Ghibli.safetensors", None, "spatial", "kind spatial"),
        ("loras\\subject.sft", None, "subject", "kind subject"),
        ("EasyControl-Depth_v2.safetensors", None, "spatial", "kind spatial by its name"),
        ("my_subject.v1.safetensors", None, "subject", "kind subject by its name"),
        ("mine.safetensors", "subject", "subject", "kind subject"),
        ("canny.safetensors", "subject", "subject", "kind subject"),  # the file knows better than its name
    ],
)
def test_auto_is_the_kind_that_the_file_or_its_name_says(name, said, kind, words):
    file = named(name, said)
    assert file.kind("auto") == kind
    assert file.report.endswith(f"; {words}")
    assert file.kind(kind) == kind


@pytest.mark.parametrize("name", ["mine.safetensors", "subject_pose.safetensors", "lifestyle.sft", "subject/a.sft"])
def test_auto_asks_where_nothing_says_the_kind_and_any_choice_is_taken(name, caplog):
    file = named(name)
    assert file.report.endswith("; kind not known, set it in Apply EasyControl")
    with pytest.raises(ValueError, match=r"does not say what kind of condition it is for\. Set 'kind' to spatial if"):
        file.kind("auto")
    assert [file.kind(kind) for kind in ("spatial", "subject")] == ["spatial", "subject"]
    assert not caplog.records


def test_a_kind_that_the_file_is_known_not_to_be_for_is_refused():
    published = r"subject\.sft is for subject conditions, and 'kind' is spatial\. Set 'kind' to auto or subject\."
    with pytest.raises(ValueError, match=published + " If it is another file than the published one, rename it"):
        named("subject.sft").kind("spatial")
    own = r"mine\.sft is for spatial conditions, and 'kind' is subject\. Set 'kind' to auto or spatial\.$"
    with pytest.raises(ValueError, match=own):
        named("mine.sft", "spatial").kind("subject")


def test_a_kind_that_a_name_only_sounds_against_is_taken_with_a_warning(caplog):
    assert named("my_depth.sft").kind("subject") == "subject"
    assert "by its name, my_depth.sft is for spatial conditions, and 'kind' is subject" in caplog.text


def test_a_file_must_say_a_kind_that_there_is():
    metadata = described("easycontrol", {"kind": ["subject"]})
    with pytest.raises(ValueError, match=r"f must say 'spatial' or 'subject' as its kind, got \['subject'\]"):
        easycontrol_files.from_state(tiny.lora_state(double=1, single=1, dim=8), "f", None, metadata)


@pytest.mark.parametrize("kind", ["spatial", "subject"])
def test_auto_draws_what_the_kind_drew(tiny_flux, kind):
    file = easycontrol_files.from_state(tiny.lora_state(), "a.sft", None, write_metadata(kind))
    vae = Vae()
    found = [tiny.sample(apply(tiny_flux, file, image=image(), vae=vae, kind=asked), 1) for asked in ("auto", kind)]
    assert torch.equal(vae.seen[0], vae.seen[1])
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", ["edge", "pose", "subject"])
def test_the_files_that_ship_say_their_kind(kind):
    loaded = easycontrol_files.load(f"tiny_{kind}.safetensors")
    assert loaded.checkpoint.kind == ("subject" if kind == "subject" else "spatial")


@pytest.mark.parametrize("off", [{"strength": 0.0}, {"influence": 0.0}])
def test_off_passes_the_model_on_and_encodes_nothing(tiny_flux, file, off):
    vae = Vae()
    assert apply(tiny_flux, file, image=image(), vae=vae, **off) is tiny_flux
    assert vae.seen == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"needs a condition: connect 'image' and 'vae', or 'latent'\."),
        ({"image": 1, "latent": 1}, r"takes an 'image' or a 'latent', not both\. Disconnect one"),
        ({"image": 1}, r"needs a VAE to encode 'image'\. Connect 'vae', or use 'latent'"),
        ({"latent": 1, "strength": float("nan")}, r"'strength' must be a number from 0\.0 to 4\.0, got nan"),
        ({"latent": 1, "end_percent": float("nan")}, r"'end_percent' must be a number from 0\.0 to 1\.0, got nan"),
        ({"latent": 1, "start_percent": 0.6, "end_percent": 0.6}, r"start_percent \(0\.6\) must be below"),
        ({"latent": 1, "influence": 2.0}, r"'influence' must be a number from 0\.0 to 1\.0, got 2"),
        ({"latent": 1, "slot": 3}, "has no slot 3, its last one is 0"),
        ({"image": 1, "vae": 1, "condition_size": 72}, "'condition_size' must be a multiple of 16 pixels, got 72"),
        ({"image": 1, "vae": 1, "condition_size": 0}, "'condition_size' must be a whole number from 16 to 2048, got 0"),
    ],
)
def test_wrong_inputs_are_answered_with_a_sentence(tiny_flux, file, values, message):
    stand_ins = {"image": image(), "vae": Vae(), "latent": {"samples": tiny.latent()}}
    values = {name: stand_ins.get(name, value) for name, value in values.items()}
    with pytest.raises(ValueError, match=message):
        apply(tiny_flux, file, **values)


def test_another_model_family_is_refused(file):
    base = SimpleNamespace(model_config=supported_models.SDXL.__new__(supported_models.SDXL))
    other = SimpleNamespace(get_model_object=lambda name: torch.nn.Identity(), model=base)
    with pytest.raises(ValueError, match=r"Apply EasyControl needs a FLUX\.1 model, got SDXL\. Connect one"):
        apply(other, file, latent={"samples": tiny.latent()})
