"""Random scenes of the second world: more to wear, prints, larger eyes and hands, two dolls, small objects, textures.

Three things are never trained on, so that three questions can be asked (`KINDS_OF_TEST`): captions (one in sixteen),
garments (one in twelve of cut, colour and pattern, and some colours with some patterns on any cut), and poses (one arm
up, the other out).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from .sampling import held_out, pick, two
from .things import (
    COLOURS,
    CUTS,
    GROUNDS,
    HAIR,
    MORE_ARMS,
    MORE_BOTTOMS,
    MORE_HAIRSTYLES,
    MORE_PATTERNS,
    OBJECTS,
    PRINTS,
    SKINS,
    TEXTURES,
    Scene,
    Thing,
)

VERSION = 1  # of how its scenes look and read: a change asks for new weights
KINDS_OF_TEST = ("captions", "garments", "poses")
NEVER_TOGETHER = frozenset({
    ("purple", "checked"), ("orange", "spotted"), ("pink", "striped"), ("green", "star"), ("blue", "heart"),
    ("yellow", "x"),
})  # fmt: skip


def unseen_garment(doll: Thing) -> bool:
    """Whether what this doll wears above is kept from all training."""
    shown = doll.print or doll.pattern
    if (doll.colour, shown) in NEVER_TOGETHER:
        return True
    return hashlib.sha256(f"{doll.colour} {shown} {doll.cut}".encode()).digest()[0] % 12 == 0


def unseen_pose(doll: Thing) -> bool:
    """One arm up, the other out: kept from all training."""
    low, high = sorted(doll.arms)
    return 60 <= low < 106 <= high


def _kept_out(scene: Scene, kind: str) -> bool:
    dolls = [thing for thing in scene.things if thing.kind == "doll"]
    if kind == "captions":
        return held_out(scene)
    return any((unseen_garment if kind == "garments" else unseen_pose)(doll) for doll in dolls)


def wear(rng: np.random.Generator, doll: Thing) -> Thing:
    """The doll in another garment, any one. What it wears below stays, but for a skirt under a coat."""
    pattern = pick(rng, ("plain", "plain", *MORE_PATTERNS))
    shown = pick(rng, PRINTS) if pattern == "plain" and rng.random() < 0.4 else ""
    cut = pick(rng, CUTS)
    shown = "" if cut == "coat" else shown  # a coat is open in the middle
    bottom = "trousers" if cut == "coat" and doll.bottom == "skirt" else doll.bottom
    colour = pick(rng, [c for c in COLOURS if c != doll.bottom_colour])
    return replace(doll, colour=colour, cut=cut, pattern=pattern, print=shown, bottom=bottom)


def _doll(rng: np.random.Generator, x: float, size: float, ground: str, poses: tuple[str, ...]) -> tuple[Thing, str]:
    """A doll, and its pose in words; "" with arms anyhow."""
    pose = pick(rng, (*poses, ""))
    if pose:
        base = MORE_ARMS[pose] if rng.random() < 0.5 else MORE_ARMS[pose][::-1]
        arms = tuple(float(np.clip(a + rng.normal(0, 6), 6, 165)) for a in base)
    else:
        arms = tuple(float(a) for a in rng.uniform(6, 165, 2))
    doll = Thing(
        "doll", x, 0.5 + float(rng.normal(0, 0.01)), size, "red", "plain", pick(rng, MORE_BOTTOMS), pick(rng, COLOURS),
        pick(rng, [h for h in HAIR if not (ground == "dark" and h == "black")]), pick(rng, MORE_HAIRSTYLES), arms,
        tuple(float(a) for a in rng.uniform(3, 18, 2)), int(rng.integers(len(SKINS))), edition=2,
    )  # fmt: skip
    return wear(rng, doll), pose


POSES = tuple(MORE_ARMS)
_NARROW = ("down", "up", "waving")  # these leave room for something beside the doll


def sample_scene(rng: np.random.Generator, level: int) -> Scene:
    """A random scene of one difficulty: an index of `things.LEVELS`, or 5, an object in front of another one.

    The last is for the depth adapter. Its caption does not say which is nearer, and its scenes are not scored.
    """
    ground = pick(rng, GROUNDS)
    texture = pick(rng, ("", "", *TEXTURES))
    if level == 0:
        small = rng.random() < 0.25
        side = pick(rng, ("", "", "left", "right", "top", "bottom"))
        off = {"": (0, 0), "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}[side]
        size = float(rng.uniform(0.22, 0.27) if small else rng.uniform(0.5, 0.56 if side else 0.74))
        reach = 0.26 if small else 0.2
        x, y = (0.5 + reach * o + float(rng.uniform(-0.03, 0.03)) for o in off)
        return Scene(ground, (_object(rng, x, y, size),), side, texture=texture)
    if level == 1:
        relation = pick(rng, ("left", "right", "above", "below"))
        sizes = [float(rng.uniform(0.22, 0.27) if rng.random() < 0.2 else rng.uniform(0.37, 0.45)) for _ in range(2)]
        sign = -1 if relation in ("left", "above") else 1
        jitter = rng.uniform(-0.05, 0.05, 2)
        spots = [(0.5 + sign * 0.25, 0.5 + jitter[0]), (0.5 - sign * 0.25, 0.5 + jitter[1])]
        spots = [(y, x) for x, y in spots] if relation in ("above", "below") else spots
        (k1, k2), (c1, c2) = two(rng, OBJECTS), two(rng, COLOURS)
        made = tuple(
            Thing(k, float(p[0]), float(p[1]), s, c, edition=2)
            for k, c, s, p in zip((k1, k2), (c1, c2), sizes, spots, strict=True)
        )
        return Scene(ground, made, relation, texture=texture)
    if level == 2:
        doll, pose = _doll(rng, 0.5 + float(rng.uniform(-0.05, 0.05)), float(rng.uniform(0.85, 0.92)), ground, POSES)
        return Scene(ground, (doll,), "", pose if rng.random() < 0.85 else "", texture)
    if level == 3:
        side = pick(rng, ("left", "right"))
        sign = -1 if side == "left" else 1
        doll, pose = _doll(rng, 0.5 - sign * 0.2, float(rng.uniform(0.84, 0.91)), ground, _NARROW)
        if not pose:  # arms held out would cover the object
            doll = replace(doll, arms=tuple(a if a < 40 or a > 140 else 20.0 for a in doll.arms))
        worn = (doll.colour, doll.bottom_colour)
        size = float(rng.uniform(0.22, 0.27) if rng.random() < 0.35 else rng.uniform(0.31, 0.36))
        toy = _object(rng, 0.5 + sign * 0.31, float(rng.uniform(0.56, 0.76)), size, worn)
        return Scene(ground, (doll, toy), side, pose if rng.random() < 0.85 else "", texture)
    if level == 4:
        dolls = []
        for sign in (-1, 1):
            doll, _ = _doll(rng, 0.5 + sign * 0.25, float(rng.uniform(0.78, 0.86)), ground, ("down",))
            arms = [min(a, 20.0) for a in doll.arms]
            if rng.random() < 0.3:
                arms[0 if sign < 0 else 1] = 150.0  # the outer one
            dolls.append(replace(doll, arms=tuple(arms), bottom="trousers" if doll.bottom == "skirt" else doll.bottom))
        a, b = dolls
        while b.colour == a.colour:
            b = wear(rng, b)
        return Scene(ground, (a, b), "left", texture=texture)
    if level == 5:
        (k1, k2), (c1, c2) = two(rng, OBJECTS), two(rng, COLOURS)
        turn, apart = float(rng.uniform(0, 2 * np.pi)), float(rng.uniform(0.13, 0.19))
        made = tuple(
            Thing(k, 0.5 + s * apart * np.cos(turn), 0.5 + s * apart * np.sin(turn), float(rng.uniform(0.42, 0.52)), c,
                  edition=2)
            for k, c, s in ((k1, c1, -1), (k2, c2, 1))
        )  # fmt: skip
        return Scene(ground, made, "", texture=texture)
    raise ValueError(f"level must be 0 to 5, got {level}")


def _object(rng: np.random.Generator, x: float, y: float, size: float, worn: tuple[str, ...] = ()) -> Thing:
    return Thing(pick(rng, OBJECTS), x, y, size, pick(rng, [c for c in COLOURS if c not in worn]), edition=2)


def scenes(seed: int, levels: tuple[float, ...], test: str = "") -> Iterator[Scene]:
    """Endless scenes. `levels`: how often each difficulty comes; `test`: one of `KINDS_OF_TEST`, or "" for training.

    Scenes for training have nothing that is kept out; those of a test have what it asks for, and nothing else of it.
    """
    if test not in ("", *KINDS_OF_TEST):
        raise ValueError(f"test must be one of {', '.join(KINDS_OF_TEST)}, or empty, got {test!r}")
    rng = np.random.default_rng((2, seed))
    weights = np.array(levels, np.float64) / sum(levels)
    while True:
        scene = sample_scene(rng, int(rng.choice(len(levels), p=weights)))
        wanted = [kind == test for kind in KINDS_OF_TEST]
        if [_kept_out(scene, kind) for kind in KINDS_OF_TEST] == wanted:
            yield scene
