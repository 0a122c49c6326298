"""Several related pictures on one canvas: where the panels lie, which tag introduces each, and which are given.

Source: In-Context LoRA, arXiv:2410.23775, section 3. The pictures of a set stand side by side on one canvas, their
captions form one prompt, and an ordinary LoRA learns from 20 to 100 such sets. Some panels may be given; inpainting
fills the rest. The model itself stays unchanged. Canvas sizes, tags and prefixes of the ten published LoRAs come from
the authors' model table (github.com/ali-vilab/In-Context-LoRA); the panel grids follow from the sample prompts.
`panel_prompt.py` makes the joint prompt, `panel_pictures.py` the canvas.

Panel numbers follow the reading order, row by row, from 1 as the user sees them.
Units: pixels. Borders of panels lie on multiples of `TOKEN`, so a token never sees two panels.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

TOKEN = 16  # pixels: 8 of the autoencoder times 2 of the patch
LIMIT = 8  # rows or columns

Tags = Literal["auto", "position", "scene", "image"]

POSITIONS: dict[tuple[int, int], tuple[str, ...]] = {  # (rows, columns): the names in the published prompts
    (1, 2): ("LEFT", "RIGHT"),
    (2, 1): ("TOP", "BOTTOM"),
    (2, 2): ("TOP-LEFT", "TOP-RIGHT", "BOTTOM-LEFT", "BOTTOM-RIGHT"),
}


@dataclass(frozen=True)
class Layout:
    """Equal panels in rows and columns, without gutters.

    Attributes:
        panel_width, panel_height: pixels, multiples of `TOKEN`.
        tags: one per panel, with brackets; it introduces the panel in the prompt.
        prefix: the beginning of this task's prompts and captions; "" for none.
        given: indices from 0 of the given panels, ascending.
        joint: separator between two panels' texts.

    Raises:
        ValueError: rows or columns outside 1..`LIMIT`, or sides that do not end on a token.
    """

    rows: int
    columns: int
    panel_width: int
    panel_height: int
    tags: tuple[str, ...]
    prefix: str = ""
    given: tuple[int, ...] = ()
    joint: str = "; "

    def __post_init__(self):
        for name, value in (("rows", self.rows), ("columns", self.columns)):
            if not 1 <= value <= LIMIT:
                raise ValueError(f"'{name}' must be from 1 to {LIMIT}, got {value}.")
        for name, value in (("panel_width", self.panel_width), ("panel_height", self.panel_height)):
            if value < TOKEN or value % TOKEN:
                lower = max(value // TOKEN, 1) * TOKEN
                nearest = f"{lower} or {lower + TOKEN}" if value > TOKEN else f"{TOKEN} or more"
                raise ValueError(f"'{name}' must be a multiple of {TOKEN} pixels, got {value}. Take {nearest}.")
        if len(self.tags) != self.count:
            raise ValueError(f"{self.count} panels need {self.count} tags, got {len(self.tags)}.")
        if any(not 0 <= index < self.count for index in self.given) or list(self.given) != sorted({*self.given}):
            raise ValueError(f"given panels must be different indices below {self.count}, ascending, got {self.given}.")

    @property
    def count(self) -> int:
        return self.rows * self.columns

    @property
    def width(self) -> int:
        """Width of the canvas."""
        return self.columns * self.panel_width

    @property
    def height(self) -> int:
        return self.rows * self.panel_height

    @property
    def unknown(self) -> tuple[int, ...]:
        """Indices of the panels to generate."""
        return tuple(index for index in range(self.count) if index not in self.given)


@dataclass(frozen=True)
class Preset:
    """The canvas that a published LoRA was trained with. `width`, `height`: of one panel."""

    rows: int
    columns: int
    width: int
    height: int
    tags: Tags = "position"
    prefix: str = ""


PRESETS: dict[str, Preset] = {  # by file name; canvas sizes as in the authors' table
    "couple-profile": Preset(1, 2, 1024, 1024),
    "film-storyboard": Preset(3, 1, 1024, 512, "scene", "[MOVIE-SHOTS]"),
    "font-design": Preset(2, 2, 896, 608),
    "home-decoration": Preset(2, 2, 672, 864),
    "portrait-illustration": Preset(1, 2, 576, 1088),
    "portrait-photography": Preset(2, 2, 672, 864, prefix="[FOUR-PANEL]"),
    "ppt-templates": Preset(2, 2, 992, 576),
    "sandstorm-visual-effect": Preset(2, 1, 1408, 800, prefix="[SANDSTORM-PSA]"),
    "sparklers-visual-effect": Preset(2, 1, 960, 544, prefix="[REAL-SPARKLERS-OVERLAYS]"),
    "visual-identity-design": Preset(1, 2, 736, 1024),
}


def panel_layout(
    preset: str, rows: int, columns: int, panel_width: int, panel_height: int, tags: Tags, prefix: str, given: str
) -> Layout:
    """The layout that the user describes.

    Args:
        preset: a key of `PRESETS`, or "custom", which alone reads the four numbers.
        tags: "auto" takes the preset's; for a custom grid see `resolved`.
        prefix: "" takes the preset's.
        given: see `parse_given`.

    Raises:
        ValueError: an unknown preset, or an error of `Layout`, `tag_names` or `parse_given`.
    """
    if preset == "custom":
        found = Preset(rows, columns, panel_width, panel_height, "auto")
    elif preset in PRESETS:
        found = PRESETS[preset]
    else:
        raise ValueError(f"There is no preset {preset!r}. Choose custom, {', '.join(PRESETS)}.")
    style = resolved(found.tags if tags == "auto" else tags, found.rows, found.columns)
    return Layout(
        found.rows,
        found.columns,
        found.width,
        found.height,
        tag_names(style, found.rows, found.columns),
        without_breaks(prefix).strip() or found.prefix,
        parse_given(given, found.rows * found.columns),
        joint=", " if style == "scene" else "; ",  # as in the published prompts
    )


def resolved(tags: Tags, rows: int, columns: int) -> Tags:
    """The meaning of "auto" for a grid: names of positions if it has any, scenes for one column, else numbers."""
    if tags != "auto":
        return tags
    return "position" if (rows, columns) in POSITIONS else "scene" if columns == 1 else "image"


def tag_names(tags: Tags, rows: int, columns: int) -> tuple[str, ...]:
    """The tag of each panel, such as `[TOP-LEFT]`, `[SCENE-1]` or `[IMAGE1]`, in reading order.

    Raises:
        ValueError: positions for a grid without names for them, or an unknown style.
    """
    tags = resolved(tags, rows, columns)
    numbers = range(1, rows * columns + 1)
    if tags == "scene":
        return tuple(f"[SCENE-{number}]" for number in numbers)
    if tags == "image":
        return tuple(f"[IMAGE{number}]" for number in numbers)
    if tags != "position":
        raise ValueError(f"'tags' must be auto, position, scene or image, got {tags!r}.")
    if (rows, columns) not in POSITIONS:
        raise ValueError(
            f"'tags' position has names for 1 x 2, 2 x 1 and 2 x 2 panels (rows x columns), not for {rows} x {columns}"
            ". Choose scene or image."
        )
    return tuple(f"[{name}]" for name in POSITIONS[rows, columns])


def parse_given(text: str, count: int) -> tuple[int, ...]:
    """Indices from 0 out of panel numbers from 1, as in "1, 3". Ascending, each once; "" gives none.

    Raises:
        ValueError: a word that is no number, or no number of a panel.
    """
    numbers = set()
    for word in filter(None, re.split(r"[\s,;]+", text)):
        digits = word.lstrip("0")
        is_number = re.fullmatch("[0-9]+", word) and len(digits) <= len(str(count))
        if not is_number or not 1 <= int(digits or "0") <= count:
            shown = word if len(word) <= 20 else f"{word[:20]}..."
            raise ValueError(
                f"'given' must list panel numbers from 1 to {count}, like 1, 3, or stay empty; got {shown!r}."
            )
        numbers.add(int(digits))
    return tuple(sorted(number - 1 for number in numbers))


def without_breaks(text: str) -> str:
    """Each line break, of whatever kind, becomes a blank; several in a row become one."""
    return " ".join(filter(None, text.splitlines()))
