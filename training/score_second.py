"""The scorer of the second world: what a picture shows, by drawing it again.

Objects are recognised by their silhouettes, as in `score`. A doll is found by its silhouette, then drawn in every cut,
pattern, hairstyle and pose until the drawing is most like the picture. What is left to count is counted in the picture
itself: tips of a star, eyes, hands and feet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import cv2
import numpy as np

from . import score as first
from .score import GRID, Score, centre_of, kind_of, pose_of
from .world import (
    COLOURS,
    CUTS,
    GROUNDS,
    HAIR,
    LABELS,
    MORE_BOTTOMS,
    MORE_HAIRSTYLES,
    MORE_PATTERNS,
    PRINTS,
    SKINS,
    TEXTURES,
    TRUNK,
    Scene,
    Thing,
    doll_joints,
    doll_parts,
    render,
)
from .world.rendering import ground_tones, texture_amount

SMALLEST = 0.006  # of the canvas: what counts as a thing
SIDE = 64  # pixels a side where dolls are compared whole


# Ground and things


def texture_of(image: np.ndarray, ground: str, things: np.ndarray) -> str:
    """The ground's texture, "" when it is plain. `things`: where it is hidden, `[S, S]` bool."""
    base, second = ground_tones(ground)
    sign = np.sign((second - base).mean())
    clear = ~cv2.dilate(things.astype(np.uint8), np.ones((7, 7), np.uint8)).astype(bool)
    tone = sign * (image.astype(np.float32).mean(-1) - base.mean())
    found = {}
    for name in TEXTURES:
        amount = texture_amount(name, image.shape[0])
        on, off = tone[clear & (amount > 0.9)], tone[clear & (amount < 0.1)]
        found[name] = (on.mean() - off.mean()) if len(on) and len(off) else 0.0
    best = max(found, key=found.__getitem__)
    return best if found[best] > 0.45 * abs(second - base).mean() else ""


def things_in(image: np.ndarray, ground: str, dolls: bool) -> list[np.ndarray]:
    """Masks of the things, largest first. `dolls`: white on a white ground does not cut a thing in two."""
    away = (np.abs(image.astype(np.float32) - np.array(GROUNDS[ground], np.float32)).max(-1) > 40).astype(np.uint8)
    if dolls:
        away = cv2.morphologyEx(away, cv2.MORPH_CLOSE, np.ones((round(away.shape[0] * 0.08) | 1, 1), np.uint8))
    solid = cv2.morphologyEx(away, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    count, regions, stats, _ = cv2.connectedComponentsWithStats(solid, connectivity=8)
    order = sorted(range(1, count), key=lambda k: -stats[k, cv2.CC_STAT_AREA])
    return [regions == k for k in order if stats[k, cv2.CC_STAT_AREA] >= SMALLEST * solid.size]


# Counts


def tips_of(mask: np.ndarray) -> int:
    """How many tips a silhouette has: corners of its hull that stand out from the shape between them."""
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    outline = max(outlines, key=cv2.contourArea)[:, 0].astype(np.float64)
    x, y = outline.mean(0)
    away = np.hypot(outline[:, 0] - x, outline[:, 1] - y)
    angle = np.arctan2(outline[:, 1] - y, outline[:, 0] - x)
    around = np.zeros(72)
    np.maximum.at(around, ((angle + np.pi) / (2 * np.pi) * 72).astype(int) % 72, away)
    smooth = (np.roll(around, 1) + around + np.roll(around, -1)) / 3
    peaks = 0
    for k in range(72):
        near = smooth[np.arange(k - 5, k + 6) % 72]
        valley = smooth[np.arange(k - 8, k + 9) % 72].min()
        peaks += (
            smooth[k] == near.max()
            and smooth[k] > max(1.25 * valley, 0.72 * smooth.max())
            and (near[:5] < smooth[k]).all()
        )
    return peaks


def _share(image: np.ndarray, wanted: np.ndarray, x: float, y: float, radius: float) -> float:
    """Part of the disc around `x`, `y`, in unit coordinates, where `wanted` `[S, S]` holds."""
    s = image.shape[0]
    grid = (np.arange(s) + 0.5) / s
    disc = np.hypot(grid[None] - x, grid[:, None] - y) < max(radius, 1.0 / s)
    return float(wanted[disc].mean()) if disc.any() else 0.0


def fish_has_eye(image: np.ndarray, mask: np.ndarray) -> bool:
    """A dark spot in a white one, in the fish's front. Its mask may be open there: the white can be the ground's."""
    wide = round(0.45 * np.sqrt(mask.sum())) | 1
    solid = cv2.morphologyEx(
        first._filled(mask), cv2.MORPH_CLOSE, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (wide, wide))
    ).astype(bool)
    columns = np.flatnonzero(mask.any(0))
    solid[:, round(columns[0] + 0.55 * (columns[-1] - columns[0])) :] = False
    values = image.astype(int)
    dark, white = (values.max(-1) < 110) & solid, (values.min(-1) > 150) & solid
    area = solid.sum()
    return bool(dark.sum() > 0.006 * area and white.sum() > 0.008 * area)


