"""Try-on LoRAs after MC-VTON as ComfyUI models: finds and loads them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import partial

from comfy.model_patcher import ModelPatcher

from ...models.control.mc_vton import BranchLora
from ...models.control.mc_vton_keys import Branch, Checkpoint, parse
from .. import adapters, model_files

FOLDER = "try_on"

Depth = tuple[int, int]  # double and single blocks of the model


@dataclass(frozen=True, eq=False)
class TryOnFile:
    """A loaded file. It builds adapters for each model, because a file may not know the model's number of blocks."""

    name: str
    checkpoint: Checkpoint
    path: str | None = None
    _adapters: dict[tuple[str, Depth], ModelPatcher] = field(default_factory=dict)

    def adapter(self, branch: str, blocks: Depth) -> ModelPatcher | None:
        """The LoRA of "person" or "garment" for every MODEL with these blocks; None if the file has none."""
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


def load_patcher(path: str, branch: str, blocks: Depth, disable_dynamic: bool = False) -> ModelPatcher:
    """The factory that core calls for another copy of an adapter."""
    checkpoint = read(path, os.path.basename(path))
    return _patcher(checkpoint, checkpoint.branches[branch], blocks, disable_dynamic)


def _patcher(checkpoint: Checkpoint, branch: Branch, blocks: Depth, disable_dynamic: bool = False) -> ModelPatcher:
    make = partial(BranchLora, checkpoint.dim, *blocks, branch.ranks, branch.scales, hidden=checkpoint.hidden)
    return adapters.patcher(make, branch.weights, disable_dynamic)
