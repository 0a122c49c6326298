"""Poses of one person over time, from and to the key points that ComfyUI's nodes exchange.

POSE_KEYPOINT, as core's SDPose Keypoint Extractor and the pose nodes of other packs give it: a list of frames, each

    {"canvas_width": w, "canvas_height": h, "people": [{"pose_keypoints_2d": [x, y, score, ...], ...}, ...]}

with 18 points of the body, and, where they were found, 6 of the feet, 70 (or 68) of the face, 21 of each hand, in
pixels of the canvas. Also read: coordinates in 0..1, the 25 body points of OpenPose, None or nothing where a part is
missing.

Points `[N, 134, 2]`, 0..1 of their own canvas, and scores `[N, 134]`; a score of 0 is a point without a place. Order,
as core has it: body 0-17, feet 18-23, face 24-91, right hand 92-112, left hand 113-133.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

POINTS = 134
BODY, FEET, FACE = slice(0, 18), slice(18, 24), slice(24, 92)
RIGHT_HAND, LEFT_HAND = slice(92, 113), slice(113, 134)
SEEN = 0.3  # a body point with a higher score is seen; official code
WRISTS_AND_ELBOWS = (3, 4, 6, 7)

# Each part's key, where its points go, and the lengths that are known for it.
PARTS: tuple[tuple[str, slice, tuple[int, ...]], ...] = (
    ("pose_keypoints_2d", BODY, (18, 25)),
    ("foot_keypoints_2d", FEET, (6,)),
    ("face_keypoints_2d", FACE, (70, 68)),
    ("hand_right_keypoints_2d", RIGHT_HAND, (21,)),
    ("hand_left_keypoints_2d", LEFT_HAND, (21,)),
)
OF_25 = [*range(8), *range(9, 19)]  # OpenPose's 25 points without the middle of the hips and the feet
EYES = (14, 15)  # core repeats them behind the 68 points of the face
SHARE = 2.0  # coordinates that stay below this are no pixels, but parts of the canvas
FAR = 100.0  # canvases: what lies farther away is no place

Person = Literal["largest", "follow"]


@dataclass(frozen=True)
class Poses:
    """One person in N frames.

    `people`: how many were found in each frame; 0 where the pose was filled in. Width and height of the canvas are 0
    where nobody said them.
    """

    points: np.ndarray  # [N, 134, 2]
    scores: np.ndarray  # [N, 134]
    width: int
    height: int
    people: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, frames: slice | Sequence[int]) -> Poses:
        """Some of the frames: a slice, or their numbers."""
        people = self.people[frames] if isinstance(frames, slice) else tuple(self.people[k] for k in frames)
        return replace(self, points=self.points[frames], scores=self.scores[frames], people=people)

    @property
    def seen(self) -> np.ndarray:
        """`[N, 134]`: True where a body point is seen, and where another one has a score at all."""
        seen = self.scores > 0
        seen[:, BODY] = self.scores[:, BODY] > SEEN
        return seen


def joined(first: Poses, *others: Poses) -> Poses:
    """One after the other, on the canvas of the first."""
    every = (first, *others)
    return replace(
        first,
        points=np.concatenate([each.points for each in every]),
        scores=np.concatenate([each.scores for each in every]),
        people=sum((each.people for each in every), ()),
    )


# Reading


def parse(keypoints: Any, name: str = "poses", person: Person = "largest") -> tuple[Poses, list[str]]:
    """One person out of a POSE_KEYPOINT, and what there is to say about it, in sentences.

    Args:
        name: what errors call the key points.
        person: whom to take where there are several: the largest in each frame; or the largest of the first frame, and
            from there whoever is nearest to the frame before.

    Frames without a person are filled in from their neighbours. A person is whoever has a body point that is seen.

    Raises:
        ValueError: with the frame and the part, for what is no POSE_KEYPOINT, for numbers that are none, for canvases
            of different proportions, and where no frame has a person.
    """
    frames = frames_of(keypoints, name)
    raw = [people_of(frame, f"Frame {number} of '{name}'") for number, frame in enumerate(frames)]
    in_pixels = any(np.abs(points[scores > 0]).max(initial=0) > SHARE for people in raw for points, scores in people)
    sizes = [canvas_of(frame, f"Frame {number} of '{name}'") for number, frame in enumerate(frames)]
    width, height = common_canvas(sizes, name, in_pixels)
    if in_pixels:
        raw = [[(points / size, scores) for points, scores in each] for each, size in zip(raw, sizes, strict=True)]
    found = [[each for each in people if (each[1][BODY] > SEEN).any()] for people in raw]
    if not any(found):
        raise ValueError(
            f"No person was found in '{name}': none of {counted(len(frames), 'frame')} has a body point with a score "
            "above 0.3. Look at the detector's input, or give it a box around the person."
        )
    for number, people in enumerate(found):
        if any(np.abs(points[scores > 0]).max(initial=0) > FAR for points, scores in people):
            raise ValueError(f"Frame {number} of '{name}' has points far outside of its canvas {width} x {height}.")
    chosen = choose(found, person)
    notes = notes_on(found, person, name)
    counts = tuple(len(people) for people in found)
    points = np.stack([np.zeros((POINTS, 2)) if each is None else each[0] for each in chosen])
    scores = np.stack([np.zeros(POINTS) if each is None else each[1] for each in chosen])
    return filled(Poses(points, scores, width, height, counts)), notes


OnePerson = tuple[np.ndarray, np.ndarray]  # points [134, 2], scores [134]


def frames_of(keypoints: Any, name: str) -> list[Mapping[str, Any]]:
    frames = [keypoints] if isinstance(keypoints, Mapping) else keypoints
    if not isinstance(frames, Sequence) or isinstance(frames, str) or not all(isinstance(f, Mapping) for f in frames):
        raise ValueError(
            f"'{name}' must be key points (POSE_KEYPOINT), a list of frames with their people. Connect SDPose Keypoint "
            "Extractor or Pose Keyframes."
        )
    if not frames:
        raise ValueError(f"'{name}' has no frames. Connect key points of at least one picture.")
    return list(frames)


def people_of(frame: Mapping[str, Any], where: str) -> list[OnePerson]:
    """Everybody in a frame, in the frame's own units."""
    people = frame.get("people")
    if people is None:
        people = []
    if not isinstance(people, Sequence) or not all(isinstance(each, Mapping) for each in people):
        raise ValueError(f"{where} must have a list of people, each with its key points.")
    return [one_person(each, where) for each in people]


