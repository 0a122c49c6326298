"""Let a FLUX.1 model see condition images as extra keys and values, computed once.

Source: EasyControl, arXiv:2503.07027, section 3: condition injection LoRA, causal conditional attention with a KV
cache, position-aware interpolation. What the paper leaves open follows the authors' published code.

A condition image becomes tokens as the picture itself does, and runs through the image branch of every block. Only its
own tokens receive the LoRA, its modulation is that of timestep 0, and it attends to itself alone. So its keys and
values depend on the image, the LoRA, the guidance and the pooled text, and on nothing that changes between steps:

    text and picture:  softmax(Q [K ; K_1 ; ... ; K_m]^T / sqrt(d)) [V ; V_1 ; ... ; V_m]
    condition j:       softmax(Q_j K_j^T / sqrt(d)) V_j

`encode_condition` computes K_j and V_j of every block; whoever runs the model appends them. It asks a block's LoRA for
its share of each layer, so that other methods bring LoRAs of their own (`models/control/mc_vton.py`).

Shapes: B batch, T condition tokens, D hidden size, H heads, d head size.
Precision: everything in the dtype of the tokens; float16 states are cut at +-65504 as in the base model.
Limits: conditions do not see each other. The paper's order of conditions does not matter here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .easycontrol_keys import PARTS, Checkpoint, Slot, layers, write

Grid = tuple[int, int]  # rows and columns of tokens
KeysValues = tuple[Tensor, Tensor]  # of one block, each [B, H, T, d], after QK norm and RoPE
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [B, H, T, d] -> [B, T, H*d]
ApplyRope = Callable[[Tensor, Tensor], Tensor]  # x [B, H, T, d], pe [1, 1, T, d/2, 2, 2] -> like x

SUBJECT_OFFSET = 64  # rows; the authors' constant, the token rows of a 1024 pixel picture
FLOAT16_MAX = 65504.0


def spatial_ids(grid: Grid, picture: Grid, device: torch.device | None = None) -> Tensor:
    """Position ids of a condition that lies over the picture: `[T, 3]` as (0, row, column), float32.

    Position-aware interpolation, section 3.3: token (i, j) of an Rc x Cc grid sits at (i * R / Rc, j * C / Cc) of the
    picture's R x C grid. The authors' code rounds these to bfloat16, by up to 0.125 rows; this does not.
    """
    return grid_ids(grid, (picture[0] / grid[0], picture[1] / grid[1]), device=device)


def tokens_in_tile(grid: Grid, picture: Grid, first: tuple[float, float], tile: Grid) -> Tensor:
    """Numbers of the tokens, of a condition that lies over the picture, that lie in a tile of it: `[T]`.

    Tiles of one size have as many, wherever they lie: the nearest whole tokens.

    Args:
        grid, picture: rows and columns of the condition and of the whole picture, in tokens.
        first: row and column of the picture at which the tile begins. tile: its rows and columns.
    """
    sides = []
    for own, whole, start, length in zip(grid, picture, first, tile, strict=True):
        count = min(max(math.ceil(length * own / whole), 1), own)
        begin = min(round(start * own / whole), own - count)
        sides.append(torch.arange(begin, begin + count))
    rows, columns = sides
    return (rows[:, None] * grid[1] + columns).flatten()


def subject_ids(grid: Grid, picture: Grid, device: torch.device | None = None) -> Tensor:
    """Position ids of a condition that lies beside the picture, below it: `[T, 3]` as (0, row, column), float32.

    The authors add 64 to every row, which meets the picture's own rows where it is taller than 1024 pixels; then this
    uses the picture's height.
    """
    return grid_ids(grid, first=(max(SUBJECT_OFFSET, picture[0]), 0), device=device)


def grid_ids(
    grid: Grid, step: tuple[float, float] = (1.0, 1.0), first: Grid = (0, 0), device: torch.device | None = None
) -> Tensor:
    """Position ids `[T, 3]` of a grid: (0, first + i * step, first + j * step), row by row, float32."""
    rows = torch.arange(grid[0], dtype=torch.float32, device=device) * step[0] + first[0]
    columns = torch.arange(grid[1], dtype=torch.float32, device=device) * step[1] + first[1]
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack((torch.zeros_like(row), row, column), dim=-1).flatten(0, 1)


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
    """The low-rank layers of one block by part. Layers of parts that it lacks stay the base model's.

    Parts of a double block's image stream: q, k, v, proj, mlp_in, mlp_out, mod; of a single block: q, k, v, mlp, out,
    mod. `mlp` are the rows of the fused first projection that feed the MLP, `mod` is the modulation's projection.
    """

    def add(self, part: str, x: Tensor, y: Tensor, strength: float) -> Tensor:
        """A layer's output `y`, given its input `x`, plus `strength` times the LoRA's share: y + s * up(down(x))."""
        return y + strength * self[part](x) if part in self else y


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
        rank: one for all layers, or one per layer name as `Slot.ranks` gives them.
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


def init_low_rank(lora: nn.Module, generator: torch.Generator | None = None) -> None:
    """down ~ N(0, 1 / rank^2), up = 0, so that training begins at the base model. Source: EasyControl's code."""
    for module in lora.modules():
        if isinstance(module, LowRank):
            nn.init.normal_(module.down.weight, std=1 / module.down.weight.shape[0], generator=generator)
            nn.init.zeros_(module.up.weight)


