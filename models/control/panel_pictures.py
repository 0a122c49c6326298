"""Pictures, latents and masks of panels: fit them, put them together on a canvas, and cut them apart again.

`panel_layout.py` says where the panels lie.

Shapes: IMAGE `[B, H, W, 3]` in 0..1. Panels are in reading order, row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .panel_layout import Layout
from .pixels import Fit

FILL = 0.5  # grey of panels that are not given, and around padded pictures

Start = Literal["neutral", "first given panel"]  # start of the panels that are not given


def fitted(picture: Tensor, width: int, height: int, fit: Fit) -> Tensor:
    """A picture `[1, H, W, C]` (C being 1, 3 or 4) at the size of a panel, `[1, height, width, 3]`.

    crop: fills the panel and loses the overhang. pad: keeps everything, with grey around it. stretch: keeps everything,
    out of proportion. All are centred and antialiased; a picture of the right size stays unchanged.
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
    # Negative padding cuts the overhang off, positive padding fills the rest.
    left, top = (width - wide) // 2, (height - high) // 2
    return F.pad(scaled, (left, width - wide - left, top, height - high - top), value=FILL).movedim(1, -1)


def resized(pixels: Tensor, width: int, height: int) -> Tensor:
    """`[B, C, H, W]`, bicubic with antialiasing, in 0..1. Sums in float64, because flat colours would lose a digit."""
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
    return arranged([panels.get(index, fill) for index in range(layout.count)], layout.rows, -3, -2)


def grey(layout: Layout, panels: Mapping[int, Tensor]) -> Tensor:
    """A grey panel, in the dtype and on the device of the others."""
    like = next(iter(panels.values()), torch.zeros(0))
    return like.new_full((1, layout.panel_height, layout.panel_width, 3), FILL)


def compose_latent(layout: Layout, panels: Mapping[int, Tensor], fill: Tensor) -> Tensor:
    """The canvas's latent `[1, C, ..., h, w]` from latents of single panels, so no pixel reaches over a border."""
    return arranged([panels.get(index, fill) for index in range(layout.count)], layout.rows, -2, -1)


def arranged(panels: Sequence[Tensor], rows: int, down: int, right: int) -> Tensor:
    """Panels in reading order, put together along the dimensions `down` and `right`."""
    columns = len(panels) // rows
    bands = [torch.cat([*panels[row * columns : (row + 1) * columns]], right) for row in range(rows)]
    return torch.cat(bands, down)


def unknown_mask(layout: Layout) -> Tensor:
    """1 on panels to generate, 0 on given panels: `[1, 1, height, width]`, in pixels.

    ComfyUI scales it to latent pixels by bilinear interpolation. Borders lie on multiples of 16, so each latent pixel
    reads from one panel only, and edges stay hard.
    """
    shape = (1, 1, layout.panel_height, layout.panel_width)
    zero, one = torch.zeros(shape), torch.ones(shape)
    return arranged([zero if index in layout.given else one for index in range(layout.count)], layout.rows, -2, -1)


def panels_of(layout: Layout, image: Tensor) -> Tensor:
    """The panels of `[B, H, W, C]` as `[B * count, h, w, C]`: all of the first picture, then all of the second.

    The image has the layout's size, or any size of the same proportions that divides evenly into the panels.

    Raises:
        ValueError: an image of another size.
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

    Decode them one by one, and no colour of a neighbour bleeds over the border.

    Raises:
        ValueError: the latent does not divide into the panels, or has other proportions.
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
    """Panels without their borders, with the given ones untouched.

    Args:
        panels: `[B * count, h, w, C]`, in reading order, picture after picture.
        inset: pixels to cut off each panel on all four sides, because colours of the neighbour bleed over the border.
        canvas: `[1 or B, H, W, C]`, the source of the given panels instead.

    Returns:
        `[B * count, h - 2 * inset, w - 2 * inset, C]`, in the same order.

    Raises:
        ValueError: an inset that leaves nothing, or a canvas of another size.
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


def start_panel(layout: Layout, panels: Mapping[int, Tensor], start: Start) -> Tensor | None:
    """The start of the unknown panels: `None` for mid-grey, or the first given panel's picture.

    Raises:
        ValueError: an unknown `start`, or no given panel.
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
        ValueError: the numbers of pictures and of given panels differ.
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
    layout: Layout,
    panels: Mapping[int, Tensor],
    fill: Tensor | None,
    encode: Callable[[Tensor], Tensor],
    each: Callable[[list[int]], Iterable[int]] = iter,
) -> Tensor:
    """Encode each panel by itself and put the latents together, `[1, C, ..., h, w]`.

    Args:
        encode: IMAGE `[1, H, W, 3]` -> latent.
        fill: the picture for panels that are not in `panels`; `None` is mid-grey. Encoded once, even if it is a given
            panel too.
        each: walks over the panels.
    """
    latents = {index: encode(panels[index]) for index in each([*panels])}
    missing = len(latents) < layout.count
    same = next((latents[index] for index, panel in panels.items() if panel is fill), None)
    if fill is None:
        fill = grey(layout, panels)
    rest = same if same is not None else encode(fill) if missing else next(iter(latents.values()))
    return compose_latent(layout, latents, rest)
