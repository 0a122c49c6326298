"""The whole clip: the picture's pose, the way in, and the movement; and the mask of what it sweeps over."""

from __future__ import annotations

import numpy as np
import pytest

from dit_toolkit.models.animate.pose_alignment import align, fitted
from dit_toolkit.models.animate.pose_area import swept
from dit_toolkit.models.animate.pose_clip import Timing, prepared
from dit_toolkit.models.animate.poses import BODY, Poses, parse
from dit_toolkit.tests.models.animate.people import STANDING, dancing, frame, person

WIDTH, HEIGHT = 64, 96


def clip(count: int, **more) -> Poses:
    return parse(dancing(count, **more))[0]


def test_the_picture_s_pose_comes_first_and_the_movement_follows():
    driving, reference = clip(20), clip(1, turn=0.5, width=96, height=96)
    made, notes = prepared(driving, reference, WIDTH, HEIGHT, Timing(length=13))
    picture = fitted(reference, WIDTH, HEIGHT)
    moved, _ = align(driving[:12], picture, WIDTH, HEIGHT, "paper")
    assert not notes
    np.testing.assert_array_equal(made.points[0], picture.points[0])
    np.testing.assert_array_equal(made.points[1:], moved.points)


def test_transition_frames_lie_between_and_count():
    driving, reference = clip(20), clip(1, turn=0.5)
    made, _ = prepared(driving, reference, WIDTH, HEIGHT, Timing(length=13, transition=3))
    moved, _ = align(driving[:9], reference, WIDTH, HEIGHT, "paper")
    assert len(made) == 13
    np.testing.assert_array_equal(made.points[4:], moved.points)
    steps = np.linalg.norm(np.diff(made.points[:5, 4], axis=0), axis=1)
    assert (steps > 0).all()
    assert steps[0] < steps[1]
    assert steps[3] < steps[2]


def test_without_the_picture_s_pose_the_movement_is_all():
    driving = clip(13)
    made, notes = prepared(driving, None, WIDTH, HEIGHT, Timing(transition=2), "none")
    np.testing.assert_array_equal(made.points, driving.points)
    assert notes == ["Without the pose of the picture there is nothing to lead in from: no transition frames."]
    not_first, _ = prepared(driving, clip(1), WIDTH, HEIGHT, Timing(prepend=False), "none")
    np.testing.assert_array_equal(not_first.points, driving.points)


def test_a_clip_shorter_than_asked_is_made_as_long_as_it_lasts():
    made, notes = prepared(clip(9), clip(1), WIDTH, HEIGHT, Timing(length=37))
    assert len(made) == 5
    assert notes == ["The poses last for 10 frames, 37 were asked for: the video has 5."]
    made, notes = prepared(clip(1), clip(1), WIDTH, HEIGHT, Timing())
    assert len(made) == 5
    np.testing.assert_array_equal(made.points[2:], made.points[[1, 1, 1]])


def test_no_room_for_the_movement_is_refused():
    with pytest.raises(ValueError, match=r"5 frames has no room for 4 transition frames and the driving poses\. Lower"):
        prepared(clip(9), clip(1), WIDTH, HEIGHT, Timing(length=5, transition=4))


def test_the_mask_covers_the_body_in_every_frame_and_a_margin():
    poses = clip(5)
    narrow, wide = swept(poses, HEIGHT, WIDTH, 0.0), swept(poses, HEIGHT, WIDTH, 0.1)
    one = [swept(poses[k : k + 1], HEIGHT, WIDTH, 0.0) for k in range(5)]
    np.testing.assert_array_equal(narrow, np.logical_or.reduce(one))
    for points in poses.points[:, BODY]:
        for x, y in points:
            assert narrow[min(int(y * HEIGHT), HEIGHT - 1), min(int(x * WIDTH), WIDTH - 1)]
    ys, xs = np.nonzero(narrow)
    for y in range(0, HEIGHT, 5):
        for x in range(0, WIDTH, 5):
            assert wide[y, x] == (np.hypot(ys - y, xs - x).min() <= 0.1 * WIDTH)
    assert not wide.all()


def test_a_mask_of_points_that_nobody_sees_is_empty():
    far = parse(frame(person(STANDING + 5, 64, 96)))[0]
    assert not swept(far, HEIGHT, WIDTH, 0.1).any()
    one_point = clip(1)
    one_point.scores[:] = 0
    one_point.scores[0, 0] = 1
    assert swept(one_point, HEIGHT, WIDTH, 0.0).any()
