"""The stages of the embedded default: which ones `make train-tiny` runs, what they write, what `--fresh` forgets."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dit_toolkit.scripts.places import ROOT
from dit_toolkit.training import __main__ as stages
from dit_toolkit.training import (
    checkpoints,
    dit4sr,
    dynamictrl,
    easycontrol,
    in_context,
    loop,
    sd3,
    try_on_model,
    vae,
    video_vae,
)

ALL = ["vae", "base", "edge", "pose", "subject", "try_on", "in_context", "sd3_vae", "sd3", "dit4sr",
       "video_vae", "cogvideox", "dynamictrl"]  # fmt: skip
KEPT = {
    "vae": {"vae.pt", "vae.png"},
    "base": {"pool.pt", "base.pt", "base.png"},
    "edge": {"pool-edge-1.pt", "easycontrol-edge-1.pt", "easycontrol-edge-1.png"},
    "pose": {"pool-pose-1.pt", "easycontrol-pose-1.pt"},
    "subject": {"pool-subject-1.pt", "easycontrol-subject-1.pt"},
    "try_on": {"try-on-pool-1.pt", "try-on-lora-1.pt", "try-on-lora-1.png"},
    "try_on_8_steps": {"try-on-journeys-1.pt", "try-on-8-steps-1.pt"},
    "in_context": set(),
    "sd3_vae": {"vae.pt", "vae.png"},
    "sd3": {"pool.pt", "sd3.pt", "sd3.png"},
    "dit4sr": {"dit4sr-pool-1.pt", "dit4sr-1.pt", "dit4sr-1.png"},
    "video_vae": {"encoder.pt", "decoder.pt", "decoder.png"},
    "cogvideox": {"clips-1.pt", "cogvideox-1.pt", "cogvideox-1.png"},
    "dynamictrl": {"dynamictrl-1.pt", "dynamictrl-1.png"},
    "start": {"start.pt", "start.png"},
    "second_vae": {"vae.pt", "vae.png"},
    "second_base": {"second-pool.pt", "second.pt", "second.png"},
    "second_guided": {"guided.pt", "guided.png"},
}
LATER = {"try_on_8_steps", *stages.SECOND}  # not in "all"
EVERY = {"components.pt"}.union(*KEPT.values())


def command(monkeypatch, *arguments: str) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["training", "--threads=1", "--workers=1", *arguments])
    try:
        stages.main()
    finally:
        torch.set_num_threads(threads)


def folder_of(stage: str) -> Path:
    """Where a stage keeps its checkpoints."""
    return checkpoints.work(stages.recipe_of(stage, {}))


def shipped() -> set[str]:
    """Names of the files in `weights/`, by their folder in it."""
    return {path.relative_to(ROOT / "weights").as_posix() for path in (ROOT / "weights").rglob("*.safetensors")}


@pytest.fixture
def ran(monkeypatch, tmp_path) -> list[str]:
    """Stages that do nothing but note that they ran; one file of each kind in the folder of the recipe."""
    noted: list[str] = []
    names = {"train_base": "base", "train_try_on": "try_on", "train_fast": "try_on_8_steps", "train_sd3": "sd3",
             "train_in_context": "in_context", "train_dit4sr": "dit4sr", "train_video_vae": "video_vae",
             "train_cogvideox": "cogvideox", "train_dynamictrl": "dynamictrl", "train_start": "start",
             "train_second_vae": "second_vae", "train_second_base": "second_base",
             "train_second_guided": "second_guided"}  # fmt: skip
    for function, stage in names.items():
        monkeypatch.setattr(stages, function, lambda *_, stage=stage: noted.append(stage))
    monkeypatch.setattr(stages, "train_vae", lambda _, *kind: noted.append("sd3_vae" if kind else "vae"))
    monkeypatch.setattr(stages, "train_adapter", lambda kind, *_: noted.append(kind))
    monkeypatch.setattr(checkpoints, "WORK", tmp_path)
    for folder in (folder_of("base"), folder_of("sd3"), folder_of("cogvideox"), folder_of("start")):
        folder.mkdir()
        for name in EVERY:
            (folder / name).touch()
    return noted


def test_all_runs_every_stage_but_the_8_steps_in_the_order_of_what_they_need(ran, monkeypatch):
    command(monkeypatch, "all")
    assert ran == ALL
    assert set(stages.OWN) == {*ALL, *LATER}


@pytest.mark.parametrize("stage", stages.OWN)
def test_a_stage_runs_by_itself_and_fresh_forgets_its_own_files_only(stage, ran, monkeypatch):
    folder = folder_of(stage)
    command(monkeypatch, stage)
    assert {path.name for path in folder.iterdir()} == EVERY
    command(monkeypatch, stage, "--fresh")
    assert {path.name for path in folder.iterdir()} == EVERY - KEPT[stage]
    assert ran == [stage, stage]


def test_all_fresh_forgets_everything_of_its_recipe_and_nothing_of_another(ran, monkeypatch):
    other = checkpoints.work(checkpoints.Recipe(pixels=128))
    other.mkdir()
    command(monkeypatch, "all", "--fresh")
    assert not folder_of("base").exists()
    assert not folder_of("sd3").exists()
    assert not folder_of("cogvideox").exists()
    assert other.exists()


def test_make_train_tiny_runs_all_of_them():
    (recipe,) = re.findall(r"^train-tiny:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert re.search(r"-m training all\b", recipe)


@pytest.mark.comfy
@pytest.mark.long
def test_all_makes_every_file_in_weights(monkeypatch, tmp_path):
    """Every stage for real, one step each. Only the In-Context LoRA's takes the models in `weights/`."""
    monkeypatch.setattr(checkpoints, "WORK", tmp_path / "work")
    monkeypatch.setattr(checkpoints, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setattr(loop, "device_of", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch, "compile", lambda model: model)
    sizes = {
        "AdapterRecipe": {"pool": 4, "steps": 1, "batch": 2},
        "TryOnRecipe": {"pool": 4, "steps": 1, "batch": 2},
        "InContextRecipe": {"sets": 2, "steps": 1, "batch": 2},
        "SD3Recipe": {"pixels": 32, "pool": 60, "batch": 2, "vae_steps": 1, "base_steps": 1},
        "RestoreRecipe": {"pool": 40, "steps": 1, "batch": 2},
        "VideoVAERecipe": {"pixels": 32, "clips": 4, "decoder_steps": 1, "crop": 4},
        "VideoRecipe": {"pool": 4, "batch": 2, "base_steps": 1, "steps": 1},
    }
    for module in (easycontrol, sd3, dit4sr, video_vae, dynamictrl):
        monkeypatch.setattr(module, "CHUNK", 4)
    for name, small in sizes.items():
        made = replace(getattr(stages, name)(), **small)
        monkeypatch.setattr(stages, name, lambda made=made: made)
    stock_of = vae.stock_of
    monkeypatch.setattr(vae, "stock_of", lambda kind, recipe, seed, count: stock_of(kind, recipe, seed, min(count, 60)))
    command(monkeypatch, "all", "--pixels=32", "--pool=8", "--batch=4", "--vae-steps=1", "--base-steps=1")
    written = {path.relative_to(tmp_path / "weights").as_posix() for path in (tmp_path / "weights").rglob("*.*")}
    assert written == shipped()
    assert {in_context.NAME, try_on_model.NAME} <= written
    stage_files = {path.name for path in next((tmp_path / "work").iterdir()).iterdir() if path.suffix == ".pt"}
    owned = [pattern for patterns in stages.OWN.values() for pattern in patterns]
    assert all(name == "components.pt" or any(Path(name).match(p) for p in owned) for name in stage_files)


# The model card


def test_the_model_card_lists_every_file_with_its_size():
    card = (ROOT / "weights" / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w/]+\.safetensors)` \| ([\d.]+) \|", card, re.MULTILINE))
    assert set(rows) == shipped()
    for name, megabytes in rows.items():
        assert float(megabytes) == pytest.approx((ROOT / "weights" / name).stat().st_size / 1e6, abs=0.0051), name
    (total,) = re.findall(r"all together ([\d.]+) MB", re.sub(r"<!--.*?-->", "", card))
    assert float(total) == pytest.approx(
        sum((ROOT / "weights" / name).stat().st_size for name in rows) / 1e6, abs=0.051
    )
