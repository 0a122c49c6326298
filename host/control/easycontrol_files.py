"""EasyControl checkpoints as ComfyUI models: where they lie, and how they are loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...models.control.easycontrol import ConditionLora
from ...models.control.easycontrol_keys import Checkpoint, Slot, parse
from .. import model_files
from . import adapters

FOLDER = "easycontrol"


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
    path = model_files.path_of(FOLDER, name)
    return from_state(model_files.read(path), name, path)


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
    checkpoint = parse(model_files.read(path), os.path.basename(path))
    return [_patcher(checkpoint, slot, disable_dynamic) for slot in checkpoint.slots]


def _patcher(checkpoint: Checkpoint, slot: Slot, disable_dynamic: bool = False) -> ModelPatcher:
    make = partial(ConditionLora, checkpoint.dim, checkpoint.double, checkpoint.single, slot.ranks, slot.scales)
    return adapters.patcher(make, slot.weights, disable_dynamic)
