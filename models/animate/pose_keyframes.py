"""Poses written by hand: a few key poses with named joints, and everything between them.

    {"length": 21, "canvas": [512, 512], "easing": "spline",
     "key_poses": [{"frame": 0, "joints": {"nose": [0.5, 0.2], "neck": [0.5, 0.3], ...}},
                   {"frame": 10, "joints": {"right_wrist": [0.2, 0.1]}, "easing": "linear"}]}

or the list of key poses alone. Coordinates: 0..1 of the canvas, x to the right, y down; a third number is the score (1
without it), null takes a joint away. What a key pose does not name stays as the one before had it. Right and left are
the person's own. The format of OpenPose (`poses.py`), as JSON, is read as well.

Between key poses a limb swings about the joint it hangs on, so it keeps its length: angles and lengths are
interpolated, in pixels of the canvas, and the neck moves in a straight line. Easing, of the way to a key pose:

    ease      slow at both ends      3 t^2 - 2 t^3
    spline    through the key poses without stopping (Catmull-Rom, over frames)
    linear    evenly
    hold      jumps at the key pose
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np

from .pose_timing import smoothstep
from .poses import BODY, POINTS, Poses, is_number, parse, to_keypoints

JOINTS = (
    "nose", "neck", "right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow", "left_wrist",
    "right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle", "right_eye", "left_eye",
    "right_ear", "left_ear",
)  # fmt: skip
# The joint that each hangs on, in an order in which a joint comes behind the one it hangs on.
HANGS_ON = {
    0: 1, 2: 1, 5: 1, 8: 1, 11: 1, 3: 2, 4: 3, 6: 5, 7: 6, 9: 8, 10: 9, 12: 11, 13: 12, 14: 0, 15: 0, 16: 0, 17: 0,
}  # fmt: skip
ROOT = 1  # the neck
LONGEST = 4096  # frames
KNOWN = {"length", "canvas", "easing", "key_poses"}
KNOWN_OF_POSE = {"frame", "joints", "easing"}

Easing = Literal["ease", "spline", "linear", "hold"]


@dataclass(frozen=True)
class KeyPose:
    """Joints by number: x, y in 0..1 and the score; None where the joint is taken away."""

    frame: int
    joints: Mapping[int, tuple[float, float, float] | None]
    easing: Easing


@dataclass(frozen=True)
class Script:
    """What was written. A length of 0 ends with the last key pose; a canvas of 0 x 0 is the node's."""

    keys: tuple[KeyPose, ...]
    length: int = 0
    canvas: tuple[int, int] = (0, 0)


# Reading


def read(text: str, easing: Easing) -> Script | Poses:
    """Key poses, or poses where the text has OpenPose's format.

    Raises:
        ValueError: with the place and the name, for what is no such text.
    """
    try:
        written = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"The text is no JSON: line {error.lineno}, column {error.colno}: {error.msg.lower()}."
        ) from error
    except (RecursionError, ValueError) as error:
        raise ValueError(
            "The text is no JSON that can be read: too deep, or with numbers that are too long."
        ) from error
    if isinstance(written, Mapping) and "frames" in written:
        written = written["frames"]
    frames = written if isinstance(written, list) else [written]
    if any(isinstance(frame, Mapping) and "people" in frame for frame in frames):
        return parse(written, "text")[0]
    return script(written, easing)


def script(written: Any, easing: Easing) -> Script:
    if isinstance(written, Mapping) and "joints" in written:
        written = [written]
    if isinstance(written, list):
        written = {"key_poses": written}
    if not isinstance(written, Mapping) or not isinstance(written.get("key_poses"), list) or not written["key_poses"]:
        raise ValueError(
            'The text must be a list of key poses, like [{"frame": 0, "joints": {"nose": [0.5, 0.2]}}], or key points '
            "in OpenPose's format."
        )
    refuse_unknown(written, KNOWN, "The text")
    easing = easing_of(written.get("easing", easing), "The text")
    keys = [key_pose(each, number, easing) for number, each in enumerate(written["key_poses"], 1)]
    keys.sort(key=lambda key: key.frame)
    twice = next((a.frame for a, b in pairwise(keys) if a.frame == b.frame), None)
    if twice is not None:
        raise ValueError(f"There are two key poses for frame {twice}. Write one with the joints of both.")
    length = written.get("length", 0)
    if not is_whole(length) or not 0 <= length <= LONGEST:
        raise ValueError(f"'length' must be a whole number of frames from 0 to {LONGEST}, got {short(length)}.")
    if length and keys[-1].frame >= length:
        raise ValueError(
            f"A key pose is for frame {keys[-1].frame}, and 'length' {length} ends with frame {length - 1}. Frames "
            "count from 0."
        )
    canvas = written.get("canvas", (0, 0))
    if "canvas" in written and not (
        isinstance(canvas, list) and len(canvas) == 2 and all(is_whole(side) and 0 < side <= 16384 for side in canvas)
    ):
        raise ValueError(f"'canvas' must be [width, height] in pixels, got {short(canvas)}.")
    return Script(tuple(keys), length, (canvas[0], canvas[1]))