def one_person(person: Mapping[str, Any], where: str) -> OnePerson:
    points, scores = np.zeros((POINTS, 2)), np.zeros(POINTS)
    for key, place, lengths in PARTS:
        part = numbers_of(person.get(key), key, lengths, where)
        if part is None:
            continue
        if len(part) == 25:
            part = part[OF_25]
        part = part[: place.stop - place.start]
        points[place], scores[place] = part[:, :2], part[:, 2]
    return points, scores


def numbers_of(flat: Any, key: str, lengths: tuple[int, ...], where: str) -> np.ndarray | None:
    """`[P, 3]`: x, y, score. None where the part is missing."""
    if flat is None or (isinstance(flat, Sequence | np.ndarray) and len(flat) == 0):
        return None
    try:
        numbers = np.asarray(flat, dtype=float).reshape(-1)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{where}: '{key}' must be a flat list of numbers x, y, score.") from None
    if numbers.size not in [3 * length for length in lengths]:
        expected = " or ".join(f"{3 * length}" for length in lengths)
        raise ValueError(f"{where}: '{key}' must have {expected} numbers, got {numbers.size}.")
    if not np.isfinite(numbers).all():
        raise ValueError(f"{where}: '{key}' has values that are no numbers (NaN or infinite).")
    part = numbers.reshape(-1, 3)
    part[:, 2] = np.clip(part[:, 2], 0, FAR)
    return part


def canvas_of(frame: Mapping[str, Any], where: str) -> tuple[float, float]:
    """Width and height; (0, 0) where the frame does not say them."""
    size: tuple[Any, Any] = frame.get("canvas_width"), frame.get("canvas_height")
    if size == (None, None):
        return 0, 0
    if not all(is_number(side) and 0 < side < 1e6 for side in size):
        raise ValueError(f"{where} has a canvas of {size[0]} x {size[1]} pixels; both must be above 0.")
    return size


