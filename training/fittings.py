"""What the try-on is shown: a doll with its shirt masked, the wanted shirt laid flat, and what is to come out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import cv2
import numpy as np

from . import world

SIDE = 96
GREY = 127  # of the masked shirt


def masked(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture with grey where the mask is set, `[H, W, 3]` uint8."""
    return np.where(mask[..., None] > 127, np.uint8(GREY), picture)


def widened(shirt: np.ndarray, pixels: int, box: bool = False) -> np.ndarray:
    """The mask grown by `pixels` all around, or its bounding box grown so; uint8 0 or 255."""
    if box and shirt.any():
        x, y, w, h = cv2.boundingRect(shirt)
        shirt = np.zeros_like(shirt)
        shirt[y : y + h, x : x + w] = 255
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * pixels + 1,) * 2)
    return cv2.dilate(shirt, kernel) if pixels else shirt


def redressed(scene: world.Scene, rng: np.random.Generator) -> world.Scene:
    """The same scene with another shirt on the doll."""
    doll = scene.things[0]
    colour = rng.choice([c for c in world.COLOURS if c != doll.colour])
    other = replace(doll, colour=str(colour), pattern=str(rng.choice(world.PATTERNS)))
    return replace(scene, things=(other, *scene.things[1:]))


@cache
def flat(colour: str, pattern: str, size: int) -> np.ndarray:
    """The shirt alone on white. All dolls' shirts have one cut."""
    return world.garment_flat(world.Thing("doll", 0.5, 0.5, 0.9, colour, pattern), size)


def jittered(garment: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The flat garment a little larger or smaller, and not quite centred, on white."""
    size, zoom = garment.shape[0], rng.uniform(0.75, 1.05)
    x, y = size / 2 * (1 - zoom) + rng.uniform(-0.05, 0.05, 2) * size
    where = np.array([[zoom, 0, x], [0, zoom, y]], np.float32)
    return cv2.warpAffine(garment, where, (size, size), flags=cv2.INTER_LINEAR, borderValue=world.WHITE)


@dataclass(frozen=True)
class Fitting:
    """One example: `shown` is to come out of `person` and `garment`; all `[H, W, 3]`. `mask` is the agnostic one."""

    shown: np.ndarray
    person: np.ndarray
    garment: np.ndarray
    mask: np.ndarray


def training_fitting(scene: world.Scene, size: int, rng: np.random.Generator) -> Fitting:
    """Masks as people bring them: mostly generous, some boxes, some so tight or shifted that the old shirt shows."""
    picture, roll = world.render(scene, size), rng.random()
    shirt = world.garment_mask(picture, 1)
    tight = roll < 0.1
    if tight:
        shift = rng.integers(-2, 3, 2) * size // 96
        mask = np.roll(widened(shirt, int(rng.integers(2)) * size // 96), shift, (0, 1))
    else:
        mask = widened(shirt, int(rng.integers(2, 7)) * size // 96, box=roll < 0.25)
    before = world.render(redressed(scene, rng), size) if tight else picture  # else the mask hides all that differs
    garment = flat(scene.things[0].colour, scene.things[0].pattern, size)
    garment = garment if rng.random() < 0.3 else jittered(garment, rng)
    return Fitting(picture.image, masked(before.image, mask), garment, mask)


def user_fitting(scene: world.Scene, rng: np.random.Generator, size: int = SIDE, grow: int = 3) -> Fitting:
    """As a user does it: the doll in another shirt, that shirt's mask grown by `grow` pixels, the flat garment."""
    before = world.render(redressed(scene, rng), size)
    mask = widened(world.garment_mask(before, 1), grow)
    doll = scene.things[0]
    garment = flat(doll.colour, doll.pattern, size)
    return Fitting(world.render(scene, size).image, masked(before.image, mask), garment, mask)
