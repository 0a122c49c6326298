"""What the world is made of: colours, dolls, objects, and their outlines in unit coordinates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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

# The second world: the same things, with more to wear, larger parts, and textures under them.
CUTS: dict[str, float] = {"shirt": 0.66, "tee": 0.4, "vest": 0.0, "dress": 0.4, "coat": 0.66}  # part of the arm covered
MORE_PATTERNS = (*PATTERNS, "checked")
MORE_BOTTOMS = (*BOTTOMS, "shorts")
MORE_HAIRSTYLES = (*HAIRSTYLES, "tied")
MORE_ARMS: dict[str, tuple[float, float]] = {**ARMS, "pointing": (14, 88)}
PRINTS = ("star", "heart", "x", "t", "h")
TEXTURES = ("striped", "spotted", "checked")
MOUTH = (168, 44, 52)
SMALL = 0.29  # objects below this size are called small


@dataclass(frozen=True)
class Look:
    """How a doll is drawn, as parts of its size."""

    eye: float = 0.016
    hand: float = 0.055
    arm: float = 0.055
    shoe: float = 0.062
    leather: tuple[int, int, int] = SHOE
    mouth: bool = False
    arms_in_front: bool = False  # of the garment


LOOKS: dict[int, Look] = {
    1: Look(),
    2: Look(eye=0.026, hand=0.066, arm=0.058, shoe=0.072, leather=TRUNK, mouth=True, arms_in_front=True),
}


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
    cut: str = "shirt"  # of the garment, a key of CUTS; the first world knows shirts only
    print: str = ""  # on a plain garment, one of PRINTS
    edition: int = 1  # of the world, a key of LOOKS


@dataclass(frozen=True)
class Scene:
    """Subjects from back to front on one ground. `relation`: what the caption says of the first and the second."""

    ground: str
    things: tuple[Thing, ...]
    relation: str = ""  # "left", "right", "above", "below": of the first thing to the second, or of one on the canvas
    pose: str = ""  # of the first doll, a key of ARMS; "" when the caption is silent
    texture: str = ""  # of the ground, one of TEXTURES


@dataclass(frozen=True)
class Part:
    """One flat polygon `[N, 2]` in unit coordinates, with its label, colour, owner and pattern."""

    label: str
    colour: tuple[int, int, int]
    points: np.ndarray
    owner: int
    pattern: str = "plain"
    frame: tuple[float, float, float] = (0.0, 0.0, 1.0)  # x, y, size of the owner: where the pattern is anchored


# Outlines


def circle(x: float, y: float, r: float, n: int = 40, squash: float = 1.0) -> np.ndarray:
    a = np.linspace(0, 2 * np.pi, n, endpoint=False)
    return np.stack([x + r * np.cos(a), y + r * squash * np.sin(a)], 1)


def capsule(x0: float, y0: float, x1: float, y1: float, r: float) -> np.ndarray:
    angle = np.arctan2(y1 - y0, x1 - x0)
    end = angle + np.linspace(-np.pi / 2, np.pi / 2, 12)
    start = angle + np.linspace(np.pi / 2, 3 * np.pi / 2, 12)
    return np.concatenate(
        [
            np.stack([x1 + r * np.cos(end), y1 + r * np.sin(end)], 1),
            np.stack([x0 + r * np.cos(start), y0 + r * np.sin(start)], 1),
        ]
    )


_LARGER: dict[str, list[tuple[str, np.ndarray]]] = {  # in place of the first world's "white" and "eye"
    "house": [("white", np.array([[-0.13, 0.12], [0.13, 0.12], [0.13, 0.48], [-0.13, 0.48]]))],
    "fish": [("white", circle(-0.27, -0.07, 0.115, 24)), ("eye", circle(-0.28, -0.07, 0.065, 20))],
}


def object_outline(kind: str, edition: int = 1) -> list[tuple[str, np.ndarray]]:
    """Polygons of an object in the box -0.5..0.5: `("body" | "white" | "trunk" | "eye", points)`, back to front.

    The second world has the same silhouettes, and larger doors and eyes.
    """
    if edition == 2 and kind in _LARGER:
        return [part for part in object_outline(kind) if part[0] not in ("white", "eye")] + _LARGER[kind]
    if kind == "ball":
        return [("body", circle(0, 0, 0.5))]
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
        return [("body", tail), ("body", circle(-0.1, 0, 0.4, squash=0.68)), ("eye", circle(-0.28, -0.07, 0.055, 16))]
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


def print_outline(name: str) -> list[np.ndarray]:
    """Polygons of a print in the box -0.5..0.5."""
    if name in OBJECTS:
        return [points for _, points in object_outline(name)]
    bars = {
        "x": [(-0.4, -0.5, 0.4, 0.5), (0.4, -0.5, -0.4, 0.5)],
        "t": [(-0.42, -0.4, 0.42, -0.4), (0, -0.4, 0, 0.45)],
        "h": [(-0.34, -0.45, -0.34, 0.45), (0.34, -0.45, 0.34, 0.45), (-0.34, 0, 0.34, 0)],
    }
    if name not in bars:
        raise ValueError(f"a print must be one of {', '.join(PRINTS)}, got {name!r}")
    return [capsule(*bar, 0.13) for bar in bars[name]]


PRINT_AT, PRINT_SIZE = 0.42, 0.2  # middle, from the top, and size of a print, as parts of the doll's


def doll_parts(doll: Thing, owner: int) -> list[Part]:
    """Polygons of a doll, back to front."""
    s, x, top = doll.size, doll.x, doll.y - doll.size / 2
    j, look = doll_joints(doll), LOOKS[doll.edition]
    skin, shirt, hair = SKINS[doll.skin], COLOURS[doll.colour], HAIR[doll.hair]
    below = COLOURS[doll.bottom_colour]
    frame = (x, top + 0.28 * s, s)
    parts: list[Part] = []

    def add(label: str, colour: tuple[int, int, int], points: np.ndarray, pattern: str = "plain") -> None:
        parts.append(Part(label, colour, np.asarray(points), owner, pattern, frame))

    def sides(*half: tuple[float, float]) -> list[list[float]]:
        """A shape that is the same left and right, from half widths at heights, top to bottom."""
        return [[x + w * s, top + h * s] for w, h in half] + [[x - w * s, top + h * s] for w, h in reversed(half)]

    if doll.hairstyle == "long":
        add("hair", hair, capsule(x, top + 0.15 * s, x, top + 0.3 * s, 0.175 * s))
    if doll.hairstyle == "tied":
        add("hair", hair, circle(x, top + 0.015 * s, 0.085 * s, 24))
    bottom = "" if doll.cut == "dress" else doll.bottom
    for side, sign in (("l", -1), ("r", 1)):
        fx, fy = j[f"{side}_foot"]
        start = (x + sign * 0.07 * s, j["hip"][1])
        colour, label = (below, "bottom") if bottom == "trousers" else (skin, "leg")
        width = 0.068 if bottom == "trousers" else 0.045
        add("shoe", look.leather, circle(fx + sign * 0.02 * s, fy + 0.02 * s, look.shoe * s, 20, 0.75))
        add(label, colour, capsule(*start, fx, fy - 0.03 * s, width * s))
        if bottom == "shorts":
            knee = (start[0] + 0.42 * (fx - start[0]), start[1] + 0.42 * (fy - start[1]))
            add("bottom", below, capsule(*start, *knee, 0.078 * s))
    if bottom == "skirt":
        y0, y1 = top + 0.53 * s, top + 0.78 * s
        add("bottom", below, [[x - 0.13 * s, y0], [x + 0.13 * s, y0], [x + 0.25 * s, y1], [x - 0.25 * s, y1]])
    elif bottom:
        y0, y1 = top + 0.53 * s, top + 0.65 * s
        add("bottom", below, [[x - 0.138 * s, y0], [x + 0.138 * s, y0], [x + 0.138 * s, y1], [x - 0.138 * s, y1]])
    y0, y1, w0, w1 = top + 0.275 * s, top + 0.57 * s, 0.15 * s, 0.145 * s
    trunk = [[x - w0, y0], [x + w0, y0], [x + w1, y1], [x - w1, y1]]
    trunk = {"dress": sides((0.15, 0.275), (0.135, 0.5), (0.27, 0.8)),
             "coat": sides((0.15, 0.275), (0.15, 0.5), (0.18, 0.7))}.get(doll.cut, trunk)  # fmt: skip
    sleeves_in_front = look.arms_in_front and doll.cut != "vest"
    if sleeves_in_front:
        add("shirt", shirt, trunk, doll.pattern)
    covered = CUTS[doll.cut] if look.arms_in_front else 0.82
    for side in ("l", "r"):
        (sx, sy), (hx, hy) = j[f"{side}_shoulder"], j[f"{side}_hand"]
        add("hand", skin, circle(hx, hy, look.hand * s, 20))
        if covered < 0.5:
            add("hand", skin, capsule(sx, sy, hx, hy, 0.046 * s))
        if covered:
            end = (sx + covered * (hx - sx), sy + covered * (hy - sy))
            add("shirt", shirt, capsule(sx, sy, *end, look.arm * s), doll.pattern)
    if not sleeves_in_front:
        add("shirt", shirt, trunk, doll.pattern)
    if doll.cut == "coat":
        add("shirt", WHITE, sides((0.085, 0.275), (0.0, 0.4)))
        add("shirt", SHOE, sides((0.014, 0.4), (0.014, 0.7)))
    for points in print_outline(doll.print) if doll.print else ():
        add("shirt", WHITE, points * PRINT_SIZE * s + np.array([x, top + PRINT_AT * s]))
    hx, hy = j["head"]
    add("head", skin, circle(hx, hy, 0.135 * s))
    cap = np.linspace(np.pi * 1.02, np.pi * 1.98, 24)
    brow = [[hx + 0.15 * s, hy - 0.01 * s], [hx + 0.06 * s, hy - 0.055 * s], [hx - 0.07 * s, hy - 0.05 * s]]
    crown = np.stack([hx + 0.152 * s * np.cos(cap), hy + 0.152 * s * np.sin(cap)], 1)
    add("hair", hair, np.concatenate([crown, brow, [[hx - 0.15 * s, hy - 0.01 * s]]]))
    for sign in (-1, 1):
        add("detail", EYE, circle(hx + sign * 0.05 * s, hy + 0.02 * s, look.eye * s, 12))
    if look.mouth:
        smile = np.linspace(0, np.pi, 12)
        add("detail", MOUTH, np.stack([hx + 0.05 * s * np.cos(smile), hy + 0.066 * s + 0.036 * s * np.sin(smile)], 1))
    return parts


def parts_of(thing: Thing, owner: int = 1) -> list[Part]:
    """Polygons of any thing, back to front, in unit coordinates."""
    if thing.kind == "doll":
        return doll_parts(thing, owner)
    fill = {"body": COLOURS[thing.colour], "white": WHITE, "trunk": TRUNK, "eye": EYE}
    label = {"body": "object", "white": "detail", "trunk": "object", "eye": "detail"}
    where = np.array([thing.x, thing.y])
    return [
        Part(label[n], fill[n], where + thing.size * p, owner) for n, p in object_outline(thing.kind, thing.edition)
    ]