def key_pose(written: Any, number: int, easing: Easing) -> KeyPose:
    where = f"Key pose {number}"
    if not isinstance(written, Mapping) or not isinstance(written.get("joints"), Mapping) or "frame" not in written:
        raise ValueError(
            f'{where} must have a frame and joints, like {{"frame": 0, "joints": {{"nose": [0.5, 0.2]}}}}.'
        )
    refuse_unknown(written, KNOWN_OF_POSE, where)
    frame = written["frame"]
    if not is_whole(frame) or not 0 <= frame < LONGEST:
        raise ValueError(f"{where}: 'frame' must be a whole number from 0 to {LONGEST - 1}, got {short(frame)}.")
    joints = {joint_number(name, where): place_of(place, name, where) for name, place in written["joints"].items()}
    return KeyPose(frame, joints, easing_of(written.get("easing", easing), where))


def joint_number(name: str, where: str) -> int:
    if name in JOINTS:
        return JOINTS.index(name)
    near = difflib.get_close_matches(name.replace("hand", "wrist").replace("foot", "ankle"), JOINTS, 1)
    hint = f"Perhaps '{near[0]}' is meant." if near else f"There are: {', '.join(JOINTS)}."
    raise ValueError(f"{where} names the joint {short(name)}, which there is not. {hint}")


def place_of(place: Any, name: str, where: str) -> tuple[float, float, float] | None:
    if place is None:
        return None
    if not isinstance(place, list) or len(place) not in (2, 3) or not all(map(is_number, place)):
        raise ValueError(f"{where}: '{name}' must be [x, y] in 0..1 of the picture, or null, got {short(place)}.")
    if max(abs(place[0]), abs(place[1])) > 10:
        raise ValueError(
            f"{where}: '{name}' is at {short(place)}, far outside of the picture. Coordinates are 0..1, not pixels."
        )
    score = place[2] if len(place) == 3 else 1.0
    if not 0 <= score <= 1:
        raise ValueError(f"{where}: the score of '{name}' must be from 0 to 1, got {short(score)}.")
    return float(place[0]), float(place[1]), float(score)


def easing_of(word: Any, where: str) -> Easing:
    if word not in get_args(Easing):
        raise ValueError(f"{where}: 'easing' must be one of {', '.join(get_args(Easing))}; got {short(word)}.")
    return word


def refuse_unknown(written: Mapping[str, Any], known: set[str], where: str) -> None:
    strange = [key for key in written if key not in known]
    if strange:
        raise ValueError(
            f"{where} has {short(strange[0])}, which means nothing here. Known: {', '.join(sorted(known))}."
        )


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def short(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, int) or abs(value) < 10**40 else "a very long number"
    return text if len(text) <= 60 else f"{text[:60]}..."


# Between key poses


def posed(written: Script, length: int, width: int, height: int) -> Poses:
    """Every frame of a script.

    Args:
        length: in frames; 0 is the script's own, or up to its last key pose. After the last key pose nothing moves, nor
            before the first one.
    """
    width, height = written.canvas if written.canvas != (0, 0) else (width, height)
    length = length or written.length or written.keys[-1].frame + 1
    points, scores = standing(written)
    if not (scores > 0).any():
        raise ValueError('No key pose has a joint that is seen. Write at least one, like "nose": [0.5, 0.2].')
    size = np.array([width, height], dtype=float)
    frames = [key.frame for key in written.keys]
    swings = Swings(points * size, scores)
    whole_points, whole_scores = np.zeros((length, POINTS, 2)), np.zeros((length, POINTS))
    for frame in range(length):
        weights = weights_at(frame, frames, [key.easing for key in written.keys])
        whole_scores[frame, BODY] = np.clip(np.round(weights @ scores, 9), 0, 1)  # 1 stays 1
        only = np.flatnonzero(weights == 1)
        whole_points[frame, BODY] = points[only[0]] if len(only) else swings.at(weights) / size
    return Poses(whole_points, whole_scores, width, height, (1,) * length)


def standing(written: Script) -> tuple[np.ndarray, np.ndarray]:
    """All joints at every key pose: points `[K, 18, 2]` and scores `[K, 18]`.

    A joint that only later key poses name stands where it first appears, with a score of 0.
    """
    points, scores = np.full((len(written.keys), 18, 2), np.nan), np.zeros((len(written.keys), 18))
    for k, key in enumerate(written.keys):
        if k:
            points[k], scores[k] = points[k - 1], scores[k - 1]
        for joint, place in key.joints.items():
            if place is None:
                scores[k, joint] = 0
            else:
                points[k, joint], scores[k, joint] = place[:2], place[2]
    for joint in range(18):
        known = np.flatnonzero(np.isfinite(points[:, joint, 0]))
        if len(known):
            points[: known[0], joint] = points[known[0], joint]
    return np.nan_to_num(points), scores


