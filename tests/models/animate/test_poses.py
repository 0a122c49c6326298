"""Key points as other nodes hand them over: what is read, who is taken, what is filled in, what is refused."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest

from dit_toolkit.models.animate.poses import BODY, FACE, FEET, LEFT_HAND, RIGHT_HAND, parse, to_keypoints
from dit_toolkit.tests.models.animate.people import STANDING, crowded, dancing, frame, moved, person


def test_core_s_key_points_are_read_in_core_s_order():
    """Each number is its own place in the order of 134, so that none can be mistaken."""
    width, height = 1000, 500

    def part(first, count):
        return [v for k in range(first, first + count) for v in (k, 0.5 * k, 0.9)]

    one = {
        "pose_keypoints_2d": part(0, 18),
        "foot_keypoints_2d": part(18, 6),
        "face_keypoints_2d": part(24, 68) + [0.0] * 6,
        "hand_right_keypoints_2d": part(92, 21),
        "hand_left_keypoints_2d": part(113, 21),
    }
    poses, notes = parse([frame(one, width=width, height=height)])
    assert not notes
    assert poses.points.shape == (1, 134, 2)
    np.testing.assert_allclose(poses.points[0, :, 0], np.arange(134) / width)
    np.testing.assert_allclose(poses.points[0, :, 1], np.arange(134) * 0.5 / height)
    assert (poses.scores == 0.9).all()
    assert (poses.width, poses.height) == (1000, 500)


def test_what_is_written_is_read_again_bit_for_bit():
    poses, _ = parse(dancing(3))
    written = to_keypoints(poses)
    again, _ = parse(written)
    np.testing.assert_array_equal(again.scores, poses.scores)
    np.testing.assert_allclose(again.points, poses.points, rtol=0, atol=1e-15)
    assert {key: len(value) for key, value in written[0]["people"][0].items()} == {
        "pose_keypoints_2d": 54, "foot_keypoints_2d": 18, "face_keypoints_2d": 210, "hand_right_keypoints_2d": 63,
        "hand_left_keypoints_2d": 63,
    }  # fmt: skip
    assert written[0]["people"][0]["face_keypoints_2d"][-6:] == written[0]["people"][0]["pose_keypoints_2d"][42:48]


def test_coordinates_in_0_to_1_are_read_with_and_without_a_canvas():
    poses, _ = parse(dancing(2))
    shares = copy.deepcopy(dancing(2, width=1, height=1))
    without = copy.deepcopy(shares)
    for each in shares:
        each["canvas_width"], each["canvas_height"] = 64, 96
    for each in without:
        del each["canvas_width"], each["canvas_height"]
    for other in (shares, without):
        np.testing.assert_allclose(parse(other)[0].points, poses.points, atol=1e-12)
    assert parse(without)[0].width == 0


def test_missing_parts_are_parts_that_nobody_saw():
    for missing in (None, [], "gone"):
        frames = dancing(1)
        one = frames[0]["people"][0]
        for key in ("foot_keypoints_2d", "face_keypoints_2d", "hand_right_keypoints_2d", "hand_left_keypoints_2d"):
            if missing == "gone":
                del one[key]
            else:
                one[key] = missing
        poses, _ = parse(frames)
        assert (poses.scores[0, BODY] == 1).all()
        assert not any(poses.scores[0, part].any() for part in (FEET, FACE, RIGHT_HAND, LEFT_HAND))


def test_openpose_s_25_points_are_brought_to_18():
    body = np.concatenate([STANDING[:8], [[9, 9]], STANDING[8:], np.full((6, 2), 9)])
    poses, _ = parse(frame({"pose_keypoints_2d": [v for x, y in body for v in (x, y, 1.0)]}, width=1, height=1))
    np.testing.assert_allclose(poses.points[0, BODY], STANDING)


def test_the_largest_person_is_taken_or_the_one_that_was_followed():
    left = [0.5 * moved(k) + [0, 0.2] for k in range(4)]
    largest, notes = parse(crowded(4), "poses", "largest")
    followed, _ = parse(crowded(4), "poses", "follow")
    assert notes == ["Several people in frames 0, 1, 2, 3 of 'poses': the largest was taken."]
    assert largest.people == (2, 2, 2, 2)
    for k in range(4):
        is_left = np.allclose(largest.points[k, BODY], left[k])
        assert is_left == (k % 2 == 0)
        np.testing.assert_allclose(followed.points[k, BODY], left[k])


def test_gaps_are_filled_in_from_their_neighbours_and_that_is_said():
    frames = dancing(6)
    whole, _ = parse(frames)
    for k in (0, 2, 3, 5):
        frames[k]["people"] = []
    poses, notes = parse(frames)
    assert notes == ["No person in frames 0, 2, 3, 5 of 'poses': filled in from the frames beside."]
    assert poses.people == (0, 1, 0, 0, 1, 0)
    for k, (a, b, part) in {0: (1, 1, 0), 1: (1, 1, 0), 2: (1, 4, 1 / 3), 3: (1, 4, 2 / 3), 5: (4, 4, 0)}.items():
        expected = (1 - part) * whole.points[a, BODY] + part * whole.points[b, BODY]
        np.testing.assert_allclose(poses.points[k, BODY], expected, atol=1e-12)


def test_a_point_that_one_neighbour_does_not_see_stays_where_the_other_saw_it():
    frames = dancing(3)
    frames[1]["people"] = []
    frames[2]["people"][0]["pose_keypoints_2d"][12:15] = [0, 0, 0]  # a wrist
    poses, _ = parse(frames)
    np.testing.assert_array_equal(poses.points[1, 4], poses.points[0, 4])
    assert poses.scores[1, 4] == 0.5


def damaged(change):
    frames = dancing(2)
    change(frames)
    return frames


def put(key, value):
    return lambda frames: frames[1]["people"][0].__setitem__(key, value)


BODY_KEY = "pose_keypoints_2d"


@pytest.mark.parametrize(
    ("keypoints", "message"),
    [
        (None, r"'poses' must be key points \(POSE_KEYPOINT\)"),
        ("[]", r"must be key points"),
        ([1, 2], r"must be key points"),
        ([], r"'poses' has no frames"),
        (
            damaged(lambda f: [each.update(people=[]) for each in f]),
            r"No person was found in 'poses': none of 2 frames",
        ),
        ([frame(person(STANDING, 64, 96, score=0.2))], r"none of 1 frame has a body point with a score above 0\.3"),
        (damaged(lambda f: [each["people"][0].update({BODY_KEY: []}) for each in f]), r"No person was found"),
        (damaged(lambda f: f[1].update(people=7)), r"Frame 1 of 'poses' must have a list of people"),
        (
            damaged(put(BODY_KEY, [1.0, 2.0])),
            r"Frame 1 of 'poses': 'pose_keypoints_2d' must have 54 or 75 numbers, got 2",
        ),
        (damaged(put("hand_left_keypoints_2d", [0.0] * 60)), r"'hand_left_keypoints_2d' must have 63 numbers, got 60"),
        (damaged(put(BODY_KEY, [math.nan] * 54)), r"Frame 1 .* 'pose_keypoints_2d' has values that are no numbers"),
        (damaged(put(BODY_KEY, [math.inf] * 54)), r"has values that are no numbers"),
        (damaged(put(BODY_KEY, ["a"] * 54)), r"must be a flat list of numbers"),
        (damaged(put(BODY_KEY, [10**400] * 54)), r"must be a flat list of numbers"),
        (damaged(put(BODY_KEY, [1e9, 1e9, 1.0] * 18)), r"Frame 1 of 'poses' has points far outside"),
        (damaged(lambda f: f[0].update(canvas_width=0)), r"Frame 0 of 'poses' has a canvas of 0 x 96 pixels"),
        (damaged(lambda f: f[0].update(canvas_height=None)), r"Frame 0 of 'poses' has a canvas of 64 x None pixels"),
        (
            damaged(lambda f: f[1].update(canvas_width=128)),
            r"differ in their proportions: 64 x 96 in frame 0, 128 x 96",
        ),
        (
            damaged(lambda f: [f[1].pop(side) for side in ("canvas_width", "canvas_height")]),
            r"Frame 1 of 'poses' has points in pixels, but no 'canvas_width'",
        ),
    ],
)
def test_what_is_no_pose_is_answered_with_a_sentence(keypoints, message):
    with pytest.raises(ValueError, match=message) as refused:
        parse(keypoints)
    assert str(refused.value).endswith(".")


def test_canvases_of_two_sizes_and_one_proportion_go_together():
    frames = [dancing(1)[0], dancing(2, width=128, height=192)[1]]
    np.testing.assert_allclose(parse(frames)[0].points, parse(dancing(2))[0].points, atol=1e-12)


def test_nothing_is_written_into_what_came_in():
    frames = dancing(3)
    frames[1]["people"] = []
    before = copy.deepcopy(frames)
    parse(frames)
    assert frames == before
