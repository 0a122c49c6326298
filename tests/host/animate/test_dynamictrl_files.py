"""DynamiCtrl's files as people have them: one file, several with an index, a folder, ours, in fp8, and broken ones."""

from __future__ import annotations

import json
import random
from pathlib import Path

import folder_paths
import pytest
import safetensors.torch
import torch
from safetensors.torch import save_file

pytestmark = pytest.mark.comfy

from dit_toolkit.host import model_files, sharded_files  # noqa: E402
from dit_toolkit.host.animate import dynamictrl_files  # noqa: E402
from dit_toolkit.host.animate.dynamictrl_files import in_fp8, load, names  # noqa: E402
from dit_toolkit.host.animate.dynamictrl_run import norms_of  # noqa: E402
from dit_toolkit.host.transformer import transformer_of  # noqa: E402
from dit_toolkit.models.animate.dynamictrl_keys import comfyui_name, diffusers_name  # noqa: E402
from dit_toolkit.tests.host.animate.tiny_dynamictrl import latent, loaded, prompt, published, sample  # noqa: E402
from dit_toolkit.tests.host.test_damaged_files import DAMAGES, mutated, refusal  # noqa: E402

INDEX = "diffusion_pytorch_model.safetensors.index.json"
EMBEDDED = "tiny_dynamictrl.safetensors"


@pytest.fixture
def folders(tmp_path, monkeypatch) -> Path:
    """Model folders of our own, with nothing in them, and the pack's own folder of weights beside them."""
    known = dict(folder_paths.folder_names_and_paths)
    for kind in ("dynamictrl", "diffusion_models", "loras"):
        (tmp_path / "models" / kind).mkdir(parents=True)
        known[kind] = ([str(tmp_path / "models" / kind)], {".safetensors", ".sft"})
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(model_files, "WEIGHTS", tmp_path / "weights")
    return tmp_path / "models"


def sharded(folder: Path, state: dict, count: int = 3) -> Path:
    """A transformer in several files and their index, as diffusers saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = sorted(state)
    where = {key: f"diffusion_pytorch_model-{1 + i % count:05}-of-{count:05}.safetensors" for i, key in enumerate(keys)}
    for shard in set(where.values()):
        save_file({key: state[key] for key in keys if where[key] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"weight_map": where}), encoding="utf-8")
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return folder / INDEX


def ours(state):
    return {comfyui_name(key): tensor for key, tensor in state.items()}


def same(found, state=None):
    """The MODEL and its norms have the numbers of the file."""
    base = transformer_of(found.model).state_dict()
    norms = found.model.get_additional_models()[0].model.state_dict()
    expected = ours(published() if state is None else state)
    assert base.keys() | norms.keys() == expected.keys()
    return all(torch.equal({**base, **norms}[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("kind", ["dynamictrl", "diffusion_models"])
@pytest.mark.parametrize("naming", [dict, ours])
def test_one_file_is_found_where_people_keep_it(folders, kind, naming):
    (folders / kind / "people").mkdir()
    save_file(naming(published()), folders / kind / "people" / "dance.safetensors")
    assert names() == [str(Path("people", "dance.safetensors"))]
    found = load(names()[0])
    assert same(found)
    assert found.report == f"{names()[0]}: DynamiCtrl on CogVideoX 1.5: 3 blocks, width 128, float32"


def test_a_transformer_in_several_files_is_listed_once_and_read_from_all(folders):
    sharded(folders / "diffusion_models" / "DynamiCtrl" / "transformer", published())
    (name,) = names()
    assert name == str(Path("DynamiCtrl", "transformer", INDEX))
    shard = name.replace(".safetensors.index.json", "-00002-of-00003.safetensors")
    for each in (name, "DynamiCtrl", str(Path("DynamiCtrl", "transformer")), shard):
        assert same(load(each))


def test_a_path_is_loaded_too(tmp_path):
    """As the embedded default does."""
    save_file(published(), tmp_path / "here.safetensors")
    found = load(str(tmp_path / "here.safetensors"))
    assert same(found)
    assert found.report.startswith("here.safetensors: DynamiCtrl on CogVideoX 1.5")


def test_the_file_of_the_pack_is_offered_and_loaded(folders):
    """With ComfyUI's names, as ours are written."""
    (model_files.WEIGHTS / "dynamictrl").mkdir(parents=True)
    save_file(ours(published()), model_files.WEIGHTS / "dynamictrl" / EMBEDDED)
    assert names() == [EMBEDDED]
    assert same(load(EMBEDDED))


def test_what_is_saved_in_published_names_is_read_back(folders):
    saved = {diffusers_name(key): tensor for key, tensor in ours(published()).items()}
    assert saved.keys() == published().keys()
    save_file(saved, folders / "dynamictrl" / "again.safetensors")
    assert same(load("again.safetensors"))


def test_bfloat16_is_said_and_kept(folders):
    state = {key: tensor.bfloat16() for key, tensor in published().items()}
    save_file(state, folders / "dynamictrl" / "half.safetensors")
    found = load("half.safetensors")
    assert found.report.endswith("3 blocks, width 128, bfloat16")
    assert norms_of(found.model).state_dict()["blocks.0.control_norm1.linear.weight"].dtype == torch.bfloat16


