"""Low-rank weights as every loader of the pack keeps them, whatever the file they come from."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class LowRankWeights:
    """One LoRA under the pack's own names: down `[rank, in]`, up `[out, rank]`.

    weights: `"double_blocks.0.q.down.weight"`, ...: the state_dict of its module.
    alphas: `"double_blocks.0.q"` to alpha; layers that are not here have alpha = rank.
    """

    weights: dict[str, Tensor]
    alphas: dict[str, Tensor] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each layer that is there: `{"double_blocks.0.q": 128, ...}`."""
        down = ".down.weight"
        return {key.removesuffix(down): weight.shape[0] for key, weight in self.weights.items() if key.endswith(down)}

    @property
    def scales(self) -> dict[str, float]:
        """alpha / rank of the layers that have an alpha."""
        ranks = self.ranks
        return {layer: float(alpha) / ranks[layer] for layer, alpha in self.alphas.items()}
