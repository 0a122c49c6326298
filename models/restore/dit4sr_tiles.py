"""Windows over a large latent, and how their results become one.

Source: the authors' code of DiT4SR, arXiv:2503.23580, after Mixture of Diffusers, arXiv:2302.02412. A latent is cut
into windows of one size, whose first ones lie `tile - overlap` apart; the last one ends at the border. Each is a
picture of its own to the model. Where windows overlap, the result is their mean, weighted by a Gaussian around the
middle of each:

    w(y, x) = exp(-((y - t_y / 2)^2 / t_y^2 + (x - (t_x - 1) / 2)^2 / t_x^2) / (2 * 0.01))

The authors' middle is half a row off along y, and exact along x; it is kept.

Units: cells of the latent, 8 pixels each.
Where we differ: a side that is shorter than `tile` gives windows of its length; the authors make the window square.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

VARIANCE = 0.01  # of the Gaussian, in units of a window's side squared


@dataclass(frozen=True)
class Window:
    """A part of a latent."""

    top: int
    left: int
    height: int
    width: int

    def of(self, x: Tensor, cell: int = 1) -> Tensor:
        """That part of `x`, `[..., h, w]`, where one value stands for `cell` x `cell` cells."""
        top, left, height, width = (side // cell for side in (self.top, self.left, self.height, self.width))
        return x[..., top : top + height, left : left + width]


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where windows begin along one side. `starts(128, 64, 24)` is `[0, 40, 64]`."""
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap must be at least 0 and below tile ({tile}), got {overlap}")
    found = [0]
    while found[-1] + tile < length:
        found.append(min(found[-1] + tile - overlap, length - tile))
    return found


def windows(size: tuple[int, int], tile: int, overlap: int) -> list[Window]:
    """All windows over a latent of this height and width, row by row.

    One for all of it where it has no more cells than a window, and where `tile` is 0.
    """
    height, width = size
    if tile == 0 or height * width <= tile * tile:
        return [Window(0, 0, height, width)]
    tall, wide = min(tile, height), min(tile, width)
    return [
        Window(top, left, tall, wide) for top in starts(height, tile, overlap) for left in starts(width, tile, overlap)
    ]


def weights(height: int, width: int) -> Tensor:
    """The weight of each cell of a window, `[h, w]`, float32; 1 in its middle."""
    y = (torch.arange(height, dtype=torch.float64) - height / 2) / height
    x = (torch.arange(width, dtype=torch.float64) - (width - 1) / 2) / width
    return torch.exp(-(y[:, None] ** 2 + x**2) / (2 * VARIANCE)).float()


class Blend:
    """Takes the results of windows one after the other, and holds no more of them than their sum.

    Neutral case: windows of one picture that agree where they overlap give that picture, up to rounding.
    """

    def __init__(self, size: tuple[int, int], of_window: Tensor):
        """`of_window`: the weight of each cell of a window, `[h, w]`, on the device of the results: `weights`."""
        self.size, self.of_window = size, of_window
        self.sum: Tensor | None = None
        self.weight: Tensor | None = None

    def add(self, window: Window, result: Tensor) -> None:
        """`result`: `[B, C, h, w]` of the window."""
        weight = self.of_window
        if self.sum is None or self.weight is None:
            self.sum = torch.zeros((*result.shape[:2], *self.size), device=result.device, dtype=torch.float32)
            self.weight = torch.zeros(self.size, device=result.device, dtype=torch.float32)
        window.of(self.sum).add_(result * weight)
        window.of(self.weight).add_(weight)

    def result(self) -> Tensor:
        """The whole, `[B, C, h, w]`, float32."""
        if self.sum is None or self.weight is None:
            raise ValueError("no window was added")
        return self.sum / self.weight
