"""When poses are shown: how many frames, at which rate, how smooth, and the way in."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from dit_toolkit.models.animate.pose_timing import (
    frames_near,
    frames_to_make,
    frames_within,
    held,
    lead_in,
    resampled,
    smoothed,
    smoothstep,
    strided,
)
from dit_toolkit.models.animate.poses import BODY, Poses, parse
from dit_toolkit.tests.models.animate.people import dancing

VALID = [8 * k + 5 for k in range(40)]


def clip(count: int) -> Poses:
    return parse(dancing(count))[0]


@pytest.mark.parametrize("count", range(1, 100))
def test_numbers_of_frames_are_of_the_kind_8_k_plus_5(count):
    assert frames_near(count) == min(VALID, key=lambda valid: (abs(valid - count), valid))
    assert frames_within(count) == max([valid for valid in VALID if valid <= count], default=5)


@pytest.mark.parametrize(
    ("available", "asked", "made", "words"),
    [
        (37, 37, 37, []),
        (50, 37, 37, []),
        (50, 40, 37, ["40 frames were asked for: DynamiCtrl makes 5, 13, 21, ..., so 37 are meant."]),
        (30, 37, 29, ["The poses last for 30 frames, 37 were asked for: the video has 29."]),
        (21, 0, 21, []),
        (24, 0, 21, ["DynamiCtrl makes 5, 13, 21, ... frames: 21 of 24 are used."]),
        (3, 0, 5, ["The last pose is held for 2 frames."]),
        (
            4,
            81,
            5,
            [
                "81 frames were asked for: DynamiCtrl makes 5, 13, 21, ..., so 77 are meant.",
                "The poses last for 4 frames, 77 were asked for: the video has 5.",
                "The last pose is held for 1 frame.",
            ],
        ),
    ],
)
def test_what_is_rounded_is_said(available, asked, made, words):
    assert frames_to_make(available, asked) == (made, words)


def test_a_stride_takes_every_so_manieth_frame():
    poses = clip(7)
    np.testing.assert_array_equal(strided(poses, 3).points, poses.points[[0, 3, 6]])
    assert strided(poses, 1) is poses


@pytest.mark.parametrize("rate", [8.0, 24.0, 30.0, 60.0])
def test_another_frame_rate_is_the_same_movement_in_time(rate):
    """Points that move evenly stay on their line: the place of frame k is that of the time k / 16."""
    poses = clip(31)
    line = np.arange(31)[:, None, None] * np.array([0.01, -0.005])
    even = replace(poses, points=poses.points[:1] + line)
    again = resampled(even, rate)
    assert len(again) == math.floor(30 / rate * 16 + 1e-9) + 1
    for k in range(len(again)):
        expected = poses.points[0] + k / 16 * rate * np.array([0.01, -0.005])
        np.testing.assert_allclose(again.points[k], expected, atol=1e-12)
    assert resampled(poses, 16.0) is resampled(poses, 0.0) is poses


def test_smoothing_is_the_weighted_mean_over_frames_that_see_the_point():
    poses, sigma = clip(9), 1.3
    scores = poses.scores.copy()
    scores[4, 3] = 0
    scores[5, 4] = 0.2  # a body point that is not seen
    poses = replace(poses, scores=scores)
    made = smoothed(poses, sigma)
    reach = math.ceil(3 * sigma)
    for joint in (0, 3, 4, 30):
        for k in range(9):
            total, weight = np.zeros(2), 0.0
            for j in range(max(0, k - reach), min(9, k + reach + 1)):
                if scores[j, joint] > (0.3 if joint < 18 else 0):
                    share = math.exp(-((j - k) ** 2) / (2 * sigma**2))
                    total, weight = total + share * poses.points[j, joint], weight + share
            seen = scores[k, joint] > (0.3 if joint < 18 else 0)
            expected = total / weight if seen else poses.points[k, joint]
            np.testing.assert_allclose(made.points[k, joint], expected, atol=1e-12)
    np.testing.assert_array_equal(made.scores, scores)
    assert smoothed(poses, 0.0) is poses


def test_a_clip_of_one_frame_is_smoothed_too():
    poses = clip(1)
    np.testing.assert_allclose(smoothed(poses, 5.0).points, poses.points)


def test_frames_that_lead_in_go_slowly_off_and_slowly_arrive():
    first, poses = clip(1), parse(dancing(3, turn=1.0))[0]
    way = lead_in(first, poses, 3)
    assert len(way) == 3
    for k, part in enumerate((1 / 4, 2 / 4, 3 / 4)):
        share = 3 * part**2 - 2 * part**3
        expected = (1 - share) * first.points[0, BODY] + share * poses.points[0, BODY]
        np.testing.assert_allclose(way.points[k, BODY], expected, atol=1e-12)
    assert [smoothstep(part) for part in (0, 0.5, 1)] == [0, 0.5, 1]


def test_a_point_that_only_the_clip_sees_fades_in_at_its_place():
    first, poses = clip(1), clip(2)
    scores = first.scores.copy()
    scores[0, 10] = 0
    way = lead_in(replace(first, scores=scores), poses, 3)
    np.testing.assert_array_equal(way.points[:, 10], poses.points[[0, 0, 0], 10])
    assert list(way.scores[:, 10]) == [smoothstep(k / 4) for k in (1, 2, 3)]


def test_the_last_pose_is_held():
    poses = clip(3)
    np.testing.assert_array_equal(held(poses, 5).points, poses.points[[0, 1, 2, 2, 2]])
    np.testing.assert_array_equal(held(poses, 2).points, poses.points[:2])
    assert held(poses, 3) is poses
