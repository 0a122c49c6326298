"""People of key points, to test with."""

from __future__ import annotations

from typing import Any

import numpy as np

# The 18 points of the body, standing, in 0..1.
STANDING = np.array(
    [
        [0.50, 0.20], [0.50, 0.30], [0.42, 0.31], [0.39, 0.42], [0.38, 0.53], [0.58, 0.31], [0.61, 0.42], [0.62, 0.53],
        [0.45, 0.55], [0.44, 0.70], [0.44, 0.85], [0.55, 0.55], [0.56, 0.70], [0.56, 0.85], [0.48, 0.18], [0.52, 0.18],
        [0.46, 0.19], [0.54, 0.19],
    ]
)  # fmt: skip
HAND = np.array([[0.0, 0.0], *([0.006 * (f - 2) * b, 0.01 * b] for f in range(5) for b in range(1, 5))])
FACE = np.stack([0.02 * np.cos(np.arange(70)), 0.03 * np.sin(np.arange(70))], 1)


def flat(points: np.ndarray, score: float = 1.0) -> list[float]:
    return [float(v) for x, y in points for v in (x, y, score)]


def person(body: np.ndarray, width: int, height: int, score: float = 1.0) -> dict[str, Any]:
    """One of a frame's people, in pixels of the canvas: body, hands, and face."""
    size = (width, height)
    return {
        "pose_keypoints_2d": flat(body * size, score),
        "foot_keypoints_2d": flat(np.zeros((6, 2)), 0.0),
        "face_keypoints_2d": flat((body[0] + FACE) * size, score),
        "hand_right_keypoints_2d": flat((body[4] + HAND) * size, score),
        "hand_left_keypoints_2d": flat((body[7] + HAND) * size, score),
    }


def moved(frame: int, turn: float = 0.0) -> np.ndarray:
    """Standing, with arms that go up over the frames, and a sway."""
    body = STANDING.copy()
    for shoulder, elbow, wrist, sign in ((2, 3, 4, 1), (5, 6, 7, -1)):
        angle = sign * (0.25 * frame + turn)
        rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        for joint in (elbow, wrist):
            body[joint] = body[shoulder] + rotation @ (body[joint] - body[shoulder])
    return body + np.array([0.02 * np.sin(frame), 0.01 * np.cos(0.7 * frame)])


def frame(*people: dict[str, Any], width: int = 64, height: int = 96) -> dict[str, Any]:
    return {"canvas_width": width, "canvas_height": height, "people": list(people)}


def dancing(count: int, turn: float = 0.0, width: int = 64, height: int = 96) -> list[dict[str, Any]]:
    """A POSE_KEYPOINT of one person."""
    return [frame(person(moved(k, turn), width, height), width=width, height=height) for k in range(count)]


def crowded(count: int, width: int = 64, height: int = 96) -> list[dict[str, Any]]:
    """Two people who are the largest in turns: one on the left, one on the right."""
    made = []
    for k in range(count):
        left, right = 0.5 * moved(k) + [0, 0.2], 0.5 * moved(k, 0.5) + [0.5, 0.2]
        middle, factor = [0.75, 0.5], 0.5 if k % 2 == 0 else 1.5
        made.append(
            frame(
                person(left, width, height),
                person((right - middle) * factor + middle, width, height),
                width=width,
                height=height,
            )
        )
    return made
