"""DiT4SR's files as people have them: a patch, a whole transformer, one in several files, a folder, and broken ones."""

from __future__ import annotations

import json
from pathlib import Path

import comfy.sd
import folder_paths
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

pytestmark = pytest.mark.comfy

from dit_toolkit.host import model_files, sharded_files  # noqa: E402
from dit_toolkit.host.restore import dit4sr  # noqa: E402
from dit_toolkit.host.restore.dit4sr_extract import extract, target_of  # noqa: E402
from dit_toolkit.host.restore.dit4sr_files import load, load_patcher, names, path_of  # noqa: E402
from dit_toolkit.host.restore.dit4sr_settings import DiT4SR  # noqa: E402
from dit_toolkit.models.restore.dit4sr_keys import write  # noqa: E402
from dit_toolkit.tests.host import families  # noqa: E402
from dit_toolkit.tests.host.restore.tiny_dit4sr import (  # noqa: E402
    base,
    close,
    file,
    latent,
    published,
    restored,
    sample,
)

INDEX = "diffusion_pytorch_model.safetensors.index.json"
KINDS = ("dit4sr", "model_patches", "diffusion_models", "loras")


@pytest.fixture
def folders(tmp_path, monkeypatch) -> Path:
    """Model folders of our own, and an output folder, with nothing in them."""
    known = dict(folder_paths.folder_names_and_paths)
    for kind in KINDS:
        (tmp_path / "models" / kind).mkdir(parents=True)
        known[kind] = ([str(tmp_path / "models" / kind)], {".safetensors", ".sft"})
    (tmp_path / "output").mkdir()
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    return tmp_path / "models"


