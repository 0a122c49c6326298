"""A clip of poses for one picture: driving poses brought to the picture's frame rate, person and number of frames.

Source: official code of DynamiCtrl (arXiv:2503.21246), `utils/pre_process.py`: the first frame is the picture's own
pose, the driving poses follow. Ours: frame rate, smoothing, and frames that lead in.
"""

from __future__ import annotations

from dataclasses import dataclass

from .pose_alignment import Crop, Mode, align, fitted
from .pose_timing import frames_to_make, held, lead_in, resampled, smoothed, strided
from .poses import Poses, counted, joined


@dataclass(frozen=True)
class Timing:
    """Neutral values: those that are here, but for `prepend`, which is only read with a reference."""

    length: int = 0  # frames of the whole clip; 0 for all there are
    frame_rate: float = 0.0  # of the driving clip; 0 takes its frames as they are
    stride: int = 1
    smoothing: float = 0.0  # frames
    transition: int = 0  # frames that lead in
    prepend: bool = True  # the picture's own pose comes first


def prepared(
    driving: Poses,
    reference: Poses | None,
    width: int,
    height: int,
    timing: Timing,
    alignment: Mode = "paper",
    crop: Crop = "center",
) -> tuple[Poses, list[str]]:
    """The clip on a canvas of width x height, and what there is to say about it, in sentences.

    As in the official code, the alignment sees only driving frames that the clip has room for.

    Raises:
        ValueError: as `align`; and if no frame is left for the driving poses.
    """
    notes = []
    if reference is not None:
        reference = fitted(reference[:1], width, height, crop)
    elif timing.transition:
        notes.append("Without the pose of the picture there is nothing to lead in from: no transition frames.")
    before = timing.prepend + timing.transition if reference is not None else 0
    driving = smoothed(strided(resampled(driving, timing.frame_rate), timing.stride), timing.smoothing)
    made, said = frames_to_make(before + len(driving), timing.length)
    if made <= before:
        raise ValueError(
            f"A clip of {counted(made, 'frame')} has no room for {counted(timing.transition, 'transition frame')} and "
            "the driving poses. Lower 'transition_frames' or raise 'length'."
        )
    driving = driving[: made - before]
    moved, fit = align(driving, reference, width, height, alignment, crop)
    parts = [moved]
    if reference is not None and timing.transition:
        parts.insert(0, lead_in(reference, moved, timing.transition))
    if reference is not None and timing.prepend:
        parts.insert(0, reference)
    return held(joined(*parts), made), [*notes, *said, *fit]
