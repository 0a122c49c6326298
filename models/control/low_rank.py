"""Low-rank layers beside those of a base model, and the form of their weights in every loader of the pack."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LowRankWeights:
    """One LoRA under the pack's own names: down `[rank, in]`, up `[out, rank]`.

    weights: `"double_blocks.0.q.down.weight"`, ...: the state_dict of its module.
    alphas: `"double_blocks.0.q"` to alpha; other layers have alpha = rank.
    """

    weights: dict[str, Tensor]
    alphas: dict[str, Tensor] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each layer: `{"double_blocks.0.q": 128, ...}`."""
        down = ".down.weight"
        return {key.removesuffix(down): weight.shape[0] for key, weight in self.weights.items() if key.endswith(down)}

    @property
    def scales(self) -> dict[str, float]:
        """alpha / rank of the layers that have an alpha."""
        ranks = self.ranks
        return {layer: float(alpha) / ranks[layer] for layer, alpha in self.alphas.items()}


class LowRank(nn.Module):
    """`scale * up(down(x))`, `[..., dim]` to `[..., out]`, which is `dim` if not given. `scale` is alpha / rank."""

    def __init__(
        self, dim: int, rank: int, scale: float, *, out: int | None = None, operations: Any, device=None, dtype=None
    ):
        super().__init__()
        self.down = operations.Linear(dim, rank, bias=False, device=device, dtype=dtype)
        self.up = operations.Linear(rank, dim if out is None else out, bias=False, device=device, dtype=dtype)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x)) * self.scale


class LoraBlock(nn.ModuleDict):
    """The low-rank layers of one block by part. Without a part, the base model's layer stays as it is.

    Parts of a double block's image stream: q, k, v, proj, mlp_in, mlp_out, mod; of a single block: q, k, v, mlp, out,
    mod. `mlp` are the rows of the fused first projection that feed the MLP, `mod` is the modulation's projection.
    """

    def add(self, part: str, x: Tensor, y: Tensor, strength: float) -> Tensor:
        """A layer's output `y`, given its input `x`, plus `strength` times the LoRA's share: y + s * up(down(x))."""
        return y + strength * self[part](x) if part in self else y


def init_low_rank(lora: nn.Module, generator: torch.Generator | None = None) -> None:
    """down ~ N(0, 1 / rank^2), up = 0, so that training begins at the base model. Source: EasyControl's code."""
    for module in lora.modules():
        if isinstance(module, LowRank):
            nn.init.normal_(module.down.weight, std=1 / module.down.weight.shape[0], generator=generator)
            nn.init.zeros_(module.up.weight)
