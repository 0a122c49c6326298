"""The paper-doll world: procedural scenes with every ground truth that the features need.

A scene is a small frozen value. Rendering it at any size gives the picture and, from the same polygons, its label
map, edge map, keypoints, cut-outs, garment flat, masks and depth order, and a motion clip of the same scene. The same
seed gives the same scene on every machine.

Coordinates: the canvas is the unit square, x to the right, y down. Angles: degrees, 0 is straight down, positive away
from the body. Pictures: uint8 RGB `[H, W, 3]`; maps: uint8 `[H, W]`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import cv2
import numpy as np

VERSION = 1  # of what scenes look like and how they are told: a change asks for new weights

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 45),
    "orange": (245, 140, 30),
    "yellow": (250, 220, 50),
    "green": (50, 160, 75),
    "blue": (45, 95, 205),
    "purple": (135, 60, 165),
    "pink": (242, 130, 178),
}
HAIR: dict[str, tuple[int, int, int]] = {"black": (30, 28, 30), "brown": (98, 56, 30), "blonde": (246, 208, 110)}
GROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 241),
    "grey": (150, 154, 158),
    "dark": (42, 44, 58),
    "pale": (196, 222, 236),
}
SKINS: tuple[tuple[int, int, int], ...] = ((250, 208, 180), (226, 172, 132), (170, 116, 84))
WHITE, SHOE, TRUNK, EYE = (248, 248, 248), (70, 58, 58), (120, 78, 48), (30, 30, 34)

OBJECTS = ("ball", "box", "star", "heart", "house", "tree", "fish", "moon")
PATTERNS = ("plain", "striped", "spotted")
BOTTOMS = ("trousers", "skirt")
HAIRSTYLES = ("short", "long")
ARMS: dict[str, tuple[float, float]] = {"down": (14, 14), "out": (88, 88), "up": (152, 152), "waving": (14, 152)}
LABELS = ("ground", "object", "hair", "head", "shirt", "bottom", "leg", "hand", "shoe", "detail")
JOINTS = ("head", "neck", "l_shoulder", "l_hand", "r_shoulder", "r_hand", "hip", "l_foot", "r_foot")
BONES = ((0, 1), (1, 2), (2, 3), (1, 4), (4, 5), (1, 6), (6, 7), (6, 8))
LEVELS = ("one object", "two objects", "one doll", "a doll and an object", "two dolls")


@dataclass(frozen=True)
class Thing:
    """One subject. `x, y`: centre; `size`: height of a doll, longer side of an object, as a part of the canvas."""

    kind: str
    x: float
    y: float
    size: float
    colour: str  # of the object, or of the shirt
    pattern: str = "plain"
    bottom: str = "trousers"
    bottom_colour: str = "blue"
    hair: str = "black"
    hairstyle: str = "short"
    arms: tuple[float, float] = (14.0, 14.0)  # left and right on the picture, degrees
    legs: tuple[float, float] = (8.0, 8.0)
    skin: int = 0


@dataclass(frozen=True)
class Scene:
    """Subjects from back to front on one ground. `relation`: what the caption says of the first and the second."""

    ground: str
    things: tuple[Thing, ...]
    relation: str = ""  # "left", "right", "above", "below": of the first thing to the second, or of one on the canvas
    pose: str = ""  # of the first doll, a key of ARMS; "" when the caption is silent


@dataclass(frozen=True)
class Part:
    """One flat polygon `[N, 2]` in unit coordinates, with its label, colour, owner and pattern."""

    label: str
    colour: tuple[int, int, int]
    points: np.ndarray
    owner: int
    pattern: str = "plain"
    frame: tuple[float, float, float] = (0.0, 0.0, 1.0)  # x, y, size of the owner: where the pattern is anchored


# ---------------------------------------------------------------------------------------------------------- shapes


def _circle(x: float, y: float, r: float, n: int = 40, squash: float = 1.0) -> np.ndarray:
    a = np.linspace(0, 2 * np.pi, n, endpoint=False)
    return np.stack([x + r * np.cos(a), y + r * squash * np.sin(a)], 1)


def _capsule(x0: float, y0: float, x1: float, y1: float, r: float) -> np.ndarray:
    angle = np.arctan2(y1 - y0, x1 - x0)
    end = angle + np.linspace(-np.pi / 2, np.pi / 2, 12)
    start = angle + np.linspace(np.pi / 2, 3 * np.pi / 2, 12)
    return np.concatenate(
        [
            np.stack([x1 + r * np.cos(end), y1 + r * np.sin(end)], 1),
            np.stack([x0 + r * np.cos(start), y0 + r * np.sin(start)], 1),
        ]
    )


def object_outline(kind: str) -> list[tuple[str, np.ndarray]]:
    """Polygons of an object in the box -0.5..0.5: `("body" | "white" | "trunk" | "eye", points)`, back to front."""
    if kind == "ball":
        return [("body", _circle(0, 0, 0.5))]
    if kind == "box":
        return [("body", np.array([[-0.46, -0.46], [0.46, -0.46], [0.46, 0.46], [-0.46, 0.46]]))]
    if kind == "star":
        a = np.arange(10) * np.pi / 5 - np.pi / 2
        r = np.where(np.arange(10) % 2 == 0, 0.55, 0.25)
        return [("body", np.stack([r * np.cos(a), 0.04 + r * np.sin(a)], 1))]
    if kind == "heart":
        t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return [("body", np.stack([16 * np.sin(t) ** 3 / 33, -(y + 2.5) / 33], 1))]
    if kind == "house":
        walls = np.array([[-0.36, -0.08], [0.36, -0.08], [0.36, 0.48], [-0.36, 0.48]])
        roof = np.array([[-0.5, -0.06], [0, -0.5], [0.5, -0.06]])
        door = np.array([[-0.1, 0.16], [0.1, 0.16], [0.1, 0.48], [-0.1, 0.48]])
        return [("body", walls), ("body", roof), ("white", door)]
    if kind == "tree":
        trunk = np.array([[-0.08, 0.2], [0.08, 0.2], [0.08, 0.5], [-0.08, 0.5]])
        crown = [(-0.5, -0.02, 0.22), (-0.24, 0.32, 0.4)]
        tiers = [("body", np.array([[0, top], [wide, low], [-wide, low]])) for top, low, wide in crown]
        return [("trunk", trunk), tiers[1], ("body", np.array([[0, -0.5], [0.28, 0.04], [-0.28, 0.04]]))]
    if kind == "fish":
        tail = np.array([[0.2, 0.0], [0.5, -0.26], [0.5, 0.26]])
        return [("body", tail), ("body", _circle(-0.1, 0, 0.4, squash=0.68)), ("eye", _circle(-0.28, -0.07, 0.055, 16))]
    if kind == "moon":
        outer = np.linspace(0.28 * np.pi, 1.72 * np.pi, 30)
        inner = np.linspace(1.72 * np.pi, 0.28 * np.pi, 30)
        tip_x, tip_y = 0.5 * np.cos(0.28 * np.pi), 0.5 * np.sin(0.28 * np.pi)
        centre = 0.3
        radius = np.hypot(tip_x - centre, tip_y)
        start = np.arctan2(tip_y, tip_x - centre)
        inner = np.linspace(2 * np.pi - start, start, 30)
        arc = np.stack([centre + radius * np.cos(inner), radius * np.sin(inner)], 1)
        rim = np.stack([0.5 * np.cos(outer), 0.5 * np.sin(outer)], 1)
        return [("body", np.concatenate([rim, arc]) + [0.12, 0])]
    raise ValueError(f"kind must be one of {', '.join(OBJECTS)} or doll, got {kind!r}")


def doll_joints(doll: Thing) -> dict[str, tuple[float, float]]:
    """Keypoints of a doll in unit coordinates, by the names in `JOINTS`."""
    s, x, top = doll.size, doll.x, doll.y - doll.size / 2
    joints = {"head": (x, top + 0.15 * s), "neck": (x, top + 0.28 * s), "hip": (x, top + 0.58 * s)}
    for side, sign, arm, leg in (("l", -1, doll.arms[0], doll.legs[0]), ("r", 1, doll.arms[1], doll.legs[1])):
        shoulder = (x + sign * 0.115 * s, top + 0.335 * s)
        a, b = np.deg2rad(arm), np.deg2rad(leg)
        joints[f"{side}_shoulder"] = shoulder
        joints[f"{side}_hand"] = (shoulder[0] + sign * 0.26 * s * np.sin(a), shoulder[1] + 0.26 * s * np.cos(a))
        start = x + sign * 0.07 * s
        joints[f"{side}_foot"] = (start + sign * 0.34 * s * np.sin(b), top + 0.58 * s + 0.35 * s * np.cos(b))
    return joints


def doll_parts(doll: Thing, owner: int) -> list[Part]:
    """Polygons of a doll, back to front."""
    s, x, top = doll.size, doll.x, doll.y - doll.size / 2
    j = doll_joints(doll)
    skin, shirt, hair = SKINS[doll.skin], COLOURS[doll.colour], HAIR[doll.hair]
    below = COLOURS[doll.bottom_colour]
    frame = (x, top + 0.28 * s, s)
    parts: list[Part] = []

    def add(label: str, colour: tuple[int, int, int], points: np.ndarray, pattern: str = "plain") -> None:
        parts.append(Part(label, colour, np.asarray(points), owner, pattern, frame))

    if doll.hairstyle == "long":
        add("hair", hair, _capsule(x, top + 0.15 * s, x, top + 0.3 * s, 0.175 * s))
    for side, sign in (("l", -1), ("r", 1)):
        fx, fy = j[f"{side}_foot"]
        start = (x + sign * 0.07 * s, j["hip"][1])
        colour, label = (below, "bottom") if doll.bottom == "trousers" else (skin, "leg")
        width = 0.068 if doll.bottom == "trousers" else 0.045
        add("shoe", SHOE, _circle(fx + sign * 0.02 * s, fy + 0.02 * s, 0.062 * s, 20, 0.75))
        add(label, colour, _capsule(*start, fx, fy - 0.03 * s, width * s))
    if doll.bottom == "skirt":
        y0, y1 = top + 0.53 * s, top + 0.78 * s
        add("bottom", below, [[x - 0.13 * s, y0], [x + 0.13 * s, y0], [x + 0.25 * s, y1], [x - 0.25 * s, y1]])
    else:
        y0, y1 = top + 0.53 * s, top + 0.65 * s
        add("bottom", below, [[x - 0.138 * s, y0], [x + 0.138 * s, y0], [x + 0.138 * s, y1], [x - 0.138 * s, y1]])
    for side in ("l", "r"):
        (sx, sy), (hx, hy) = j[f"{side}_shoulder"], j[f"{side}_hand"]
        add("hand", skin, _circle(hx, hy, 0.055 * s, 20))
        add("shirt", shirt, _capsule(sx, sy, sx + 0.82 * (hx - sx), sy + 0.82 * (hy - sy), 0.055 * s), doll.pattern)
    y0, y1, w0, w1 = top + 0.275 * s, top + 0.57 * s, 0.15 * s, 0.145 * s
    add("shirt", shirt, [[x - w0, y0], [x + w0, y0], [x + w1, y1], [x - w1, y1]], doll.pattern)
    hx, hy = j["head"]
    add("head", skin, _circle(hx, hy, 0.135 * s))
    cap = np.linspace(np.pi * 1.02, np.pi * 1.98, 24)
    brow = [[hx + 0.15 * s, hy - 0.01 * s], [hx + 0.06 * s, hy - 0.055 * s], [hx - 0.07 * s, hy - 0.05 * s]]
    crown = np.stack([hx + 0.152 * s * np.cos(cap), hy + 0.152 * s * np.sin(cap)], 1)
    add("hair", hair, np.concatenate([crown, brow, [[hx - 0.15 * s, hy - 0.01 * s]]]))
    for sign in (-1, 1):
        add("detail", EYE, _circle(hx + sign * 0.05 * s, hy + 0.02 * s, 0.016 * s, 12))
    return parts


def parts_of(thing: Thing, owner: int = 1) -> list[Part]:
    """Polygons of any thing, back to front, in unit coordinates."""
    if thing.kind == "doll":
        return doll_parts(thing, owner)
    fill = {"body": COLOURS[thing.colour], "white": WHITE, "trunk": TRUNK, "eye": EYE}
    label = {"body": "object", "white": "detail", "trunk": "object", "eye": "detail"}
    where = np.array([thing.x, thing.y])
    return [Part(label[n], fill[n], where + thing.size * p, owner) for n, p in object_outline(thing.kind)]


# ------------------------------------------------------------------------------------------------------- rendering


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


def _paint(part: Part, size: int) -> np.ndarray:
    """Colour of a part at every pixel, `[H, W, 3]` float32 or `[3]` when plain. Patterns move with their owner."""
    base = np.array(part.colour, np.float32)
    if part.pattern not in PATTERNS:
        raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}, got '{part.pattern}'")
    if part.pattern == "plain":
        return base
    x0, y0, s = part.frame
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    u, v = (grid[None, :] - x0) / s, (grid[:, None] - y0) / s
    soft = 1.2 / (size * s)  # one pixel of blend at the borders
    if part.pattern == "striped":
        phase = np.abs((v / 0.13) % 1.0 - 0.5) * 0.13  # 0 in the middle of a white band
        amount = np.clip((0.03 - phase) / soft + 0.5, 0, 1) + 0 * u
    else:
        row = np.floor(v / 0.105)
        du = (u / 0.12 + 0.5 * (row % 2)) % 1.0 - 0.5
        dv = (v / 0.105) % 1.0 - 0.5
        amount = np.clip((0.033 - np.hypot(du * 0.12, dv * 0.105)) / soft + 0.5, 0, 1)
    return base + amount[..., None] * (np.array(WHITE, np.float32) - base)


def _draw(parts: list[Part], ground: tuple[int, int, int], size: int) -> Picture:
    image = np.empty((size, size, 3), np.float32)
    image[:] = ground
    labels, owners = np.zeros((size, size), np.uint8), np.zeros((size, size), np.uint8)
    for part in parts:
        cover = np.zeros((size, size), np.uint8)
        _fill(cover, part.points, 255, smooth=True)
        alpha = cover[..., None].astype(np.float32) / 255
        image += alpha * (_paint(part, size) - image)
        inside = cover > 127
        labels[inside] = LABELS.index(part.label)
        owners[inside] = part.owner
    return Picture(np.round(image).astype(np.uint8), labels, owners)


def render(scene: Scene, size: int) -> Picture:
    """Draw a scene, `size` pixels a side. Owner k is `scene.things[k - 1]`; a higher owner is nearer (depth order)."""
    parts = [part for i, thing in enumerate(scene.things) for part in parts_of(thing, i + 1)]
    return _draw(parts, GROUNDS[scene.ground], size)


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
            _fill(cover, _capsule(*points[a], *points[b], max(0.016, 1.2 / size)), 255, smooth=True)
            alpha = cover[..., None].astype(np.float32) / 255
            canvas = (canvas + alpha * (np.array(colour, np.float32) - canvas)).astype(np.uint8)
        cover = np.zeros((size, size), np.uint8)
        _fill(cover, _circle(*points[0], 0.035), 255, smooth=True)
        canvas[cover > 127] = (255, 0, 85)
    return canvas


def cut_out(scene: Scene, index: int, size: int, ground: tuple[int, int, int] = WHITE) -> np.ndarray:
    """One subject alone, large and centred, arms as in the scene, on plain ground, `[H, W, 3]`."""
    thing = scene.things[index]
    grown = replace(thing, x=0.5, y=0.5, size=0.9 if thing.kind == "doll" else 0.72)
    return _draw(parts_of(grown), ground, size).image


def garment_flat(doll: Thing, size: int) -> np.ndarray:
    """The shirt alone, laid flat with the arms out, on white, `[H, W, 3]`."""
    flat = replace(doll, kind="doll", x=0.5, y=0.61, size=1.5, arms=(58.0, 58.0))
    return _draw([part for part in doll_parts(flat, 1) if part.label == "shirt"], WHITE, size).image


def garment_mask(picture: Picture, owner: int) -> np.ndarray:
    """Where the shirt of `owner` shows, uint8 0 or 255, `[H, W]`."""
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


# ------------------------------------------------------------------------------------------------- scenes and words


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _object_words(thing: Thing) -> str:
    return f"{_article(thing.colour)} {thing.colour} {thing.kind}"


def _doll_words(doll: Thing, pose: str) -> str:
    pattern = "" if doll.pattern == "plain" else f"{doll.pattern} "
    bottom = doll.bottom_colour + " " + doll.bottom
    bottom = bottom if doll.bottom == "trousers" else f"{_article(bottom)} {bottom}"
    arms = "" if not pose else (", waving" if pose == "waving" else f", arms {pose}")
    return (
        f"a doll with {doll.hairstyle} {doll.hair} hair, {_article(doll.colour)} {doll.colour} {pattern}shirt "
        f"and {bottom}{arms}"
    )


def caption(scene: Scene) -> str:
    """The scene in plain English. Says nothing that the picture does not show; silent on an empty relation or pose."""
    ground = f"on a {scene.ground} ground"
    side = f" on the {scene.relation}" if scene.relation else ""
    first, *rest = scene.things
    if first.kind == "doll" and not rest:
        return f"{_doll_words(first, scene.pose)}, {ground}"
    if first.kind == "doll" and rest[0].kind != "doll":
        return f"{_doll_words(first, scene.pose)}, {_object_words(rest[0])}{side}, {ground}"
    if first.kind == "doll":
        short = [f"a doll in {_article(d.colour)} {d.colour} shirt" for d in (first, rest[0])]
        return f"{short[0]} left of {short[1]}, {ground}"
    if not rest:
        return f"{_object_words(first)}{side}, {ground}"
    link = {"left": "left of", "right": "right of", "": "and"}.get(scene.relation, scene.relation)
    return f"{_object_words(first)} {link} {_object_words(rest[0])}, {ground}"


def held_out(scene: Scene) -> bool:
    """One scene in sixteen, by its caption, is never trained on: prompts and pictures for tests come from these."""
    return hashlib.sha256(caption(scene).encode()).digest()[0] < 16


def _pick(rng: np.random.Generator, options) -> str:
    return list(options)[rng.integers(len(options))]


def _two(rng: np.random.Generator, options) -> tuple[str, str]:
    a, b = rng.permutation(len(options))[:2]
    return list(options)[a], list(options)[b]


def _doll(rng: np.random.Generator, x: float, size: float, ground: str) -> tuple[Thing, str]:
    pose = _pick(rng, ARMS)
    base = ARMS[pose] if pose != "waving" or rng.random() < 0.5 else ARMS[pose][::-1]
    arms = tuple(float(np.clip(a + rng.normal(0, 7), 6, 165)) for a in base)
    legs = tuple(float(a) for a in rng.uniform(2, 20, 2))
    shirt, below = _two(rng, COLOURS)
    hair = _pick(rng, [h for h in HAIR if not (ground == "dark" and h == "black")])
    doll = Thing(
        "doll", x, 0.5 + float(rng.normal(0, 0.012)), size, shirt, _pick(rng, PATTERNS), _pick(rng, BOTTOMS), below,
        hair, _pick(rng, HAIRSTYLES), arms, legs, int(rng.integers(len(SKINS))),
    )  # fmt: skip
    return doll, pose


def sample_scene(rng: np.random.Generator, level: int) -> Scene:
    """A random scene of one difficulty, an index of `LEVELS`."""
    ground = _pick(rng, GROUNDS)
    if level == 0:
        size = float(rng.uniform(0.5, 0.74))
        side = _pick(rng, ("", "", "left", "right", "top", "bottom"))
        off = {"": (0, 0), "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}[side]
        size = size if not side else min(size, 0.56)
        x, y = (0.5 + 0.2 * o + float(rng.uniform(-0.03, 0.03)) for o in off)
        return Scene(ground, (Thing(_pick(rng, OBJECTS), x, y, size, _pick(rng, COLOURS)),), side)
    if level == 1:
        (k1, k2), (c1, c2) = _two(rng, OBJECTS), _two(rng, COLOURS)
        relation = _pick(rng, ("left", "right", "above", "below"))
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
        side = _pick(rng, ("left", "right"))
        sign = -1 if side == "left" else 1
        doll, pose = _doll(rng, 0.5 - sign * 0.2, float(rng.uniform(0.84, 0.92)), ground)
        while "out" in pose:  # arms held out would cover the object
            doll, pose = _doll(rng, 0.5 - sign * 0.2, float(rng.uniform(0.84, 0.92)), ground)
        colour = _pick(rng, [c for c in COLOURS if c not in (doll.colour, doll.bottom_colour)])
        toy = Thing(
            _pick(rng, OBJECTS), 0.5 + sign * 0.3, float(rng.uniform(0.6, 0.76)), float(rng.uniform(0.3, 0.36)), colour
        )
        return Scene(ground, (doll, toy), side, pose if rng.random() < 0.8 else "")
    if level == 4:
        (a, _), (b, _) = (_doll(rng, 0.5 + s * 0.24, float(rng.uniform(0.8, 0.88)), ground) for s in (-1, 1))
        a, b = (replace(d, arms=tuple(min(arm, 30.0) for arm in d.arms)) for d in (a, b))
        if a.colour == b.colour:
            b = replace(b, colour=_pick(rng, [c for c in COLOURS if c != a.colour]))
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


# --------------------------------------------------------------------------------------------- sets: one doll, twice


def set_caption(scenes: tuple[Scene, Scene], named: bool) -> str:
    """One sentence for two panels with the same doll. `named`: the first panel says what the doll wears."""

    def pose(scene: Scene) -> str:
        return {"": "", "waving": " waving"}.get(scene.pose, f", arms {scene.pose}")

    first, second = scenes
    doll = _doll_words(first.things[0], first.pose) if named else f"a doll{pose(first)}"
    return f"[LEFT] {doll}, on a {first.ground} ground; [RIGHT] the doll{pose(second)}, on a {second.ground} ground"


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
