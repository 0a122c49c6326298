"""Which part of the picture a call of the model is for, if another node cuts the picture into tiles.

TiledDiffusion and similar nodes call the model for crops of the latent, several in one batch. They do not say where the
crops lie. But each crop is an exact copy of a part of the sampler's latent, so we search for it there.

A prompt for an area is a crop too, but no tile: the user wants it to be a picture of its own.

A feature of ours that cuts the picture knows where its tiles lie, and says so (`TILES`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TILES = "dit_toolkit.tiles"  # in transformer_options: the Tile of each condition of a call, where a feature of ours cut


class Tile(NamedTuple):
    """A crop of the latent. Unit: cells of the latent, 8 pixels. `top` and `left` are -1 if the search failed."""

    top: int
    left: int
    whole: tuple[int, int]  # height and width of the uncut latent

    @property
    def found(self) -> bool:
        return self.top >= 0


def tiles_of(x: Tensor, picture: Tensor | None, conditions: int, row: int, rows: int) -> list[Tile | None]:
    """The tiles in a call of the model, in the order of its batch.

    Args:
        x: the call's batch, `[tiles * conditions * rows, C, ..., h, w]`.
        picture: the sampler's latent, `[N, C, ..., H, W]`.
        conditions: prompts side by side in each tile.
        row: the picture of the latent that comes first in the call.
        rows: how many pictures the call has of each tile and condition.

    Returns:
        `[None]` where the call is for whole pictures.
    """
    if picture is None or x.ndim != picture.ndim or x.shape[1] != picture.shape[1]:
        return [None]
    size, whole = x.shape[-2:], (picture.shape[-2], picture.shape[-1])
    if size == whole or size[0] > whole[0] or size[1] > whole[1]:
        return [None]
    each = conditions * rows
    if x.shape[0] % each:
        return [Tile(-1, -1, whole)]
    x, picture = x.to(picture.dtype).cpu(), picture.cpu()  # on a GPU, every comparison would be waited for
    return [find(tile[0], picture[row]) for tile in x.split(each)]


def find(crop: Tensor, picture: Tensor) -> Tile:
    """Where `crop`, `[C, ..., h, w]`, was cut out of `picture`, `[C, ..., H, W]`."""
    height, width = crop.shape[-2:]
    whole = (picture.shape[-2], picture.shape[-1])
    crop, picture = crop.to(picture).flatten(0, -3), picture.flatten(0, -3)  # [channels, h, w]
    corners = picture[0, : whole[0] - height + 1, : whole[1] - width + 1] == crop[0, 0, 0]
    found = [
        (top, left)
        for top, left in corners.nonzero().tolist()
        if torch.equal(picture[:, top : top + height, left : left + width], crop)
    ]
    return Tile(*found[0], whole) if len(found) == 1 else Tile(-1, -1, whole)