def limbs_of(image: np.ndarray, doll: Thing) -> dict[str, int]:
    """How many eyes, hands and feet a fitted doll has on the picture."""
    s, joints = doll.size, doll_joints(doll)
    values = image.astype(np.float32)
    dark = values.max(-1) < 110
    (x, y) = joints["head"]
    eyes = sum(_share(image, dark, x + sign * 0.05 * s, y + 0.02 * s, 0.022 * s) > 0.4 for sign in (-1, 1))
    skin = np.abs(values - np.array(SKINS[doll.skin], np.float32)).max(-1) < 60
    hands = sum(_share(image, skin, *joints[f"{side}_hand"], 0.05 * s) > 0.35 for side in ("l", "r"))
    shoe = np.abs(values - np.array(TRUNK, np.float32)).max(-1) < 38
    grid = (np.arange(image.shape[0]) + 0.5) / image.shape[0]
    low = (grid > doll.y + 0.36 * s)[:, None] & (np.abs(grid - doll.x) < 0.3 * s)[None] & shoe
    enough = 0.0022 * (s * image.shape[0]) ** 2  # under trousers a shoe shows twice that
    feet = sum((low & side[None]).sum() > enough for side in (grid < doll.x, grid > doll.x))
    return {"eyes": eyes, "hands": hands, "feet": feet}


# Dolls


def _palette(image: np.ndarray) -> np.ndarray:
    """Index into the scorer's palette, and past it into the skins, for every pixel; the nearest colour, `[S, S]`."""
    values = np.concatenate([first._VALUES, np.array(SKINS, np.float32)])
    flat = image.reshape(-1, 3).astype(np.float32)
    return ((values**2).sum(1) - 2 * flat @ values.T).argmin(1).reshape(image.shape[:2])


_HAIRS = [first._NAMES.index(f"hair {name}") for name in HAIR]
_SKINS = [len(first._NAMES) + k for k in range(len(SKINS))]


def _vote(palette: np.ndarray, mask: np.ndarray, among: list[int]) -> int | None:
    """Place in `among` of the most frequent one under `mask`, None when there is none of them."""
    votes = np.bincount(palette[mask], minlength=len(first._NAMES) + len(SKINS))[among]
    return int(votes.argmax()) if votes.any() else None


def colour_of(palette: np.ndarray, mask: np.ndarray, but: str = "") -> str:
    """The most frequent colour of things under `mask`, "" when there is none. `but`: it is not this one."""
    names = [name for name in COLOURS if name != but]
    found = _vote(palette, mask, [first._NAMES.index(name) for name in names])
    return "" if found is None else names[found]


_STEPS = (14.0, 50.0, 88.0, 120.0, 152.0)


@cache
def _dolls() -> tuple[list[Thing], np.ndarray]:
    """Candidate dolls in the middle and their silhouettes, `[N, GRID*GRID]` float32."""
    made, masks = [], []
    lower = ({"bottom": "trousers"}, {"bottom": "skirt"}, {"cut": "dress"}, {"cut": "coat"})
    for size in (0.78, 0.82, 0.86, 0.9):
        for a in _STEPS:
            for b in _STEPS:
                for worn in lower:
                    for hairstyle in ("short", "long"):
                        doll = Thing("doll", 0.5, 0.5, size, "red", hairstyle=hairstyle, arms=(a, b), legs=(10, 10),
                                     edition=2, **worn)  # fmt: skip
                        whole = np.zeros((GRID, GRID), np.uint8)
                        for part in doll_parts(doll, 1):
                            fixed = np.round((part.points * GRID - 0.5) * 16).astype(np.int32)
                            cv2.fillPoly(whole, [fixed], 1, cv2.LINE_8, 4)
                        made.append(doll)
                        masks.append(whole.ravel())
    return made, np.stack(masks).astype(np.float32)


