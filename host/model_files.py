"""Kinds of model files that the pack adds to ComfyUI's: where they lie, what is there, and how they are read.

Many users keep all LoRAs in one place, so the loaders look into the LoRA folders too. These do not become folders of a
kind: core lists, tags and uploads to files by their folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import comfy.utils
import folder_paths
from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"  # what ships with the pack
SAFE = {".safetensors", ".sft"}
DEMO = "dit_toolkit_demo_"
LORAS = ("loras",)  # where many keep all LoRAs, whatever their kind

AGAIN = "Download it again."
CONVERT = "Get it as a safetensors file; another ending is not enough."
# What people have in place of a safetensors file: its first bytes, what it is, what to do.
TAKEN_FOR_ONE = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself", "Run 'git lfs pull', or download it."),
    (b"<", "is a web page, not the file itself", "Download it again; its page may want you to log in first."),
    (b"PK\x03\x04", "is a zip archive or a PyTorch file", CONVERT),
    (b"\x80", "is a PyTorch file", CONVERT),
    (b"GGUF", "is a GGUF file", CONVERT),
)


class Contents(NamedTuple):
    """What a safetensors file holds."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def register(kind: str) -> None:
    """Make `kind` a folder of models: models/<kind> and what ships with the pack, after what the user set up."""
    known, _ = folder_paths.folder_names_and_paths.get(kind, ([], set()))
    shipped = WEIGHTS / kind
    paths = [*known, os.path.join(folder_paths.models_dir, kind), *([str(shipped)] if shipped.is_dir() else [])]
    # Set directly: add_model_folder_path would list files of every type.
    folder_paths.folder_names_and_paths[kind] = (list(dict.fromkeys(paths)), SAFE)


def offer_loras() -> None:
    """Add the LoRAs that ship with the pack to what ComfyUI's own LoRA loaders offer, after the user's own.

    Every LoRA loader of the installation lists them, so their names begin with DEMO. A folder would show it too, but
    on Windows its separator is another one than in the workflows that name the file.
    """
    shipped = WEIGHTS / "loras"
    if shipped.is_dir():
        folder_paths.add_model_folder_path("loras", str(shipped))


def names(kind: str, also: Sequence[str] = LORAS) -> list[str]:
    """What a loader offers, read anew each time: files of the kind, and the user's own in the folders of `also`."""
    register(kind)
    own = set()
    for other in also:
        found = folder_paths.filter_files_extensions(folder_paths.get_filename_list(other), SAFE)
        own |= {name for name in found if not (WEIGHTS / other / name).is_file() or _own(other, name)}
    return sorted({*folder_paths.get_filename_list(kind), *own})


def path_of(kind: str, name: str, also: Sequence[str] = LORAS) -> str:
    """Where a file of a kind lies. The user's own come before one that ships.

    Raises:
        FileNotFoundError: no such file in any of the folders.
    """
    register(kind)
    path = folder_paths.get_full_path(kind, name)
    if path is None or WEIGHTS in Path(path).parents:
        path = next((own for other in also if (own := _own(other, name))), path)
    if path is None:
        *first, last = (f"models/{folder}" for folder in (kind, *also))
        raise FileNotFoundError(
            f"{name} is not in {', '.join(first)} or {last}. Put it there and refresh the page; the node's help page "
            "says where such files come from."
        )
    return path


def _own(kind: str, name: str) -> str | None:
    """Where a file of the user lies in the folders of one of ComfyUI's own kinds; None for those that ship with us."""
    for folder in folder_paths.get_folder_paths(kind):
        path = os.path.join(folder, os.path.relpath(os.path.join("/", name), "/"))  # as core: it stays in the folder
        if folder != str(WEIGHTS / kind) and os.path.isfile(path):
            return path
    return None


def read(path: str, name: str, remedy: str | None = None) -> Contents:
    """A safetensors file, called `name` in errors.

    Args:
        remedy: what to do about a damaged one. None: what is best for its damage.

    Raises:
        ValueError: it is damaged, or no safetensors file.
    """
    with opened(path, name, remedy) as file:  # core's reader for dynamic VRAM takes a header as it comes
        metadata = file.metadata() or {}
        tensors = comfy.utils.load_torch_file(path, safe_load=True)
    return Contents(cast("dict[str, Tensor]", tensors), metadata)


@contextmanager
def opened(path: str, name: str, remedy: str | None = None) -> Iterator[Any]:
    """A safetensors file whose tensors are read one by one, with the same errors."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        what, best = _damage(path)
        raise ValueError(f"{name} {what}. {remedy or best} ({in_one_line(error)})") from error


def in_one_line(error: Any) -> str:
    """The words of an error that another program raised."""
    return " ".join(str(error).split())[:150]


def _damage(path: str) -> tuple[str, str]:
    """What is wrong with a file that cannot be read, and what to do."""
    if os.path.isdir(path):
        return "is a folder, not a file", "Put the file that lies in it in its place."
    try:
        with open(path, "rb") as file:
            start = file.read(40)
    except OSError:
        return "cannot be opened", "See whether ComfyUI may read it."
    if not start:
        return "is empty", AGAIN
    for first, what, best in TAKEN_FOR_ONE:
        if start.lstrip().startswith(first):
            return what, best
    if start.isascii() and start.decode("ascii").strip().isprintable():  # what a server answered
        return f"is a text, {in_one_line(start.decode('ascii'))!r}, not the file itself", AGAIN
    return "is damaged, or was not downloaded to its end", AGAIN
