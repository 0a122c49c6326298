"""Pictures of the world as tensors: what the autoencoder is trained on, and the conditions of the control adapters."""

from __future__ import annotations

import cv2
import numpy as np

from . import world


def edges_as_a_user_would(picture: world.Picture, rng: np.random.Generator) -> np.ndarray:
    """An outline drawing of the picture in one of the styles people bring: Canny, drawn parts, drawn silhouette."""
    style = rng.random()
    if style < 0.4:
        return world.canny(picture, int(rng.integers(40, 90)), int(rng.integers(110, 200)))
    widest = max(4, picture.image.shape[0] // 32)
    drawn = world.edge_map(picture, int(rng.integers(1, widest)), parts=style < 0.75)
    if rng.random() < 0.5:  # a pen is softer than a comparison of pixels
        drawn = cv2.GaussianBlur(drawn, (3, 3), 0)
        drawn = np.clip(drawn.astype(np.float32) * 1.6, 0, 255).astype(np.uint8)
    return drawn


def training_picture(scene: world.Scene, size: int, rng: np.random.Generator) -> np.ndarray:
    """One picture for the autoencoder: mostly scenes, sometimes what conditions look like. RGB uint8."""
    roll = rng.random()
    picture = world.render(scene, size)
    if roll < 0.72:
        return picture.image
    if roll < 0.86:
        return edges_as_a_user_would(picture, rng)
    dolls = [i for i, thing in enumerate(scene.things) if thing.kind == "doll"]
    if roll < 0.91 and dolls:
        return world.pose_map(scene, size)
    if roll < 0.96 or not dolls:
        return world.cut_out(scene, int(rng.integers(len(scene.things))), size)
    return world.garment_flat(scene.things[dolls[0]], size)


def to_unit(images: np.ndarray) -> np.ndarray:
    """uint8 `[..., H, W, 3]` -> float32 `[..., 3, H, W]` in -1..1."""
    return np.moveaxis(images.astype(np.float32) / 127.5 - 1, -1, -3)