def test_1_0_is_told(folders):
    save_file(published("1.0"), folders / "dynamictrl" / "old.safetensors")
    assert "on CogVideoX 1.0: 3 blocks" in load("old.safetensors").report


def test_tensors_are_read_one_by_one_and_none_is_held_twice(folders, monkeypatch):
    read, get = [], sharded_files.Tensors.__getitem__
    monkeypatch.setattr(sharded_files.Tensors, "__getitem__", lambda self, key: read.append(key) or get(self, key))
    sharded(folders / "diffusion_models" / "s", published())
    load("s")
    assert sorted(read) == sorted(published())


def test_other_copies_are_loaded_from_the_file_again(folders):
    """As core does for another GPU, and for LoRAs on a part of the run."""
    sharded(folders / "diffusion_models" / "s", published())
    model = load("s").model
    norms = model.get_additional_models()[0]
    for patcher in (model, norms):
        factory, arguments = patcher.cached_patcher_init
        again = factory(*arguments, disable_dynamic=True)
        state = patcher.model.state_dict()
        assert again.model is not patcher.model
        assert again.model.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[key]) for key, tensor in again.model.state_dict().items())


# fp8


@pytest.mark.parametrize("dtype", ["fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"])
def test_in_fp8_are_large_matrices_and_nothing_else(folders, dtype):
    save_file(published(), folders / "dynamictrl" / "a.safetensors")
    found = load("a.safetensors", dtype)
    assert found.report.endswith(f"float32, large matrices in {dtype}")
    transformer, expected = transformer_of(found.model), ours(published())
    kept = {key: tensor for key, tensor in transformer.state_dict().items() if key in expected and not in_fp8(key)}
    assert {"blocks.0.norm1.linear.weight", "patch_embed.proj.weight", "time_embedding_linear_1.weight"} <= kept.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in kept.items())
    for part in ("q", "k", "v", "attn_out", "ff_proj", "ff_out"):
        assert in_fp8(f"blocks.1.{part}.weight")
        assert getattr(transformer.blocks[1], part).quant_format == f"float8_{dtype.split('_')[1]}"
    assert sum(in_fp8(key) for key in expected) == 3 * 6
    norms = norms_of(found.model).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in norms.items())


@pytest.mark.parametrize("dtype", ["fp8_e4m3fn", "fp8_e5m2"])
def test_in_fp8_it_draws_nearly_the_same(folders, dtype):
    save_file(published(), folders / "dynamictrl" / "a.safetensors")
    posed = prompt(3, pose=latent(20))
    full, out = sample(loaded(), 2, positive=posed), sample(load("a.safetensors", dtype).model, 2, positive=posed)
    error = float((out - full).norm() / full.norm())
    assert 0 < error < 0.1
    assert error < float((full - sample(loaded(), 2)).norm() / full.norm())


# What is broken


@pytest.mark.parametrize(("damage", "words"), DAMAGES, ids=[words[:30] for _, words in DAMAGES])
def test_a_damaged_file_is_answered_with_its_name_and_what_to_do(folders, damage, words):
    (folders / "dynamictrl" / "d.safetensors").write_bytes(damage(safetensors.torch.save(published())))
    with pytest.raises(ValueError, match=r"d\.safetensors") as refused:
        load("d.safetensors")
    said = str(refused.value)
    assert said.startswith(f"d.safetensors {words}")
    assert len(said) < 400


def test_a_mutated_file_loads_or_is_refused_in_a_sentence(folders):
    state, refused = published(blocks=1, heads=1, time=8), 0

    def attempt():
        found = load("m.safetensors")
        weights = [*found.model.model.state_dict().values(), *norms_of(found.model).state_dict().values()]
        assert all(tensor.double().isfinite().all() for tensor in weights)

    for seed in range(60):
        (folders / "dynamictrl" / "m.safetensors").write_bytes(mutated(state, {}, random.Random(seed)))
        refused += refusal(attempt, "m.safetensors", seed) is not None
    assert 36 < refused < 60


def test_plain_cogvideox_is_refused(folders):
    plain = {key: tensor for key, tensor in published().items() if "control_norm1" not in key}
    save_file(plain, folders / "diffusion_models" / "plain.safetensors")
    with pytest.raises(ValueError, match=r"plain\.safetensors is CogVideoX without the pose norms of DynamiCtrl"):
        load("plain.safetensors")


def test_a_file_that_is_not_there_is_said(folders):
    for name in ("none.safetensors", "none", str(Path("none", INDEX))):
        with pytest.raises(FileNotFoundError, match="is not in models/dynamictrl or models/diffusion_models"):
            load(name)


def test_a_shard_that_is_missing_is_said(folders):
    sharded(folders / "diffusion_models" / "s", published())
    next((folders / "diffusion_models" / "s").glob("*-00002-of-*")).unlink()
    with pytest.raises(ValueError, match=r"-00002-of-00003\.safetensors is missing beside"):
        load("s")


def test_float16_on_1_5_is_warned_of(monkeypatch):
    monkeypatch.setattr("comfy.model_base.BaseModel.get_dtype_inference", lambda self: torch.float16)
    assert "gives black videos with CogVideoX 1.5" in dynamictrl_files.from_state(published(), "x").report
    assert "black" not in dynamictrl_files.from_state(published("1.0"), "x").report
