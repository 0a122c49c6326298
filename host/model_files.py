"""Kinds of model files that the pack adds to ComfyUI's: their folders, their names, and how to read them.

Many users keep all LoRAs in one folder, so our loaders look into the LoRA folders too. We do not register those folders
for our kinds, because core lists, tags and uploads files by folder.
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

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"  # the pack's own files
SAFE = {".safetensors", ".sft"}
DEMO = "dit_toolkit_demo_"
LORAS = ("loras",)  # where many keep all LoRAs, whatever their kind

AGAIN = "Download it again."
CONVERT = "Get it as a safetensors file; another ending is not enough."
# Files that people mistake for safetensors: first bytes, what the file is, what to do.
MISTAKEN = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself", "Run 'git lfs pull', or download it."),
    (b"<", "is a web page, not the file itself", "Download it again; its page may want you to log in first."),
    (b"PK\x03\x04", "is a zip archive or a PyTorch file", CONVERT),
    (b"\x80", "is a PyTorch file", CONVERT),
    (b"GGUF", "is a GGUF file", CONVERT),
)


class Contents(NamedTuple):
    """The contents of a safetensors file."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def register(kind: str) -> None:
    """Register models/<kind> and the pack's own folder as folders of a kind, after the user's folders."""
    known, _ = folder_paths.folder_names_and_paths.get(kind, ([], set()))
    shipped = WEIGHTS / kind
    paths = [*known, os.path.join(folder_paths.models_dir, kind), *([str(shipped)] if shipped.is_dir() else [])]
    # Set directly: add_model_folder_path would list files of every type.
    folder_paths.folder_names_and_paths[kind] = (list(dict.fromkeys(paths)), SAFE)


def offer_loras() -> None:
    """Offer the pack's LoRAs in ComfyUI's own LoRA loaders, after the user's.

    Every LoRA loader of the installation lists them, so their names begin with DEMO. A folder name in front would show
    it too, but Windows writes another separator than the workflows that name the file.
    """
    shipped = WEIGHTS / "loras"
    if shipped.is_dir():
        folder_paths.add_model_folder_path("loras", str(shipped))


def names(kind: str, also: Sequence[str] = LORAS) -> list[str]:
    """The names that a loader offers, read anew each time: files of the kind, and the user's in the folders `also`."""
    register(kind)
    own = set()
    for other in also:
        found = folder_paths.filter_files_extensions(folder_paths.get_filename_list(other), SAFE)
        own |= {name for name in found if not (WEIGHTS / other / name).is_file() or _own(other, name)}
    return sorted({*folder_paths.get_filename_list(kind), *own})


def path_of(kind: str, name: str, also: Sequence[str] = LORAS) -> str:
    """The path of a file of a kind. The user's own files come before those of the pack.

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
    """The path of a user's file of one of ComfyUI's kinds. None for the pack's own files."""
    for folder in folder_paths.get_folder_paths(kind):
        path = os.path.join(folder, os.path.relpath(os.path.join("/", name), "/"))  # as core: stays in the folder
        if folder != str(WEIGHTS / kind) and os.path.isfile(path):
            return path
    return None


def read(path: str, name: str, remedy: str | None = None) -> Contents:
    """A safetensors file, called `name` in errors.

    Args:
        remedy: what to do about a damaged file. None: the advice that suits the damage.

    Raises:
        ValueError: the file is damaged, or no safetensors file.
    """
    with opened(path, name, remedy) as file:  # core's reader for dynamic VRAM does not check the header
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
    """The text of another program's error, short and on one line."""
    return " ".join(str(error).split())[:150]


def _damage(path: str) -> tuple[str, str]:
    """What is wrong with a file that cannot be read, and what to do."""
    if os.path.isdir(path):
        return "is a folder, not a file", "Put the file inside it in its place."
    try:
        with open(path, "rb") as file:
            start = file.read(40)
    except OSError:
        return "cannot be opened", "See whether ComfyUI may read it."
    if not start:
        return "is empty", AGAIN
    length = start[4:8] == bytes(4)  # of a header, whose first byte may be that of a PyTorch file
    for magic, what, best in MISTAKEN:
        if start.lstrip().startswith(magic) and not (length and magic == b"\x80"):
            return what, best
    if start.isascii() and start.decode("ascii").strip().isprintable():  # a server's answer
        return f"is a text, {in_one_line(start.decode('ascii'))!r}, not the file itself", AGAIN
    return "is damaged, or was not downloaded to its end", AGAIN