def fit_doll(mask: np.ndarray) -> tuple[Thing, float]:
    """The doll whose silhouette overlaps most with `mask`, and by how much. It is moved under the candidates."""
    made, masks = _dolls()
    size = mask.shape[0]
    ys, xs = np.nonzero(mask)
    low = ys > ys.max() - 0.4 * (ys.max() - ys.min())
    middle = np.median(xs[low]) + 0.5
    best: tuple[float, Thing] = (-1.0, made[0])
    small = mask.astype(np.float32)
    for shift in range(-3, 4):
        move = size / 2 - middle + shift * size / GRID
        moved = cv2.warpAffine(small, np.array([[1, 0, move], [0, 1, 0]], np.float32), (size, size))
        grid = (cv2.resize(moved, (GRID, GRID), interpolation=cv2.INTER_AREA) > 0.5).ravel().astype(np.float32)
        both = masks @ grid
        overlap = both / np.maximum(masks.sum(1) + grid.sum() - both, 1)
        k = int(overlap.argmax())
        if overlap[k] > best[0]:
            best = (float(overlap[k]), replace(made[k], x=0.5 - move / size))
    return best[1], best[0]


@dataclass(frozen=True)
class _View:
    """A picture of a doll at the size where drawings are compared. `here`: where, `[SIDE, SIDE]` bool."""

    scene: Scene
    image: np.ndarray
    here: np.ndarray

    def apart(self, doll: Thing) -> float:
        drawn = render(replace(self.scene, things=(doll,)), SIDE)
        where = self.here | (drawn.owners > 0)
        return float(np.abs(drawn.image.astype(np.float32) - self.image)[where].sum()) / max(int(self.here.sum()), 1)

    def nearest(self, options: list[Thing]) -> Thing:
        return min(options, key=self.apart)


def _shown(doll: Thing, what: str) -> Thing:
    return (
        replace(doll, pattern=what, print="") if what in MORE_PATTERNS else replace(doll, pattern="plain", print=what)
    )


def _torso(image: np.ndarray, palette: np.ndarray, doll: Thing) -> Thing:
    """The doll with the colour, the pattern or the print, and, if its garment is open, the coat of the picture."""
    s, size = doll.size, image.shape[0]
    top, left = round((doll.y - 0.19 * s) * size), round((doll.x - 0.12 * s) * size)
    bottom, right = round((doll.y + 0.05 * s) * size), round((doll.x + 0.12 * s) * size)
    box = np.zeros((size, size), bool)
    box[max(top, 0) : bottom, max(left, 0) : right] = True
    doll = replace(doll, colour=colour_of(palette, box) or doll.colour)
    shown = cv2.GaussianBlur(image, (3, 3), 0).astype(np.float32)[top:bottom, left:right]
    best: tuple[float, Thing] = (np.inf, doll)
    for cut, what in [("shirt", w) for w in (*MORE_PATTERNS, *PRINTS)] + [("coat", w) for w in MORE_PATTERNS]:
        tried = _shown(replace(doll, cut=cut), what)
        drawn = render(Scene("grey", (tried,)), size).image
        drawn = cv2.GaussianBlur(drawn, (3, 3), 0).astype(np.float32)
        for dy in (-2, 0, 2):
            for dx in (-2, 0, 2):
                part = drawn[top + dy : bottom + dy, left + dx : right + dx]
                if part.shape == shown.shape:
                    error = float(np.square(part - shown).mean())
                    if error < best[0]:
                        best = (error, tried)
    return best[1]


