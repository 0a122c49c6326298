"""Kinds of model files: what a loader offers, and what ComfyUI's own lists show of it."""

from __future__ import annotations

from pathlib import Path

import folder_paths
import pytest
from app.model_manager import ModelFileManager

from dit_toolkit.host import model_files
from dit_toolkit.training import in_context, try_on_8_steps

pytestmark = pytest.mark.comfy

KIND = "try_on"
SHIPPED = "tiny_try_on.safetensors"
LORA = "dit_toolkit_demo_in_context.safetensors"  # ships too, as an ordinary LoRA


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Model folders of our own: one LoRA of the user's, one folder that the user gave the kind as its default."""
    known = {**folder_paths.folder_names_and_paths}
    known["loras"] = ([str(tmp_path / "loras")], folder_paths.supported_pt_extensions)
    known.pop(KIND, None)
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    for folder, name in (("loras", "mine.safetensors"), ("loras", "old.ckpt"), ("nas", "far.sft"), (KIND, "near.sft")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).touch()
    folder_paths.add_model_folder_path(KIND, str(tmp_path / "nas"), is_default=True)
    model_files.offer_loras()
    return tmp_path


def test_loras_are_offered_without_becoming_files_of_the_kind(folders):
    assert model_files.names(KIND) == ["far.sft", "mine.safetensors", "near.sft", SHIPPED]
    assert model_files.path_of(KIND, "mine.safetensors") == str(folders / "loras" / "mine.safetensors")
    listed = ModelFileManager().get_model_file_list(KIND)
    assert sorted(entry["name"] for entry in listed) == ["far.sft", "near.sft", SHIPPED]


def test_the_order_of_the_users_folders_stays(folders):
    for _ in range(2):
        model_files.names(KIND)
        model_files.path_of(KIND, SHIPPED)
    wanted = [str(folders / "nas"), str(folders / KIND), str(model_files.WEIGHTS / KIND)]
    assert folder_paths.get_folder_paths(KIND) == wanted
    assert folder_paths.get_folder_paths("loras") == [str(folders / "loras"), str(model_files.WEIGHTS / "loras")]


def test_a_file_of_the_user_goes_before_one_that_ships(folders):
    assert model_files.path_of(KIND, SHIPPED) == str(model_files.WEIGHTS / KIND / SHIPPED)
    (folders / "loras" / SHIPPED).touch()
    assert model_files.path_of(KIND, SHIPPED) == str(folders / "loras" / SHIPPED)
    (folders / "nas" / SHIPPED).touch()
    assert model_files.path_of(KIND, SHIPPED) == str(folders / "nas" / SHIPPED)


def test_loras_that_ship_say_whose_they_are_in_every_list(folders):
    shipped = [path.name for path in (model_files.WEIGHTS / "loras").iterdir()]
    assert shipped
    assert all(name.startswith(model_files.DEMO) for name in shipped)
    assert all(Path(name).name.startswith(model_files.DEMO) for name in (in_context.NAME, try_on_8_steps.FAST))
    assert set(folder_paths.get_filename_list("loras")) - {"mine.safetensors", "old.ckpt"} == set(shipped)


def test_loras_that_ship_are_no_files_of_the_kind(folders):
    assert LORA in folder_paths.get_filename_list("loras")
    with pytest.raises(FileNotFoundError, match="is not in models/try_on or models/loras"):
        model_files.path_of(KIND, LORA)
    (folders / "loras" / LORA).touch()
    assert LORA in model_files.names(KIND)
    assert model_files.path_of(KIND, LORA) == str(folders / "loras" / LORA)


@pytest.mark.parametrize("name", ["../secret.safetensors", "sub/../../secret.safetensors"])
def test_names_stay_within_their_folders(folders, name):
    (folders / "secret.safetensors").touch()
    with pytest.raises(FileNotFoundError):
        model_files.path_of(KIND, name)
