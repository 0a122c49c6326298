"""Several related pictures on one canvas: where the panels lie, how the joint prompt is put together, how it is cut.

Source: In-Context LoRA, arXiv:2410.23775, section 3: the pictures of a set are put side by side on one canvas, their
captions are joined into one prompt, and an ordinary LoRA learns from 20 to 100 such sets. Some panels may be given;
the rest is then inpainted. The model is never touched. Canvas sizes, tags and prefixes of the ten published LoRAs:
the authors' model table (github.com/ali-vilab/In-Context-LoRA); its panel grids follow from the sample prompts.

Shapes: IMAGE `[B, H, W, 3]` in 0..1. Panels are counted in reading order, row by row, from 1 as the user sees them.
Units: pixels. Borders of panels lie on multiples of `TOKEN`, so a token never sees two panels.
Where we differ: the paper does not say how to resize, what stands in the place of a panel that is not given, nor how
to mask. Here: centred crop, mid-grey (`FILL`), and a mask with hard edges on the panels' borders.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

TOKEN = 16  # pixels: 8 of the autoencoder times 2 of the patch
LIMIT = 8  # rows or columns
FILL = 0.5  # grey of a panel that is not given, and around a padded picture

# Full-width marks as escapes: shipped code stays in the characters that every scanner reads.
STOPS = ".\u3002"  # between two panels, the layout's joint stands for them
JOINTS = ",;:\uff0c\uff1b\uff1a\u3001"  # stay between two panels; dropped at the end
ENDS = "!?\uff01\uff1f\u2026"  # stay
QUOTES = "\"'\u201d\u2019\u00bb\u300d\u300f"  # no full stop is put after one that follows a stop

Tags = Literal["auto", "position", "scene", "image"]
Fit = Literal["crop", "pad", "stretch"]

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
        tags: what introduces each panel in the prompt, with its brackets.
        prefix: what prompts and captions of this task begin with; "" for nothing.
        given: indices from 0 of the panels that are given as pictures, ascending.
        joint: what stands between two panels' texts.

    Raises:
        ValueError: for rows and columns outside 1..`LIMIT`, or sides that do not end on a token.
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
        """Of the canvas."""
        return self.columns * self.panel_width

    @property
    def height(self) -> int:
        return self.rows * self.panel_height

    @property
    def unknown(self) -> tuple[int, ...]:
        """Indices of the panels that are to be generated."""
        return tuple(index for index in range(self.count) if index not in self.given)


@dataclass(frozen=True)
class Preset:
    """What a published LoRA was trained with. `width`, `height`: of one panel."""

    rows: int
    columns: int
    width: int
    height: int
    tags: Tags = "position"
    prefix: str = ""


PRESETS: dict[str, Preset] = {  # by file name; canvas sizes as the authors' table has them
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
        tags: "auto" takes what the preset was trained with; see `tag_names` for what a grid of one's own gets.
        prefix: "" takes the preset's.
        given: see `parse_given`.

    Raises:
        ValueError: for an unknown preset, and where `Layout`, `tag_names` or `parse_given` do.
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
        prefix.strip() or found.prefix,
        parse_given(given, found.rows * found.columns),
        joint=", " if style == "scene" else "; ",  # as in the published prompts
    )


def resolved(tags: Tags, rows: int, columns: int) -> Tags:
    """What "auto" means for a grid: names of positions where there are any, scenes for one column, else numbers."""
    if tags != "auto":
        return tags
    return "position" if (rows, columns) in POSITIONS else "scene" if columns == 1 else "image"


def tag_names(tags: Tags, rows: int, columns: int) -> tuple[str, ...]:
    """The tag of each panel, such as `[TOP-LEFT]`, `[SCENE-1]` or `[IMAGE1]`, in reading order.

    Raises:
        ValueError: for positions in a grid that has no names for them, or a style that does not exist.
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
        ValueError: for what is no number, or no panel of the `count`.
    """
    numbers = set()
    for word in re.split(r"[\s,;]+", text.strip()):
        if not word:
            continue
        if not re.fullmatch("[0-9]{1,9}", word) or not 1 <= int(word) <= count:
            raise ValueError(
                f"'given' must list panel numbers from 1 to {count}, like 1, 3, or stay empty; got {word[:40]!r}."
            )
        numbers.add(int(word))
    return tuple(sorted(number - 1 for number in numbers))


# Words


def panel_texts(lines: str, count: int) -> tuple[str, ...]:
    """One text per panel out of one line per panel. Lines may be empty, and missing at the end.

    Raises:
        ValueError: for more lines than panels.
    """
    texts = [line.strip() for line in lines.rstrip().splitlines()]
    if len(texts) > count:
        raise ValueError(
            f"'panel_prompts' has {len(texts)} lines for {count} panels. Write one line per panel, without line breaks "
            "inside a panel's text."
        )
    return tuple(texts + [""] * (count - len(texts)))


def joint_prompt(layout: Layout, summary: str, texts: Sequence[str]) -> str:
    """One flowing sentence: prefix, a sentence on the whole set, each panel introduced by its tag.

    Full stops inside are turned into the layout's joint; a comma, semicolon, `!` or `?` that ends a part stays. A text
    that has its tag already keeps it where it is ("while [RIGHT] a white cat"), as some published prompts do; so does
    a summary that has the prefix as a word of its own ("This [FOUR-PANEL] image ..."). A panel without text keeps its
    tag, because panels without tags tend to run together.

    Raises:
        ValueError: unless there is one text per panel.
    """
    if len(texts) != layout.count:
        raise ValueError(f"{layout.count} panels need {layout.count} texts, got {len(texts)}.")
    summary = one_line(summary)
    parts = [summary] if summary.strip(f" {STOPS}") else []
    for tag, text in zip(layout.tags, texts, strict=True):
        text = one_line(text)
        parts.append(text if tag in text else f"{tag} {text}".rstrip())
    sentence = parts[0]
    for part in parts[1:]:
        sentence = sentence.rstrip(f" {STOPS}")
        sentence += (" " if sentence.endswith((*JOINTS, *ENDS)) else layout.joint) + part
    sentence = sentence.rstrip(f" {JOINTS}")
    sentence += "" if sentence.rstrip(QUOTES).endswith((*STOPS, *ENDS)) else "."
    return f"{layout.prefix} {sentence}" if layout.prefix and not has_word(summary, layout.prefix) else sentence


def has_word(text: str, word: str) -> bool:
    """Whether it stands there by itself: "sks" does in "a sks dog", but not in "tasks"."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None


