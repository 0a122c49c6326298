"""DiT4SR: restore a photo with a stream of its low-resolution picture beside the picture's own.

Source: DiT4SR, arXiv:2503.23580. What the paper leaves open follows the authors' published code. The base is Stable
Diffusion 3.5 Medium, whose block runs a picture X and a text T. DiT4SR runs a third stream L through the same block:
the low-resolution picture, enlarged to the size of the result and encoded. Both streams pass the same patch embedding,
positions and modulation. With n the normalised, modulated input of a stream:

    q, k, v of L   = RMS(W_qc W_q n_L), key, W_vc W_v n_L
    A_X, A_L, A_T  = one softmax over the keys of X, L and T
    X <- X + g W_o A_X                  L <- L + g W_oc (A_L + n_L)         the LR residual
    f_X, f_L       = GELU(W_1 n)        f_X <- f_X + c conv(f_L)            the cross-stream convolution
    X <- X + g W_2 f_X                  L <- L + g W_2 f_L

`conv` is depth-wise, 3 x 3, over the grid of tokens. A second attention, where a block has one, sees X and L only.
Every layer but those with a c is the base model's, so its LoRAs reach L as they reach X.

Two variants are published. The key of L is in r1 `RMS(W_kc W_k n_L)`, as in the paper; in v1 it is the key of X, normed
once more. The wrong one is plainly visible.

Strength s between 0 and 1 is ours. X and T see the keys of L with `log s` added to the logits, so L's share of each
softmax fades to nothing, and the convolution is scaled by s; L itself runs as published. So 1 is the published model, 0
is the base model, and both ends are reached without a jump. It costs two calls of attention in the place of one.
Weights scaled to 0 would not be the base model: tokens without a value still take their share.

Shapes: B batch, N tokens of the picture and of L, M tokens of text, D hidden size, H heads, d head size.
Precision: everything in the dtype of the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from .dit4sr_keys import Variant

CROSS_STREAM_SCALE = 1.2  # c: written into the authors' code for inference
Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # q, k, v [B, L, D], mask [Lq, Lk] -> [B, Lq, D]


class ControlAttention(nn.Module):
    """What DiT4SR adds to one attention. `own_keys`: with the projection of keys that r1 has."""

    def __init__(self, dim: int, own_keys: bool, *, operations: Any, **where: Any):
        super().__init__()
        self.to_q_control = operations.Linear(dim, dim, **where)
        self.to_k_control = operations.Linear(dim, dim, **where) if own_keys else None
        self.to_v_control = operations.Linear(dim, dim, **where)
        self.to_out_control = operations.Linear(dim, dim, **where)


class ControlFeedForward(nn.Module):
    """What DiT4SR adds to an MLP of `4 dim` channels."""

    def __init__(self, dim: int, *, operations: Any, **where: Any):
        super().__init__()
        self.control_conv = operations.Conv2d(4 * dim, 4 * dim, 3, padding=1, groups=4 * dim, **where)


class ControlBlock(nn.Module):
    """What DiT4SR adds to one block. `dual`: to its second attention, too."""

    def __init__(self, dim: int, dual: bool, own_keys: bool, **layers: Any):
        super().__init__()
        self.attn = ControlAttention(dim, own_keys, **layers)
        self.attn2 = ControlAttention(dim, own_keys, **layers) if dual else None
        self.ff = ControlFeedForward(dim, **layers)


class ControlBranch(nn.Module):
    """All that DiT4SR adds to a model. Its state_dict has the published names, see `dit4sr_keys.py`.

    Args:
        dim: hidden size D of the model.
        blocks: how many it has; `dual` are those with a second attention.
        operations: layer classes, ComfyUI's or `torch.nn`.
    """

    def __init__(
        self,
        dim: int,
        blocks: int,
        dual: Collection[int],
        variant: Variant,
        *,
        operations: Any,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        layers = {"operations": operations, "device": device, "dtype": dtype}
        own_keys = variant == "r1"
        self.transformer_blocks = nn.ModuleList(ControlBlock(dim, i in dual, own_keys, **layers) for i in range(blocks))


def joint_block(
    block: Any,
    control: Any,
    img: Tensor,
    lr: Tensor,
    txt: Tensor,
    vec: Tensor,
    grid: tuple[int, int],
    *,
    attention: Attention,
    strength: float = 1.0,
    cross_stream_scale: float = CROSS_STREAM_SCALE,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One block with its third stream. Nothing is written in place.

    Args:
        block: a joint block of SD3.5 under ComfyUI's attribute names: `x_block` and `context_block`.
        control: the `ControlBlock` of the same number.
        img, lr: the picture and the low-resolution stream, `[B, N, D]`.
        txt: the text, `[B, M, D]`.
        vec: what modulates the block, `[B, D]`.
        grid: rows and columns of the picture's tokens, N in all.
        attention: of all heads, with or without a mask that is added to the logits.
        strength: above 0 and at most 1, see above. Neutral value: 1.
        cross_stream_scale: factor c on the convolution.

    Returns:
        The three streams; no text after the last block.
    """
    shared, n = block.x_block, img.shape[1]
    parts = 9 if shared.x_block_self_attn else 6
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, *second = (
        part.unsqueeze(1) for part in shared.adaLN_modulation(vec).chunk(parts, dim=1)
    )
    txt_qkv, txt_rest = block.context_block.pre_attention(txt, vec)
    both = torch.cat([img, lr], 1)  # [B, 2 N, D]
    normed = shared.norm1(both)
    attended, txt_attended = attend(
        shared.attn, control.attn, modulated(normed, shift, scale), n, txt_qkv, attention, strength
    )
    changed = both + gate * attended
    if second:
        shift, scale, gate = second
        seen = modulated(normed, shift, scale)
        changed = changed + gate * attend(shared.attn2, control.attn2, seen, n, None, attention, strength)[0]
    both = changed

    inner = modulated(shared.norm2(both), shift_mlp, scale_mlp)
    both = both + gate_mlp * feed_forward(shared.mlp, control.ff, inner, n, grid, strength * cross_stream_scale)
    text = block.context_block
    return both[:, :n], both[:, n:], None if text.pre_only else text.post_attention(txt_attended, *txt_rest)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, x, 1 + scale)


