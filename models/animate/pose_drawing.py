"""Poses as the pictures that DynamiCtrl was trained on, and bolder ones for small pictures.

Source: official code of DynamiCtrl (arXiv:2503.21246), `dwpose/util.py`. Drawn by OpenCV, whose rasteriser decides the
pixels, on a black canvas; then red and blue are swapped:

    limbs   17 pairs of points, an ellipse each, colour * score * score, darkened to 0.6
    joints  18 dots, colour * score
    hands   20 lines each in the colours of the rainbow * score * score; 21 dots, 255 * score in the last channel
    face    68 dots, white * score

`DynamiCtrl` is that, on a canvas whose shorter side has 2160 pixels, with limbs 8 pixels wide: bit for bit the official
picture. At 96 pixels little of it is left, so `bold` draws the same in lines that grow with the picture.

Points: `[P, 2]` in 0..1 of the picture, in the order of `poses.py`: the 18 of the body alone, or all 134. Limbs and
joints are drawn where scores are above 0.3; hands and face where they are above 0, except on the first pixel row and
column. Deviations, for scores that no detector gives: at exactly 0.3 the official code draws the limb to the left ear;
at 0 and below it draws hands and face in black.
"""

from __future__ import annotations

import colorsys
import math
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np

from .poses import BODY, FACE, LEFT_HAND, RIGHT_HAND, SEEN

Style = Literal["DynamiCtrl", "bold"]

# Pairs of points, from 0; one colour each. The last colour is that of the last joint only.
LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10),
    (1, 11), (11, 12), (12, 13), (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
COLOURS = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0), (0, 255, 85),
    (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255),
    (255, 0, 170), (255, 0, 85),
)  # fmt: skip
FINGERS = tuple((4 * finger + bone if bone else 0, 4 * finger + bone + 1) for finger in range(5) for bone in range(4))
RAINBOW = tuple(colorsys.hsv_to_rgb(edge / len(FINGERS), 1.0, 1.0) for edge in range(len(FINGERS)))
LIMB_BRIGHTNESS = 0.6
CANVAS = 2160  # pixels of the shorter side, official
BOLD = 0.016  # of the shorter side: half the width of a limb


@cache
def opencv() -> Any:
    """OpenCV, imported at the first drawing, so that the pack loads without it.

    Raises:
        RuntimeError: it cannot be imported.
    """
    try:
        import cv2
    except ImportError as error:
        raise RuntimeError(
            "Drawing poses needs OpenCV, which cannot be imported. Install it for ComfyUI's Python (python -m pip "
            f"install opencv-python-headless) and start ComfyUI again. ({error})"
        ) from error
    return cv2


def draw(
    points: np.ndarray,
    scores: np.ndarray,
    height: int,
    width: int,
    style: Style = "DynamiCtrl",
    body: float = 1.0,
    hands: float = 1.0,
    face: float = 1.0,
) -> np.ndarray:
    """One pose as a picture, uint8 RGB `[height, width, 3]`.

    Args:
        points: `[18, 2]` or `[134, 2]`, x and y in 0..1 of the picture; beyond it they are cut off.
        scores: `[18]` or `[134]`.
        body, hands, face: brightness of each part. 1 is as published, 0 leaves it out.
    """
    cv2 = opencv()
    canvas, lines = blank(height, width, style)
    scale = np.array(canvas.shape[1::-1], dtype=float)
    whole = len(points) > BODY.stop
    if body > 0:
        draw_body(canvas, points[BODY], scores[BODY], scale, lines, body)
    if whole and hands > 0:
        for hand in (RIGHT_HAND, LEFT_HAND):
            draw_hand(canvas, points[hand], scores[hand], scale, lines, hands)
    if whole and face > 0:
        draw_face(canvas, points[FACE], scores[FACE], scale, lines, face)
    kind = cv2.INTER_LINEAR if style == "DynamiCtrl" else cv2.INTER_AREA
    return cv2.cvtColor(cv2.resize(canvas, (width, height), interpolation=kind), cv2.COLOR_BGR2RGB)


class Lines(NamedTuple):
    """Sizes on the canvas, in pixels."""

    limb: int  # half the width of a limb, and the radius of a joint
    dot: int  # radius of a dot of the face
    finger: int  # thickness of a line of a hand


def blank(height: int, width: int, style: Style) -> tuple[np.ndarray, Lines]:
    """A black canvas for a picture of this size, and how bold to draw on it."""
    short = min(height, width)
    if style == "DynamiCtrl":
        ratio = CANVAS / short if short != CANVAS else 1
        return np.zeros((int(height * ratio), int(width * ratio), 3), np.uint8), Lines(4, 3, 2)
    factor = 4 if short <= 256 else 2
    limb = max(1, round(BOLD * short * factor))
    canvas = np.zeros((height * factor, width * factor, 3), np.uint8)
    return canvas, Lines(limb, max(1, round(limb / 2)), max(1, round(limb / 2)))


def draw_body(
    canvas: np.ndarray, points: np.ndarray, scores: np.ndarray, scale: np.ndarray, lines: Lines, strength: float
) -> None:
    cv2 = opencv()
    at = points * scale
    for (a, b), colour in zip(LIMBS, COLOURS, strict=False):
        if scores[a] <= SEEN or scores[b] <= SEEN:
            continue
        (x0, y0), (x1, y1) = at[a], at[b]
        length = ((y0 - y1) ** 2 + (x0 - x1) ** 2) ** 0.5
        angle = math.degrees(math.atan2(y0 - y1, x0 - x1))
        middle = int((x0 + x1) / 2), int((y0 + y1) / 2)
        ellipse = cv2.ellipse2Poly(middle, (int(length / 2), lines.limb), int(angle), 0, 360, 1)
        bright = blended(colour, scores[a] * scores[b] * strength)
        cv2.fillConvexPoly(canvas, ellipse, [int(c * LIMB_BRIGHTNESS) for c in bright])
    for (x, y), score, colour in zip(at, scores, COLOURS, strict=True):
        if score > SEEN:
            cv2.circle(canvas, (int(x), int(y)), lines.limb, blended(colour, score * strength), thickness=-1)


def draw_hand(
    canvas: np.ndarray, points: np.ndarray, scores: np.ndarray, scale: np.ndarray, lines: Lines, strength: float
) -> None:
    cv2 = opencv()
    at = [(int(x), int(y)) for x, y in points * scale]
    for (a, b), colour in zip(FINGERS, RAINBOW, strict=True):
        score = int(scores[a] * scores[b] * strength * 255)
        if min(scores[a], scores[b]) > 0 and min(*at[a], *at[b]) > 0:
            cv2.line(canvas, at[a], at[b], [c * score for c in colour], thickness=lines.finger)
    for point, score in zip(at, scores, strict=True):
        if score > 0 and min(point) > 0:
            cv2.circle(canvas, point, lines.limb, (0, 0, int(score * strength * 255)), thickness=-1)


def draw_face(
    canvas: np.ndarray, points: np.ndarray, scores: np.ndarray, scale: np.ndarray, lines: Lines, strength: float
) -> None:
    cv2 = opencv()
    for (x, y), score in zip(points * scale, scores, strict=True):
        point, grey = (int(x), int(y)), int(score * strength * 255)
        if score > 0 and min(point) > 0:
            cv2.circle(canvas, point, lines.dot, (grey, grey, grey), thickness=-1)


def blended(colour: tuple[int, int, int], share: float) -> list[int]:
    return [min(255, max(0, int(c * share))) for c in colour]
