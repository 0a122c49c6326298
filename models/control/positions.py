"""Position ids of a condition image's tokens: over, beside and below the picture.

Source: position-aware interpolation, EasyControl, arXiv:2503.07027, section 3.3; the offset of subjects is in its code.
The diptych is that of MC-VTON, arXiv:2501.03630.

Shapes: T condition tokens, row by row.
Units: tokens of the picture's own grid.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GridSize = tuple[int, int]  # rows and columns of tokens

SUBJECT_OFFSET = 64  # rows; the authors' constant, the token rows of a 1024 pixel picture


def spatial_ids(grid: GridSize, picture: GridSize, device: torch.device | None = None) -> Tensor:
    """Position ids of a condition that lies over the picture: `[T, 3]` as (0, row, column), float32.

    Position-aware interpolation, section 3.3: token (i, j) of an Rc x Cc grid sits at (i * R / Rc, j * C / Cc) of the
    picture's R x C grid. The authors' code rounds these to bfloat16, by up to 0.125 rows; this does not.
    """
    return grid_ids(grid, (picture[0] / grid[0], picture[1] / grid[1]), device=device)


def tokens_in_tile(grid: GridSize, picture: GridSize, corner: tuple[float, float], tile: GridSize) -> Tensor:
    """Which tokens of a condition over the picture lie in a tile of it, by number, `[T]`.

    Tiles of one size get equally many: the nearest whole tokens.

    Args:
        grid, picture: rows and columns of the condition and of the whole picture, in tokens.
        corner: row and column of the picture where the tile begins. tile: its rows and columns.
    """
    sides = []
    for own, whole, start, length in zip(grid, picture, corner, tile, strict=True):
        count = min(max(math.ceil(length * own / whole), 1), own)
        begin = min(round(start * own / whole), own - count)
        sides.append(torch.arange(begin, begin + count))
    rows, columns = sides
    return (rows[:, None] * grid[1] + columns).flatten()


def subject_ids(grid: GridSize, picture: GridSize, device: torch.device | None = None) -> Tensor:
    """Position ids of a condition that lies beside the picture, below it: `[T, 3]` as (0, row, column), float32.

    The authors add 64 to every row. In pictures taller than 1024 pixels that would overlap the picture's own rows, so
    there we add the picture's height.
    """
    return grid_ids(grid, offset=(max(SUBJECT_OFFSET, picture[0]), 0), device=device)


def beside_ids(grid: GridSize, picture: GridSize, device: torch.device | None = None) -> Tensor:
    """Position ids of a condition that lies right of the picture: `[T, 3]` as (0, row, column), float32.

    Both grids in tokens. Token (i, j) sits at row i, column j + the picture's columns.
    """
    return grid_ids(grid, offset=(0, picture[1]), device=device)


def grid_ids(
    grid: GridSize,
    step: tuple[float, float] = (1.0, 1.0),
    offset: GridSize = (0, 0),
    device: torch.device | None = None,
) -> Tensor:
    """Position ids `[T, 3]` of a grid: (0, offset + i * step, offset + j * step), row by row, float32."""
    rows = torch.arange(grid[0], dtype=torch.float32, device=device) * step[0] + offset[0]
    columns = torch.arange(grid[1], dtype=torch.float32, device=device) * step[1] + offset[1]
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack((torch.zeros_like(row), row, column), dim=-1).flatten(0, 1)
