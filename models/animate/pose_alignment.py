"""Moves driving poses to the person in the picture.

Source: official code of DynamiCtrl (arXiv:2503.21246), `dwpose/preprocess.py`. One scale and one shift for the whole
clip, from key points of the head, neck, shoulders, hips and legs that are seen in the picture, in 0..1 of the picture
(H x W) and of the driving frames (fh x fw):

    picture_y ~ ay * driving_y + by       least squares over all these points and frames
    ax = ay / (fh / fw / H * W)           the same in pixels
    bx = mean(picture_x - ax * driving_x)
    by = picture_y - ay * driving_y       of the first such point (the nose) in the first frame

Frames take part in which exactly one person was found. Where the fit cannot be right (few points, a scale that is
negative or beyond 5), boxes around the body decide, and that is said.

Deviations: points that a detector gave no place to (score 0) take no part. If the picture's nose is not seen, the
official code puts the driving nose where the next point is; here that point goes there.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from .poses import BODY, WRISTS_AND_ELBOWS, Poses

Mode = Literal["paper", "bounding box", "none"]
Crop = Literal["center", "stretch"]

FITTED = (0, 1, 2, 5, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17)  # all but elbows and wrists
FEW = 4  # points; with fewer, a line through them says little
WILD = 5.0  # a scale beyond this, or below its inverse, is no person of this picture
FLAT = 1e-3  # sides of a box below this part of a canvas cannot be compared


@dataclass(frozen=True)
class Alignment:
    """`x' = scale[0] * x + shift[0]`, `y' = scale[1] * y + shift[1]`, in 0..1 of driving frame and picture."""

    scale: tuple[float, float] = (1.0, 1.0)
    shift: tuple[float, float] = (0.0, 0.0)

    def moved(self, poses: Poses, width: int, height: int) -> Poses:
        """All points moved, on a canvas of the picture's size."""
        return replace(poses, points=poses.points * self.scale + self.shift, width=width, height=height)


def fitted(poses: Poses, width: int, height: int, crop: Crop = "center") -> Poses:
    """Poses on the canvas of a picture that is cut from the middle to other proportions, or stretched."""
    scale = [1.0, 1.0]
    if crop == "center" and poses.width and poses.height:
        ratio = (poses.width / poses.height) / (width / height)
        scale = [max(ratio, 1.0), max(1 / ratio, 1.0)]
    shift = [(1 - each) / 2 for each in scale]
    return Alignment((scale[0], scale[1]), (shift[0], shift[1])).moved(poses, width, height)


def align(
    driving: Poses, reference: Poses | None, width: int, height: int, mode: Mode, crop: Crop = "center"
) -> tuple[Poses, list[str]]:
    """Driving poses on the picture's canvas, and what there is to say about it.

    Args:
        reference: the picture's pose, on the picture's canvas (`fitted`); its first frame counts.

    Raises:
        ValueError: without a reference; without a body point that both see.
    """
    if mode == "none":
        return fitted(driving, width, height, crop), []
    if reference is None:
        raise ValueError(
            f"Alignment '{mode}' needs the pose of the picture. Connect 'reference', or set 'alignment' to 'none'."
        )
    notes = []
    if not driving.width:
        notes.append(
            "The driving poses do not say how large their frames are: taken to have the picture's proportions."
        )
        driving = replace(driving, width=width, height=height)
    alignment: Alignment | None = None
    if mode == "paper":
        alignment, reason = least_squares(driving, reference, width, height)
        if alignment is None:
            notes.append(f"{reason}: aligned by boxes around the bodies instead.")
    return (alignment or boxes(driving, reference, width, height)).moved(driving, width, height), notes


def least_squares(driving: Poses, reference: Poses, width: int, height: int) -> tuple[Alignment | None, str]:
    """The official fit; or None, and why it cannot be right."""
    kept = [k for k in FITTED if reference.seen[0, k]]
    frames = [k for k, count in enumerate(driving.people) if count == 1]
    frames = frames or [k for k, count in enumerate(driving.people) if count] or [0]
    x, y = (driving.points[frames][:, kept, axis] for axis in (0, 1))
    to_x, to_y = (np.tile(reference.points[0, kept, axis], (len(frames), 1)) for axis in (0, 1))
    placed = driving.scores[frames][:, kept] > 0
    common = placed.any(0).sum()
    if common < FEW:
        return None, f"The picture and the driving poses share {common} points of head, body and legs"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", np.exceptions.RankWarning if hasattr(np, "exceptions") else Warning)
        ay = float(np.polyfit(y[placed], to_y[placed], 1)[0])
    if not 1 / WILD <= ay <= WILD:
        return None, f"The fit of the paper gives a scale of {ay:.2f}"
    ax = ay / (driving.height / driving.width / height * width)
    bx = float((to_x - x * ax)[placed].mean())
    first = next((k for k in kept if driving.scores[0, k] > 0), None)
    if first is None:
        return None, "The first driving pose has none of the picture's points"
    by = float(reference.points[0, first, 1] - ay * driving.points[0, first, 1])
    return Alignment((ax, ay), (bx, by)), ""


def boxes(driving: Poses, reference: Poses, width: int, height: int) -> Alignment:
    """Scale and shift of the box around the body, without elbows and wrists: a raised arm is not a taller person.

    The scale is the median over frames, each box around the points that the picture sees, too; the lowest point of the
    first frame (the feet) and the middle of its box go where the picture's are.
    """
    proportions = driving.height / driving.width / height * width  # ay / ax of equal scales in pixels
    ratios = []
    for frame in range(len(driving)):
        mine, theirs = shared(driving, frame, reference)
        if len(mine) < 2:
            continue
        (w, h), (to_w, to_h) = np.ptp(mine, axis=0), np.ptp(theirs, axis=0)
        if h > FLAT and to_h > FLAT:
            ratios.append(to_h / h)
        elif w > FLAT and to_w > FLAT:
            ratios.append(to_w / w * proportions)
    ay = float(np.clip(np.median(ratios), 1 / WILD, WILD)) if ratios else 1.0
    ax = ay / proportions
    common = [each for k in range(len(driving)) if len((each := shared(driving, k, reference))[0])]
    if not common:
        raise ValueError(
            "The picture and the driving poses have no body point in common, so they cannot be aligned. Set "
            "'alignment' to 'none', or use a picture that shows what the clip shows."
        )
    mine, theirs = common[0]
    middle, to_middle = (np.mean([points[:, 0].min(), points[:, 0].max()]) for points in (mine, theirs))
    return Alignment((ax, ay), (float(to_middle - ax * middle), float(theirs[:, 1].max() - ay * mine[:, 1].max())))


def shared(driving: Poses, frame: int, reference: Poses) -> tuple[np.ndarray, np.ndarray]:
    """The body points, without elbows and wrists, that a driving frame and the picture see: of each, `[K, 2]`."""
    both = (driving.seen[frame] & reference.seen[0])[BODY]
    both[list(WRISTS_AND_ELBOWS)] = False
    return driving.points[frame, BODY][both], reference.points[0, BODY][both]
