"""Poses as DynamiCtrl was trained: pixel for pixel by their definition, and in bold lines."""

from __future__ import annotations

import builtins
import math

import cv2
import numpy as np
import pytest
from matplotlib.colors import hsv_to_rgb

from dit_toolkit.models.animate import pose_drawing
from dit_toolkit.models.animate.pose_drawing import COLOURS, FINGERS, LIMBS, draw
from dit_toolkit.models.animate.poses import parse
from dit_toolkit.tests.models.animate.people import dancing

POSES = parse(dancing(2, width=96, height=96))[0]


def by_definition(points, scores, height, width):
    """The rules of the method's card, part after part, on the whole canvas each time."""
    ratio = 2160 / min(height, width)
    h, w = int(height * ratio), int(width * ratio)
    canvas = np.zeros((h, w, 3), np.uint8)
    at = points * [w, h]
    for number, (a, b) in enumerate(LIMBS):
        if scores[a] > 0.3 and scores[b] > 0.3:
            (x0, y0), (x1, y1) = at[a], at[b]
            angle = int(math.degrees(math.atan2(y0 - y1, x0 - x1)))
            axes = (int(math.hypot(x0 - x1, y0 - y1) / 2), 4)
            shape = cv2.ellipse2Poly((int((x0 + x1) / 2), int((y0 + y1) / 2)), axes, angle, 0, 360, 1)
            cv2.fillConvexPoly(canvas, shape, [int(c * (scores[a] * scores[b])) for c in COLOURS[number]])
    canvas = (canvas * 0.6).astype(np.uint8)
    for number in range(18):
        if scores[number] > 0.3:
            cv2.circle(
                canvas, at[number].astype(int).tolist(), 4, [int(c * scores[number]) for c in COLOURS[number]], -1
            )
    for first in (92, 113):
        hand = at[first : first + 21].astype(int).tolist()
        for edge, (a, b) in enumerate(FINGERS):
            score = int(scores[first + a] * scores[first + b] * 255)
            if min(*hand[a], *hand[b]) > 0:
                cv2.line(canvas, hand[a], hand[b], (hsv_to_rgb([edge / 20, 1, 1]) * score).tolist(), 2)
        for k, point in enumerate(hand):
            if min(point) > 0:
                cv2.circle(canvas, point, 4, (0, 0, int(scores[first + k] * 255)), -1)
    for k in range(24, 92):
        grey = int(scores[k] * 255)
        if at[k].min() >= 1:
            cv2.circle(canvas, at[k].astype(int).tolist(), 3, (grey, grey, grey), -1)
    return cv2.resize(canvas, (width, height))[..., ::-1]


@pytest.mark.parametrize(("height", "width"), [(2160, 2160), (340, 192), (144, 256)])
def test_the_style_of_dynamictrl_is_its_definition_pixel_for_pixel(height, width):
    dice = np.random.default_rng(height)
    for points in (POSES.points[1], dice.uniform(-0.1, 1.1, (134, 2))):
        scores = dice.uniform(0.01, 1.0, 134)
        expected = by_definition(points, scores, height, width)
        assert expected.any()
        np.testing.assert_array_equal(draw(points, scores, height, width), expected)


def test_the_measured_pixels_of_the_official_pictures():
    points, scores = np.full((134, 2), -1.0), np.zeros(134)
    places = {1: (0.5, 0.2), 2: (0.3, 0.2), 3: (0.3, 0.5), 92: (0.8, 0.8)}
    for k, place in places.items():
        points[k], scores[k] = place, 1
    picture = draw(points, scores, 2160, 2160)

    def pixel(x, y):
        return tuple(picture[int(y * 2160), int(x * 2160)].tolist())

    assert pixel(0.4, 0.2) == (0, 0, 153)  # from neck to right shoulder
    assert pixel(0.3, 0.35) == (0, 102, 153)  # upper arm
    assert pixel(0.3, 0.2) == (0, 170, 255)  # right shoulder
    assert pixel(0.8, 0.8) == (255, 0, 0)  # a hand's dot
    column = picture[:, int(0.4 * 2160)].any(-1)
    assert column.sum() in (8, 9)  # 4 pixels to either side