def one_line(text: str) -> str:
    return " ".join(text.split())


# Pictures


def fitted(picture: Tensor, width: int, height: int, fit: Fit) -> Tensor:
    """A picture `[1, H, W, C]` (C being 1, 3 or 4) at the size of a panel, `[1, height, width, 3]`.

    crop: fills the panel and loses what stands over. pad: keeps everything, grey around it. stretch: keeps
    everything, out of proportion. All are centred and resampled with antialiasing; the right size stays as it is.
    """
    pixels = picture[..., :3].movedim(-1, 1).expand(-1, 3, -1, -1)
    if pixels.shape[-2:] == (height, width):
        return pixels.movedim(1, -1)
    factors = width / pixels.shape[-1], height / pixels.shape[-2]
    if fit == "stretch":
        return resized(pixels, width, height).movedim(1, -1)
    if fit not in ("crop", "pad"):
        raise ValueError(f"'fit' must be crop, pad or stretch, got {fit!r}.")
    factor = max(factors) if fit == "crop" else min(factors)
    wide, high = (max(round(side * factor), 1) for side in (pixels.shape[-1], pixels.shape[-2]))
    scaled = resized(pixels, wide, high)
    # What stands over is cut off (negative), what is missing is filled (positive).
    left, top = (width - wide) // 2, (height - high) // 2
    return F.pad(scaled, (left, width - wide - left, top, height - high - top), value=FILL).movedim(1, -1)


def resized(pixels: Tensor, width: int, height: int) -> Tensor:
    """`[B, C, H, W]`, bicubic with antialiasing, in 0..1. Summed in float64, or flat colours would lose a digit."""
    if pixels.shape[-2:] == (height, width):
        return pixels
    scaled = F.interpolate(pixels.double(), (height, width), mode="bicubic", antialias=True, align_corners=False)
    return scaled.clamp(0, 1).to(pixels)


