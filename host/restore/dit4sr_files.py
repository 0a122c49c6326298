"""DiT4SR's files: where they lie, and how they are loaded.

A file is one of three: a patch, a published transformer, or the index of one that is split into several files. Of a
transformer only the control weights are read.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import folder_paths
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...models.checkpoint import shown
from ...models.restore.dit4sr import ControlBranch
from ...models.restore.dit4sr_keys import Asked, Checkpoint, Variant, chosen, parse
from .. import adapters, model_files
from ..families.sd3 import Sizes

logger = logging.getLogger(__name__)

FOLDER = "dit4sr"
ALSO = ("model_patches", "diffusion_models")  # where people keep patches, and whole transformers
INDEX = ".safetensors.index.json"
SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}\.safetensors")
LONGEST_INDEX = 1 << 24  # bytes
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


class Tensors(Mapping[str, Tensor]):
    """The tensors of one or several safetensors files. Each is read when it is asked for."""

    def __init__(self, files: Mapping[str, str], name: str):
        """`files`: the path of the file that holds each tensor."""
        self.files, self.name = files, name

    def __getitem__(self, key: str) -> Tensor:
        with model_files.opened(self.files[key], self.name) as file:
            return file.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def names() -> list[str]:
    """What the loader offers, read anew each time. Files of one transformer are shown once, as their index."""
    _register()
    found = set()
    for name in model_files.names(FOLDER, ALSO):
        match = SHARD.fullmatch(name)
        found.add(f"{match['stem']}{INDEX}" if match else name)
    return sorted(found)


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
    """Where a file, an index or a folder of the list lies.

    Raises:
        FileNotFoundError: nowhere.
        ValueError: a folder without a transformer, or with several.
    """
    _register()
    shards = SHARD.fullmatch(name)
    if shards is not None:
        name = f"{shards['stem']}{INDEX}"
    if name.endswith(INDEX) or not os.path.splitext(name)[1]:
        found = next((path for path in _beside(name) if path.exists()), None)
        if found is not None:
            return str(_transformer_in(found, name) if found.is_dir() else found)
    return model_files.path_of(FOLDER, name, ALSO)


def _beside(name: str) -> Iterator[Path]:
    """Where something that is no safetensors file may lie in the folders of the list."""
    inside = os.path.relpath(os.path.join("/", name), "/")  # as core: it stays in the folder
    for kind in (FOLDER, *ALSO):
        yield from (Path(folder) / inside for folder in folder_paths.get_folder_paths(kind))


def _transformer_in(folder: Path, name: str) -> Path:
    """The index or the one file in a folder as it is published, or in the `transformer` folder in it."""
    for place in (folder, folder / "transformer"):
        indexed = sorted(place.glob(f"*{INDEX}"))
        found = indexed or sorted(path for path in place.glob("*.safetensors"))
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"The folder {name} holds several files: {_few(found)}. Choose one of them.")
    raise ValueError(f"The folder {name} holds no safetensors file. Download the whole folder of the transformer.")


def _few(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths[:3]) + (", ..." if len(paths) > 3 else "")


# ------------------------------------------------------------------------------------------------------ what it holds


def contents(path: str, name: str) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a file or of all files of an index, and the metadata of a single file."""
    if path.endswith(INDEX):
        return Tensors(_indexed(path, name), name), {}
    with model_files.opened(path, name) as file:
        return Tensors(dict.fromkeys(file.keys(), path), name), file.metadata() or {}


def _indexed(path: str, name: str) -> dict[str, str]:
    """The path of the file that holds each tensor, as an index says and the files do.

    Raises:
        ValueError: an index that cannot be read, a file that is missing, or one that lacks what the index says of it.
    """
    folder, files = Path(path).parent, {}
    for key, shard in _weight_map(path, name).items():
        if not isinstance(shard, str) or shard != os.path.basename(shard) or not shard.endswith(".safetensors"):
            raise ValueError(f"{name} says that {shown(key)} is in {shown(shard)}, which is no file beside it.")
        files.setdefault(shard, []).append(key)
    found = {}
    for shard, keys in files.items():
        if not (folder / shard).is_file():
            raise ValueError(f"{shard} is missing beside {name}. Download all files of the folder.")
        with model_files.opened(str(folder / shard), shard) as file:
            held = set(file.keys())
        for key in keys:
            if key not in held:
                raise ValueError(f"{shard} does not hold {shown(key)}, which {name} says it does. {model_files.AGAIN}")
            found[key] = str(folder / shard)
    return found


def _weight_map(path: str, name: str) -> dict[str, object]:
    try:
        whole = json.loads(Path(path).read_text("utf-8")) if os.path.getsize(path) <= LONGEST_INDEX else None
    except (OSError, ValueError, RecursionError):
        whole = None
    found = whole.get("weight_map") if isinstance(whole, dict) else None
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{name} is no index of safetensors files, or is damaged. {model_files.AGAIN}")
    return found