def _votes(palette: np.ndarray, doll: Thing) -> Thing:
    """Skin, hair and the colour of what is worn below, from where the fitted doll has them."""
    drawn = render(Scene("white", (doll,)), palette.shape[0])

    def region(label: str) -> np.ndarray:
        found = (drawn.labels == LABELS.index(label)).astype(np.uint8)
        thin = cv2.erode(found, np.ones((3, 3), np.uint8))
        return (thin if thin.any() else found).astype(bool)

    rows = np.arange(palette.shape[0])[:, None] / palette.shape[0]
    hair = _vote(palette, region("hair") & (rows < doll.y - 0.38 * doll.size), _HAIRS)
    return replace(
        doll,
        hair=doll.hair if hair is None else list(HAIR)[hair],
        skin=_vote(palette, region("head"), _SKINS) or 0,
        bottom_colour=colour_of(palette, region("bottom"), but=doll.colour) or doll.bottom_colour,
    )


def _dressed(palette: np.ndarray, view: _View, doll: Thing) -> Thing:
    """The doll in the cut, the bottom and the hairstyle that look most like the picture."""
    open_in_front = doll.cut == "coat"
    tops = ("coat",) if open_in_front else tuple(cut for cut in CUTS if cut != "coat")
    options = []
    for cut in tops:
        bottoms = ("trousers",) if cut == "dress" else tuple(b for b in MORE_BOTTOMS if cut != "coat" or b != "skirt")
        options += [_votes(palette, replace(doll, cut=cut, bottom=bottom)) for bottom in bottoms]
    doll = view.nearest(options)
    return view.nearest([replace(doll, hairstyle=hairstyle) for hairstyle in MORE_HAIRSTYLES])