def attend(
    shared: Any,
    control: Any,
    tokens: Tensor,
    n: int,
    text: tuple[Tensor, Tensor, Tensor] | None,
    attention: Attention,
    strength: float,
) -> tuple[Tensor, Tensor]:
    """One attention of picture, low-resolution stream and, where it takes part, text.

    Args:
        shared: the base model's attention, control: what is added to it.
        tokens: input of picture and low-resolution stream, `[B, 2 N, D]`, the first `n` being the picture's.
        text: its queries, keys and values, each `[B, M, D]` or `[B, M, H, d]`.

    Returns:
        For picture and low-resolution stream, `[B, 2 N, D]`, behind the output projection, and for the text,
        `[B, M, D]`, before it.
    """
    q, k, v = shared.qkv(tokens).chunk(3, dim=2)
    img_q, img_k, img_v = by_head(q[:, :n], shared), by_head(k[:, :n], shared), v[:, :n]
    img_q, img_k = shared.ln_q(img_q), shared.ln_k(img_k)
    lr_q = shared.ln_q(by_head(control.to_q_control(q[:, n:]), shared))
    lr_k = img_k if control.to_k_control is None else by_head(control.to_k_control(k[:, n:]), shared)
    lr_k, lr_v = shared.ln_k(lr_k), control.to_v_control(v[:, n:])

    streams = [(img_q, img_k, img_v), (lr_q, lr_k, lr_v)]
    m = 0 if text is None else text[0].shape[1]
    if text is not None:
        streams = [text, *streams]
    q, k, v = (torch.cat([x.reshape(*x.shape[:2], -1) for x in each], 1) for each in zip(*streams, strict=True))
    if strength < 1:
        bias = torch.cat([q.new_zeros(m + n), q.new_full((n,), math.log(strength))])  # [M + 2 N]
        queries = m + n
        out = attention(q[:, :queries], k, v, bias.expand(queries, -1)), attention(q[:, queries:], k, v, None)
        out = torch.cat(out, 1)
    else:
        out = attention(q, k, v, None)
    lr_out = control.to_out_control(out[:, m + n :] + tokens[:, n:])
    return torch.cat([shared.post_attention(out[:, m : m + n]), lr_out], 1), out[:, :m]


def by_head(x: Tensor, shared: Any) -> Tensor:
    return rearrange(x, "b l (h d) -> b l h d", h=shared.num_heads)


def feed_forward(mlp: Any, control: Any, tokens: Tensor, n: int, grid: tuple[int, int], scale: float) -> Tensor:
    """The MLP of both streams, `[B, 2 N, D]`; `scale` is that of the cross-stream convolution."""
    inner = mlp.act(mlp.fc1(tokens))
    img, lr = inner[:, :n], inner[:, n:]
    h, w = grid
    crossed = control.control_conv(rearrange(lr, "b (h w) c -> b c h w", h=h, w=w))
    return mlp.fc2(torch.cat([img + scale * rearrange(crossed, "b c h w -> b (h w) c"), lr], 1))