def compose(layout: Layout, panels: Mapping[int, Tensor], fill: Tensor | None = None) -> Tensor:
    """The canvas `[1, height, width, 3]`.

    Args:
        panels: by index, each `[1, panel_height, panel_width, 3]`.
        fill: the same shape, for all other panels; `None` is mid-grey.
    """
    if fill is None:
        fill = grey(layout, panels)
    return tiled([panels.get(index, fill) for index in range(layout.count)], layout.rows, -3, -2)


def grey(layout: Layout, panels: Mapping[int, Tensor]) -> Tensor:
    """A panel of it, as the others are in dtype and device."""
    like = next(iter(panels.values()), torch.zeros(0))
    return like.new_full((1, layout.panel_height, layout.panel_width, 3), FILL)


def compose_latent(layout: Layout, panels: Mapping[int, Tensor], fill: Tensor) -> Tensor:
    """The canvas's latent `[1, C, ..., h, w]` out of latents of single panels: no pixel reaches over a border."""
    return tiled([panels.get(index, fill) for index in range(layout.count)], layout.rows, -2, -1)


def tiled(panels: Sequence[Tensor], rows: int, down: int, right: int) -> Tensor:
    """Panels in reading order, put together along the dimensions `down` and `right`."""
    columns = len(panels) // rows
    bands = [torch.cat([*panels[row * columns : (row + 1) * columns]], right) for row in range(rows)]
    return torch.cat(bands, down)


def unknown_mask(layout: Layout) -> Tensor:
    """1 where the picture is to be generated, 0 on given panels: `[1, 1, height, width]`, in pixels.

    ComfyUI brings it to latent pixels by bilinear interpolation, which reads inside one latent pixel only, as borders
    lie on multiples of 16: edges stay hard.
    """
    shape = (1, 1, layout.panel_height, layout.panel_width)
    zero, one = torch.zeros(shape), torch.ones(shape)
    return tiled([zero if index in layout.given else one for index in range(layout.count)], layout.rows, -2, -1)


def panels_of(layout: Layout, image: Tensor) -> Tensor:
    """The panels of `[B, H, W, C]` as `[B * count, h, w, C]`: all of the first picture, then all of the second.

    The image has the layout's size, or any size of the same proportions that divides evenly into the panels.

    Raises:
        ValueError: where it does not.
    """
    batch, height, width, channels = image.shape
    layout_size = f"{layout.width} x {layout.height}"
    if width * layout.height != height * layout.width:
        raise ValueError(
            f"the image is {width} x {height}, which has not the proportions of the layout's {layout_size}. Connect "
            "the layout that it was made with."
        )
    if width % layout.columns or height % layout.rows:
        raise ValueError(
            f"the image is {width} x {height}, which does not divide evenly into {layout.rows} rows and "
            f"{layout.columns} columns. Scale the {layout_size} canvas by a whole number, or resize it to one."
        )
    h, w = height // layout.rows, width // layout.columns
    cells = image.reshape(batch, layout.rows, h, layout.columns, w, channels)
    return cells.transpose(2, 3).reshape(batch * layout.count, h, w, channels)


def latent_panels(layout: Layout, latent: Tensor) -> Tensor:
    """The panels of a canvas's latent `[B, C, ..., h, w]` as `[B * count, C, ..., h / rows, w / columns]`.

    Decoded one by one, no colour of a neighbour reaches over the border, as it does where a decoder sees all panels.

    Raises:
        ValueError: when the latent does not divide into the panels, or has other proportions.
    """
    height, width = latent.shape[-2:]
    if width * layout.height != height * layout.width or height % layout.rows or width % layout.columns:
        raise ValueError(
            f"the latent is {width} x {height}, which does not divide into the panels of a canvas of {layout.width} x "
            f"{layout.height} pixels. Connect the layout that it was sampled with."
        )
    cells = latent.unflatten(-1, (layout.columns, -1)).unflatten(-3, (layout.rows, -1))  # [..., rows, h, columns, w]
    return cells.movedim((-4, -2), (1, 2)).flatten(0, 2)


