"""Kinds of model files that the pack adds to ComfyUI's: where they lie, and what is there.

Many users keep all LoRAs in one place, so the loaders look into the LoRA folders too. These do not become folders of a
kind: core lists, tags and uploads to files by their folder.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import comfy.utils
import folder_paths
from torch import Tensor

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"  # what ships with the pack
SAFE = {".safetensors", ".sft"}


def register(kind: str) -> None:
    """Make `kind` a folder of models: models/<kind> and what ships with the pack, after what the user set up."""
    known, _ = folder_paths.folder_names_and_paths.get(kind, ([], set()))
    shipped = WEIGHTS / kind
    paths = [*known, os.path.join(folder_paths.models_dir, kind), *([str(shipped)] if shipped.is_dir() else [])]
    # Set directly: add_model_folder_path would list files of every type.
    folder_paths.folder_names_and_paths[kind] = (list(dict.fromkeys(paths)), SAFE)


def offer_loras() -> None:
    """Add the LoRAs that ship with the pack to what ComfyUI's own LoRA loaders offer, after the user's own."""
    shipped = WEIGHTS / "loras"
    if shipped.is_dir():
        folder_paths.add_model_folder_path("loras", str(shipped))


def names(kind: str) -> list[str]:
    """What a loader offers, read anew each time: files of the kind, and the user's LoRAs."""
    register(kind)
    loras = folder_paths.filter_files_extensions(folder_paths.get_filename_list("loras"), SAFE)
    own = (name for name in loras if not (WEIGHTS / "loras" / name).is_file() or _own_lora(name))
    return sorted({*folder_paths.get_filename_list(kind), *own})


def path_of(kind: str, name: str) -> str:
    """Where a file of a kind lies. The user's own come before one that ships.

    Raises:
        FileNotFoundError: no such file in any of the folders.
    """
    register(kind)
    path = folder_paths.get_full_path(kind, name)
    if path is None or WEIGHTS in Path(path).parents:
        path = _own_lora(name) or path
    if path is None:
        raise FileNotFoundError(
            f"{name} is not in models/{kind} or models/loras. Put it there and refresh the page; the node's help page "
            "says where such files come from."
        )
    return path


def _own_lora(name: str) -> str | None:
    """Where a LoRA of the user lies; None for those that ship with the pack: they are of ComfyUI's own kind."""
    for folder in folder_paths.get_folder_paths("loras"):
        path = os.path.join(folder, os.path.relpath(os.path.join("/", name), "/"))  # as core: it stays in the folder
        if folder != str(WEIGHTS / "loras") and os.path.isfile(path):
            return path
    return None


def read(path: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    return cast("dict[str, Tensor]", comfy.utils.load_torch_file(path, safe_load=True))
