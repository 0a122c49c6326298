"""The 18 body points of a doll, as OpenPose names them, in unit coordinates.

Order: nose, neck, right shoulder, elbow, wrist, left shoulder, elbow, wrist, right hip, knee, ankle, left hip, knee,
ankle, right eye, left eye, right ear, left ear. Right and left are the doll's own: it faces the viewer, so its right
is on the picture's left, where `doll_joints` says `l_`.
"""

from __future__ import annotations

import numpy as np

from .things import Thing, doll_joints

HEAD_RADIUS = 0.135  # of a doll's size, as `doll_parts` draws it
HIP_OFFSET = 0.07  # from the middle to where a leg starts, as a part of the size


def openpose(doll: Thing) -> np.ndarray:
    """Body points `[18, 3]` of a doll: x, y and score 1, in unit coordinates. Arms and legs are straight.

    Raises:
        ValueError: the thing is no doll.
    """
    if doll.kind != "doll":
        raise ValueError(f"only a doll has body points, this is a {doll.kind}")
    s, joints = doll.size, doll_joints(doll)
    (x, y), hip = joints["head"], joints["hip"]

    def limb(start: tuple[float, float], end: tuple[float, float]) -> list[tuple[float, float]]:
        return [start, ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2), end]

    points: list[tuple[float, float]] = [joints["head"], joints["neck"]]
    for side in ("l", "r"):
        points += limb(joints[f"{side}_shoulder"], joints[f"{side}_hand"])
    for side, sign in (("l", -1), ("r", 1)):
        points += limb((hip[0] + sign * HIP_OFFSET * s, hip[1]), joints[f"{side}_foot"])
    points += [(x + sign * 0.05 * s, y + 0.02 * s) for sign in (-1, 1)]
    points += [(x + sign * HEAD_RADIUS * s, y) for sign in (-1, 1)]
    return np.concatenate([np.array(points), np.ones((18, 1))], 1)
