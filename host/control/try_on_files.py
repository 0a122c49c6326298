"""Try-on LoRAs after MC-VTON as ComfyUI models: where they lie, and how they are loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import partial

from comfy.model_patcher import ModelPatcher

from ...models.control.mc_vton import BranchLora
from ...models.control.mc_vton_keys import Branch, Checkpoint, parse
from .. import model_files
from . import adapters

FOLDER = "try_on"

Blocks = tuple[int, int]  # double and single blocks of the model


@dataclass(frozen=True, eq=False)
class TryOnFile:
    """A loaded file. Its adapters are built for the model they meet: a file may not know how many blocks that has."""

    name: str
    checkpoint: Checkpoint
    path: str | None = None
    _adapters: dict[tuple[str, Blocks], ModelPatcher] = field(default_factory=dict)

    def adapter(self, branch: str, blocks: Blocks) -> ModelPatcher | None:
        """The LoRA of "person" or "garment", the same one for every MODEL of these blocks; None where it has none."""
        if branch not in self.checkpoint.branches:
            return None
        key = (branch, blocks)
        if key not in self._adapters:
            patcher = _patcher(self.checkpoint, self.checkpoint.branches[branch], blocks)
            if self.path is not None:
                patcher.cached_patcher_init = (load_patcher, (self.path, branch, blocks))
            self._adapters[key] = patcher
        return self._adapters[key]


def load(name: str) -> TryOnFile:
    """Read a file of the "try_on" kind by its name in the list.

    Raises:
        FileNotFoundError: no such file in any of the folders.
        ValueError: it is no try-on LoRA, a damaged one, or one for a newer version of the pack.
    """
    path = model_files.path_of(FOLDER, name)
    return TryOnFile(name, read(path, name), path)


def read(path: str, name: str) -> Checkpoint:
    """The file at `path`, called `name` in errors."""
    state, metadata = model_files.read(path, name)
    return parse(state, name, metadata)


def load_patcher(path: str, branch: str, blocks: Blocks, disable_dynamic: bool = False) -> ModelPatcher:
    """The factory core calls for another copy of an adapter."""
    checkpoint = read(path, os.path.basename(path))
    return _patcher(checkpoint, checkpoint.branches[branch], blocks, disable_dynamic)


def _patcher(checkpoint: Checkpoint, branch: Branch, blocks: Blocks, disable_dynamic: bool = False) -> ModelPatcher:
    make = partial(BranchLora, checkpoint.dim, *blocks, branch.ranks, branch.scales, hidden=checkpoint.hidden)
    return adapters.patcher(make, branch.weights, disable_dynamic)
