"""Kinds of model files that the pack adds to ComfyUI's: where they lie, and what is there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import comfy.utils
import folder_paths
from torch import Tensor

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"  # what ships with the pack


def register(kind: str) -> None:
    """Make `kind` a folder of models: models/<kind>, every LoRA folder of the user, and what ships with the pack."""
    known, _ = folder_paths.folder_names_and_paths.get(kind, ([], set()))
    loras = [path for path in folder_paths.get_folder_paths("loras") if path != str(WEIGHTS / "loras")]
    paths = [os.path.join(folder_paths.models_dir, kind), *known, *loras]
    shipped = WEIGHTS / kind
    paths += [str(shipped)] if shipped.is_dir() else []
    # Set directly: add_model_folder_path would list files of every type.
    folder_paths.folder_names_and_paths[kind] = (list(dict.fromkeys(paths)), {".safetensors", ".sft"})


def offer_loras() -> None:
    """Add the LoRAs that ship with the pack to what ComfyUI's own LoRA loaders offer, after the user's own."""
    shipped = WEIGHTS / "loras"
    if shipped.is_dir():
        folder_paths.add_model_folder_path("loras", str(shipped))


def names(kind: str) -> list[str]:
    """What a loader offers, read anew each time."""
    register(kind)
    return folder_paths.get_filename_list(kind)


def path_of(kind: str, name: str) -> str:
    """Where a file of a kind lies.

    Raises:
        FileNotFoundError: no such file in any of the folders.
    """
    register(kind)
    path = folder_paths.get_full_path(kind, name)
    if path is None:
        raise FileNotFoundError(
            f"{name} is not in models/{kind} or models/loras. Put it there and refresh the page; the node's help page "
            "says where such files come from."
        )
    return path


def read(path: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    return cast("dict[str, Tensor]", comfy.utils.load_torch_file(path, safe_load=True))