@pytest.mark.parametrize("style", ["DynamiCtrl", "bold"])
def test_a_part_s_strength_is_its_brightness(style):
    points, scores = POSES.points[0], POSES.scores[0]

    def drawn(**parts):
        return draw(points, scores, 192, 192, style, **{"body": 0.0, "hands": 0.0, "face": 0.0, **parts}).astype(int)

    assert not drawn().any()
    for part in ("body", "hands", "face"):
        full, half = drawn(**{part: 1.0}), drawn(**{part: 0.5})
        assert full.any()
        assert half.max() == pytest.approx(full.max() / 2, abs=2)
        assert abs(half - full / 2).max() <= 3
    whole = draw(points, scores, 192, 192, style, 1.0, 1.0, 1.0)
    np.testing.assert_array_equal(whole, draw(points, scores, 192, 192, style))


def test_bold_lines_grow_with_the_picture():
    """Half a limb's width is 1.6 % of the shorter side."""
    points, scores = np.full((18, 2), -1.0), np.zeros(18)
    points[1], points[2], scores[1], scores[2] = (0.8, 0.5), (0.2, 0.5), 1, 1
    for side in (96, 384, 768):
        column = draw(points, scores, side, side, "bold")[:, side // 2].max(-1).astype(float)
        assert column.sum() / 153 == pytest.approx(2 * 0.016 * side, rel=0.15, abs=0.5)
        assert column.max() == 153


def test_bold_has_the_colours_of_the_official_pictures():
    """At every joint, and in the middle of every limb: the last one drawn lies on top in both."""
    points, scores = POSES.points[0, :18], POSES.scores[0, :18]
    thin, bold = draw(points, scores, 2160, 2160), draw(points, scores, 2160, 2160, "bold")
    apart = [4, 7, 9, 10, 12, 13]  # no other joint is near
    for x, y in (points[apart] * 2160).astype(int):
        assert thin[y, x].any()
        np.testing.assert_array_equal(bold[y, x], thin[y, x])
    for a, b in ((3, 4), (8, 9), (9, 10), (11, 12), (12, 13)):
        x, y = ((points[a] + points[b]) / 2 * 2160).astype(int)
        assert thin[y, x].any()
        np.testing.assert_array_equal(bold[y, x], thin[y, x])


@pytest.mark.parametrize("style", ["DynamiCtrl", "bold"])
def test_eighteen_points_are_drawn_without_hands_and_face(style):
    both = POSES.points[0], POSES.scores[0]
    alone = draw(both[0][:18], both[1][:18], 96, 64, style)
    assert alone.shape == (96, 64, 3)
    assert alone.dtype == np.uint8
    np.testing.assert_array_equal(alone, draw(*both, 96, 64, style, hands=0, face=0))


def test_points_that_are_not_seen_or_outside_are_no_trouble():
    points, scores = POSES.points[0].copy(), POSES.scores[0].copy()
    points[:60] += 50
    points[60:] -= 99
    assert not draw(points, scores, 96, 64).any()
    assert not draw(POSES.points[0], scores * 0, 96, 64).any()


def test_without_opencv_a_sentence_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def missing(name, *rest, **more):
        if name == "cv2":
            raise ImportError("No module named 'cv2'")
        return real(name, *rest, **more)

    pose_drawing.opencv.cache_clear()
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(RuntimeError, match=r"needs OpenCV.*pip install opencv-python-headless"):
        draw(POSES.points[0], POSES.scores[0], 96, 64)
    monkeypatch.undo()
    assert draw(POSES.points[0], POSES.scores[0], 96, 64).any()