class Swings:
    """Key poses as places, and as angles and lengths of bones, which can be weighed."""

    bones: dict[int, tuple[int, np.ndarray, np.ndarray]]

    def __init__(self, points: np.ndarray, scores: np.ndarray):
        """`points`: `[K, 18, 2]` in pixels; `scores`: `[K, 18]`.

        A joint hangs on the next one up that every key pose sees; one without such a joint moves in a straight line.
        """
        always = (scores.min(0) > 0).tolist()
        self.places = points
        self.bones = {}
        for joint in HANGS_ON:
            parent = HANGS_ON[joint]
            while parent != ROOT and not always[parent]:
                parent = HANGS_ON[parent]
            if not always[parent]:
                continue
            x, y = (points[:, joint] - points[:, parent]).T
            length, angle = np.hypot(x, y), np.arctan2(y, x)
            for k in range(1, len(angle)):
                if length[k] == 0:  # no direction of its own
                    angle[k] = angle[k - 1]
            self.bones[joint] = (parent, length, np.unwrap(angle))  # each turn the short way

    def at(self, weights: np.ndarray) -> np.ndarray:
        """`[18, 2]`: the pose that is a weighted sum of the key poses; weights `[K]` have the sum 1."""
        points = np.einsum("k,kpc->pc", weights, self.places)
        for joint, (parent, lengths, angles) in self.bones.items():
            length, angle = max(float(weights @ lengths), 0.0), float(weights @ angles)
            points[joint] = points[parent] + length * np.array([math.cos(angle), math.sin(angle)])
        return points


def weights_at(frame: int, frames: list[int], easings: list[Easing]) -> np.ndarray:
    """How much each key pose counts in a frame, `[K]`. The easing is that of the key pose ahead."""
    weights = np.zeros(len(frames))
    after = next((k for k, at in enumerate(frames) if at >= frame), len(frames) - 1)
    if frame >= frames[-1] or frame <= frames[0] or frames[after] == frame:
        weights[after] = 1
        return weights
    before = after - 1
    span = frames[after] - frames[before]
    part, easing = (frame - frames[before]) / span, easings[after]
    if easing == "spline":
        return spline_weights(frame, frames, before)
    share = {"ease": smoothstep(part), "linear": part, "hold": 0.0}[easing]
    weights[before], weights[after] = 1 - share, share
    return weights


def spline_weights(frame: int, frames: list[int], before: int) -> np.ndarray:
    """Cubic Hermite weights between two key poses. Slopes: from neighbour to neighbour, and 0 at both ends."""
    weights = np.zeros(len(frames))
    after = before + 1
    span = frames[after] - frames[before]
    t = (frame - frames[before]) / span
    weights[before] += 2 * t**3 - 3 * t**2 + 1
    weights[after] += 3 * t**2 - 2 * t**3
    for key, factor in ((before, t**3 - 2 * t**2 + t), (after, t**3 - t**2)):
        if 0 < key < len(frames) - 1:
            slope = factor * span / (frames[key + 1] - frames[key - 1])
            weights[key + 1] += slope
            weights[key - 1] -= slope
    return weights


# Key poses over poses that are there


def edited(poses: Poses, written: Script, reach: int) -> Poses:
    """Poses whose joints are moved at key poses.

    Args:
        reach: frames before and after a key pose over which its change fades, at most to the next key pose. 0 changes
            the frames of key poses only.

    What is changed are places, by the difference at the key pose. A joint that is not seen in the frame of its key pose
    appears in that frame only.

    Raises:
        ValueError: a key pose is for a frame that is not there.
    """
    late = [key.frame for key in written.keys if key.frame >= len(poses)]
    if late:
        raise ValueError(
            f"A key pose is for frame {late[0]}, and 'poses' end with frame {len(poses) - 1}. Frames count from 0."
        )
    points, scores, seen = poses.points.copy(), poses.scores.copy(), poses.scores > 0
    for joint in range(18):
        keys = [key for key in written.keys if joint in key.joints]
        for number, key in enumerate(keys):
            place = key.joints[joint]
            if place is None:
                scores[key.frame, joint] = 0
                continue
            change = np.array(place[:2]) - poses.points[key.frame, joint]
            begin = max(key.frame - reach - 1, keys[number - 1].frame if number else -math.inf)
            end = min(key.frame + reach + 1, keys[number + 1].frame if number + 1 < len(keys) else math.inf)
            for frame in range(max(0, int(begin) + 1), min(len(poses), int(end))):
                edge = end if frame > key.frame else begin
                share = 1.0 if frame == key.frame else smoothstep((edge - frame) / (edge - key.frame))
                if frame != key.frame and seen[frame, joint] and seen[key.frame, joint]:
                    points[frame, joint] += share * change
            points[key.frame, joint], scores[key.frame, joint] = place[:2], place[2]
    return replace(poses, points=points, scores=scores)


# Writing


def as_text(poses: Poses) -> str:
    """JSON in OpenPose's format, a frame to a line, without parts that have no score. Reads back as the same poses."""
    frames = to_keypoints(poses)
    for frame in frames:
        frame["people"] = [{key: part for key, part in person.items() if any(part)} for person in frame["people"]]
    return "[\n" + ",\n".join(json.dumps(frame) for frame in frames) + "\n]"