def published_state(loras: Sequence[ConditionLora]) -> dict[str, Tensor]:
    """Weights of one LoRA per slot, in the published file layout. Scales must be 1, as the layout has no alpha."""
    if any(module.scale != 1.0 for lora in loras for module in lora.modules() if isinstance(module, LowRank)):
        raise ValueError("the published layout has no alpha: fold the scale into 'up' before saving")
    slots = tuple(Slot({key: weight.detach() for key, weight in lora.state_dict().items()}, {}) for lora in loras)
    return write(Checkpoint(slots, loras[0].dim, len(loras[0].double_blocks), len(loras[0].single_blocks)))


def encode_condition(
    model: Any,
    lora: nn.Module | None,
    tokens: Tensor,
    vec: Tensor,
    pe: Tensor,
    *,
    attention: Attention,
    apply_rope: ApplyRope,
    strength: float = 1.0,
    keep: Callable[[Tensor], Tensor] | None = None,
) -> list[KeysValues]:
    """Run one condition through the image branch of a FLUX.1 model and return its keys and values.

    Nothing is written in place, so it can be differentiated with respect to everything handed in.

    Args:
        model: anything with FLUX.1's `img_in`, `double_blocks` and `single_blocks` under ComfyUI's attribute names.
        lora: `double_blocks` and `single_blocks` of `LoraBlock`s, one per block of the model, such as `ConditionLora`.
            None leaves plain tokens.
        tokens: patched condition latent, `[B or 1, T, channels of img_in]`.
        vec: modulation vector at timestep 0, with the run's guidance and pooled text, `[B or 1, D]`.
        pe: rotations of the condition's position ids, `[1, 1, T, d/2, 2, 2]`.
        attention: `(q, k, v)`, each `[B, H, T, d]`, to `[B, T, H*d]`.
        apply_rope: `(x, pe)` to `x` rotated.
        strength: factor on the whole LoRA; 0 leaves plain tokens, it does not remove the condition.
        keep: called on each K and V as soon as it is known, for example to move it to another device.

    Returns:
        (K, V) per block, double blocks first, after QK norm and RoPE.
    """
    keep = keep or (lambda x: x)
    kept: list[KeysValues] = []
    for k, v in _blocks(model, lora, tokens, vec, pe, attention, apply_rope, strength):
        kept.append((keep(k), keep(v)))
    return kept


