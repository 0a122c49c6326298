"""Scenes as pictures, and every map that goes with them: labels, edges, poses, cut-outs, garments, clips."""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np

from .things import (
    BONES,
    GROUNDS,
    JOINTS,
    LABELS,
    MORE_PATTERNS,
    TEXTURES,
    WHITE,
    Part,
    Scene,
    Thing,
    capsule,
    circle,
    doll_joints,
    doll_parts,
    parts_of,
)


@dataclass(frozen=True)
class Picture:
    """A rendered scene. `labels` index `LABELS`; `owners`: 0 is the ground, then 1, 2, ... from back to front."""

    image: np.ndarray
    labels: np.ndarray
    owners: np.ndarray


def _fill(canvas: np.ndarray, points: np.ndarray, value: int, smooth: bool) -> None:
    size = canvas.shape[0]
    fixed = np.round((points * size - 0.5) * 16).astype(np.int32)
    cv2.fillPoly(canvas, [fixed], value, cv2.LINE_AA if smooth else cv2.LINE_8, 4)


def _amount(pattern: str, u: np.ndarray, v: np.ndarray, soft: float) -> np.ndarray:
    """How much of the second colour a pattern shows at `u`, `v`, in the doll's terms; `soft`: blend at the borders."""

    def lines(along: np.ndarray, period: float, half: float) -> np.ndarray:
        return np.clip((half - np.abs((along / period) % 1.0 - 0.5) * period) / soft + 0.5, 0, 1)

    if pattern == "striped":
        return lines(v, 0.13, 0.03) + 0 * u
    if pattern == "checked":
        return np.maximum(lines(v, 0.13, 0.02), lines(u + 0.06, 0.12, 0.02))
    row = np.floor(v / 0.105)
    du = (u / 0.12 + 0.5 * (row % 2)) % 1.0 - 0.5
    dv = (v / 0.105) % 1.0 - 0.5
    return np.clip((0.033 - np.hypot(du * 0.12, dv * 0.105)) / soft + 0.5, 0, 1)


def _paint(part: Part, size: int, box: tuple[slice, slice]) -> np.ndarray:
    """Colour of a part at every pixel of `box`, `[h, w, 3]` float32 or `[3]` when plain. Patterns move with it."""
    base = np.array(part.colour, np.float32)
    if part.pattern not in MORE_PATTERNS:
        raise ValueError(f"pattern must be one of {', '.join(MORE_PATTERNS)}, got '{part.pattern}'")
    if part.pattern == "plain":
        return base
    x0, y0, s = part.frame
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    u, v = (grid[None, box[1]] - x0) / s, (grid[box[0], None] - y0) / s
    amount = _amount(part.pattern, u, v, 1.2 / (size * s))  # one pixel of blend at the borders
    return base + amount[..., None] * (np.array(WHITE, np.float32) - base)


TILE, TONE = 1 / 8, 22  # how often a texture repeats, as a part of the canvas; how much its second tone differs


def texture_amount(texture: str, size: int) -> np.ndarray:
    """Where a ground's texture shows its second tone, `[H, W]` in 0..1."""
    grid = ((np.arange(size, dtype=np.float32) + 0.5) / size / TILE) % 1.0 - 0.5
    u, v = np.abs(grid)[None, :], np.abs(grid)[:, None]
    soft = 1.2 / (size * TILE)
    if texture == "striped":
        return np.clip((0.2 - v) / soft + 0.5, 0, 1) + 0 * u
    if texture == "checked":
        return np.clip((0.13 - np.minimum(u, v)) / soft + 0.5, 0, 1)
    if texture == "spotted":
        return np.clip((0.27 - np.hypot(u, v)) / soft + 0.5, 0, 1)
    raise ValueError(f"texture must be one of {', '.join(TEXTURES)}, got '{texture}'")


def ground_tones(ground: str) -> tuple[np.ndarray, np.ndarray]:
    """Colour of a ground, and of its texture: darker, or lighter on the dark one. `[3]` float32 each."""
    first = np.array(GROUNDS[ground], np.float32)
    return first, first + (TONE if first.mean() < 80 else -TONE)


def _ground(scene: Scene, size: int) -> np.ndarray:
    first, second = ground_tones(scene.ground)
    if not scene.texture:
        return first
    return first + texture_amount(scene.texture, size)[..., None] * (second - first)


def _draw(parts: list[Part], ground: tuple[int, int, int] | np.ndarray, size: int) -> Picture:
    image = np.empty((size, size, 3), np.float32)
    image[:] = ground
    labels, owners = np.zeros((size, size), np.uint8), np.zeros((size, size), np.uint8)
    for part in parts:
        cover = np.zeros((size, size), np.uint8)
        _fill(cover, part.points, 255, smooth=True)
        x, y, w, h = cv2.boundingRect(cover)  # nothing changes outside
        box = (slice(y, y + h), slice(x, x + w))
        alpha = cover[box][..., None].astype(np.float32) / 255
        image[box] += alpha * (_paint(part, size, box) - image[box])
        inside = cover[box] > 127
        labels[box][inside] = LABELS.index(part.label)
        owners[box][inside] = part.owner
    return Picture(np.round(image).astype(np.uint8), labels, owners)