def is_number(value: Any) -> bool:
    """Finite, and no longer than a float can be."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return False
    return bool(abs(value) < 1e300)  # of NaN, too, this is False


def common_canvas(sizes: Sequence[tuple[float, float]], name: str, in_pixels: bool) -> tuple[int, int]:
    """The first canvas, whose proportions all others must have."""
    known = [(number, size) for number, size in enumerate(sizes) if size != (0, 0)]
    if in_pixels and len(known) < len(sizes):
        number = next(number for number, size in enumerate(sizes) if size == (0, 0))
        raise ValueError(
            f"Frame {number} of '{name}' has points in pixels, but no 'canvas_width' and 'canvas_height' to measure "
            "them by."
        )
    if not known:
        return 0, 0
    width, height = known[0][1]
    for number, (w, h) in known:
        if abs(w * height - h * width) > 0.02 * width * h:
            raise ValueError(
                f"Frames of '{name}' differ in their proportions: {width} x {height} in frame {known[0][0]}, {w} x {h} "
                f"in frame {number}. Crop the pictures to one size before the detector."
            )
    return round(width), round(height)


# Whom to take


def choose(found: Sequence[Sequence[OnePerson]], person: Person) -> list[OnePerson | None]:
    """One of the people in each frame; None where there are none."""
    chosen: list[OnePerson | None] = []
    last: OnePerson | None = None
    for people in found:
        if not people:
            chosen.append(None)
        elif person == "follow" and last is not None:
            chosen.append(min(people, key=lambda each, to=last: distance(each, to)))
        else:
            chosen.append(max(people, key=extent))
        last = chosen[-1] or last
    return chosen


def extent(person: OnePerson) -> float:
    """Area of the box around the body points that are seen."""
    seen = person[0][BODY][person[1][BODY] > SEEN]
    width, height = np.ptp(seen, axis=0)
    return float(width * height + 1e-3 * (width + height))  # a box without area may still be long


def distance(person: OnePerson, other: OnePerson) -> float:
    """Mean over the body points that both have; between the middles where they share none."""
    both = (person[1][BODY] > SEEN) & (other[1][BODY] > SEEN)
    if both.any():
        return float(np.linalg.norm(person[0][BODY][both] - other[0][BODY][both], axis=1).mean())
    middles = [points[BODY][scores[BODY] > SEEN].mean(0) for points, scores in (person, other)]
    return float(np.linalg.norm(middles[0] - middles[1]))


def notes_on(found: Sequence[Sequence[OnePerson]], person: Person, name: str) -> list[str]:
    notes = []
    crowded = [number for number, people in enumerate(found) if len(people) > 1]
    empty = [number for number, people in enumerate(found) if not people]
    if crowded:
        whom = "the largest was taken" if person == "largest" else "the nearest to the frame before was taken"
        notes.append(f"Several people in {listed(crowded)} of '{name}': {whom}.")
    if empty:
        notes.append(f"No person in {listed(empty)} of '{name}': filled in from the frames beside.")
    return notes


def listed(numbers: Sequence[int]) -> str:
    """Frames in a sentence: "frame 3", "frames 3, 4, 7", or "12 frames (3 to 40)"."""
    if len(numbers) == 1:
        return f"frame {numbers[0]}"
    if len(numbers) <= 5:
        return f"frames {', '.join(map(str, numbers))}"
    return f"{len(numbers)} frames ({numbers[0]} to {numbers[-1]})"


def counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


# Between frames


def filled(poses: Poses) -> Poses:
    """The same, with poses between their neighbours where nobody was found, and the nearest one before and after."""
    there = [number for number, count in enumerate(poses.people) if count]
    if len(there) == len(poses):
        return poses
    points, scores = poses.points.copy(), poses.scores.copy()
    for number in range(len(poses)):
        if poses.people[number]:
            continue
        before = max((k for k in there if k < number), default=there[0])
        after = min((k for k in there if k > number), default=there[-1])
        part = 0.0 if after <= before else (number - before) / (after - before)
        points[number], scores[number] = between(poses, before, after, min(max(part, 0.0), 1.0))
    return replace(poses, points=points, scores=scores)


def between(poses: Poses, first: int, second: int, part: float) -> OnePerson:
    """The pose a part (0..1) of the way from one frame to another, in straight lines.

    A point that only one of them sees stays at its place; its score fades.
    """
    a, b = poses.seen[first][:, None], poses.seen[second][:, None]
    p, q = poses.points[first], poses.points[second]
    start, end = np.where(a | ~b, p, q), np.where(b | ~a, q, p)
    points = start + part * (end - start) if part < 1 else end
    score, other = poses.scores[first], poses.scores[second]
    scores = score + part * (other - score) if part < 1 else other
    return points, scores


# Writing


def to_keypoints(poses: Poses, width: int = 0, height: int = 0) -> list[dict[str, Any]]:
    """As POSE_KEYPOINT in pixels of a canvas, by default the poses' own (or 512 x 512 where it is not known).

    All parts are there, in the order and lengths of core. Points without a score are at 0, 0.
    """
    width, height = width or poses.width or 512, height or poses.height or 512
    return [
        {"canvas_width": width, "canvas_height": height, "people": [one_written(p * (width, height), s)]}
        for p, s in zip(poses.points, poses.scores, strict=True)
    ]


def one_written(points: np.ndarray, scores: np.ndarray) -> dict[str, list[float]]:
    def flat(indices: Iterator[int]) -> list[float]:
        return [float(value) for k in indices for value in ((*points[k], scores[k]) if scores[k] > 0 else (0, 0, 0))]

    return {
        key: flat(iter((*range(place.start, place.stop), *(EYES if place == FACE else ())))) for key, place, _ in PARTS
    }