class _Mod(NamedTuple):
    """What a norm is followed by, `[B, 1, D]` each."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


def _blocks(model, lora, tokens, vec, pe, attention, apply_rope, strength) -> Iterator[KeysValues]:
    """Keys and values block by block. The last block stops there: nobody reads the condition's output."""
    doubles = len(model.double_blocks)
    count = doubles + len(model.single_blocks)
    if lora is None:
        double_loras, single_loras = [LoraBlock()] * doubles, [LoraBlock()] * len(model.single_blocks)
    else:
        double_loras, single_loras = lora.double_blocks, lora.single_blocks
    img = model.img_in(tokens)  # [B, T, D]

    for i, (block, low) in enumerate(zip(model.double_blocks, double_loras, strict=True), start=1):
        mod1, mod2 = _modulation(block.img_mod, vec, low, strength)
        x = _modulate(block.img_norm1(img), mod1)
        qkv = block.img_attn.qkv(x)
        q, k, v = _heads(qkv, x, low, strength, block.num_heads, block.img_attn.norm, pe, apply_rope)
        yield k, v
        if i == count:
            return
        attended = attention(q, k, v)
        img = img + mod1.gate * low.add("proj", attended, block.img_attn.proj(attended), strength)
        img = _finite(img + mod2.gate * _mlp(block.img_mlp, _modulate(block.img_norm2(img), mod2), low, strength))

    for i, (block, low) in enumerate(zip(model.single_blocks, single_loras, strict=True), start=doubles + 1):
        mod, _ = _modulation(block.modulation, vec, low, strength)
        x = _modulate(block.pre_norm(img), mod)
        fused = block.linear1(x)
        qkv, hidden = fused[..., : 3 * img.shape[-1]], fused[..., 3 * img.shape[-1] :]
        q, k, v = _heads(qkv, x, low, strength, block.num_heads, block.norm, pe, apply_rope)
        yield k, v
        if i == count:
            return
        joined = torch.cat((attention(q, k, v), block.mlp_act(low.add("mlp", x, hidden, strength))), dim=-1)
        img = _finite(img + mod.gate * low.add("out", joined, block.linear2(joined), strength))


def _heads(qkv, x, low, strength, heads, norm, pe, apply_rope) -> tuple[Tensor, Tensor, Tensor]:
    """Base projection `[B, T, 3D]` plus the LoRA's share of each third, as normalised and rotated heads."""
    thirds = zip(qkv.chunk(3, dim=-1), ("q", "k", "v"), strict=True)
    sums = (low.add(part, x, base, strength) for base, part in thirds)
    q, k, v = (third.unflatten(-1, (heads, -1)).transpose(1, 2) for third in sums)  # [B, H, T, d]
    q, k = norm(q, k, v)
    return apply_rope(q, pe), apply_rope(k, pe), v


def _modulation(layer: Any, vec: Tensor, low: LoraBlock, strength: float) -> tuple[Any, Any]:
    """The block's two modulations; a single block has one, and None. Their projection reads silu(vec)."""
    first, second = layer(vec)
    if "mod" not in low:
        return first, second
    mods = (first,) if second is None else (first, second)
    fused = torch.cat([part for mod in mods for part in (mod.shift, mod.scale, mod.gate)], dim=-1)  # [B, 1, 3D or 6D]
    parts = low.add("mod", F.silu(vec)[:, None], fused, strength).chunk(3 * len(mods), dim=-1)
    return _Mod(*parts[:3]), _Mod(*parts[3:]) if len(mods) == 2 else None


def _mlp(mlp: Any, x: Tensor, low: LoraBlock, strength: float) -> Tensor:
    if "mlp_in" not in low and "mlp_out" not in low:
        return mlp(x)
    first, act, last = mlp
    hidden = act(low.add("mlp_in", x, first(x), strength))
    return low.add("mlp_out", hidden, last(hidden), strength)


def _modulate(x: Tensor, mod: Any) -> Tensor:
    return x * (1 + mod.scale) + mod.shift


def _finite(x: Tensor) -> Tensor:
    return x.clamp(-FLOAT16_MAX, FLOAT16_MAX) if x.dtype == torch.float16 else x
