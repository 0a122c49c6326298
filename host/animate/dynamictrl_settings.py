"""DynamiCtrl: what hangs on the MODEL, and what a condition carries."""

from __future__ import annotations

import math
from dataclasses import dataclass
from uuid import UUID

from torch import Tensor

from ..families.family import require_latent
from ..part_of_run import WHOLE_RUN, PartOfRun

LOADER = "Load DynamiCtrl"
NODE = "DynamiCtrl Conditioning"
ADAPTER = "dit_toolkit.dynamictrl"  # key of the pose norms among the MODEL's additional models


@dataclass(frozen=True, eq=False)
class DynamiCtrl:
    """The pose norms on one MODEL. Without poses in its conditions it is the base model.

    adapter: uuid that all clones of the pose norms have, on every device. name: the file's, for messages.
    """

    adapter: UUID
    name: str


@dataclass(frozen=True, eq=False)
class Pose:
    """The pose video of one condition. Neutral value: `strength` 0 is the base model.

    latent: as a VAE gives it, `[N, C, T, h, w]`; N is 1, or one per video of the batch. Conditions that have the same
        tensor share one pose stream, so it tells poses apart and is never copied.
    strength: how much of it is added in every block. 1 as published.
    part: of the run in which it acts.
    area: of the latent that the condition is for, as ComfyUI hands it over: sizes, then starts. None: all of it.
    """

    latent: Tensor
    strength: float = 1.0
    part: PartOfRun = WHOLE_RUN
    area: tuple[int, ...] | None = None

    def __post_init__(self):
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise ValueError(f"pose_strength must be a number of at least 0, got {self.strength}.")
        if self.latent.ndim != 5:
            raise ValueError(
                f"The pose video's latent must be [N, C, T, h, w], got {list(self.latent.shape)}. Use CogVideoX's VAE."
            )
        require_latent(self.latent, f"{NODE}: the encoded pose video")

    def shares(self, other: Pose) -> bool:
        """Whether both have one pose stream. Values of tensors are never compared."""
        return self.latent is other.latent and self.area == other.area
