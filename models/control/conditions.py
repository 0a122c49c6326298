"""Run a condition image through a FLUX.1 model once, and keep its keys and values for the picture to attend to.

Source: EasyControl, arXiv:2503.07027, section 3: causal conditional attention with a KV cache. Where the paper leaves a
choice, we follow the authors' published code.

A condition image becomes tokens as the picture does, and runs through the image branch of every block. The LoRA acts on
its own tokens only, its modulation is that of timestep 0, and it attends to itself alone. So its keys and values depend
on the image, the LoRA, the guidance and the pooled text, and on nothing that changes between steps:

    text and picture:  softmax(Q [K ; K_1 ; ... ; K_m]^T / sqrt(d)) [V ; V_1 ; ... ; V_m]
    condition j:       softmax(Q_j K_j^T / sqrt(d)) V_j

`encode_condition` computes K_j and V_j of every block; its caller appends them to the model's own. Each method brings
its own LoRA, which adds its share to each layer: `easycontrol.py`, `mc_vton.py`. `positions.py` has the tokens'
positions.

Shapes: B batch, T condition tokens, D hidden size, H heads, d head size.
Precision: everything in the dtype of the tokens; float16 states are cut at +-65504 as in the base model.
Limits: conditions do not see each other, so the paper's order of conditions does not matter here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .low_rank import LoraBlock

KeysValues = tuple[Tensor, Tensor]  # of one block, each [B, H, T, d], after QK norm and RoPE
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [B, H, T, d] -> [B, T, H*d]
ApplyRope = Callable[[Tensor, Tensor], Tensor]  # x [B, H, T, d], pe [1, 1, T, d/2, 2, 2] -> like x

FLOAT16_MAX = 65504.0


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
    store: Callable[[Tensor], Any] | None = None,
    each: Callable[[Iterator[KeysValues], int], Iterator[KeysValues]] = lambda blocks, count: blocks,
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
        store: called on each K and V as soon as it is known. What it returns stands for the tensor in the result.
        each: walks over the blocks, whose number it gets.

    Returns:
        (K, V) per block, double blocks first, after QK norm and RoPE.
    """
    store = store or (lambda x: x)
    kept: list[KeysValues] = []
    blocks = _blocks(model, lora, tokens, vec, pe, attention, apply_rope, strength)
    for k, v in each(blocks, len(model.double_blocks) + len(model.single_blocks)):
        kept.append((store(k), store(v)))
    return kept


class _Mod(NamedTuple):
    """The modulation behind a norm, `[B, 1, D]` each."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


def _blocks(model, lora, tokens, vec, pe, attention, apply_rope, strength) -> Iterator[KeysValues]:
    """Keys and values block by block. The last block stops there, because nothing reads the condition's output."""
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
