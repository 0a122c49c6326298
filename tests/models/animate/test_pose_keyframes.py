"""Poses written by hand: what stands between them, what they correct, and what is refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from dit_toolkit.models.animate.pose_keyframes import HANGS_ON, JOINTS, as_text, edited, posed, read, weights_at
from dit_toolkit.models.animate.poses import BODY, Poses, parse
from dit_toolkit.scripts.places import DEMO_INPUTS
from dit_toolkit.tests.models.animate.people import STANDING, dancing
from dit_toolkit.training import world

NAMED = {name: list(place) for name, place in zip(JOINTS, STANDING.tolist(), strict=True)}
LOW, HIGH = [0.42, 0.55], [0.42, 0.07]  # straight below and above the right shoulder at 0.42, 0.31


def poses_of(written, easing="linear", length=0, width=500, height=500) -> Poses:
    return posed(read(json.dumps(written), easing), length, width, height)


def two(**second):
    return [{"frame": 0, "joints": NAMED}, {"frame": 4, "joints": second}]


@pytest.mark.parametrize("easing", ["ease", "spline", "linear", "hold"])
def test_key_poses_are_hit_and_what_they_leave_out_stays(easing):
    made = poses_of([*two(right_wrist=[0.3, 0.2]), {"frame": 7, "joints": {"nose": [0.6, 0.2]}}], easing)
    assert len(made) == 8
    np.testing.assert_array_equal(made.points[0, BODY], STANDING)
    np.testing.assert_array_equal(made.points[4, 4], [0.3, 0.2])
    np.testing.assert_array_equal(made.points[7, 4], [0.3, 0.2])
    np.testing.assert_array_equal(made.points[7, 0], [0.6, 0.2])
    np.testing.assert_allclose(made.points[:, 13], np.tile(STANDING[13], (8, 1)), atol=1e-12)
    assert (made.scores[:, BODY] == 1).all()
    assert not made.scores[:, 18:].any()


@pytest.mark.parametrize(("width", "height"), [(500, 500), (300, 900)])
def test_limbs_swing_and_keep_their_length(width, height):
    """In pixels, on a canvas of any proportions."""
    size = np.array([width, height])
    at, length = STANDING[3] * size, 40.0
    first, last = at + np.array([0, length]), at - np.array([length, 0])  # from below to the side, about the elbow
    written = [
        {"frame": 0, "joints": {**NAMED, "right_wrist": (first / size).tolist()}},
        {"frame": 6, "joints": {"right_wrist": (last / size).tolist()}},
    ]
    made = poses_of(written, "linear", 0, width, height)
    for k in range(7):
        angle = math.pi / 2 * (1 + k / 6)
        expected = at + length * np.array([math.cos(angle), math.sin(angle)])
        np.testing.assert_allclose(made.points[k, 4] * size, expected, atol=1e-9)


def test_a_joint_that_hangs_on_nothing_moves_in_a_straight_line():
    made = poses_of([{"frame": 0, "joints": {"nose": [0.1, 0.2]}}, {"frame": 4, "joints": {"nose": [0.5, 0.8]}}])
    np.testing.assert_allclose(made.points[1, 0], [0.2, 0.35])
    assert made.scores[:, 1:].sum() == 0


def test_easings_are_their_definitions():
    frames = [0, 4, 10]
    for frame in range(11):
        before, after = (0, 1) if frame < 4 else (1, 2)
        t = (frame - frames[before]) / (frames[after] - frames[before])
        for easing, share in {"linear": t, "ease": 3 * t**2 - 2 * t**3, "hold": float(t == 1)}.items():
            expected = np.zeros(3)
            expected[before], expected[after] = 1 - share, share
            np.testing.assert_allclose(weights_at(frame, frames, [easing] * 3), expected, atol=1e-12)
        assert weights_at(frame, frames, ["spline"] * 3).sum() == pytest.approx(1)


def test_a_spline_goes_through_a_key_pose_without_stopping_and_rests_at_the_ends():
    frames = [0, 10, 20]
    places = np.array([weights_at(k, frames, ["spline"] * 3) @ [0.0, 1.0, 2.0] for k in range(21)])
    speed = np.diff(places)
    assert speed[9] == pytest.approx(0.1, abs=0.03)
    assert speed[10] == pytest.approx(0.1, abs=0.03)
    assert max(speed[0], speed[-1]) < 0.03
    assert (speed > 0).all()
    eased = np.diff([weights_at(k, frames, ["ease"] * 3) @ [0.0, 1.0, 2.0] for k in range(21)])
    assert eased[9] < 0.03


def test_before_the_first_and_after_the_last_key_pose_nothing_moves():
    made = poses_of([{"frame": 2, "joints": NAMED}, {"frame": 4, "joints": {"nose": [0.6, 0.2]}}], length=8)
    assert len(made) == 8
    np.testing.assert_array_equal(made.points[[0, 1]], made.points[[2, 2]])
    np.testing.assert_array_equal(made.points[5:], made.points[[4, 4, 4]])


def test_a_joint_is_taken_away_and_comes_back_at_its_score():
    made = poses_of([*two(nose=None), {"frame": 8, "joints": {"nose": [0.5, 0.2, 0.6]}}])
    np.testing.assert_allclose(made.scores[:, 0], [1, 0.75, 0.5, 0.25, 0, 0.15, 0.3, 0.45, 0.6])


def test_the_text_says_length_canvas_and_easing():
    written = {"length": 6, "canvas": [300, 200], "easing": "hold", "key_poses": two(nose=[0.6, 0.2])}
    made = poses_of(written, "linear")
    assert (len(made), made.width, made.height) == (6, 300, 200)
    np.testing.assert_allclose(made.points[3, 0], NAMED["nose"])
    written["key_poses"][1]["easing"] = "linear"
    assert not np.allclose(poses_of(written).points[3, 0], NAMED["nose"])


def test_what_is_given_out_as_text_reads_back_the_same():
    made = poses_of(two(right_wrist=[0.3, 0.2]))
    again = read(as_text(made), "linear")
    assert isinstance(again, Poses)
    np.testing.assert_allclose(again.points, made.points, rtol=0, atol=1e-15)
    np.testing.assert_array_equal(again.scores, made.scores)
    for text in (json.dumps(dancing(2)), json.dumps({"frames": dancing(2)}), json.dumps(dancing(1)[0])):
        assert isinstance(read(text, "linear"), Poses)


# Corrections


def corrected(reach, *keys, count=12):
    given = parse(dancing(count))[0]
    return given, edited(given, read(json.dumps(list(keys)), "spline"), reach)


def test_a_correction_without_reach_is_of_its_frame_alone():
    given, made = corrected(0, {"frame": 5, "joints": {"left_wrist": [0.9, 0.1]}})
    np.testing.assert_array_equal(made.points[5, 7], [0.9, 0.1])
    same = np.ones(made.points.shape[:2], bool)
    same[5, 7] = False
    np.testing.assert_array_equal(made.points[same], given.points[same])


def test_a_correction_fades_over_its_reach():
    given, made = corrected(3, {"frame": 5, "joints": {"left_wrist": [0.9, 0.1]}})
    change = np.array([0.9, 0.1]) - given.points[5, 7]
    for frame in range(12):
        t = max(0.0, 1 - abs(frame - 5) / 4)
        share = 3 * t**2 - 2 * t**3
        np.testing.assert_allclose(made.points[frame, 7], given.points[frame, 7] + share * change, atol=1e-12)


def test_between_two_corrections_one_becomes_the_other():
    keys = [{"frame": k, "joints": {"left_wrist": place}} for k, place in ((3, [0.9, 0.1]), (7, [0.8, 0.3]))]
    given, made = corrected(20, *keys)
    first, second = (np.array(place) - given.points[k, 7] for k, place in ((3, [0.9, 0.1]), (7, [0.8, 0.3])))
    np.testing.assert_array_equal(made.points[[3, 7], 7], [[0.9, 0.1], [0.8, 0.3]])
    for frame in (4, 5, 6):
        t = (frame - 3) / 4
        share = 3 * t**2 - 2 * t**3
        expected = given.points[frame, 7] + (1 - share) * first + share * second
        np.testing.assert_allclose(made.points[frame, 7], expected, atol=1e-12)


def test_corrections_take_joints_away_and_put_new_ones_in():
    given, made = corrected(0, {"frame": 2, "joints": {"nose": None}})
    assert made.scores[2, 0] == 0
    assert given.scores[2, 0] == 1
    with pytest.raises(ValueError, match=r"for frame 40, and 'poses' end with frame 11"):
        corrected(0, {"frame": 40, "joints": {"nose": [0.5, 0.5]}})


# What is refused


def one(**joints):
    return [{"frame": 0, "joints": joints}]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("[1, 2", r"no JSON: line 1, column 6"),
        ("[" * 100_000, r"no JSON that can be read"),
        ("7", r"must be a list of key poses"),
        ("[]", r"must be a list of key poses"),
        ("{}", r"must be a list of key poses"),
        ('{"key_poses": []}', r"must be a list of key poses"),
        ('[{"frame": 0}]', r"Key pose 1 must have a frame and joints"),
        ('[{"joints": {}}, 3]', r"Key pose 1 must have a frame and joints"),
        (
            one(right_hand=[0, 0]),
            r"names the joint \"right_hand\", which there is not\. Perhaps 'right_wrist' is meant",
        ),
        (one(tail=[0, 0]), r"There are: nose, neck"),
        (one(nose=[0.5]), r"'nose' must be \[x, y\] in 0\.\.1 of the picture, or null, got \[0\.5\]"),
        (one(nose="up"), r"'nose' must be \[x, y\]"),
        (one(nose=[math.nan, 0]), r"'nose' must be \[x, y\] .* got \[NaN, 0\]"),
        (one(nose=[10**400, 0]), r"'nose' must be \[x, y\]"),
        (one(nose=[True, 0]), r"'nose' must be \[x, y\]"),
        (one(nose=[256, 300]), r"Coordinates are 0\.\.1, not pixels"),
        (one(nose=[0.5, 0.5, 2]), r"score of 'nose' must be from 0 to 1, got 2"),
        (one(nose=None), r"No key pose has a joint that is seen"),
        ([{"frame": -1, "joints": {}}], r"'frame' must be a whole number from 0 to 4095, got -1"),
        ([{"frame": 0.5, "joints": {}}], r"'frame' must be a whole number"),
        ([{"frame": 10**400, "joints": {}}], r"'frame' must be a whole number .* got a very long number"),
        ([*one(nose=[0, 0]), *one(neck=[0, 0])], r"two key poses for frame 0"),
        ([{"frame": 0, "joints": {}, "ease": "in"}], r"Key pose 1 has \"ease\", which means nothing here"),
        ([{"frame": 0, "joints": {}, "easing": "soft"}], r"'easing' must be one of ease, spline, linear, hold"),
        ({"key_poses": one(nose=[0, 0]), "length": -2}, r"'length' must be a whole number"),
        ({"key_poses": [{"frame": 9, "joints": {}}], "length": 9}, r"for frame 9, and 'length' 9 ends with frame 8"),
        ({"key_poses": one(nose=[0, 0]), "canvas": [0, 5]}, r"'canvas' must be \[width, height\]"),
        ({"key_poses": one(nose=[0, 0]), "fps": 5}, r"The text has \"fps\""),
        (json.dumps([{"people": []}]), r"No person was found in 'text'"),
    ],
)
def test_what_cannot_be_read_is_answered_with_a_sentence(written, message):
    text = written if isinstance(written, str) else json.dumps(written)
    with pytest.raises(ValueError, match=message) as refused:
        posed(read(text, "spline"), 0, 64, 64)
    assert str(refused.value).endswith(".")
    assert len(str(refused.value)) < 400


# What ships


def proportions(points: np.ndarray) -> np.ndarray:
    """Lengths of all bones of a pose `[18, 2]`."""
    return np.array([np.linalg.norm(points[joint] - points[parent]) for joint, parent in HANGS_ON.items()])


@pytest.mark.parametrize("name", ["jumping_jack", "wave_and_step"])
def test_the_movements_that_ship_are_those_of_a_doll(name):
    """21 frames of a doll that keeps its proportions, arms and legs straight."""
    text = (DEMO_INPUTS / "poses" / f"{name}.json").read_text(encoding="utf-8")
    made = posed(read(text, "spline"), 0, 64, 64)
    assert len(made) == 21
    doll = proportions(world.openpose(world.Thing("doll", 0.5, 0.5, 0.76, "red"))[:, :2])
    for points in made.points[:, BODY]:
        np.testing.assert_allclose(proportions(points), doll, atol=0.006)
        for start, middle, end in ((2, 3, 4), (5, 6, 7), (8, 9, 10), (11, 12, 13)):
            np.testing.assert_allclose(points[middle], (points[start] + points[end]) / 2, atol=0.003)
    assert np.ptp(made.points[:, 7, 1]) > 0.2
    assert (made.points[:, BODY] > 0).all()
    assert (made.points[:, BODY] < 1).all()
