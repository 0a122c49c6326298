"""Which function makes which picture of the tree, and which pictures are not made but given."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence

from ..places import ROOT, WORKFLOWS
from . import charts, gallery, screens, sheets
from .studio import Picture, Studio

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif")
Maker = Callable[[Studio], Picture]

# What people drew or took, and the nodes begin with. Nothing makes them: they are the examples' own sources.
SOURCES = {
    "web/icon.png": "a doll of the small world, drawn for the registry",
    **{f"web/examples/drawn_{name}.png": "drawn by hand" for name in ("doll", "fish", "house", "star")},
    **{f"web/examples/painted_{name}.png": "painted" for name in ("dancer", "doll", "person", "scene")},
    **{f"web/examples/garment_{name}.png": "painted" for name in ("spotted", "striped")},
    "web/examples/mask_doll.png": "the painted doll's outline",
    "web/examples/mask_person_shirt.png": "the painted person's shirt",
    "web/examples/mask_photo_suit.png": "the suit of the person on the photograph, drawn by hand",
    "web/examples/photo_coin.jpg": "a photograph; docs/papers.md names its source",
    "web/examples/photo_person.jpg": "a photograph; docs/papers.md names its source",
    **{f"web/examples/worn_{name}.png": "a small picture, worn" for name in ("cat", "coffee", "doll")},
}
SETS = "web/examples/panel_sets/"  # the training sets that ship: painted, with their captions


def makers() -> dict[str, Maker]:
    """Sheets, drawings and screenshots, by the path of their file."""
    return {**charts.files(), **sheets.files(), **screens.files(), **gallery.files()}


def thumbnails() -> dict[str, str]:
    """The path of each workflow's thumbnail, and the workflow's title. An app comes after its workflow."""
    stems = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
    return {f"workflows/{stem}.jpg": stem for stem in stems}


def entries() -> dict[str, str]:
    """Every picture that there should be, and how it comes about."""
    made = {
        name: f"{function.__module__.rpartition('.')[2]}.{function.__name__}" for name, function in makers().items()
    }
    return {**made, **dict.fromkeys(thumbnails(), "thumbnails.make"), **SOURCES}


def tracked() -> list[str]:
    """The pictures of the tree, those that git will know included."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name.endswith(ENDINGS) and (ROOT / name).is_file()]


def chosen(words: Sequence[str]) -> list[str]:
    """Those that are made and have one of the words in their path; all without words."""
    names = [*makers(), *thumbnails()]
    return [name for name in names if not words or any(word.lower() in name.lower() for word in words)]
