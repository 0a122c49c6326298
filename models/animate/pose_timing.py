"""When each pose is shown: frame rate, stride, smoothing, a way in from the picture's pose, and how many frames.

DynamiCtrl (arXiv:2503.21246) makes 16 frames a second, of which the first is the picture. Its latent frames go in
pairs (CogVideoX 1.5: 4 frames to one, patches of 2), so it makes 8 k + 5 frames: 5, 13, 21, 29, 37, ...
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from .poses import Poses, between, counted, joined

RATE = 16.0  # frames a second that the model was trained with
SHORTEST, PERIOD = 5, 8


def frames_near(count: int) -> int:
    """The nearest number of frames that the model makes; of two, the smaller."""
    return SHORTEST + PERIOD * max(0, math.ceil((count - SHORTEST) / PERIOD - 0.5))


def frames_within(count: int) -> int:
    """The largest number of frames that the model makes out of `count`; the shortest where there are fewer."""
    return SHORTEST + PERIOD * max(0, (count - SHORTEST) // PERIOD)


def frames_to_make(available: int, asked: int) -> tuple[int, list[str]]:
    """How many frames the clip gets, and in sentences what was changed for it.

    Args:
        available: frames there are, with the picture's own and those that lead in.
        asked: 0 for all.
    """
    notes, wanted = [], frames_near(asked) if asked else available
    if asked and wanted != asked:
        notes.append(f"{asked} frames were asked for: DynamiCtrl makes 5, 13, 21, ..., so {wanted} are meant.")
    made = wanted if asked and wanted <= available else frames_within(available)
    if asked and available < wanted:
        notes.append(
            f"The poses last for {counted(available, 'frame')}, {wanted} were asked for: the video has {made}."
        )
    elif not asked and made < available:
        notes.append(f"DynamiCtrl makes 5, 13, 21, ... frames: {made} of {available} are used.")
    if available < made:
        notes.append(f"The last pose is held for {counted(made - available, 'frame')}.")
    return made, notes


def strided(poses: Poses, stride: int) -> Poses:
    """Every `stride`-th frame, from the first."""
    return poses if stride == 1 else poses[::stride]


def resampled(poses: Poses, rate: float, to: float = RATE) -> Poses:
    """Poses of a clip with `rate` frames a second as one with `to`, in straight lines between frames.

    A rate of 0 leaves them as they are.
    """
    if rate in (0, to):
        return poses
    count = int((len(poses) - 1) * to / rate + 1e-9) + 1
    points, scores, people = [], [], []
    for k in range(count):
        place = min(k * rate / to, len(poses) - 1)
        before = int(place)
        after = min(before + 1, len(poses) - 1)
        each = between(poses, before, after, place - before)
        points.append(each[0])
        scores.append(each[1])
        people.append(poses.people[round(place)])
    return replace(poses, points=np.stack(points), scores=np.stack(scores), people=tuple(people))


def smoothed(poses: Poses, sigma: float) -> Poses:
    """Points averaged over time by a Gaussian of `sigma` frames; 0 leaves them as they are. Scores stay.

    Frames that do not see a point have no say in where it is. At both ends only what is there counts.
    """
    if sigma == 0:
        return poses
    reach = min(math.ceil(3 * sigma), len(poses) - 1)
    seen = poses.seen.astype(float)
    total, weight = np.zeros_like(poses.points), np.zeros_like(seen)
    for offset in range(-reach, reach + 1):
        share = math.exp(-0.5 * (offset / sigma) ** 2)
        here = slice(max(0, -offset), len(poses) - max(0, offset))
        there = slice(max(0, offset), len(poses) - max(0, -offset))
        total[here] += share * seen[there, :, None] * poses.points[there]
        weight[here] += share * seen[there]
    mean = total / np.maximum(weight, 1e-12)[..., None]
    return replace(poses, points=np.where(poses.seen[..., None], mean, poses.points))


def smoothstep(part: float) -> float:
    """0..1 to 0..1, slow at both ends."""
    return part * part * (3 - 2 * part)


def lead_in(first: Poses, poses: Poses, count: int) -> Poses:
    """`count` frames on the way from the first pose of `first` to that of `poses`; both must be on one canvas."""
    ends = joined(first[:1], poses[:1])
    steps = [between(ends, 0, 1, smoothstep(k / (count + 1))) for k in range(1, count + 1)]
    points, scores = np.stack([p for p, _ in steps]), np.stack([s for _, s in steps])
    return replace(ends, points=points, scores=scores, people=(0,) * count)


def held(poses: Poses, count: int) -> Poses:
    """The first `count` frames; if there are fewer, the last one again and again."""
    return poses[[min(k, len(poses) - 1) for k in range(count)]] if count != len(poses) else poses
