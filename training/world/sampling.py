"""Random scenes, and sets of two scenes with the same doll; some captions are held out for tests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from .captions import caption, set_caption
from .things import (
    ARMS,
    BOTTOMS,
    COLOURS,
    GROUNDS,
    HAIR,
    HAIRSTYLES,
    LEVELS,
    OBJECTS,
    PATTERNS,
    SKINS,
    Scene,
    Thing,
)


def held_out(scene: Scene) -> bool:
    """One scene in sixteen, by its caption, is never trained on: prompts and pictures for tests come from these."""
    return hashlib.sha256(caption(scene).encode()).digest()[0] < 16


def pick(rng: np.random.Generator, options) -> str:
    return list(options)[rng.integers(len(options))]


def two(rng: np.random.Generator, options) -> tuple[str, str]:
    a, b = rng.permutation(len(options))[:2]
    return list(options)[a], list(options)[b]


def _doll(rng: np.random.Generator, x: float, size: float, ground: str) -> tuple[Thing, str]:
    pose = pick(rng, ARMS)
    base = ARMS[pose] if pose != "waving" or rng.random() < 0.5 else ARMS[pose][::-1]
    arms = tuple(float(np.clip(a + rng.normal(0, 7), 6, 165)) for a in base)
    legs = tuple(float(a) for a in rng.uniform(2, 20, 2))
    shirt, below = two(rng, COLOURS)
    hair = pick(rng, [h for h in HAIR if not (ground == "dark" and h == "black")])
    doll = Thing(
        "doll", x, 0.5 + float(rng.normal(0, 0.012)), size, shirt, pick(rng, PATTERNS), pick(rng, BOTTOMS), below,
        hair, pick(rng, HAIRSTYLES), arms, legs, int(rng.integers(len(SKINS))),
    )  # fmt: skip
    return doll, pose


def sample_scene(rng: np.random.Generator, level: int) -> Scene:
    """A random scene of one difficulty, an index of `LEVELS`."""
    ground = pick(rng, GROUNDS)
    if level == 0:
        size = float(rng.uniform(0.5, 0.74))
        side = pick(rng, ("", "", "left", "right", "top", "bottom"))
        off = {"": (0, 0), "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}[side]
        size = size if not side else min(size, 0.56)
        x, y = (0.5 + 0.2 * o + float(rng.uniform(-0.03, 0.03)) for o in off)
        return Scene(ground, (Thing(pick(rng, OBJECTS), x, y, size, pick(rng, COLOURS)),), side)
    if level == 1:
        (k1, k2), (c1, c2) = two(rng, OBJECTS), two(rng, COLOURS)
        relation = pick(rng, ("left", "right", "above", "below"))
        sizes = rng.uniform(0.38, 0.46, 2)
        sign = -1 if relation in ("left", "above") else 1
        jitter = rng.uniform(-0.05, 0.05, 2)
        spot = [(0.5 + sign * 0.25, 0.5 + jitter[0]), (0.5 - sign * 0.25, 0.5 + jitter[1])]
        if relation in ("above", "below"):
            spot = [(y, x) for x, y in spot]
        things = tuple(
            Thing(k, float(p[0]), float(p[1]), float(s), c)
            for k, c, s, p in zip((k1, k2), (c1, c2), sizes, spot, strict=True)
        )
        return Scene(ground, things, relation)
    if level == 2:
        doll, pose = _doll(rng, 0.5 + float(rng.uniform(-0.06, 0.06)), float(rng.uniform(0.86, 0.94)), ground)
        return Scene(ground, (doll,), "", pose if rng.random() < 0.8 else "")
    if level == 3:
        side = pick(rng, ("left", "right"))
        sign = -1 if side == "left" else 1
        doll, pose = _doll(rng, 0.5 - sign * 0.2, float(rng.uniform(0.84, 0.92)), ground)
        while "out" in pose:  # arms held out would cover the object
            doll, pose = _doll(rng, 0.5 - sign * 0.2, float(rng.uniform(0.84, 0.92)), ground)
        colour = pick(rng, [c for c in COLOURS if c not in (doll.colour, doll.bottom_colour)])
        toy = Thing(
            pick(rng, OBJECTS), 0.5 + sign * 0.3, float(rng.uniform(0.6, 0.76)), float(rng.uniform(0.3, 0.36)), colour
        )
        return Scene(ground, (doll, toy), side, pose if rng.random() < 0.8 else "")
    if level == 4:
        (a, _), (b, _) = (_doll(rng, 0.5 + s * 0.24, float(rng.uniform(0.8, 0.88)), ground) for s in (-1, 1))
        a, b = (replace(d, arms=tuple(min(arm, 30.0) for arm in d.arms)) for d in (a, b))
        if a.colour == b.colour:
            b = replace(b, colour=pick(rng, [c for c in COLOURS if c != a.colour]))
        return Scene(ground, (a, b), "left")
    raise ValueError(f"level must be 0 to {len(LEVELS) - 1}, got {level}")


def scenes(seed: int, levels: tuple[float, ...], test: bool = False) -> Iterator[Scene]:
    """Endless scenes. `levels`: how often each difficulty comes; `test` yields the held-out ones, else the others."""
    rng = np.random.default_rng(seed)
    weights = np.array(levels, np.float64) / sum(levels)
    while True:
        scene = sample_scene(rng, int(rng.choice(len(levels), p=weights)))
        if held_out(scene) == test:
            yield scene


# Sets: one doll, twice


def held_out_set(scenes: tuple[Scene, Scene]) -> bool:
    """One wording in sixteen is never trained on: poses and grounds of the two panels, whoever the doll is."""
    return hashlib.sha256(set_caption(scenes, named=False).encode()).digest()[0] < 16


def sample_set(rng: np.random.Generator) -> tuple[Scene, Scene]:
    """The same doll in two poses, at two places, on two grounds."""
    first = sample_scene(rng, 2)
    while not first.pose:
        first = sample_scene(rng, 2)
    doll, second = first.things[0], first
    while (
        second.ground == first.ground
        or second.pose in ("", first.pose)
        or (doll.hair, second.ground) == ("black", "dark")
    ):
        second = sample_scene(rng, 2)
    stands = second.things[0]
    again = replace(doll, x=stands.x, y=stands.y, size=stands.size, arms=stands.arms, legs=stands.legs)
    return first, replace(second, things=(again,))


def sets(seed: int, test: bool = False) -> Iterator[tuple[Scene, Scene]]:
    """Endless sets. `test` yields those of held-out wordings, else the others, with no held-out scene among them."""
    rng = np.random.default_rng(seed)
    while True:
        pair = sample_set(rng)
        if held_out_set(pair) if test else not (held_out_set(pair) or any(held_out(scene) for scene in pair)):
            yield pair
