"""How much two pictures differ, and where.

PSNR is 10 log10(1 / mean squared error), in dB. SSIM is that of Wang et al., "Image quality assessment: from error
visibility to structural similarity" (2004), as published: a Gaussian window of 11 pixels with sigma 1.5, K1 = 0.01,
K2 = 0.03, and the mean over the channels and over all positions where the whole window lies in the picture. Both come
from kornia. A threshold finds the changed pixels; scipy's connected components gather them into boxes.

Shapes: a picture is `[H, W, C]`, its difference `[H, W]`.
Units: colours are 0..1, with 1 as the peak of PSNR and the range of SSIM. Boxes are in pixels, x to the right, y down.
Limits: neither number knows where a person looks. A picture with a side below 11 pixels gets a smaller window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SSIM_WINDOW = 11  # pixels

# Stops at 0, 1/4, 1/2, 3/4 and 1 of matplotlib's colour map "inferno" (CC0): lighter is always more, whatever the hue.
HEAT = (
    (0.001, 0.000, 0.014),
    (0.342, 0.062, 0.429),
    (0.736, 0.216, 0.330),
    (0.978, 0.558, 0.035),
    (0.988, 0.998, 0.645),
)
BOX_COLORS = ((1.0, 0.9, 0.1), (0.0, 0.0, 0.0))  # a light line beside a dark one shows on every ground


@dataclass(frozen=True)
class Box:
    """The smallest upright rectangle around some changed pixels."""

    x: int
    y: int
    width: int
    height: int
    pixels: int  # how many pixels in it changed


@dataclass(frozen=True)
class Pair:
    """The result for one pair of pictures."""

    psnr: float  # dB
    ssim: float
    changed: float  # share of the pixels, 0..1
    boxes: tuple[Box, ...]


def compare(
    first: Tensor,
    second: Tensor,
    threshold: float,
    gap: int = 0,
    least: int = 1,
    each: Callable[[Tensor], Iterable[Tensor]] = iter,
) -> list[Pair]:
    """Two batches `[B, H, W, C]`, picture by picture. A pixel changed if it differs by more than `threshold`.

    `each` walks over the first batch.
    """
    return [compare_one(a, b, threshold, gap, least) for a, b in zip(each(first), second, strict=True)]


def compare_one(first: Tensor, second: Tensor, threshold: float, gap: int, least: int) -> Pair:
    """Two pictures `[H, W, C]`."""
    changed = difference(first, second) > threshold
    boxes = find_boxes(changed, gap, least)
    return Pair(psnr(first, second), ssim(first, second), float(changed.double().mean()), boxes)


def mean_ssim(pairs: list[Pair]) -> float:
    return sum(pair.ssim for pair in pairs) / len(pairs)


def psnr(first: Tensor, second: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two tensors of one shape; infinite when they are equal."""
    from kornia.metrics import psnr  # late: loading the pack must not wait for it

    return float(psnr(first.double(), second.double(), 1.0))


def ssim(first: Tensor, second: Tensor) -> float:
    """Structural similarity of two pictures `[H, W, C]`, at most 1."""
    from kornia.metrics import ssim

    side = min(SSIM_WINDOW, *first.shape[:2])
    window = side if side % 2 else side - 1
    a, b = (picture.movedim(-1, 0)[None].float().contiguous() for picture in (first, second))  # [1, C, H, W]
    return float(ssim(a, b, window, 1.0, eps=0.0, padding="valid").double().mean())


def difference(first: Tensor, second: Tensor) -> Tensor:
    """`[..., H, W, C]` twice -> `[..., H, W]`: the largest difference among the channels of each pixel."""
    return (first - second).abs().amax(-1)


def heat(amount: Tensor, full: float) -> Tensor:
    """`[..., H, W]` -> colours `[..., H, W, 3]`, from black at 0 to pale yellow at `full` and above."""
    if not 0 < full < math.inf:
        raise ValueError(f"full must be a finite number above 0, got {full}")
    stops = torch.tensor(HEAT, dtype=amount.dtype, device=amount.device)
    position = (amount / full).clamp(0, 1) * (len(HEAT) - 1)
    below = position.long().clamp(max=len(HEAT) - 2)
    return torch.lerp(stops[below], stops[below + 1], (position - below)[..., None])


def heat_map(first: Tensor, second: Tensor, full: float = 0) -> Tensor:
    """`[B, H, W, C]` twice -> colours `[B, H, W, 3]`. `full`: the brightest difference; 0 takes the largest found."""
    amount = difference(first, second)
    return heat(amount, full or float(amount.max()) or 1.0)


def find_boxes(changed: Tensor, gap: int = 0, least: int = 1) -> tuple[Box, ...]:
    """Boxes around changed pixels, the one with the most changed pixels first.

    Args:
        changed: `[H, W]`, bool.
        gap: spots with at most this many pixels between them, also across a corner, share a box.
        least: fewest changed pixels in a box.
    """
    from scipy import ndimage

    mask = changed.cpu().numpy()
    grown = ndimage.maximum_filter(mask, size=gap + 1, mode="constant", cval=0)  # spots `gap` apart now touch
    labels = np.empty(mask.shape, dtype=np.int32)
    ndimage.label(grown, structure=np.ones((3, 3)), output=labels)  # 3 x 3: corners touch, too
    labels[~mask] = 0

    boxes = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        pixels = int((labels[rows, columns] == number).sum())
        if pixels >= least:
            boxes.append(Box(columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start, pixels))
    return tuple(sorted(boxes, key=lambda box: (-box.pixels, box.y, box.x)))


def mark(pictures: Tensor, pairs: list[Pair]) -> Tensor:
    """`[B, H, W, C]`, grey or with alpha, too -> `[B, H, W, 3]` with the boxes of each picture drawn on it."""
    return torch.stack([draw_boxes(rgb(each), pair.boxes) for each, pair in zip(pictures, pairs, strict=True)])


def rgb(picture: Tensor) -> Tensor:
    """`[H, W, C]` with grey or alpha -> `[H, W, 3]` to draw on."""
    return picture[..., :3].expand(-1, -1, 3)


def draw_boxes(picture: Tensor, boxes: tuple[Box, ...]) -> Tensor:
    """A copy of `picture` `[H, W, 3]` with a frame just outside of every box."""
    drawn = picture.clone()
    height, width = picture.shape[:2]
    line = max(1, round(min(height, width) / 400))
    for box in reversed(boxes):  # the largest last, on top
        for color, distance in zip(BOX_COLORS, (1, 1 + line), strict=True):
            for step in range(distance, distance + line):
                top, bottom = max(box.y - step, 0), min(box.y + box.height - 1 + step, height - 1)
                left, right = max(box.x - step, 0), min(box.x + box.width - 1 + step, width - 1)
                ink = picture.new_tensor(color)
                for side in (
                    (top, slice(left, right + 1)),
                    (bottom, slice(left, right + 1)),
                    (slice(top, bottom + 1), left),
                    (slice(top, bottom + 1), right),
                ):
                    drawn[side] = ink
    return drawn
