"""Poses as ComfyUI's pictures: drawn one by one, with progress, until somebody interrupts."""

from __future__ import annotations

import numpy as np
import torch
from comfy.model_management import intermediate_device
from comfy.utils import common_upscale
from torch import Tensor

from ...models.animate.pose_drawing import Style, draw
from ...models.animate.pose_sheet import evenly, over, sheet
from ...models.animate.poses import Poses
from ..progress import one_by_one


def drawn(poses: Poses, height: int, width: int, style: Style, body: float, hands: float, face: float) -> Tensor:
    """An IMAGE batch, `[N, height, width, 3]`."""
    pictures = torch.empty(len(poses), height, width, 3, device=intermediate_device())
    for number in one_by_one(range(len(poses)), len(poses)):
        points, scores = poses.points[number], poses.scores[number]
        pictures[number] = torch.from_numpy(draw(points, scores, height, width, style, body, hands, face))
    return pictures.div_(255)


def contact_sheet(pictures: Tensor, poses: Poses, shown: int, columns: int, side: int, dim: float) -> Tensor:
    """An IMAGE of one picture: frames of the poses over the picture of the same number, or over the only one.

    Args:
        pictures: `[N, H, W, C]`; those of other proportions than the poses' canvas are cut from the middle.
        side: longer side of one of them on the sheet.
    """
    height, width = tile_size(poses, pictures, side)
    tiles, frames = [], evenly(len(poses), shown)
    for frame in one_by_one(frames, len(frames)):
        picture = pictures[frame if len(pictures) > 1 else 0]
        tiles.append(over(as_bytes(picture, height, width), poses, frame, dim))
    return torch.from_numpy(sheet(tiles, columns)).to(intermediate_device())[None].float() / 255


def tile_size(poses: Poses, pictures: Tensor, side: int) -> tuple[int, int]:
    """Height and width of a tile, in the proportions of the poses' canvas, or of the picture where it is not known."""
    width, height = (poses.width, poses.height) if poses.width else (pictures.shape[2], pictures.shape[1])
    factor = side / max(width, height)
    return max(1, round(height * factor)), max(1, round(width * factor))


def as_bytes(picture: Tensor, height: int, width: int) -> np.ndarray:
    """One picture `[H, W, C]`, grey or with alpha, too, as uint8 RGB `[height, width, 3]`."""
    rgb = picture.clamp(0, 1).float()[..., :3].expand(-1, -1, 3)
    sized = common_upscale(rgb.movedim(-1, 0)[None], width, height, "area", "center")
    return (sized[0].movedim(0, -1) * 255).round().to(torch.uint8).cpu().numpy()
