"""Scenes in motion: a doll that moves its arms and legs at random and steps about, one scene a frame."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .things import Scene, Thing

ARM, LEG = (6.0, 165.0), (2.0, 30.0)  # degrees
STEP, BOB = 0.07, 0.02  # how far a doll moves from its place, as a part of the canvas


def eased(frames: int, keys: list[tuple[int, float]]) -> np.ndarray:
    """Values at every frame between `(frame, value)` keys, which starts and stops at each of them; `[frames]`."""
    at, values = zip(*keys, strict=True)
    place = np.interp(np.arange(frames), at, np.arange(len(at)))
    k = np.minimum(place.astype(int), len(at) - 2) if len(at) > 1 else np.zeros(frames, int)
    if len(at) == 1:
        return np.full(frames, values[0], np.float64)
    part = 0.5 - 0.5 * np.cos(np.pi * (place - k))
    values = np.array(values)
    return values[k] + part * (values[k + 1] - values[k])


def _path(rng: np.random.Generator, frames: int, start: float, low: float, high: float, rest: float) -> np.ndarray:
    """A random course from `start`: every few frames another goal in `low..high`, or a rest with chance `rest`."""
    keys, at, value = [(0, start)], 0, start
    while at < frames - 1:
        at += int(rng.integers(4, 11))
        value = value if rng.random() < rest else float(rng.uniform(low, high))
        keys.append((at, value))
    return eased(frames, keys)


def moving(scene: Scene, frames: int, rng: np.random.Generator) -> list[Scene]:
    """`scene` and what follows it: its dolls move, its objects stay, its ground stays. One scene a frame."""
    paths: dict[int, tuple[np.ndarray, ...]] = {}
    for i, thing in enumerate(scene.things):
        if thing.kind == "doll":
            arms = [_path(rng, frames, arm, *ARM, rest=0.25) for arm in thing.arms]
            legs = [_path(rng, frames, leg, *LEG, rest=0.4) for leg in thing.legs]
            x = _path(rng, frames, thing.x, thing.x - STEP, thing.x + STEP, rest=0.4)
            y = _path(rng, frames, thing.y, thing.y - BOB, thing.y + BOB, rest=0.5)
            paths[i] = (*arms, *legs, x, y)

    def at(k: int, i: int, thing: Thing) -> Thing:
        if i not in paths:
            return thing
        left, right, left_leg, right_leg, x, y = (float(path[k]) for path in paths[i])
        return replace(thing, arms=(left, right), legs=(left_leg, right_leg), x=x, y=y)

    things = [tuple(at(k, i, thing) for i, thing in enumerate(scene.things)) for k in range(frames)]
    return [replace(scene, things=each, pose="") for each in things]
