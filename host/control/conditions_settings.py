"""Condition images: the settings that hang on the MODEL. Each feature of this kind derives its own from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args
from uuid import UUID

from torch import Tensor

from ..families.family import require_latent
from ..part_of_run import WHOLE_RUN, PartOfRun

PATCH = 16  # pixels per token

Cache = Literal["on GPU", "offload to CPU", "off"]
PositionIds = Callable[..., Tensor]  # (own token grid, the picture's, device) to ids [T, 3]


@dataclass(frozen=True, eq=False)
class ConditionImage:
    """One condition image on one MODEL. Neutral: `strength` 0 or `influence` 0 is off; `influence` 1 is as trained.

    adapter: uuid of the LoRA, the same in all its clones on every device; None without a LoRA. name: the file's.
    latent: straight from a VAE, `[N, C, h, w]`; N is 1, or the number of pictures in the batch.
    kind: where the image lies, a key of `position_ids`.
    strength: factor on the LoRA. influence: factor on the weight of the condition's keys in every softmax, 0 to 1.
    part: the part of the run in which it acts.
    """

    feature: ClassVar[str]  # its name for users
    node: ClassVar[str]  # display name of its node
    images: ClassVar[str]  # its images, in the plural
    kind_input: ClassVar[str]  # inputs of the node, for messages
    size_input: ClassVar[str]
    prefix: ClassVar[str]  # of its keys among the additional models
    position_ids: ClassVar[Mapping[str, PositionIds]]
    over: ClassVar[frozenset[str]]  # kinds that lie over the picture: each tile sees its own part

    adapter: UUID | None
    name: str
    latent: Tensor
    kind: str
    strength: float = 1.0
    part: PartOfRun = WHOLE_RUN
    influence: float = 1.0
    cache: Cache = "on GPU"

    def __post_init__(self):
        check_numbers(self.strength, self.influence)
        choices = ((self.kind_input, self.kind, tuple(self.position_ids)), ("kv_cache", self.cache, get_args(Cache)))
        for title, value, allowed in choices:
            if value not in allowed:
                raise ValueError(f"{title} must be one of {', '.join(allowed)}, got '{value}'.")
        require_latent(self.latent, "The condition")

    @property
    def off(self) -> bool:
        return self.strength == 0 or self.influence == 0

    @property
    def offloaded(self) -> bool:
        return self.cache == "offload to CPU"


def check_numbers(strength: float, influence: float = 1.0) -> None:
    """Refuse meaningless numbers. ComfyUI does not check values from a link, and NaN passes its checks."""
    if not math.isfinite(strength):
        raise ValueError(f"strength must be a finite number, got {strength}.")
    if not 0 <= influence <= 1:  # NaN too
        raise ValueError(f"influence must be between 0 and 1, got {influence}.")
