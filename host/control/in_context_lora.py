"""Reads folders of picture sets, the training data of In-Context LoRAs, from ComfyUI's input folder.

A folder holds 20 to 100 sets (In-Context LoRA, arXiv:2410.23775, section 3), each a folder of its own:

    storyboards/
        set 1/  1.png  2.png  3.png  caption.txt
        set 2/  a.jpg  b.jpg  c.jpg  a.txt  b.txt  c.txt  summary.txt

Pictures fill the panels in the order of their names, 2 before 10. caption.txt is the caption as it stands. Without it,
the texts of the pictures are joined like a prompt, with the layout's prefix and tags, and with summary.txt in front if
there is one. ComfyUI's own nodes do the encoding and the training.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import folder_paths
import numpy as np
import torch
from torch import Tensor

from ...models.control.panel_layout import Layout
from ...models.control.panel_pictures import Fit, compose, fitted
from ...models.control.panel_prompt import joint_prompt
from .. import picture_files
from ..progress import each_of

logger = logging.getLogger(__name__)

PICTURES = (".png", ".jpg", ".jpeg", ".webp")  # as in ComfyUI's dataset nodes
EXAMPLE = "example: one doll, two scenes"  # 20 sets of two, drawn for the embedded default
EXAMPLE_SETS = Path(__file__).resolve().parents[2] / "web" / "examples" / "panel_sets"
CAPTION, SUMMARY = "caption.txt", "summary.txt"


@dataclass(frozen=True)
class PanelSet:
    """One training example: `canvas` is IMAGE `[1, height, width, 3]`."""

    name: str
    canvas: Tensor
    caption: str


def read_sets(folder: str, layout: Layout, fit: Fit) -> list[PanelSet]:
    """Every set of one of `folders`, in the order of their names.

    Raises:
        ValueError: a folder without sets, a set with too many or too few pictures or captions, or a path out of the
            input folder.
        FileNotFoundError: no such folder.
    """
    path = located(folder)
    sets = [entry for entry in in_order(path) if entry.is_dir()]
    if not sets:
        raise ValueError(f"{folder!r} has no sets: put the pictures of each set into a folder of their own inside it.")
    for one in sets:
        check(one, layout)  # all of them, before the first picture is read
    found = [read_set(one, layout, fit) for one in each_of(sets)]
    size = f"{layout.width} x {layout.height}"
    logger.info("%s: %d sets of %d panels, each canvas %s", folder, len(found), layout.count, size)
    return found


def fingerprint(folder: str | None) -> str:
    """A hash that changes when a file below the folder does, so that ComfyUI reads the folder again."""
    if folder is None:  # from a link, not known yet
        return ""
    entries = sorted(path for path in located(folder).rglob("*") if path.is_file())
    states = [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in entries]
    return sha256(repr(states).encode()).hexdigest()


def folders() -> list[str]:
    """The choices of a node: the pack's own sets, and every folder of the input folder."""
    return [EXAMPLE, *folder_paths.get_input_subfolders()]


def located(folder: str) -> Path:
    if folder == EXAMPLE:
        return EXAMPLE_SETS
    root = folder_paths.get_input_directory()
    path = Path(root, folder)
    if not folder_paths.is_within_directory(root, str(path)) or path.resolve() == Path(root).resolve():
        raise ValueError(f"{folder!r} is no folder inside ComfyUI's input folder. Choose one that is.")
    if not path.is_dir():
        raise FileNotFoundError(f"There is no folder {folder!r} in ComfyUI's input folder. Refresh the page (R).")
    return path


def in_order(path: Path) -> list[Path]:
    """The visible entries of a folder by name, 2 before 10."""
    visible = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    return sorted(visible, key=lambda entry: natural(entry.name))


def natural(name: str) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", name.casefold())
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts]


def pictures_of(one: Path) -> list[Path]:
    return [entry for entry in in_order(one) if entry.suffix.lower() in PICTURES and entry.is_file()]


def check(one: Path, layout: Layout) -> None:
    """Refuse a set that lacks pictures or captions, by its name."""
    pictures = pictures_of(one)
    if len(pictures) != layout.count:
        names = ", ".join(picture.name for picture in pictures) or "none"
        raise ValueError(
            f"Set {one.name!r} needs {layout.count} pictures, one per panel, and has {len(pictures)}: {names}. "
            f"Read are {', '.join(PICTURES)}."
        )
    texts = captions_of(one, pictures)
    missing = [text.name for text in texts if not text.is_file()]
    if missing:
        raise ValueError(
            f"Set {one.name!r} has no caption: write {CAPTION} for the whole set, or one text per picture; there is no "
            f"{', '.join(missing)}."
        )
    blank = [text.name for text in texts if not words_of(one, text)]
    if blank:
        raise ValueError(f"Set {one.name!r} has an empty caption: {', '.join(blank)}.")


def captions_of(one: Path, pictures: list[Path]) -> list[Path]:
    """The file of the joint caption, or one file per picture."""
    joint = one / CAPTION
    return [joint] if joint.is_file() else [picture.with_suffix(".txt") for picture in pictures]


def read_set(one: Path, layout: Layout, fit: Fit) -> PanelSet:
    pictures = pictures_of(one)
    panels = {
        index: fitted(read_picture(one, picture), layout.panel_width, layout.panel_height, fit)
        for index, picture in enumerate(pictures)
    }
    texts = [words_of(one, text) for text in captions_of(one, pictures)]
    if (one / CAPTION).is_file():
        return PanelSet(one.name, compose(layout, panels), texts[0])
    summary = words_of(one, one / SUMMARY) if (one / SUMMARY).is_file() else ""
    return PanelSet(one.name, compose(layout, panels), joint_prompt(layout, summary, texts))


def words_of(one: Path, text: Path) -> str:
    try:
        return text.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"Set {one.name!r}: {text.name} is not UTF-8 text. Save it as UTF-8.") from error
    except OSError as error:
        raise ValueError(f"Set {one.name!r}: {text.name} cannot be opened. Is ComfyUI allowed to? ({error})") from error


def read_picture(one: Path, path: Path) -> Tensor:
    """IMAGE `[1, H, W, 3]` in 0..1, turned upright, without alpha."""
    upright = picture_files.read_picture(path, f"Set {one.name!r}: {path.name}")
    if upright.mode.startswith("I"):  # 16 bits grey
        values = np.array(upright, np.float32) / 65535
        if values.min() < 0 or values.max() > 1:
            raise ValueError(f"Set {one.name!r}: {path.name} has more than 16 bits. Save it with 8 or 16.")
        return torch.from_numpy(values)[None, ..., None].expand(-1, -1, -1, 3)
    return torch.from_numpy(np.array(upright.convert("RGB"), np.float32) / 255)[None]