def split(layout: Layout, image: Tensor, inset: int = 0, canvas: Tensor | None = None) -> Tensor:
    """The panels of a picture `[B, H, W, C]`, exact to the pixel. See `panels_of` and `finished`."""
    return finished(layout, panels_of(layout, image), inset, canvas)


def finished(layout: Layout, panels: Tensor, inset: int = 0, canvas: Tensor | None = None) -> Tensor:
    """Panels without their borders, the given ones untouched.

    Args:
        panels: `[B * count, h, w, C]`, in reading order, picture after picture.
        inset: pixels to cut off each panel on all four sides, where colours of the neighbour bleed over the border.
        canvas: `[1 or B, H, W, C]`, what the given panels are taken from instead.

    Returns:
        `[B * count, h - 2 * inset, w - 2 * inset, C]`, in the same order.

    Raises:
        ValueError: for an inset that leaves nothing, or a canvas of another size.
    """
    h, w = panels.shape[1:3]
    if canvas is not None and layout.given:
        batch = panels.shape[0] // layout.count
        untouched = panels_of(layout, canvas)
        if untouched.shape[1:] != panels.shape[1:] or canvas.shape[0] not in (1, batch):
            raise ValueError(
                f"'canvas' must be one picture of {w * layout.columns} x {h * layout.rows} with {panels.shape[3]} "
                f"channels, as what is split, got {size_of(canvas)}. Bring both to the same size and channels, or "
                "disconnect 'canvas'."
            )
        untouched = untouched.repeat(batch // canvas.shape[0], 1, 1, 1).to(panels)
        is_given = torch.tensor([index in layout.given for index in range(layout.count)]).repeat(batch)
        panels = torch.where(is_given[:, None, None, None].to(panels.device), untouched, panels)
    if inset < 0 or 2 * inset >= min(h, w):
        raise ValueError(f"'inset' must be at least 0 and below half a panel of {w} x {h}, got {inset}.")
    return panels[:, inset : h - inset, inset : w - inset]


def size_of(image: Tensor) -> str:
    count, height, width, channels = image.shape
    return f"{count} of {width} x {height} with {channels} channels"


def start_panel(layout: Layout, panels: Mapping[int, Tensor], start: str) -> Tensor | None:
    """What the unknown panels begin as: `None` for mid-grey, or the first given panel's picture.

    Raises:
        ValueError: when nothing is given to begin with.
    """
    if start == "neutral":
        return None
    if start != "first given panel":
        raise ValueError(f"'start' must be neutral or first given panel, got {start!r}.")
    if not layout.given:
        raise ValueError(
            "'start' first given panel needs a given panel. Write its number into 'given' of Panel Layout."
        )
    return panels[layout.given[0]]


def given_panels(layout: Layout, pictures: Iterable[Tensor], fit: Fit) -> dict[int, Tensor]:
    """Pictures `[1, H, W, C]` of any size, in the order of the given panels, brought to the panels' size.

    Raises:
        ValueError: unless there are as many pictures as given panels.
    """
    pictures = list(pictures)
    if len(pictures) != len(layout.given):
        numbers = ", ".join(str(index + 1) for index in layout.given) or "none"
        raise ValueError(
            f"Panel Layout marks {len(layout.given)} panels as given ({numbers}), but {len(pictures)} pictures are "
            "connected. Connect one per given panel, or change 'given'."
        )
    return {
        index: fitted(picture, layout.panel_width, layout.panel_height, fit)
        for index, picture in zip(layout.given, pictures, strict=True)
    }


def encode_panels(
    layout: Layout, panels: Mapping[int, Tensor], fill: Tensor | None, encode: Callable[[Tensor], Tensor]
) -> Tensor:
    """Encode each panel by itself and put the latents together, `[1, C, ..., h, w]`.

    Args:
        encode: IMAGE `[1, H, W, 3]` -> latent.
        fill: the picture for panels that are not in `panels`; `None` is mid-grey. A given one is encoded once.
    """
    latents = {index: encode(panel) for index, panel in panels.items()}
    missing = len(latents) < layout.count
    same = next((latents[index] for index, panel in panels.items() if panel is fill), None)
    if fill is None:
        fill = grey(layout, panels)
    rest = same if same is not None else encode(fill) if missing else next(iter(latents.values()))
    return compose_latent(layout, latents, rest)
