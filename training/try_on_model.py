"""The embedded default with try-on's two LoRAs, as one plain torch module: to train, and to draw with.

Both conditions are tokens, encoded by the very function that the node runs (`models/control/mc_vton.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dit_toolkit.models.control.conditions import KeysValues, encode_condition
from dit_toolkit.models.control.mc_vton import BranchLora, layers
from dit_toolkit.models.control.mc_vton_keys import BRANCHES, parse
from dit_toolkit.models.control.positions import beside_ids, spatial_ids
from dit_toolkit.models.tiny_text import PAD

from . import checkpoints
from .embedded import Base
from .flux import Flux, apply_rope, attention, patchify, rope

PROMPT = "a doll"
NAME = "try_on/tiny_try_on.safetensors"


class Branches(nn.ModuleDict):
    """The two LoRAs by name."""

    def __init__(self, size, ranks: dict[str, dict[str, int]]):
        made = {
            name: BranchLora(size.hidden, size.double, size.single, ranks.get(name, {}), operations=nn)
            for name in BRANCHES
        }
        super().__init__(made)


def new_branches(size, rank: int, seed: int) -> Branches:
    """Both on all layers that matter, as training starts: the last block gives keys and values only."""
    last = f"single_blocks.{size.single - 1}."
    names = [n for n in layers(size.double, size.single) if not n.startswith(last) or n[-2:] in (".k", ".v")]
    names.append(f"{last}mod")
    loras = Branches(size, dict.fromkeys(BRANCHES, dict.fromkeys(names, rank)))
    for number, name in enumerate(BRANCHES):
        loras[name].init_for_training(torch.Generator().manual_seed(seed + number))
    return loras


def load_try_on(size) -> Branches:
    """The shipped LoRAs in float32."""
    path = checkpoints.WEIGHTS / NAME
    made = parse(load_file(path), path.name)
    loras = Branches(size, {name: branch.ranks for name, branch in made.branches.items()})
    for name, branch in made.branches.items():
        loras[name].load_state_dict({k: v.float() for k, v in branch.weights.items()})
    return loras.requires_grad_(False)


def condition_keys(
    flux: Flux, loras: nn.ModuleDict, person: Tensor, garment: Tensor, pooled: Tensor, guidance: Tensor
) -> list[KeysValues]:
    """Keys and values of every block, the person's tokens and then the garment's.

    Args:
        person, garment: latents `[B, live, h, w]`; the person's is as large as the picture's.
    """
    grid = (person.shape[-2] // 2, person.shape[-1] // 2)
    vec = flux.vec(torch.zeros_like(guidance), guidance, pooled)
    kept = []
    for name, latent, place_of in (("person", person, spatial_ids), ("garment", garment, beside_ids)):
        own = (latent.shape[-2] // 2, latent.shape[-1] // 2)
        pe = rope(place_of(own, grid, latent.device)[None])
        tokens = patchify(latent)
        kept.append(encode_condition(flux, loras[name], tokens, vec, pe, attention=attention, apply_rope=apply_rope))
    return [(torch.cat((k1, k2), 2), torch.cat((v1, v2), 2)) for (k1, v1), (k2, v2) in zip(*kept, strict=True)]


class Dressed(nn.Module):
    """Base and LoRAs in one module, so that one compilation covers both."""

    def __init__(self, base: Base, loras: nn.ModuleDict):
        super().__init__()
        self.base, self.loras = base, loras

    def forward(self, x: Tensor, t: Tensor, ids: Tensor, guidance: Tensor, person: Tensor, garment: Tensor) -> Tensor:
        context, pooled = self.base.text(ids)
        extra = condition_keys(self.base.flux, self.loras, person, garment, pooled, guidance)
        return self.base.flux(x, t, context, pooled, guidance, extra)


def levels_of(steps: int) -> Tensor:
    """Noise levels of ComfyUI's `simple` schedule with Flux's shift 1.15, `[steps + 1]`, from 1 to 0."""
    t, shift = 1 - torch.arange(steps + 1) / steps, math.exp(1.15)
    return torch.where(t > 0, shift / (shift + (1 / t.clamp(min=1e-9) - 1)), torch.zeros(()))


Velocity = Callable[[Tensor, Tensor], Tensor]  # x, noise level [B] -> like x


@torch.no_grad()
def velocity_of(
    model: Base, loras: nn.ModuleDict | None, ids: Tensor, person: Tensor, garment: Tensor, cfg: float
) -> Velocity:
    """The model with both conditions in place, and guidance. `loras` None: without conditions."""
    strength = torch.full((ids.shape[0],), 3.5)
    rows = []
    for words in (ids,) if cfg == 1.0 else (ids, torch.full_like(ids, PAD)):
        context, pooled = model.text(words)
        extra = None if loras is None else condition_keys(model.flux, loras, person, garment, pooled, strength)
        rows.append((context, pooled, extra))

    def velocity(x: Tensor, level: Tensor) -> Tensor:
        found = [model.flux(x, level, context, pooled, strength, extra) for context, pooled, extra in rows]
        return found[0] if len(found) == 1 else found[1] + cfg * (found[0] - found[1])

    return velocity


@torch.no_grad()
def draw(velocity: Velocity, noise: Tensor, levels: Tensor) -> Tensor:
    """Euler from the first level to the last. Live latents `[B, live, h, w]`."""
    x = noise
    for now, then in pairwise(levels):
        x = x + (then - now) * velocity(x, now.expand(x.shape[0]))
    return x
