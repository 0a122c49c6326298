"""Try-on after MC-VTON: a masked person and a garment as tokens with a LoRA each.

Source: MC-VTON, arXiv:2501.03630: a FLUX.1 transformer without reference network or image encoder. Its own VAE and
blocks process both conditions, and training changes low-rank weights only. No code and no weights are public. This is a
reconstruction. Our choices where the paper leaves them open:

- Each branch has a LoRA that acts on its own tokens only; picture and text keep the base weights. It is an ordinary
  LoRA, `y = W x + b + s B A x` on the layer's input (EasyControl's `proj` is not). The file sets layers and ranks.
- The masked person lies over the picture (`positions.spatial_ids`). The garment lies beside it, as a diptych
  (`positions.beside_ids`), or below it (`positions.subject_ids`).
- Conditions are modulated at timestep 0 and attend to themselves alone, so `conditions.encode_condition` computes their
  keys and values once per run. We have not built joint attention, in which the conditions see the picture and run at
  every step.

Shapes: B batch, T condition tokens, D hidden size, M hidden size of the MLP.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .low_rank import LoraBlock, LowRank, init_low_rank
from .mc_vton_keys import PARTS, Branch, widths


class BranchLora(nn.Module):
    """The low-rank weights of one branch, for `conditions.encode_condition`. Blocks and layers may be missing.

    Args:
        dim: hidden size D of the model.
        double, single: number of blocks of the model.
        ranks: rank of each layer by name as in `Branch.ranks`; other layers stay the base model's.
        scales: alpha / rank of the layers where it is not 1.
        hidden: hidden size M of the MLP, 4 D if not given.
        operations: layer classes, ComfyUI's or `torch.nn`.

    Raises:
        ValueError: a layer that the model does not have.
    """

    def __init__(
        self,
        dim: int,
        double: int,
        single: int,
        ranks: Mapping[str, int],
        scales: Mapping[str, float] | None = None,
        *,
        hidden: int | None = None,
        operations: Any,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        unknown = ranks.keys() - set(layers(double, single))
        if unknown:
            raise ValueError(f"a model of {double}+{single} blocks has no layer '{min(unknown)}'")

        def layer(name: str) -> LowRank:
            into, out = widths(name, dim, hidden or 4 * dim)
            scale = (scales or {}).get(name, 1.0)
            return LowRank(into, ranks[name], scale, out=out, operations=operations, device=device, dtype=dtype)

        def block(stream: str, i: int) -> LoraBlock:
            names = {part: f"{stream}.{i}.{part}" for part in PARTS[stream]}
            return LoraBlock({part: layer(name) for part, name in names.items() if name in ranks})

        self.dim = dim
        self.double_blocks = nn.ModuleList(block("double_blocks", i) for i in range(double))
        self.single_blocks = nn.ModuleList(block("single_blocks", i) for i in range(single))

    def init_for_training(self, generator: torch.Generator | None = None) -> None:
        """Start at the base model, see `low_rank.init_low_rank`."""
        init_low_rank(self, generator)

    def branch(self) -> Branch:
        """Its weights in a file's form, with an alpha where the scale is not 1."""
        alphas = {
            name: torch.tensor(module.scale * module.down.weight.shape[0])
            for name, module in self.named_modules()
            if isinstance(module, LowRank) and module.scale != 1.0
        }
        return Branch({key: weight.detach() for key, weight in self.state_dict().items()}, alphas)


def layers(double: int, single: int) -> list[str]:
    """Names of all layers that a branch may have, for a model with this many blocks."""
    counts = (("double_blocks", double), ("single_blocks", single))
    return [f"{stream}.{i}.{part}" for stream, count in counts for i in range(count) for part in PARTS[stream]]