def sharded(folder: Path, state: dict, count: int = 3, metadata: dict | None = None) -> Path:
    """A transformer in several files and their index, as diffusers saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = sorted(state)
    where = {key: f"diffusion_pytorch_model-{1 + i % count:05}-of-{count:05}.safetensors" for i, key in enumerate(keys)}
    for shard in set(where.values()):
        save_file({key: state[key] for key in keys if where[key] == shard}, folder / shard)
    index = {"metadata": metadata or {"total_size": 1}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return folder / INDEX


def same(found, variant="r1"):
    expected = file(variant).patcher.model.state_dict()
    state = found.patcher.model.state_dict()
    return state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)


@pytest.mark.parametrize("kind", ["dit4sr", "model_patches", "diffusion_models"])
def test_a_whole_transformer_is_found_where_people_keep_it(folders, kind):
    (folders / kind / "photos").mkdir()
    save_file(published(), folders / kind / "photos" / "whole.safetensors")
    (name,) = [each for each in names() if "whole" in each]
    found = load(name)
    assert same(found)
    assert found.report.startswith(f"{name}: variant r1; 3 blocks (2 with a second attention), hidden size 192, ")
    assert "127 base tensors are left out, 20 tensors that DiT4SR never uses are left out, too" in found.report


def test_loras_are_not_listed(folders):
    save_file(published(), folders / "loras" / "lora.safetensors")
    assert not [name for name in names() if "lora." in name]


def test_a_transformer_in_several_files_is_listed_once_and_read_from_all(folders):
    sharded(folders / "dit4sr" / "dit4sr_r1" / "transformer", published())
    (name,) = [each for each in names() if "dit4sr_r1" in each]
    assert name == str(Path("dit4sr_r1", "transformer", INDEX))
    assert same(load(name))
    for other in ("dit4sr_r1", str(Path("dit4sr_r1", "transformer")), name.replace(".index.json", "")):
        if not other.endswith(".safetensors"):
            assert same(load(other))
    assert same(load(name.replace(".safetensors.index.json", "-00002-of-00003.safetensors")))


def test_the_folder_of_one_file_is_read_too(folders):
    (folders / "dit4sr" / "q" / "transformer").mkdir(parents=True)
    save_file(published("v1"), folders / "dit4sr" / "q" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert same(load("q"), "v1")


def test_the_variant_is_the_files_or_the_users(folders):
    save_file(published("v1"), folders / "dit4sr" / "v1.safetensors")
    save_file(published(), folders / "dit4sr" / "r1.safetensors")
    assert load("v1.safetensors").variant == "v1"
    assert load("r1.safetensors").variant == "r1"
    by_choice = load("r1.safetensors", "v1")
    assert by_choice.variant == "v1"
    assert "variant v1 by choice (the file is r1)" in by_choice.report


def test_another_copy_is_loaded_from_the_file_again(folders):
    sharded(folders / "dit4sr" / "s", published("r1"))
    found = load("s", "v1")
    factory, arguments = found.patcher.cached_patcher_init
    assert factory is load_patcher
    again = factory(*arguments, disable_dynamic=True)
    assert again.model.state_dict().keys() == found.patcher.model.state_dict().keys()


def test_only_control_weights_are_read(folders, monkeypatch):
    read = []
    get = sharded_files.Tensors.__getitem__
    monkeypatch.setattr(sharded_files.Tensors, "__getitem__", lambda self, key: read.append(key) or get(self, key))
    save_file(published(), folders / "dit4sr" / "whole.safetensors")
    load("whole.safetensors")
    assert read
    assert all("control" in key for key in read)


# What is broken


def broken_index(folder: Path, change) -> None:
    path = sharded(folder, published())
    whole = json.loads(path.read_text("utf-8"))
    path.write_text(change(whole), encoding="utf-8")


def without_a_file(folder):
    sharded(folder, published())
    next(folder.glob("*-00002-of-*")).unlink()


def with_a_wrong_file(folder):
    sharded(folder, published())
    (one,) = folder.glob("*-00002-of-*")
    save_file({"other": torch.zeros(1)}, one)


def moved(whole, name):
    return json.dumps({"weight_map": {**whole["weight_map"], "transformer_blocks.0.attn.to_q.weight": name}})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (without_a_file, r"-00002-of-00003.safetensors is missing beside .*index.json. Download all files"),
        (with_a_wrong_file, r"-00002-of-00003.safetensors does not hold '.*', which .* says it does"),
        (lambda f: broken_index(f, lambda w: "{"), "is no index of safetensors files, or is damaged"),
        (lambda f: broken_index(f, lambda w: "[]"), "is no index of safetensors files"),
        (lambda f: broken_index(f, lambda w: '{"weight_map": {}}'), "is no index of safetensors files"),
        (lambda f: broken_index(f, lambda w: "[" * 100_000), "is no index of safetensors files"),
        (lambda f: broken_index(f, lambda w: moved(w, "../x.safetensors")), "which is no file beside it"),
        (lambda f: broken_index(f, lambda w: moved(w, 7)), "which is no file beside it"),
        (lambda f: broken_index(f, lambda w: moved(w, "weights.bin")), "which is no file beside it"),
    ],
)
def test_a_set_of_files_that_is_not_whole_is_refused(folders, make, words):
    make(folders / "dit4sr" / "set")
    with pytest.raises(ValueError, match=words) as refused:
        load(str(Path("set", INDEX)))
    assert str(refused.value).endswith(".")


@pytest.mark.parametrize(
    ("name", "contents", "words"),
    [
        ("page.safetensors", b"<!DOCTYPE html>", "page.safetensors is a web page"),
        ("empty.safetensors", b"", "empty.safetensors is empty"),
        ("pickle.safetensors", b"\x80\x02}q", "is a PyTorch file"),
        ("short.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{", "is damaged"),
    ],
)
def test_a_damaged_file_is_refused(folders, name, contents, words):
    (folders / "dit4sr" / name).write_bytes(contents)
    with pytest.raises(ValueError, match=words):
        load(name)


def test_other_files_are_refused(folders):
    save_file({"a": torch.zeros(2)}, folders / "dit4sr" / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors is no DiT4SR file"):
        load("other.safetensors")
    plain = {key: weight for key, weight in published().items() if "control" not in key}
    save_file(plain, folders / "dit4sr" / "base.safetensors")
    with pytest.raises(ValueError, match="The base model goes into Load Diffusion Model"):
        load("base.safetensors")


def test_what_is_nowhere_is_not_found(folders):
    for name in ("no.safetensors", "no", f"no/{INDEX}", "../../etc/passwd", "/etc/hostname"):
        with pytest.raises(FileNotFoundError, match=r"models/dit4sr, models/model_patches or models/diffusion_models"):
            path_of(name)


def test_a_folder_that_is_not_clear_is_refused(folders):
    (folders / "dit4sr" / "empty").mkdir()
    with pytest.raises(ValueError, match="The folder empty holds no safetensors file"):
        load("empty")
    for name in "ab":
        save_file({"x": torch.zeros(1)}, folders / "dit4sr" / "empty" / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"The folder empty holds several files: a.safetensors, b.safetensors\."):
        load("empty")


# Making a patch


@pytest.mark.parametrize("variant", ["v1", "r1"])
def test_a_patch_is_the_control_weights_and_nothing_else(folders, variant):
    sharded(folders / "dit4sr" / "whole", published(variant))
    target = target_of("mine")
    report = extract("whole", target, "as in the file", base())
    assert report.startswith("mine_00001.safetensors: ")
    assert report.endswith("; base weights compared in blocks 0, 1, 2")
    with safe_open(target, "pt") as made:
        assert all("_control." in key or ".control_conv." in key for key in made.keys())  # noqa: SIM118
        assert any("to_k_control" in key for key in made.keys()) == (variant == "r1")  # noqa: SIM118
        assert json.loads(made.metadata()["dit_toolkit"]) == {"dit4sr": {"variant": variant}, "format": 1}
    assert "mine_00001.safetensors" in names()
    found = load("mine_00001.safetensors")
    assert same(found, variant)
    assert found.variant == variant
    assert target_of("mine").endswith("mine_00002.safetensors")
    assert not list(Path(target).parent.glob("*.part"))


def test_a_patch_may_have_fewer_bits(folders):
    save_file(published(), folders / "dit4sr" / "whole.safetensors")
    sizes = {}
    for precision in ("as in the file", "float16", "bfloat16"):
        target = target_of(precision)
        extract("whole.safetensors", target, precision)
        sizes[precision] = Path(target).stat().st_size
        found = load(Path(target).name)
        kinds = {weight.dtype for weight in found.checkpoint.weights.values()}
        assert kinds == {getattr(torch, precision, torch.float32)}
    assert sizes["float16"] == pytest.approx(sizes["as in the file"] / 2, rel=0.05)


def test_what_float16_cannot_hold_is_refused(folders):
    key = "transformer_blocks.0.attn.to_v_control.weight"
    save_file({**published(), key: published()[key] * 1e6}, folders / "dit4sr" / "whole.safetensors")
    with pytest.raises(ValueError, match=r"is too large for float16\. Choose bfloat16"):
        extract("whole.safetensors", target_of("mine"), "float16")
    assert not list(Path(folder_paths.get_output_directory(), "dit4sr").glob("*"))


def test_the_file_must_be_made_on_the_model(folders):
    save_file(published(), folders / "dit4sr" / "whole.safetensors")
    target = target_of("mine")
    with pytest.raises(ValueError, match=r"was not made on this model: its block 0 computes something else \(x_block"):
        extract("whole.safetensors", target, "float16", base(1))
    with pytest.raises(ValueError, match=r"is made for hidden size 192, 3 blocks, 2 of them .* the model has .* 1 of"):
        extract("whole.safetensors", target, "float16", families.FAMILIES["sd35"].load())
    with pytest.raises(ValueError, match=r"Extract DiT4SR Patch needs a Stable Diffusion 3\.5 Medium model, got Flux"):
        extract("whole.safetensors", target, "float16", families.FAMILIES["flux"].load())
    assert not Path(target).exists()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_a_model_in_fewer_bits_is_compared_as_well(folders, dtype):
    save_file(published(), folders / "dit4sr" / "whole.safetensors")
    model, other = (
        comfy.sd.load_diffusion_model_state_dict(
            {key: weight.clone() for key, weight in published(seed=seed).items()}, model_options={"dtype": dtype}
        )
        for seed in (0, 1)
    )
    extract("whole.safetensors", target_of("mine"), "float16", model)
    with pytest.raises(ValueError, match="was not made on this model"):
        extract("whole.safetensors", target_of("mine"), "float16", other)


def test_a_patch_needs_no_extracting(folders):
    tensors, metadata = write(file().checkpoint.weights, "r1")
    save_file(tensors, folders / "dit4sr" / "patch.safetensors", metadata)
    with pytest.raises(ValueError, match=r"patch\.safetensors is a patch already"):
        extract("patch.safetensors", target_of("mine"))


@pytest.mark.parametrize("name", ["", " ", "../x", "a/b", "a\\b", "a\0b", "\n", "x" * 101, "-x", ".x", "\ud800", "a:b"])
def test_a_name_that_is_no_name_of_a_file_is_refused(folders, name):
    with pytest.raises(ValueError, match="'name' must be at most 100 letters"):
        target_of(name)


def test_a_list_outlives_the_folder_of_patches(folders):
    save_file(published(), folders / "dit4sr" / "whole.safetensors")
    target = Path(target_of("mine"))
    extract("whole.safetensors", str(target))
    assert target.name in names()
    target.unlink()
    target.parent.rmdir()
    assert target.name not in names()


def test_a_patch_restores_as_the_file_it_was_made_of(folders):
    save_file(published(), folders / "dit4sr" / "whole.safetensors")
    extract("whole.safetensors", target_of("mine"), "as in the file")
    made = load("mine_00001.safetensors")
    patched = dit4sr.attach(base(), made.patcher, made.made_for, DiT4SR(None, made.name, latent(12)))
    close(sample(patched), sample(restored(tile=64, overlap=24)), 0)


def test_weights_that_ship_give_way_to_the_users_own(folders, tmp_path, monkeypatch):
    shipped = tmp_path / "weights"
    (shipped / "dit4sr").mkdir(parents=True)
    save_file(published("v1"), shipped / "dit4sr" / "tiny.safetensors")
    monkeypatch.setattr(model_files, "WEIGHTS", shipped)
    assert load("tiny.safetensors").variant == "v1"
    save_file(published(), folders / "model_patches" / "tiny.safetensors")
    assert load("tiny.safetensors").variant == "r1"
