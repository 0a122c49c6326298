"""Poses drawn over a picture, side by side in one: a contact sheet to look at before anything is sampled."""

from __future__ import annotations

import numpy as np

from .pose_drawing import draw, opencv
from .poses import Poses

GAP = 4  # pixels between tiles
GROUND = 24  # grey behind them


def evenly(count: int, shown: int) -> list[int]:
    """At most `shown` of `count` frames, evenly spread, the first and the last among them."""
    if shown >= count:
        return list(range(count))
    if shown == 1:
        return [0]
    return [round(k * (count - 1) / (shown - 1)) for k in range(shown)]


def over(picture: np.ndarray, poses: Poses, frame: int, dim: float) -> np.ndarray:
    """One frame's pose in bold lines over a picture, with the frame's number in a corner.

    Args:
        picture: uint8 `[h, w, 3]`.
        dim: how much darker the picture becomes, 0..1.
    """
    cv2 = opencv()
    height, width = picture.shape[:2]
    drawn = draw(poses.points[frame], poses.scores[frame], height, width, "bold").astype(np.float32)
    cover = drawn.max(-1, keepdims=True) / 255
    mixed = picture * (1 - dim) * (1 - cover) + drawn
    tile = np.ascontiguousarray(np.clip(mixed, 0, 255).astype(np.uint8))
    size = max(0.3, min(height, width) / 500)
    for colour, thickness in ((0, 3), (255, 1)):
        at = (4, 6 + round(20 * size))
        cv2.putText(tile, str(frame), at, cv2.FONT_HERSHEY_SIMPLEX, size, (colour,) * 3, thickness, cv2.LINE_AA)
    return tile


def sheet(tiles: list[np.ndarray], columns: int) -> np.ndarray:
    """Tiles of one size `[h, w, 3]` in rows of `columns`, as one picture."""
    height, width = tiles[0].shape[:2]
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    canvas = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), GROUND, np.uint8)
    for number, tile in enumerate(tiles):
        top, left = number // columns * (height + GAP), number % columns * (width + GAP)
        canvas[top : top + height, left : left + width] = tile
    return canvas
