"""The nodes for poses as a workflow meets them: with core's own key points, and with what is no pose."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.comfy

import comfy.model_management  # noqa: E402
import comfy.utils  # noqa: E402
from comfy_extras.nodes_sdpose import SDPoseDrawKeypoints, _to_openpose_frames  # noqa: E402

from dit_toolkit.models.animate.pose_drawing import draw  # noqa: E402
from dit_toolkit.models.animate.poses import parse  # noqa: E402
from dit_toolkit.nodes.pose_video import EXAMPLE, PoseKeyframes, PosePreview, PoseVideo  # noqa: E402
from dit_toolkit.tests.models.animate.people import dancing  # noqa: E402
from dit_toolkit.tests.nodes.calling import run_node  # noqa: E402


def video(**values):
    plain = {"poses": dancing(20), "reference": dancing(1), "width": 64, "height": 96, "length": 13}
    outputs = run_node(PoseVideo, **{**plain, **values})
    return SimpleNamespace(**dict(zip(("pictures", "length", "poses", "mask", "report"), outputs, strict=True)))


def test_key_points_of_core_s_own_making_are_drawn():
    """133 points in the order of its detector, one person a frame, as SDPose Keypoint Extractor hands them on."""
    dice = np.random.default_rng(0)
    points = [[dice.uniform(10, 50, (133, 2))] for _ in range(13)]
    frames = _to_openpose_frames(points, [[np.full(133, 0.9)]] * 13, 96, 64)
    made = video(poses=frames, reference=None, alignment="none")
    assert made.pictures.shape == (13, 96, 64, 3)
    poses, _ = parse(frames)
    for k in (0, 12):
        expected = draw(poses.points[k], poses.scores[k], 96, 64)
        np.testing.assert_array_equal((made.pictures[k] * 255).round().byte().numpy(), expected)


def test_what_comes_out_can_be_drawn_by_core_and_goes_in_again():
    made = video()
    drawn = SDPoseDrawKeypoints.execute(made.poses, True, True, True, False, 4, 3, 0.3, True).args[0]
    assert drawn.shape == (13, 96, 64, 3)
    again = video(poses=made.poses, reference=None, alignment="none")
    assert torch.equal(again.pictures, made.pictures)


def test_the_report_says_what_was_changed():
    frames = dancing(9)
    frames[3]["people"] = []
    made = video(poses=frames, length=30)
    assert made.length == len(made.pictures) == len(made.poses) == 5
    assert made.report == (
        "5 frames of 64 x 96. No person in frame 3 of 'poses': filled in from the frames beside. 30 frames were asked "
        "for: DynamiCtrl makes 5, 13, 21, ..., so 29 are meant. The poses last for 10 frames, 29 were asked for: the "
        "video has 5."
    )


def test_the_mask_is_white_where_lines_are_drawn():
    made = video(style="bold")
    assert made.mask.shape == (1, 96, 64)
    assert set(made.mask.unique().tolist()) == {0.0, 1.0}
    lines = made.pictures.amax((0, 3)) > 0.1
    assert bool((made.mask[0][lines] == 1).all())


def test_progress_is_shown_and_an_interrupt_ends_it(monkeypatch):
    steps = []
    monkeypatch.setattr(comfy.utils.ProgressBar, "update", lambda self, value: steps.append(value))
    video()
    assert len(steps) == 13

    def interrupt():
        if len(steps) > 15:
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", interrupt)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        video()
    assert len(steps) == 16


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"poses": None}, r"'poses' must be key points \(POSE_KEYPOINT\)"),
        ({"poses": []}, r"'poses' has no frames"),
        ({"reference": []}, r"'reference' has no frames"),
        ({"reference": None}, r"Alignment 'paper' needs the pose of the picture"),
        ({"poses": [{"canvas_width": 9, "canvas_height": 9, "people": []}]}, r"No person was found in 'poses'"),
        ({"transition_frames": 20}, r"no room for 20 transition frames"),
    ],
)
def test_what_cannot_be_drawn_is_answered_with_a_sentence(values, message):
    with pytest.raises(ValueError, match=message):
        video(**values)


def test_a_preview_shows_each_frame_over_its_picture():
    pictures = torch.zeros(5, 48, 32, 3)
    for k in range(5):
        pictures[k, ..., 1] = 0.2 * k
    (sheet,) = run_node(PosePreview, image=pictures, poses=dancing(5), frames=3, columns=2, tile=96, dim=0.0)
    assert sheet.shape == (1, 2 * 96 + 4, 2 * 64 + 4, 3)
    corners = [sheet[0, 90, 2], sheet[0, 90, 70], sheet[0, 190, 2]]
    assert [round(float(corner[1]), 1) for corner in corners] == [0.0, 0.4, 0.8]
    lines = sheet[0, :96, :64]
    assert bool((lines > 0.5).any())
    with pytest.raises(ValueError, match=r"one picture, or one for each pose: got 5 for 'image' and 4"):
        run_node(PosePreview, image=pictures, poses=dancing(4))


def test_a_preview_cuts_a_picture_of_other_proportions_from_the_middle():
    wide = torch.zeros(1, 30, 90, 3)
    wide[:, :, 30:60] = 1
    (sheet,) = run_node(PosePreview, image=wide, poses=dancing(1, width=64, height=64), tile=64, dim=0.0)
    assert float(sheet[0, 60, 1].min()) > 0.9


def test_the_example_of_key_poses_is_a_movement():
    poses, text = run_node(PoseKeyframes)
    assert len(poses) == 21
    again, same = run_node(PoseKeyframes, text=text)
    assert same == text
    assert again == poses
    assert json.loads(EXAMPLE)[0]["frame"] == 0


def test_key_poses_correct_poses_that_are_connected():
    text = '[{"frame": 2, "joints": {"nose": [0.5, 0.5]}}]'
    poses, _ = run_node(PoseKeyframes, poses=dancing(4), text=text)
    assert poses[2]["people"][0]["pose_keypoints_2d"][:3] == [32.0, 48.0, 1.0]
    untouched, _ = run_node(PoseKeyframes, poses=dancing(4), text=" ")
    np.testing.assert_allclose(parse(untouched)[0].points, parse(dancing(4))[0].points)
    longer, _ = run_node(PoseKeyframes, poses=dancing(4), text="", length=6)
    assert len(longer) == 6
    with pytest.raises(ValueError, match=r"nothing to show: write key poses into 'text', or connect 'poses'"):
        run_node(PoseKeyframes, text="")
    with pytest.raises(ValueError, match=r"'text' holds whole poses.*Disconnect one"):
        run_node(PoseKeyframes, text=json.dumps(dancing(2)), poses=dancing(2))
