"""EasyControl checkpoints as ComfyUI models: where they lie, and how they are loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import folder_paths
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..models.easycontrol import ConditionLora
from ..models.easycontrol_keys import Checkpoint, Slot, parse

FOLDER = "easycontrol"


def register_folder() -> None:
    """Make "easycontrol" a kind of model: models/easycontrol, every LoRA folder, and what ships with the pack."""
    known, _ = folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))
    own = os.path.join(folder_paths.models_dir, FOLDER)
    shipped = str(Path(__file__).resolve().parents[1] / "weights" / FOLDER)
    paths = [own, *known, *folder_paths.get_folder_paths("loras"), shipped]
    # Set directly: add_model_folder_path would list files of every type.
    folder_paths.folder_names_and_paths[FOLDER] = (list(dict.fromkeys(paths)), {".safetensors", ".sft"})


def file_names() -> list[str]:
    """What the loader offers, read anew each time."""
    register_folder()
    return folder_paths.get_filename_list(FOLDER)


@dataclass(frozen=True, eq=False)
class EasyControlFile:
    """A loaded checkpoint: one patcher with a `ConditionLora` per slot."""

    name: str
    checkpoint: Checkpoint
    patchers: tuple[ModelPatcher, ...]

    def patcher(self, slot: int) -> ModelPatcher:
        """The adapter of one slot.

        Raises:
            ValueError: the file has no such slot.
        """
        last = len(self.patchers) - 1
        if not 0 <= slot <= last:
            raise ValueError(f"{self.name} has no slot {slot}, its last one is {last}. Set 'slot' to at most {last}.")
        return self.patchers[slot]


def load(name: str) -> EasyControlFile:
    """Read a file of the "easycontrol" kind by its name in the list.

    Raises:
        FileNotFoundError: no such file in any of the folders.
        ValueError: it is no EasyControl LoRA, or a damaged one.
    """
    register_folder()
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        raise FileNotFoundError(
            f"{name} is not in models/easycontrol or models/loras. The help page links the downloads; "
            "then refresh the page."
        )
    return from_state(_read(path), name, path)


def from_state(state: Mapping[str, Tensor], name: str, path: str | None = None) -> EasyControlFile:
    """Build the adapters of a checkpoint. With a `path`, core can load them again for another device."""
    checkpoint = parse(state, name)
    patchers = [_patcher(checkpoint, slot) for slot in checkpoint.slots]
    if path is not None:
        for number, patcher in enumerate(patchers):
            patcher.cached_patcher_init = (load_patchers, (path,), number)
    return EasyControlFile(name, checkpoint, tuple(patchers))


def load_patchers(path: str, disable_dynamic: bool = False) -> list[ModelPatcher]:
    """The factory core calls for another copy of the adapters."""
    checkpoint = parse(_read(path), os.path.basename(path))
    return [_patcher(checkpoint, slot, disable_dynamic) for slot in checkpoint.slots]


def _read(path: str) -> dict[str, Tensor]:
    return cast("dict[str, Tensor]", comfy.utils.load_torch_file(path, safe_load=True))


def _patcher(checkpoint: Checkpoint, slot: Slot, disable_dynamic: bool = False) -> ModelPatcher:
    offload = comfy.model_management.unet_offload_device()
    lora = ConditionLora(
        checkpoint.dim,
        checkpoint.double,
        checkpoint.single,
        slot.ranks,
        slot.scales,
        operations=comfy.ops.manual_cast,
        device=offload,
        dtype=next(iter(slot.weights.values())).dtype,
    )
    kind = ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = kind(lora, load_device=comfy.model_management.get_torch_device(), offload_device=offload)
    lora.load_state_dict(slot.weights, assign=patcher.is_dynamic())  # after the patcher: dynamic VRAM maps the file
    lora.requires_grad_(False)
    return patcher