def _posed(view: _View, doll: Thing, steps: tuple[float, ...]) -> Thing:
    """The doll moved, and its limbs turned, until it looks most like the picture."""
    for step in steps:
        near = step / 2000
        doll = view.nearest(
            [replace(doll, x=doll.x + near * i, y=doll.y + near * j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        )
        doll = view.nearest([replace(doll, size=doll.size + near * i) for i in (-1, 0, 1)])
        for side in (0, 1):
            for limb, part in (("arms", 1.0), ("legs", 0.2)):
                both = getattr(doll, limb)
                tries = [tuple(angle + part * step * i if k == side else angle for k, angle in enumerate(both))
                         for i in (-1, 0, 1)]  # fmt: skip
                doll = view.nearest([replace(doll, **{limb: angles}) for angles in tries])
    return doll


def read_doll(image: np.ndarray, mask: np.ndarray, ground: str, texture: str = "") -> Thing | None:
    """What the doll under `mask` looks like and how it stands, from the picture alone; None when it is no doll."""
    doll, fit = fit_doll(mask)
    if fit < 0.62 or fit < kind_of(mask)[1] - 0.1:
        return None
    small = cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    wide = cv2.dilate(mask.astype(np.uint8), np.ones((5, 5), np.uint8)).astype(np.float32)
    here = cv2.resize(wide, (SIDE, SIDE), interpolation=cv2.INTER_AREA) > 0.5
    palette = _palette(image)
    view = _View(Scene(ground, (), texture=texture), small, here)
    doll = _votes(palette, _torso(image, palette, doll))
    doll = _dressed(palette, view, doll)
    doll = _posed(view, doll, (32.0, 16.0))
    doll = _votes(palette, _torso(image, palette, doll))
    doll = _dressed(palette, view, doll)
    return _posed(view, doll, (16.0, 8.0))


def wears(doll: Thing) -> tuple[str, str, str]:
    """Colour, pattern or print, and cut of what a doll wears above."""
    return doll.colour, doll.print or doll.pattern, doll.cut


def judge_doll(image: np.ndarray, doll: Thing, seen: Thing | None, pose: str, whole: bool) -> tuple[bool, dict]:
    """Whether the colours are right, and the details. `whole`: hair and what is worn below count too."""
    names = ["cut", "pattern", *(["hairstyle", "garment", "skin"] if whole else [])]
    if seen is None:
        return False, {**dict.fromkeys(names, False), **({"pose": False} if pose else {}), "limbs": False}
    colours = seen.colour == doll.colour
    details = {"cut": seen.cut == doll.cut, "pattern": wears(seen)[1] == wears(doll)[1]}
    if whole:
        colours = colours and seen.hair == doll.hair
        details |= {"hairstyle": seen.hairstyle == doll.hairstyle, "skin": seen.skin == doll.skin}
        if doll.cut != "dress":
            colours = colours and seen.bottom_colour == doll.bottom_colour
            details["garment"] = seen.bottom == doll.bottom
    if pose:
        details["pose"] = word_of(seen.arms) == pose
    counted = limbs_of(image, seen)
    details["limbs"] = all(count == 2 for count in counted.values())
    return colours, details


def word_of(arms: tuple[float, float]) -> str:
    """A pose in words; "mixed" when it has none."""
    low, high = sorted(arms)
    return "pointing" if low < 55 <= high <= 108 else pose_of(arms)


def judge(image: np.ndarray, scene: Scene) -> Score:
    """Judge an RGB uint8 picture `[S, S, 3]` by a caption of the second world. Skin is no part of a caption."""
    kinds = [thing.kind for thing in scene.things]
    ground = first.ground_of(image)
    masks = things_in(image, ground, "doll" in kinds)
    covered = np.any(masks, 0) if masks else np.zeros(image.shape[:2], bool)
    texture = texture_of(image, ground, covered)
    right_ground, details = ground == scene.ground, {"texture": texture == scene.texture}
    masks = [m for k, m in enumerate(masks) if k < len(kinds) or m.sum() > 0.1 * masks[0].sum()]
    if len(masks) < len(kinds):
        return Score(False, False, False, right_ground, details)
    alone = len(masks) == len(kinds)
    if kinds.count("doll") == 2:
        masks = sorted(masks[:2], key=lambda m: centre_of(m)[0])
        seen = [read_doll(image, mask, ground, texture) for mask in masks]
        judged = [judge_doll(image, d, s, "", whole=False) for d, s in zip(scene.things, seen, strict=True)]
        for name in judged[0][1]:
            details[name] = judged[0][1][name] and judged[1][1][name]
        return Score(alone and None not in seen, judged[0][0] and judged[1][0], True, right_ground, details)
    if kinds[0] == "doll":
        doll = scene.things[0]
        seen_doll = read_doll(image, masks[0], ground, texture)
        colours, found = judge_doll(image, doll, seen_doll, scene.pose, whole=True)
        details |= found
        if len(kinds) == 1:
            return Score(alone and seen_doll is not None, colours, True, right_ground, details)
        toy = scene.things[1]
        kind, colour, place = _object(image, masks[1])
        details |= _parts(image, masks[1], toy)
        position = first._related(scene.relation, place, centre_of(masks[0]))
        objects = alone and seen_doll is not None and kind == toy.kind
        return Score(objects, colours and colour == toy.colour, position, right_ground, details)
    seen_things = [_object(image, mask) for mask in masks[: len(kinds)]]
    if len(kinds) == 1:
        (kind, colour, place), thing = seen_things[0], scene.things[0]
        details |= _parts(image, masks[0], thing)
        position = first._place(scene.relation, *place)
        return Score(alone and kind == thing.kind, colour == thing.colour, position, right_ground, details)
    tries = []
    for a, b in ((0, 1), (1, 0)):
        (k1, c1, p1), (k2, c2, p2) = seen_things[a], seen_things[b]
        one, two = scene.things
        parts = [_parts(image, masks[k], thing) for k, thing in ((a, one), (b, two))]
        found = {name: all(p[name] for p in parts if name in p) for p in parts for name in p}
        tries.append(
            Score(alone and (k1, k2) == (one.kind, two.kind), (c1, c2) == (one.colour, two.colour),
                  first._related(scene.relation, p1, p2), right_ground, details | found)
        )  # fmt: skip
    return max(tries, key=lambda s: s.objects + s.colours + s.position)


def _object(image: np.ndarray, mask: np.ndarray) -> tuple[str, str, tuple[float, float]]:
    """Kind ("" when it is like none), colour and place."""
    kind, fit = kind_of(mask)
    return (kind if fit > 0.55 else ""), colour_of(_palette(image), mask), centre_of(mask)


def _parts(image: np.ndarray, mask: np.ndarray, thing: Thing) -> dict[str, bool]:
    """What an object must have, counted."""
    if thing.kind == "star":
        return {"tips": tips_of(mask) == 5}
    if thing.kind == "fish":
        return {"eye": fish_has_eye(image, mask)}
    return {}
