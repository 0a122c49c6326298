"""Does a picture show what its caption says? Judged from the world's definition, without any trained model.

Things are separated from the ground by colour, objects are recognised by the overlap of their normalised silhouette
with each kind's own, dolls by the best of a few thousand silhouettes in different places, sizes and poses. Colours
are majority votes over the fitted regions. On the world's own renderings the scorer is right (see the tests).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache

import cv2
import numpy as np

from .world import (
    COLOURS,
    GROUNDS,
    HAIR,
    LABELS,
    OBJECTS,
    SKINS,
    WHITE,
    Scene,
    Thing,
    doll_joints,
    doll_parts,
    render,
)

GRID = 48  # pixels a side of the silhouettes that are compared
SMALLEST = 0.02  # of the canvas: what counts as a thing
_PALETTE = {**COLOURS, **{f"hair {k}": v for k, v in HAIR.items()}, "plain white": WHITE}
_NAMES, _VALUES = list(_PALETTE), np.array(list(_PALETTE.values()), np.float32)


@dataclass(frozen=True)
class Score:
    """What is right. `details`: pattern, garment, hairstyle and pose, where the caption names them."""

    objects: bool
    colours: bool
    position: bool
    ground: bool
    details: dict[str, bool] = field(default_factory=dict)

    @property
    def all(self) -> bool:
        """Object, colour (the ground's too) and position."""
        return self.objects and self.colours and self.position and self.ground


def nearest_colour(image: np.ndarray) -> np.ndarray:
    """Index into the palette for every pixel, `[H, W]`."""
    return ((image.astype(np.float32)[..., None, :] - _VALUES) ** 2).sum(-1).argmin(-1)


def ground_of(image: np.ndarray) -> str:
    """The ground's name, from the border."""
    rim = np.concatenate([image[:3].reshape(-1, 3), image[:, :3].reshape(-1, 3), image[:, -3:].reshape(-1, 3)])
    votes = ((rim.astype(np.float32)[:, None] - np.array(list(GROUNDS.values()), np.float32)) ** 2).sum(-1).argmin(-1)
    return list(GROUNDS)[np.bincount(votes, minlength=len(GROUNDS)).argmax()]


def things_in(image: np.ndarray, ground: str, dolls: bool = False) -> list[np.ndarray]:
    """Masks of the things, largest first. `dolls`: white stripes on a white ground do not cut a thing in two."""
    away = np.abs(image.astype(np.float32) - np.array(GROUNDS[ground], np.float32)).max(-1) > 34
    if dolls:
        away = cv2.morphologyEx(away.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((9, 1), np.uint8))
    solid = cv2.morphologyEx(away.astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    count, regions, stats, _ = cv2.connectedComponentsWithStats(solid, connectivity=8)
    order = sorted(range(1, count), key=lambda k: -stats[k, cv2.CC_STAT_AREA])
    return [regions == k for k in order if stats[k, cv2.CC_STAT_AREA] >= SMALLEST * solid.size]


def _filled(mask: np.ndarray) -> np.ndarray:
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    out = np.zeros(mask.shape, np.uint8)
    cv2.drawContours(out, outlines, -1, 1, cv2.FILLED)
    return out


def centre_of(mask: np.ndarray) -> tuple[float, float]:
    ys, xs = np.nonzero(mask)
    return (xs.mean() + 0.5) / mask.shape[1], (ys.mean() + 0.5) / mask.shape[0]


def _normalised(mask: np.ndarray) -> np.ndarray:
    """Silhouette moved and scaled to a standard centre and area, `[GRID, GRID]` bool."""
    solid = _filled(mask)
    (x, y), size = centre_of(solid), mask.shape[0]
    zoom = GRID * 0.5 / max(np.sqrt(solid.sum()), 1)
    matrix = np.array([[zoom, 0, GRID / 2 - zoom * x * size], [0, zoom, GRID / 2 - zoom * y * size]], np.float32)
    return cv2.warpAffine(solid.astype(np.float32), matrix, (GRID, GRID), flags=cv2.INTER_LINEAR) > 0.5


@cache
def _templates() -> np.ndarray:
    shown = []
    for kind in OBJECTS:
        picture = render(Scene("dark", (Thing(kind, 0.5, 0.5, 0.7, "red"),)), 144)
        shown.append(_normalised(picture.owners > 0))
    return np.stack(shown)


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of bool masks, over the last two axes."""
    return (a & b).sum((-1, -2)) / np.maximum((a | b).sum((-1, -2)), 1)


def kind_of(mask: np.ndarray) -> tuple[str, float]:
    """The object whose silhouette overlaps most, and by how much."""
    scores = overlap(_templates(), _normalised(mask))
    return OBJECTS[int(scores.argmax())], float(scores.max())


def colour_of(image: np.ndarray, mask: np.ndarray, among) -> str:
    """The most frequent palette colour under `mask`, among the named ones; "" when there is none."""
    votes = np.bincount(nearest_colour(image)[mask], minlength=len(_NAMES))
    best = max(among, key=lambda name: votes[_NAMES.index(name)])
    return best if votes[_NAMES.index(best)] else ""


_ARM_STEPS = (14.0, 50.0, 88.0, 120.0, 152.0)


@cache
def _dolls() -> tuple[list[Thing], np.ndarray]:
    """Candidate dolls and their silhouettes, `[N, GRID*GRID]` float32."""
    made, masks = [], []
    for size in (0.82, 0.86, 0.9, 0.94):
        for a in _ARM_STEPS:
            for b in _ARM_STEPS:
                for bottom in ("trousers", "skirt"):
                    for hairstyle in ("short", "long"):
                        base = Thing(
                            "doll", 0.5, 0.5, size, "red", "plain", bottom, "blue", "black", hairstyle, (a, b), (10, 10)
                        )
                        whole = np.zeros((3 * GRID, 3 * GRID), np.uint8)
                        for part in doll_parts(base, 1):
                            fixed = np.round(((part.points + 1) * GRID - 0.5) * 16).astype(np.int32)
                            cv2.fillPoly(whole, [fixed], 1, cv2.LINE_8, 4)
                        for shift in range(-14, 15):
                            x0 = GRID - shift
                            masks.append(whole[GRID : 2 * GRID, x0 : x0 + GRID].ravel().astype(bool))
                            made.append(replace(base, x=0.5 + shift / GRID))
    return made, np.stack(masks).astype(np.float32)


def fit_doll(mask: np.ndarray) -> tuple[Thing, float]:
    """The doll whose silhouette overlaps most with `mask`, and by how much."""
    made, masks = _dolls()
    small = (cv2.resize(mask.astype(np.float32), (GRID, GRID), interpolation=cv2.INTER_AREA) > 0.5).ravel()
    both = masks @ small.astype(np.float32)
    scores = both / np.maximum(masks.sum(1) + small.sum() - both, 1)
    best = int(scores.argmax())
    return made[best], float(scores[best])


def _arm_word(angle: float) -> str:
    return "down" if angle < 60 else "out" if angle < 106 else "up"


def pose_of(arms: tuple[float, float]) -> str:
    words = sorted(_arm_word(a) for a in arms)
    return "waving" if words == ["down", "up"] else words[0] if words[0] == words[1] else "mixed"


def pattern_of(image: np.ndarray, mask: np.ndarray) -> str:
    """Plain, striped or spotted, from where the shirt under `mask` is white."""
    ys, xs = np.nonzero(mask)
    y0, y1, x0, x1 = ys.min(), ys.max() + 1, xs.min(), xs.max() + 1
    shirt = image[y0:y1, x0:x1].astype(np.float32)
    inside = mask[y0:y1, x0:x1]
    base = (
        np.median(shirt[inside & (nearest_colour(shirt) != _NAMES.index("plain white"))], 0) if inside.any() else WHITE
    )
    if not np.isfinite(base).all():
        return "plain"
    away = np.array(WHITE, np.float32) - base
    white = np.clip(((shirt - base) @ away) / max(float(away @ away), 1.0), 0, 1) * inside
    share = white.sum() / max(inside.sum(), 1)
    if share < 0.1:
        return "plain"
    across = white.sum(1) / np.maximum(inside.sum(1), 1)
    return "striped" if across.std() > 0.34 else "spotted"  # 0.44 and 0.24 on the world's own


def _long_hair(image: np.ndarray, fitted: Thing, hair: str) -> bool:
    """Whether hair of that colour falls beside the neck and the shoulders of a fitted doll."""
    dressed = replace(fitted, colour="red", pattern="plain", bottom_colour="blue", hair="black")  # any: it is the shape
    falls = render(Scene("white", (replace(dressed, hairstyle="long", arms=(14.0, 14.0)),)), image.shape[0])
    rows = np.arange(image.shape[0])[:, None] / image.shape[0] - (fitted.y - fitted.size / 2)
    beside = (falls.labels == LABELS.index("hair")) & (rows > 0.2 * fitted.size)
    shade = nearest_colour_with_skin(image)
    return bool((shade[beside] == _NAMES.index(f"hair {hair}")).mean() > 0.12) if hair else False


def _read_doll(image: np.ndarray, mask: np.ndarray) -> Thing | None:
    """The doll that `mask` covers, as it looks on the picture, or None. What cannot be told is ""."""
    fitted, fit = fit_doll(mask)
    if fit < 0.62 or fit < kind_of(mask)[1] - 0.1:
        return None
    here = render(Scene("white", (fitted,)), image.shape[0])

    def region(label: str) -> np.ndarray:
        found = cv2.erode(((here.labels == LABELS.index(label)) & mask).astype(np.uint8), np.ones((3, 3), np.uint8))
        return found.astype(bool)

    crown = region("hair") & (np.arange(image.shape[0])[:, None] < (fitted.y - 0.35 * fitted.size) * image.shape[0])
    hair = colour_of(image, crown, [f"hair {name}" for name in HAIR]).removeprefix("hair ")
    torso = region("shirt") & (np.abs(np.arange(image.shape[1])[None] / image.shape[1] - fitted.x) < 0.13 * fitted.size)
    face = nearest_colour_with_skin(image)[region("head")] - len(_NAMES)
    return replace(
        fitted,
        colour=colour_of(image, region("shirt"), COLOURS),
        bottom_colour=colour_of(image, region("bottom"), COLOURS),
        hair=hair,
        pattern=pattern_of(image, torso) if torso.sum() > 20 else "",
        hairstyle="long" if _long_hair(image, fitted, hair) else "short",
        skin=int(np.bincount(face[face >= 0], minlength=len(SKINS)).argmax()),
    )


def read_doll(image: np.ndarray) -> Thing | None:
    """What the doll of a picture looks like and how it stands, from the picture alone: uint8 RGB `[S, S, 3]`.

    Returns:
        The best fitting doll, with place, size and arms of its silhouette; `colour`, `bottom_colour`, `hair` and
        `pattern` are "" where they cannot be told. None when the largest thing is no doll, or there is none.
    """
    masks = things_in(image, ground_of(image), dolls=True)
    return _read_doll(image, masks[0]) if masks else None


def agreement(a: Thing | None, b: Thing | None) -> dict[str, bool]:
    """What two dolls have in common, by part. A doll that could not be read agrees in nothing.

    Parts: hair, shirt, bottom (colours), garment (trousers or skirt), pattern, skin, and hairstyle, which is left
    out where two raised arms hide it.
    """
    parts = {"hair": "hair", "shirt": "colour", "bottom": "bottom_colour", "garment": "bottom", "pattern": "pattern",
             "skin": "skin", "hairstyle": "hairstyle"}  # fmt: skip
    if a is None or b is None:
        return dict.fromkeys(parts, False)
    if min(a.arms) >= 100 or min(b.arms) >= 100:
        del parts["hairstyle"]
    return {part: getattr(a, name) == getattr(b, name) != "" for part, name in parts.items()}


OUTFIT = ("hair", "shirt", "bottom", "garment")  # of `agreement`: what makes two dolls the same


def _score_doll(
    image: np.ndarray, scene: Scene, masks: list[np.ndarray]
) -> tuple[bool, bool, dict[str, bool], Thing | None]:
    doll, seen = scene.things[0], _read_doll(image, masks[0])
    if seen is None:
        return False, False, {}, None
    colours = (seen.colour, seen.bottom_colour, seen.hair) == (doll.colour, doll.bottom_colour, doll.hair)
    details = {"pattern": seen.pattern == doll.pattern, "garment": seen.bottom == doll.bottom}
    if min(doll.arms) < 100:  # two raised arms hide it
        details["hairstyle"] = _long_hair(image, seen, doll.hair) == (doll.hairstyle == "long")
    if scene.pose:
        details["pose"] = pose_of(seen.arms) == scene.pose
    return True, colours, details, seen


def nearest_colour_with_skin(image: np.ndarray) -> np.ndarray:
    """As `nearest_colour`, where skin is told from hair and cloth: skin pixels get an index past the palette."""
    values = np.concatenate([_VALUES, np.array(SKINS, np.float32)])
    return ((image.astype(np.float32)[..., None, :] - values) ** 2).sum(-1).argmin(-1)


def _place(side: str, x: float, y: float) -> bool:
    dx, dy = x - 0.5, y - 0.5
    want = {"left": -dx, "right": dx, "top": -dy, "bottom": dy}
    return not side or (want[side] > 0.07 and want[side] >= max(abs(dx), abs(dy)) - 1e-6)


def _related(relation: str, a: tuple[float, float], b: tuple[float, float]) -> bool:
    dx, dy = b[0] - a[0], b[1] - a[1]
    return {"left": dx, "right": -dx, "above": dy, "below": -dy}[relation] > 0.15


def score(image: np.ndarray, scene: Scene) -> Score:
    """Judge an RGB uint8 picture `[S, S, 3]` by `scene`'s caption. Two dolls are not judged (ValueError)."""
    kinds = [thing.kind for thing in scene.things]
    if kinds.count("doll") > 1:
        raise ValueError("two dolls in one scene are not scored: score scenes of levels 0 to 3")
    ground = ground_of(image)
    masks, right_ground = things_in(image, ground, "doll" in kinds), ground == scene.ground
    if len(masks) < len(kinds):
        return Score(False, False, False, right_ground)
    seen = [(kind_of(m), colour_of(image, m, COLOURS), centre_of(m)) for m in masks[: len(kinds)]]
    if kinds[0] == "doll":
        is_doll, colours, details, _ = _score_doll(image, scene, masks)
        if len(kinds) == 1:
            return Score(is_doll and len(masks) == 1, colours, True, right_ground, details)
        (kind, fit), colour, place = seen[1]
        toy = scene.things[1]
        position = _related(scene.relation, place, centre_of(masks[0]))
        objects = is_doll and len(masks) == 2 and kind == toy.kind and fit > 0.55
        return Score(objects, colours and colour == toy.colour, position, right_ground, details)
    if len(kinds) == 1:
        (kind, fit), colour, place = seen[0]
        thing = scene.things[0]
        objects = len(masks) == 1 and kind == thing.kind and fit > 0.6
        return Score(objects, colour == thing.colour, _place(scene.relation, *place), right_ground)
    first, second = scene.things
    tries = []
    for a, b in ((seen[0], seen[1]), (seen[1], seen[0])):
        objects = a[0][0] == first.kind and b[0][0] == second.kind and min(a[0][1], b[0][1]) > 0.55
        colours = a[1] == first.colour and b[1] == second.colour
        tries.append((objects and len(masks) == 2, colours, _related(scene.relation, a[2], b[2])))
    return Score(*max(tries, key=sum), right_ground)


def _edges_of(image: np.ndarray) -> np.ndarray:
    """Canny of a picture, as `world.canny` sees the truth, `[S, S]` bool."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return cv2.Canny(cv2.GaussianBlur(grey, (3, 3), 0), 60, 140) > 0


def edge_distance(image: np.ndarray, edges: np.ndarray) -> float:
    """Symmetric Chamfer distance of the picture's own Canny edges to the wanted ones, in pixels. 0 is perfect.

    The mean distance from a drawn edge pixel to the nearest wanted one, averaged with that of the other direction.
    Both `[S, S, 3]` uint8. A picture without edges counts as S pixels away.
    """
    own, wanted = _edges_of(image), edges.max(-1) > 127
    if not own.any() or not wanted.any():
        return float(image.shape[0])

    def apart(a: np.ndarray, b: np.ndarray) -> float:
        return float(cv2.distanceTransform((~b).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[a].mean())

    return (apart(own, wanted) + apart(wanted, own)) / 2


def edge_agreement(image: np.ndarray, edges: np.ndarray, tolerance: int = 2) -> float:
    """F1 of the picture's own Canny edges against the wanted ones, each counted as found within `tolerance` pixels.

    Both `[S, S, 3]` uint8. 1 is perfect; unrelated pictures of this world reach 0.4, as they fill the same places.
    """
    own, wanted = _edges_of(image), edges.max(-1) > 127
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * tolerance + 1, 2 * tolerance + 1))
    near_own, near_wanted = (
        cv2.dilate(own.astype(np.uint8), kernel) > 0,
        cv2.dilate(wanted.astype(np.uint8), kernel) > 0,
    )
    precision = (own & near_wanted).sum() / max(own.sum(), 1)
    recall = (wanted & near_own).sum() / max(wanted.sum(), 1)
    return float(2 * precision * recall / max(precision + recall, 1e-9))


def silhouette_agreement(image: np.ndarray, scene: Scene) -> float:
    """Intersection over union of the picture's foreground with the scene's true one."""
    truth = render(scene, image.shape[0]).owners > 0
    ground = np.array(GROUNDS[ground_of(image)], np.float32)
    away = np.abs(image.astype(np.float32) - ground).max(-1) > 34
    return float(overlap(away, truth))


def pose_in(image: np.ndarray, scene: Scene) -> Thing:
    """How the doll of `scene` stands on a picture of it: its first thing, moved until its drawing looks most alike.

    The search knows who the doll is and how large, not where it stands: it starts in the middle, arms half raised.
    Place, then every arm and leg in turn, then all of it again in small steps. uint8 RGB `[S, S, 3]`.
    """
    small = cv2.resize(image, (GRID, GRID), interpolation=cv2.INTER_AREA).astype(np.float32)
    rest = scene.things[1:]

    def apart(doll: Thing) -> float:
        return float(np.abs(render(replace(scene, things=(doll, *rest)), GRID).image - small).mean())

    def turned(doll: Thing, limb: str, side: int, angle: float) -> Thing:
        both = list(getattr(doll, limb))
        both[side] = angle
        return replace(doll, **{limb: tuple(both)})

    def nearest(options: list[Thing]) -> Thing:
        return min(options, key=apart)

    doll = replace(scene.things[0], x=0.5, y=0.5, arms=(88.0, 88.0), legs=(12.0, 12.0))
    doll = nearest([replace(doll, x=float(x)) for x in np.linspace(0.2, 0.8, 21)])
    for arms, legs, step in ((np.arange(6, 175, 12), np.arange(2, 36, 6), 0.0), (None, None, 0.02), (None, None, 0.01)):
        if step:
            doll = nearest(
                [replace(doll, x=doll.x + step * i, y=doll.y + step * j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
            )
        for limb, angles in (("arms", arms), ("legs", legs)):
            for side in (0, 1):
                now = getattr(doll, limb)[side]
                tries = angles if angles is not None else now + np.array([-8, -4, 0, 4, 8]) * (step / 0.02)
                doll = nearest([turned(doll, limb, side, float(angle)) for angle in tries])
    return doll


def pose_error(a: Thing, b: Thing) -> float:
    """Mean distance of the hands and feet of two dolls, as a part of their size."""
    ends = ("l_hand", "r_hand", "l_foot", "r_foot")
    one, other = (np.array([doll_joints(doll)[end] for end in ends]) for doll in (a, b))
    return float(np.hypot(*(one - other).T).mean() / b.size)
