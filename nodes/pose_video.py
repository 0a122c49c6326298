"""Poses for DynamiCtrl: key points become the drawn clip that the model follows, and can be seen and written before.

Paper: DynamiCtrl, arXiv:2503.21246. The clip is put together in `models/animate/pose_clip.py`, drawn in
`models/animate/pose_drawing.py`; key poses are read in `models/animate/pose_keyframes.py`.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from comfy.model_management import intermediate_device
from comfy_api.latest import io, ui
from torch import Tensor

from ..host.animate.pose_pictures import contact_sheet, drawn
from ..models.animate.pose_alignment import Crop, Mode
from ..models.animate.pose_area import swept
from ..models.animate.pose_clip import Timing, prepared
from ..models.animate.pose_drawing import Style
from ..models.animate.pose_keyframes import LONGEST, Easing, as_text, edited, posed, read
from ..models.animate.pose_timing import held
from ..models.animate.poses import Person, Poses, parse, to_keypoints
from .inputs import check, choice, share

logger = logging.getLogger(__name__)

PoseType = io.Custom("POSE_KEYPOINT")

CATEGORY = "DiT Toolkit/animate"

EXAMPLE = """[
  {"frame": 0, "joints": {
    "nose": [0.5, 0.22], "neck": [0.5, 0.32],
    "right_shoulder": [0.41, 0.37], "right_elbow": [0.38, 0.47], "right_wrist": [0.36, 0.57],
    "left_shoulder": [0.59, 0.37], "left_elbow": [0.62, 0.47], "left_wrist": [0.64, 0.57],
    "right_hip": [0.44, 0.56], "right_knee": [0.43, 0.7], "right_ankle": [0.42, 0.84],
    "left_hip": [0.56, 0.56], "left_knee": [0.57, 0.7], "left_ankle": [0.58, 0.84]}},
  {"frame": 10, "joints": {"left_elbow": [0.67, 0.29], "left_wrist": [0.7, 0.2]}},
  {"frame": 20, "joints": {"left_elbow": [0.62, 0.47], "left_wrist": [0.64, 0.57]}}
]"""


def side(name: str, default: int, tooltip: str) -> io.Input:
    return io.Int.Input(name, default=default, min=16, max=4096, step=16, tooltip=tooltip)


class PoseVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiTPoseVideo",
            display_name="DynamiCtrl Pose Video",
            category=CATEGORY,
            description=(
                "Draws the movement that DynamiCtrl follows: takes the poses of a clip, moves them to the person in "
                "your picture, and puts the picture's own pose first."
            ),
            search_aliases=[
                "pose", "dance", "motion", "motion transfer", "openpose", "dwpose", "skeleton", "animate", "video",
            ],
            inputs=[
                PoseType.Input("poses", tooltip="The movement: key points of a clip, from SDPose Keypoint Extractor, a "
                                                "DWPose node, or Pose Keyframes."),
                PoseType.Input("reference", optional=True,
                               tooltip="Key points of your picture, from the same detector. Without them, set "
                               "'alignment' to none."),
                side("width", 768, "Width of the video in pixels."),
                side("height", 1360, "Height of the video in pixels."),
                io.Int.Input("length", default=37, min=0, max=1021,
                             tooltip="Frames of the video: 5, 13, 21, 29, 37, ...; others become the nearest of these. "
                             "0 takes all there are."),
                choice("alignment", Mode, "paper",
                       "How the movement gets to the person in the picture. paper: one scale and shift that fit head, "
                       "body and legs best. bounding box: by the box around the body, feet on the ground. none: the "
                       "poses stay where they are."),
                choice("style", Style, "DynamiCtrl",
                       "DynamiCtrl: the thin lines that the model was trained with. bold: the same in lines that stay "
                       "visible in small pictures, for the embedded model and to look at."),
                io.Int.Input("transition_frames", default=0, min=0, max=256,
                             tooltip="Frames in which the picture's pose turns into the first of the movement. A few "
                             "avoid a jump at the start. 0 starts at once."),
                choice("person", Person, "largest",
                       "Whom to take where there are several people. largest: in each frame. follow: the largest in "
                       "the first frame, then whoever is nearest to the frame before.", advanced=True),
                io.Float.Input("frame_rate", default=0.0, min=0.0, max=240.0, step=1.0, round=0.001, advanced=True,
                               tooltip="Frames a second of the driving clip; they become DynamiCtrl's 16. 0 takes "
                               "frame by frame."),
                io.Int.Input("stride", default=1, min=1, max=64, advanced=True,
                             tooltip="Takes every so-manieth pose: 2 is twice as fast. 1 takes all."),
                io.Float.Input("smoothing", default=0.0, min=0.0, max=16.0, step=0.1, advanced=True,
                               tooltip="Calms trembling key points: each is averaged over about so many frames. 0 "
                               "leaves them as they are."),
                share("body", 1.0, "Brightness of the body's lines. 1 is as trained, 0 leaves the body out.",
                      advanced=True),
                share("hands", 1.0, "Brightness of the hands. Lower it where fingers come out wrong. 0 leaves them "
                      "out.", advanced=True),
                share("face", 1.0, "Brightness of the dots of the face. Lower it where the face of the clip shows in "
                      "yours. 0 leaves them out.", advanced=True),
                io.Boolean.Input("prepend_reference", default=True, advanced=True,
                                 tooltip="The first frame is the picture's own pose, as the model was trained. Read "
                                 "where 'reference' is connected."),
                choice("crop", Crop, "center", advanced=True,
                       tooltip="What happens to a picture of other proportions than the video. center: cut from the "
                       "middle. stretch: pressed into shape. Choose as in DynamiCtrl Conditioning."),
                share("mask_margin", 0.06, "How much around the body the mask covers, as a part of the shorter side.",
                      advanced=True),
            ],
            outputs=[
                io.Image.Output(display_name="pose_video", tooltip="The drawn poses, for DynamiCtrl Conditioning."),
                io.Int.Output(display_name="length", tooltip="How many frames there are."),
                PoseType.Output(display_name="poses", tooltip="The poses as they were drawn, to look at, to edit or to "
                                                              "save."),
                io.Mask.Output(display_name="mask", tooltip="Where the body is at any time: outside of it the "
                                                            "background can stand still."),
                io.String.Output(display_name="report", tooltip="What was made, and what was changed or filled in."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        poses: Any,
        width: int,
        height: int,
        length: int,
        alignment: Mode,
        style: Style,
        transition_frames: int,
        person: Person,
        frame_rate: float,
        stride: int,
        smoothing: float,
        body: float,
        hands: float,
        face: float,
        prepend_reference: bool,
        crop: Crop,
        mask_margin: float,
        reference: Any = None,
    ) -> io.NodeOutput:
        check(cls, locals())
        driving, said = parse(poses, "poses", person)
        picture: Poses | None = None
        if reference is not None:
            picture, more = parse(reference, "reference", person)
            said += more
        timing = Timing(int(length), float(frame_rate), int(stride), float(smoothing), int(transition_frames),
                        bool(prepend_reference))  # fmt: skip
        clip, changed = prepared(driving, picture, int(width), int(height), timing, alignment, crop)
        for note in (*said, *changed):
            logger.info("DynamiCtrl Pose Video: %s", note)
        video = drawn(clip, int(height), int(width), style, body, hands, face)
        mask = torch.from_numpy(swept(clip, int(height), int(width), mask_margin)).float()[None]
        report = " ".join((f"{len(clip)} frames of {width} x {height}.", *said, *changed))
        return io.NodeOutput(
            video, len(clip), to_keypoints(clip, int(width), int(height)), mask.to(intermediate_device()), report
        )


class PosePreview(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiTPosePreview",
            display_name="Pose Preview",
            category=CATEGORY,
            description=(
                "Shows poses over your picture, frame by frame on one sheet: whether they fit is seen before "
                "anything is sampled."
            ),
            search_aliases=["pose", "openpose", "skeleton", "contact sheet", "overlay", "check pose"],
            inputs=[
                io.Image.Input("image", tooltip="Your picture. Or as many as there are poses: each is shown under its "
                                                "own."),
                PoseType.Input("poses", tooltip="From DynamiCtrl Pose Video to see them as they will be drawn, or from "
                                                "a detector."),
                io.Int.Input("frames", default=12, min=1, max=256,
                             tooltip="How many of the frames are shown, evenly spread from the first to the last."),
                io.Int.Input("columns", default=4, min=1, max=64, tooltip="Frames in a row."),
                io.Int.Input("tile", default=256, min=32, max=1024, step=8, advanced=True,
                             tooltip="Longer side of each frame on the sheet, in pixels."),
                share("dim", 0.5, "How much darker the picture is shown, so that the lines stand out.", advanced=True),
            ],
            outputs=[io.Image.Output(tooltip="The sheet, one picture. Also shown on the node.")],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, image: Tensor, poses: Any, frames: int, columns: int, tile: int, dim: float) -> io.NodeOutput:
        check(cls, locals())
        shown, _ = parse(poses, "poses")
        if len(image) not in (1, len(shown)):
            raise ValueError(
                f"Pose Preview needs one picture, or one for each pose: got {len(image)} for 'image' and {len(shown)} "
                "frames for 'poses'."
            )
        made = contact_sheet(image, shown, int(frames), int(columns), int(tile), dim)
        return io.NodeOutput(made, ui=ui.PreviewImage(made, cls=cls))


class PoseKeyframes(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiTPoseKeyframes",
            display_name="Pose Keyframes",
            category=CATEGORY,
            description=(
                "Makes a movement out of a few poses that you write, or corrects the poses of a clip in some frames. "
                "Everything between is filled in."
            ),
            search_aliases=["pose editor", "keyframe", "edit pose", "openpose", "skeleton", "tween", "json"],
            inputs=[
                io.String.Input("text", multiline=True, default=EXAMPLE,
                                tooltip="Key poses: frames and named joints at x, y from 0 to 1, right and left as the "
                                "person has them. Joints that a key pose leaves out stay where they were. Or whole "
                                "poses in OpenPose's JSON."),
                PoseType.Input("poses", optional=True,
                               tooltip="Poses to correct: joints in 'text' replace theirs in these frames."),
                io.Int.Input("length", default=0, min=0, max=LONGEST,
                             tooltip="Frames. The last pose is held, or the rest cut off. 0 is what the text says, or "
                             "up to its last key pose."),
                choice("easing", Easing, "spline",
                       "How joints get to a key pose. spline: through it without stopping. ease: slow at both ends. "
                       "linear: evenly. hold: at once. The text may say another."),
                io.Int.Input("reach", default=0, min=0, max=256, advanced=True,
                             tooltip="With 'poses': frames before and after a correction over which it fades. 0 "
                             "corrects single frames."),
                side("width", 512, "Width of the canvas, whose proportions decide how limbs swing. Not read with "
                     "'poses', or where the text has a canvas."),
                side("height", 512, "Height of the canvas."),
            ],
            outputs=[
                PoseType.Output(display_name="poses", tooltip="For DynamiCtrl Pose Video or Pose Preview."),
                io.String.Output(display_name="text", tooltip="The same as OpenPose's JSON, to look at, to edit and to "
                                                              "paste back."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, text: str, length: int, easing: Easing, reach: int, width: int, height: int, poses: Any = None
    ) -> io.NodeOutput:
        check(cls, locals())
        made = keyframes(text, poses, int(length), easing, int(reach), int(width), int(height))
        return io.NodeOutput(to_keypoints(made), as_text(made))


def keyframes(text: str, keypoints: Any, length: int, easing: Easing, reach: int, width: int, height: int) -> Poses:
    """The poses of a text, of key points, or of key points that a text corrects."""
    given = None if keypoints is None else parse(keypoints, "poses")[0]
    if not text.strip():
        if given is None:
            raise ValueError("Pose Keyframes has nothing to show: write key poses into 'text', or connect 'poses'.")
        return held(given, length or len(given))
    written = read(text, easing)
    if isinstance(written, Poses):
        if given is not None:
            raise ValueError(
                "'text' holds whole poses in OpenPose's format, and 'poses' is connected, too. Disconnect one, or "
                "write key poses with the joints to correct."
            )
        return held(written, length or len(written))
    if given is None:
        return posed(written, length, width, height)
    return held(edited(given, written, reach), length or len(given))


NODES = [PoseVideo, PosePreview, PoseKeyframes]
