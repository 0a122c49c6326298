"""EasyControl: the low-rank weights by which a FLUX.1 model reads a condition image.

Source: EasyControl, arXiv:2503.07027, section 3: condition injection LoRA. Where the paper leaves a choice, we follow
the authors' published code. `conditions.py` runs the image through the model, `positions.py` has its tokens' positions.

Shapes: D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .easycontrol_keys import PARTS, Checkpoint, Slot, layers, write
from .low_rank import LoraBlock, LowRank, init_low_rank


class ConditionBlock(LoraBlock):
    """EasyControl's own rule: `proj` reads the projection's output."""

    def add(self, part: str, x: Tensor, y: Tensor, strength: float) -> Tensor:
        return super().add(part, y if part == "proj" else x, y, strength)


class ConditionLora(nn.Module):
    """The low-rank weights of one condition: q, k, v and proj of double blocks, q, k and v of single blocks.

    q, k, v are ordinary: they add to their third of a fused projection. `proj` is not: it takes the projection's
    *output*, bias included, `y + scale * up(down(y))`, so it cannot be merged as a LoRA on the projection's weight.

    Args:
        dim: hidden size D of the model.
        double, single: number of blocks.
        rank: one for all layers, or one per layer name as in `Slot.ranks`.
        scales: alpha / rank of the layers where it is not 1.
        operations: layer classes, ComfyUI's or `torch.nn`.
    """

    def __init__(
        self,
        dim: int,
        double: int,
        single: int,
        rank: int | Mapping[str, int],
        scales: Mapping[str, float] | None = None,
        *,
        operations: Any,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        ranks = dict.fromkeys(layers(double, single), rank) if isinstance(rank, int) else rank

        def layer(name: str) -> LowRank:
            scale = (scales or {}).get(name, 1.0)
            return LowRank(dim, ranks[name], scale, operations=operations, device=device, dtype=dtype)

        def block(stream: str, i: int) -> ConditionBlock:
            return ConditionBlock({part: layer(f"{stream}.{i}.{part}") for part in PARTS[stream]})

        self.dim = dim
        self.double_blocks = nn.ModuleList(block("double_blocks", i) for i in range(double))
        self.single_blocks = nn.ModuleList(block("single_blocks", i) for i in range(single))

    def init_for_training(self, generator: torch.Generator | None = None) -> None:
        """The authors' start, see `init_low_rank`."""
        init_low_rank(self, generator)


def published_state(loras: Sequence[ConditionLora]) -> dict[str, Tensor]:
    """Weights of one LoRA per slot, in the published file layout. Scales must be 1, as the layout has no alpha."""
    if any(module.scale != 1.0 for lora in loras for module in lora.modules() if isinstance(module, LowRank)):
        raise ValueError("the published layout has no alpha: fold the scale into 'up' before saving")
    slots = tuple(Slot({key: weight.detach() for key, weight in lora.state_dict().items()}, {}) for lora in loras)
    return write(Checkpoint(slots, loras[0].dim, len(loras[0].double_blocks), len(loras[0].single_blocks)))
