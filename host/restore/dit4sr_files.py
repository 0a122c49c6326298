"""DiT4SR's files: where they lie, and how they are loaded.

A file is one of three: a patch, a published transformer, or the index of one that is split into several files. Of a
transformer only the control weights are read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import folder_paths
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...models.restore.dit4sr import ControlBranch
from ...models.restore.dit4sr_keys import Asked, Checkpoint, Variant, chosen, parse
from .. import adapters, model_files, sharded_files
from ..families.family import Sizes
from ..sharded_files import contents

FOLDER = "dit4sr"
ALSO = ("model_patches", "diffusion_models")  # where people keep patches, and whole transformers
SHOULD_LOOK_LIKE = "transformer_blocks.0.attn.to_q.weight"


@dataclass(frozen=True, eq=False)
class DiT4SRFile:
    """A loaded file, as one variant."""

    name: str
    checkpoint: Checkpoint
    variant: Variant
    patcher: ModelPatcher

    @property
    def made_for(self) -> Sizes:
        return Sizes(self.checkpoint.dim, self.checkpoint.blocks, self.checkpoint.dual)

    @property
    def report(self) -> str:
        """One line: what was found in the file."""
        asked = "" if self.variant == self.checkpoint.variant else f" by choice (the file is {self.checkpoint.variant})"
        return f"{self.name}: variant {self.variant}{asked}; {self.checkpoint.summary}"


def names() -> list[str]:
    """What the loader offers, see `sharded_files.names`."""
    _register()
    return sharded_files.names(FOLDER, ALSO)


def load(name: str, asked: Asked = "auto") -> DiT4SRFile:
    """Read a file by its name in the list: of a file, of an index, or of the folder that holds either.

    Raises:
        FileNotFoundError: no such file in any of the folders.
        ValueError: it is no DiT4SR file, a damaged one, or one that cannot run as asked.
    """
    path = path_of(name)
    state, metadata = contents(path, name)
    return from_state(state, name, asked, path, metadata)


def from_state(
    state: Mapping[str, Tensor],
    name: str,
    asked: Asked = "auto",
    path: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> DiT4SRFile:
    """Build the branch of a checkpoint. With a `path`, core can load it again for another device."""
    checkpoint = parse(state, name, metadata)
    variant = chosen(checkpoint, asked, name)
    patcher = _patcher(checkpoint, variant)
    if path is not None:
        patcher.cached_patcher_init = (load_patcher, (path, asked))
    return DiT4SRFile(name, checkpoint, variant, patcher)


def load_patcher(path: str, asked: Asked, disable_dynamic: bool = False) -> ModelPatcher:
    """The factory core calls for another copy of the branch."""
    name = os.path.basename(path)
    checkpoint = parse(*_with_name(path, name))
    return _patcher(checkpoint, chosen(checkpoint, asked, name), disable_dynamic)


def _with_name(path: str, name: str) -> tuple[Mapping[str, Tensor], str, dict[str, str]]:
    state, metadata = contents(path, name)
    return state, name, metadata


def _patcher(checkpoint: Checkpoint, variant: Variant, disable_dynamic: bool = False) -> ModelPatcher:
    make = partial(ControlBranch, checkpoint.dim, checkpoint.blocks, checkpoint.dual, variant)
    return adapters.patcher(make, checkpoint.used_as(variant), disable_dynamic)


# ----------------------------------------------------------------------------------------------------- where it lies


def output_folder() -> Path:
    return Path(folder_paths.get_output_directory()) / FOLDER


def _register() -> None:
    """Make what was extracted part of the list, behind what the user has put into models/dit4sr.

    Core fails at a folder of the list that is gone.
    """
    model_files.register(FOLDER)
    (paths, _), extracted = folder_paths.folder_names_and_paths[FOLDER], str(output_folder())
    if os.path.isdir(extracted) and extracted not in paths:
        paths.append(extracted)
    elif not os.path.isdir(extracted) and extracted in paths:
        paths.remove(extracted)
        folder_paths.filename_list_cache.pop(FOLDER, None)


def path_of(name: str) -> str:
    """Where a file, an index or a folder of the list lies, see `sharded_files.path_of`."""
    _register()
    return sharded_files.path_of(FOLDER, name, ALSO)