def render(scene: Scene, size: int) -> Picture:
    """Draw a scene, `size` pixels a side. Owner k is `scene.things[k - 1]`; a higher owner is nearer (depth order)."""
    parts = [part for i, thing in enumerate(scene.things) for part in parts_of(thing, i + 1)]
    return _draw(parts, _ground(scene, size), size)


def edge_map(picture: Picture, thickness: int = 1, parts: bool = True) -> np.ndarray:
    """White outlines on black, `[H, W, 3]`. `parts=False` draws the silhouette of each thing only."""
    regions = picture.owners.astype(np.int32)
    if parts:
        flat = np.where(picture.labels == LABELS.index("detail"), 0, picture.labels)
        regions = regions * len(LABELS) + flat
    edges = np.zeros(regions.shape, np.uint8)
    edges[:, 1:] |= (regions[:, 1:] != regions[:, :-1]).astype(np.uint8) * 255
    edges[1:, :] |= (regions[1:, :] != regions[:-1, :]).astype(np.uint8) * 255
    if thickness > 1:
        edges = cv2.dilate(edges, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (thickness, thickness)))
    return np.repeat(edges[..., None], 3, 2)


def canny(picture: Picture, low: int = 60, high: int = 140) -> np.ndarray:
    """OpenCV's Canny of the picture, `[H, W, 3]`: what a user's preprocessor would deliver."""
    grey = cv2.cvtColor(picture.image, cv2.COLOR_RGB2GRAY)
    return np.repeat(cv2.Canny(cv2.GaussianBlur(grey, (3, 3), 0), low, high)[..., None], 3, 2)


_BONE_COLOURS = (
    (0, 0, 255), (255, 85, 0), (255, 170, 0), (255, 255, 0), (85, 255, 0), (0, 255, 0), (0, 255, 170), (0, 170, 255),
)  # fmt: skip


def keypoints(scene: Scene) -> list[dict[str, tuple[float, float]]]:
    """Joints of each doll, back to front, in unit coordinates."""
    return [doll_joints(thing) for thing in scene.things if thing.kind == "doll"]


def pose_map(scene: Scene, size: int) -> np.ndarray:
    """Coloured skeletons on black, `[H, W, 3]`, in the manner of OpenPose."""
    canvas = np.zeros((size, size, 3), np.uint8)
    for joints in keypoints(scene):
        points = [np.array(joints[name]) for name in JOINTS]
        for (a, b), colour in zip(BONES, _BONE_COLOURS, strict=True):
            cover = np.zeros((size, size), np.uint8)
            _fill(cover, capsule(*points[a], *points[b], max(0.016, 1.2 / size)), 255, smooth=True)
            alpha = cover[..., None].astype(np.float32) / 255
            canvas = (canvas + alpha * (np.array(colour, np.float32) - canvas)).astype(np.uint8)
        cover = np.zeros((size, size), np.uint8)
        _fill(cover, circle(*points[0], 0.035), 255, smooth=True)
        canvas[cover > 127] = (255, 0, 85)
    return canvas


def depth_map(picture: Picture, far: int = 30, near: int = 240) -> np.ndarray:
    """Depth of a picture as grey, `[H, W, 3]`: the ground is `far`, what is nearest is `near`, the others between."""
    things = int(picture.owners.max())
    greys = np.linspace(far, near, things + 1) if things else np.array([far])
    return np.repeat(np.round(greys).astype(np.uint8)[picture.owners][..., None], 3, 2)


def cut_out(scene: Scene, index: int, size: int, ground: tuple[int, int, int] = WHITE) -> np.ndarray:
    """One subject alone, large and centred, arms as in the scene, on plain ground, `[H, W, 3]`."""
    thing = scene.things[index]
    grown = replace(thing, x=0.5, y=0.5, size=0.9 if thing.kind == "doll" else 0.72)
    return _draw(parts_of(grown), ground, size).image


def garment_flat(doll: Thing, size: int) -> np.ndarray:
    """The garment alone, laid flat with the arms out, on white, `[H, W, 3]`."""
    y, scale = (0.61, 1.5) if doll.edition == 1 else (0.55, 1.25)  # dresses and coats are longer
    flat = replace(doll, kind="doll", x=0.5, y=y, size=scale, arms=(58.0, 58.0))
    return _draw([part for part in doll_parts(flat, 1) if part.label == "shirt"], WHITE, size).image


def garment_mask(picture: Picture, owner: int) -> np.ndarray:
    """Where the garment of `owner` shows, uint8 0 or 255, `[H, W]`."""
    return ((picture.labels == LABELS.index("shirt")) & (picture.owners == owner)).astype(np.uint8) * 255


def clip(scene: Scene, frames: int) -> list[Scene]:
    """The same scene in motion: arms swing from this pose to its mirror and the dolls step. One scene a frame."""
    made = []
    for k in range(frames):
        phase = 0.5 - 0.5 * np.cos(np.pi * k / max(frames - 1, 1))
        things = []
        for thing in scene.things:
            if thing.kind == "doll":
                (a, b), (c, d) = thing.arms, thing.legs
                arms = (a + phase * (160 - 2 * a) * 0.8, b + phase * (160 - 2 * b) * 0.8)
                swing = 10 * np.sin(np.pi * phase)
                thing = replace(thing, arms=arms, legs=(c + swing, d - swing))
            things.append(thing)
        made.append(replace(scene, things=tuple(things)))
    return made
