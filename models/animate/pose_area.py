"""Where a person's body is, from its key points: what a clip's body sweeps over, as a mask.

Ours, not the paper's: limbs, torso and head as thick shapes in proportion to the body, so that the mask covers the
person and not only the lines of the skeleton.
"""

from __future__ import annotations

import numpy as np

from .pose_drawing import LIMBS, opencv
from .poses import BODY, SEEN, Poses

NOSE, NECK, RIGHT_SHOULDER, LEFT_SHOULDER, RIGHT_HIP, LEFT_HIP = 0, 1, 2, 5, 8, 11
ENDS = (4, 7, 10, 13)  # wrists and ankles: hands and feet go on behind them
EARS = (16, 17)
TORSO = (RIGHT_SHOULDER, LEFT_SHOULDER, LEFT_HIP, RIGHT_HIP)

# Parts of the torso's length.
LIMB, END, HEAD = 0.26, 0.22, 0.42
OVER_EARS = 1.4  # how far the head reaches, as a multiple of the distance from nose to ear


def swept(poses: Poses, height: int, width: int, margin: float) -> np.ndarray:
    """`[height, width]`, bool: where the body is in any of the frames, and `margin` around it.

    Args:
        margin: as a part of the shorter side.
    """
    cv2 = opencv()
    mask = np.zeros((height, width), np.uint8)
    for points, scores in zip(poses.points, poses.scores, strict=True):
        fill_body(mask, points[BODY] * (width, height), scores[BODY] > SEEN)
    if margin == 0 or not mask.any():
        return mask > 0
    return cv2.distanceTransform(1 - mask, cv2.DIST_L2, cv2.DIST_MASK_PRECISE) <= margin * min(height, width)


def fill_body(mask: np.ndarray, points: np.ndarray, seen: np.ndarray) -> None:
    """Set a body's pixels to 1. `points`: `[18, 2]` in pixels."""
    cv2 = opencv()
    if not seen.any():
        return
    unit = torso_length(points, seen)
    at = np.rint(points).astype(int)

    def disc(k: int, radius: float) -> None:
        cv2.circle(mask, at[k].tolist(), max(1, round(radius)), 1, thickness=-1)

    for a, b in LIMBS[:12]:
        if seen[a] and seen[b]:
            cv2.line(mask, at[a].tolist(), at[b].tolist(), 1, thickness=max(1, round(LIMB * unit)))
    torso = [at[k] for k in TORSO if seen[k]]
    if len(torso) > 2:
        cv2.fillConvexPoly(mask, cv2.convexHull(np.array(torso, np.int32)), 1)
    if seen[NOSE]:
        ears = [float(np.linalg.norm(points[k] - points[NOSE])) for k in EARS if seen[k]]
        disc(NOSE, max(HEAD * unit, OVER_EARS * max(ears, default=0.0)))
    for k in ENDS:
        if seen[k]:
            disc(k, END * unit)


def torso_length(points: np.ndarray, seen: np.ndarray) -> float:
    """From neck to hips in pixels, or what the rest of the body says about it."""
    hips = [points[k] for k in (RIGHT_HIP, LEFT_HIP) if seen[k]]
    lengths = []
    if seen[NECK] and hips:
        lengths.append(float(np.linalg.norm(points[NECK] - np.mean(hips, axis=0))))
    if seen[RIGHT_SHOULDER] and seen[LEFT_SHOULDER]:
        lengths.append(1.2 * float(np.linalg.norm(points[RIGHT_SHOULDER] - points[LEFT_SHOULDER])))
    if not lengths:
        lengths.append(0.4 * float(np.ptp(points[seen], axis=0).max()))
    return max(lengths)
