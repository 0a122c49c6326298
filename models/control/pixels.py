"""Pictures and masks as pixels: resampling, distances, dilation, boxes, backgrounds.

Resampling: Lanczos with 3 lobes (Turkowski, Filters for Common Resampling Tasks, 1990). For a smaller picture the
filter is stretched by the scale, against aliasing. At the border, the weights of the existing pixels sum to 1. All in
float32, where PIL would round to 8 bits. The same size leaves the pixels unchanged.

Shapes: pictures `[..., H, W, C]` in 0..1, masks `[H, W]` bool. Units: pixels.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Fit = Literal["crop", "pad", "stretch"]  # how a picture of other proportions is brought to a size

LOBES = 3


def rgb(image: Tensor) -> Tensor:
    """`[..., C]`, C being 1, 3 or 4, as `[..., 3]`: repeats grey, leaves out alpha.

    Raises:
        ValueError: another number of channels.
    """
    channels = image.shape[-1]
    if channels not in (1, 3, 4):
        raise ValueError(f"A picture must have 1, 3 or 4 channels, got {channels}.")
    return image.expand(*image.shape[:-1], 3) if channels == 1 else image[..., :3]


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """`[..., H, W, C]` as `[..., height, width, C]`, clamped to 0..1 unless the size stays the same."""
    before = tuple(image.shape[-3:-1])
    if before == (height, width):
        return image
    rows, columns = (
        lanczos(old, new).to(image.device) for old, new in zip(before, (height, width), strict=True)
    )  # [height, H], [width, W]
    planes = image.movedim(-1, -3).float()  # [..., C, H, W]
    return (rows @ (planes @ columns.T)).clamp(0, 1).movedim(-3, -1).to(image.dtype)


def lanczos(old: int, new: int) -> Tensor:
    """Weights that make `new` samples of `old`: `[new, old]`, every row sums to 1."""
    scale = max(old / new, 1.0)
    centre = (torch.arange(new, dtype=torch.float64) + 0.5) * old / new
    distance = (torch.arange(old, dtype=torch.float64) + 0.5 - centre[:, None]) / scale
    weights = torch.sinc(distance) * torch.sinc(distance / LOBES) * (distance.abs() < LOBES)
    return (weights / weights.sum(1, keepdim=True)).float()


def distance_to(target: Tensor, limit: int) -> Tensor:
    """Euclidean distance of every pixel to the nearest True one of `target`, `[H, W]` float32, cut at `limit` + 1.

    Exact: first along columns, then the smallest sum of squares along rows, up to `limit` pixels to either side.
    """
    height, width = target.shape
    far = limit + 1
    row = torch.arange(height, dtype=torch.float32, device=target.device)[:, None].expand(height, width)
    above = torch.where(target, row, -math.inf).cummax(0).values
    below = torch.where(target, row, math.inf).flip(0).cummin(0).values.flip(0)
    square = torch.minimum(row - above, below - row).clamp(max=far).square()  # [H, W]
    nearest = square
    for step in range(1, min(limit, width - 1) + 1):
        reach = torch.full_like(square, math.inf)
        reach[:, step:] = square[:, :-step]
        reach[:, :-step] = torch.minimum(reach[:, :-step], square[:, step:])
        nearest = torch.minimum(nearest, reach + step**2)
    return nearest.sqrt().clamp(max=far)


def dilate(mask: Tensor, radius: int) -> Tensor:
    """`mask` and all pixels within `radius` of it. At least one pixel must be True."""
    if radius == 0:
        return mask
    near = around(mask, radius)
    grown = mask.clone()
    grown[near] = distance_to(mask[near], radius) <= radius
    return grown


def around(mask: Tensor, by: int) -> tuple[slice, slice]:
    """Rows and columns of the box around the True pixels, wider by `by` pixels on each side, within the mask."""
    left, top, width, height = bounds(mask)
    return slice(max(top - by, 0), top + height + by), slice(max(left - by, 0), left + width + by)


def bounds(mask: Tensor) -> tuple[int, int, int, int]:
    """Left, top, width and height of the box around the True pixels. At least one pixel must be True."""
    rows, columns = (torch.nonzero(mask.any(axis)).flatten() for axis in (1, 0))
    left, top = int(columns[0]), int(rows[0])
    return left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top


def any_background(masks: Tensor) -> bool:
    """Whether one of the masks `[N, H, W]` or `[H, W]`, above 0.5, looks like a background."""
    return any(around_something(each > 0.5) for each in (masks[None] if masks.ndim == 2 else masks))


def around_something(mask: Tensor) -> bool:
    """Whether a mask has all four corners and not the middle, like the mask of a background."""
    corners = mask[:: mask.shape[0] - 1 or 1, :: mask.shape[1] - 1 or 1]
    return bool(corners.all()) and not mask[mask.shape[0] // 2, mask.shape[1] // 2]
