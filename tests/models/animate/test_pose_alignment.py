"""Driving poses land on the person in the picture: exactly where scale and shift are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dit_toolkit.models.animate.pose_alignment import FITTED, align, fitted
from dit_toolkit.models.animate.poses import BODY, Poses, parse
from dit_toolkit.tests.models.animate.people import dancing

WIDTH, HEIGHT = 768, 1360


def driving(count: int = 5, width: int = 1280, height: int = 720) -> Poses:
    return parse(dancing(count, width=width, height=height))[0]


def picture_of(poses: Poses, ay: float, by: float, bx: float) -> Poses:
    """The first driving pose as the picture shows it, scaled alike in both directions, in pixels."""
    ax = ay / (poses.height / poses.width / HEIGHT * WIDTH)
    return replace(poses[:1], points=poses.points[:1] * [ax, ay] + [bx, by], width=WIDTH, height=HEIGHT)


@pytest.mark.parametrize("mode", ["paper", "bounding box"])
@pytest.mark.parametrize(("ay", "by", "bx"), [(1.0, 0.0, 0.0), (0.7, 0.2, -0.4), (1.6, -0.3, -1.2)])
def test_a_known_scale_and_shift_are_found(mode, ay, by, bx):
    still = driving(1)[[0, 0, 0]]
    reference = picture_of(still, ay, by, bx)
    moved, notes = align(still, reference, WIDTH, HEIGHT, mode)
    assert not notes
    assert (moved.width, moved.height) == (WIDTH, HEIGHT)
    np.testing.assert_allclose(moved.points[1], reference.points[0], atol=1e-9)  # hands and face, too


def test_the_fit_is_that_of_least_squares_by_its_normal_equations():
    clip = driving(7)
    reference = picture_of(clip, 0.8, 0.1, -0.5)
    noise = np.random.default_rng(0).normal(0, 0.02, reference.points.shape)
    reference = replace(reference, points=reference.points + noise)
    moved, _ = align(clip, reference, WIDTH, HEIGHT, "paper")

    pairs = [(clip.points[k, j], reference.points[0, j]) for k in range(7) for j in FITTED]
    n, y, to = len(pairs), [p[1] for p, _ in pairs], [q[1] for _, q in pairs]
    ay = (n * np.dot(y, to) - sum(y) * sum(to)) / (n * np.dot(y, y) - sum(y) ** 2)
    ax = ay / (720 / 1280 / HEIGHT * WIDTH)
    bx = sum(q[0] - ax * p[0] for p, q in pairs) / n
    by = reference.points[0, 0, 1] - ay * clip.points[0, 0, 1]
    np.testing.assert_allclose(moved.points, clip.points * [ax, ay] + [bx, by], atol=1e-12)
    assert moved.points[0, 0, 1] == pytest.approx(reference.points[0, 0, 1])  # the nose keeps its height


def test_elbows_wrists_and_unseen_points_have_no_say():
    clip, changed = driving(), driving()
    reference = picture_of(clip, 0.8, 0.1, -0.5)
    scores = reference.scores.copy()
    scores[0, [9, 13]] = 0.3
    reference = replace(reference, scores=scores)
    changed.points[:, [3, 4, 6, 7, 9, 13]] += 0.3
    placed, unplaced = driving(), driving()
    unplaced.points[:, 17], unplaced.scores[:, 17] = 0, 0
    placed = align(clip, reference, WIDTH, HEIGHT, "paper")[0]
    moved = align(changed, reference, WIDTH, HEIGHT, "paper")[0]
    still = align(unplaced, replace(reference, points=reference.points), WIDTH, HEIGHT, "paper")[0]
    np.testing.assert_array_equal(moved.points[:, 0], placed.points[:, 0])
    np.testing.assert_allclose(still.points[:, 0], placed.points[:, 0], atol=0.05)


def test_frames_that_were_filled_in_or_crowded_have_no_say():
    clip = driving()
    reference = picture_of(clip, 0.8, 0.1, -0.5)
    usual = align(clip, reference, WIDTH, HEIGHT, "paper")[0]
    for count in (0, 2):
        more = replace(clip, people=(1, 1, 1, count, count), points=clip.points.copy())
        more.points[3:] *= 2
        moved = align(more, reference, WIDTH, HEIGHT, "paper")[0]
        only = align(clip[:3], reference, WIDTH, HEIGHT, "paper")[0]
        np.testing.assert_array_equal(moved.points[:3], only.points)
        assert not np.array_equal(moved.points[:3], usual.points[:3])


def test_a_wild_fit_falls_back_to_boxes_and_says_so():
    clip = driving()
    upside_down = picture_of(clip, 0.8, 0.1, -0.5)
    upside_down = replace(upside_down, points=1 - upside_down.points)
    moved, (note,) = align(clip, upside_down, WIDTH, HEIGHT, "paper")
    assert note.startswith("The fit of the paper gives a scale of -0.")
    assert note.endswith("aligned by boxes around the bodies instead.")
    np.testing.assert_array_equal(moved.points, align(clip, upside_down, WIDTH, HEIGHT, "bounding box")[0].points)

    few = picture_of(clip, 0.8, 0.1, -0.5)
    scores = np.zeros_like(few.scores)
    scores[0, [0, 1, 2]] = 1
    few = replace(few, scores=scores)
    _, (note,) = align(clip, few, WIDTH, HEIGHT, "paper")
    assert note.startswith("The picture and the driving poses share 3 points of head, body and legs")


def test_boxes_leave_out_arms_and_put_feet_on_the_ground():
    clip = driving()
    reference = picture_of(clip, 0.8, 0.1, -0.5)
    reference.points[0, [4, 7]] = [[0.0, -1.0], [1.0, -1.0]]  # arms up high
    moved, _ = align(clip, reference, WIDTH, HEIGHT, "bounding box")
    assert moved.points[0, BODY, 1].max() == pytest.approx(reference.points[0, BODY, 1].max())
    np.testing.assert_allclose(np.delete(moved.points[0, BODY], [3, 4, 6, 7], 0),
                               np.delete(reference.points[0, BODY], [3, 4, 6, 7], 0), atol=1e-3)  # fmt: skip


def test_one_point_in_common_moves_without_a_scale_and_none_is_refused():
    clip = driving(2)
    reference = picture_of(clip, 1.0, 0.1, 0.2)
    scores = np.zeros_like(reference.scores)
    scores[0, 0] = 1
    moved, _ = align(clip, replace(reference, scores=scores), WIDTH, HEIGHT, "bounding box")
    np.testing.assert_allclose(moved.points[0, 0], reference.points[0, 0])
    for mode in ("paper", "bounding box"):
        with pytest.raises(ValueError, match=r"no body point in common.*'none'"):
            align(clip, replace(reference, scores=scores * 0), WIDTH, HEIGHT, mode)
        with pytest.raises(ValueError, match=f"'{mode}' needs the pose of the picture. Connect 'reference'"):
            align(clip, None, WIDTH, HEIGHT, mode)


def test_none_leaves_poses_where_they_are_on_a_canvas_of_their_proportions():
    clip = driving(2, 384, 680)
    moved, notes = align(clip, None, WIDTH, HEIGHT, "none")
    np.testing.assert_array_equal(moved.points, clip.points)
    assert not notes


@pytest.mark.parametrize(("width", "height"), [(1000, 500), (500, 1000), (300, 300)])
def test_a_cut_from_the_middle_is_that_of_the_pixels(width, height):
    """A square is cut out of the canvas: half a pixel's place goes where it is counted."""
    poses = driving(1, width, height)
    cut = fitted(poses, 640, 640)
    side = min(width, height)
    expected = (poses.points * [width, height] - [(width - side) / 2, (height - side) / 2]) / side
    np.testing.assert_allclose(cut.points, expected, atol=1e-12)
    np.testing.assert_array_equal(fitted(poses, 640, 640, "stretch").points, poses.points)


def test_poses_without_a_canvas_are_taken_to_have_the_picture_s_proportions():
    clip = replace(driving(3, WIDTH, HEIGHT), width=0, height=0)
    known = replace(clip, width=WIDTH, height=HEIGHT)
    reference = picture_of(known, 0.7, 0.2, 0.1)
    moved, (note,) = align(clip, reference, WIDTH, HEIGHT, "paper")
    assert note.startswith("The driving poses do not say how large their frames are")
    np.testing.assert_array_equal(moved.points, align(known, reference, WIDTH, HEIGHT, "paper")[0].points)
