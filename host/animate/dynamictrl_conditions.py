"""Poses travel with the prompts: each CONDITIONING has its own, or none.

They are one of the `model_conds` of an entry, which ComfyUI batches with the prompt and hands to APPLY_MODEL. They stay
whole on this way: context windows and areas are cut out there, where both are known.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy.conds import CONDRegular

from .dynamictrl_settings import LOADER, NODE, Pose

POSES = "dit_toolkit_poses"  # in model_conds, and from there the name of an argument of the model


class Poses(tuple[Pose, ...]):
    """The poses of one call of the model, one for each condition in its batch.

    Whoever has pose norms takes them out of the call. ComfyUI asks each argument that is left for its dtype, right
    before it calls the model: then there are no pose norms, and the poses would be without effect.
    """

    @property
    def dtype(self) -> Any:
        raise ValueError(
            f"{NODE} has given a prompt poses, and the model has no pose norms to read them. Load the model with "
            f"{LOADER}, or leave 'pose' unconnected."
        )


class PoseCondition(CONDRegular):
    """The pose of one condition. `cond` is no tensor, so nobody cuts, repeats or moves it on the way."""

    cond: Pose

    def process_cond(self, batch_size: int, area: Any = None, **kwargs: Any) -> PoseCondition:
        return self._copy_with(replace(self.cond, area=None if area is None else tuple(area)))

    def can_concat(self, other: Any) -> bool:
        return isinstance(other, PoseCondition)

    def concat(self, others: list[PoseCondition]) -> Poses:
        return Poses([self.cond, *(other.cond for other in others)])

    def size(self) -> list[int]:
        """For ComfyUI's estimate of memory."""
        return list(self.cond.latent.shape)


def with_pose(conditioning: list, pose: Pose) -> list:
    """A CONDITIONING whose every entry carries `pose`, in the place of an earlier one."""
    found = []
    for text, values in conditioning:
        conds = {**values.get("model_conds", {}), POSES: PoseCondition(pose)}
        found.append([text, {**values, "model_conds": conds}])
    return found
