"""Transformers as diffusers publishes them: one safetensors file, or several and their index, or the folder of either.

Tensors are read one by one, when they are asked for.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import folder_paths
from torch import Tensor

from ..models.checkpoint import shown
from . import model_files

INDEX = ".safetensors.index.json"
SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}\.safetensors")
LONGEST_INDEX = 1 << 24  # bytes


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


# ----------------------------------------------------------------------------------------------------- where it lies


def names(kind: str, also: Sequence[str]) -> list[str]:
    """What a loader offers, read anew each time. Files of one transformer are shown once, as their index."""
    found = set()
    for name in model_files.names(kind, also):
        match = SHARD.fullmatch(name)
        found.add(f"{match['stem']}{INDEX}" if match else name)
    return sorted(found)


def path_of(kind: str, name: str, also: Sequence[str]) -> str:
    """Where a file, an index or a folder of the list lies.

    Raises:
        FileNotFoundError: nowhere.
        ValueError: a folder without a transformer, or with several.
    """
    shards = SHARD.fullmatch(name)
    if shards is not None:
        name = f"{shards['stem']}{INDEX}"
    if name.endswith(INDEX) or not os.path.splitext(name)[1]:
        found = next((path for path in _beside((kind, *also), name) if path.exists()), None)
        if found is not None:
            return str(_transformer_in(found, name) if found.is_dir() else found)
    return model_files.path_of(kind, name, also)


def _beside(kinds: Sequence[str], name: str) -> Iterator[Path]:
    """Where something that is no safetensors file may lie in the folders of the list."""
    inside = os.path.relpath(os.path.join("/", name), "/")  # as core: it stays in the folder
    for kind in kinds:
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
