"""The attention over a picture's own tokens on ComfyUI's models: take it over, with its arguments in one layout.

Hook: one `optimized_attention_override` per feature, on the run's own options, behind all earlier ones. Features do not
read attention arguments themselves. `take_over` hands them an `OwnAttention`: queries, keys and values of the picture's
own tokens in one layout. It passes all other calls on to the earlier function:

- cross-attention, attention of text alone, and every length but that of the token grid;
- keys beside the model's own, unless they are those of `host/attention.py`, which every token sees;
- masks that differ from query to query. A bias per key stays, as padded text and EasyControl's influence have it.

A feature passes a call on by answering None. `sparse_backends.py` computes the patterns.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...models.accelerate.sparse_attention import Grid, additive
from .. import token_grid
from ..attention import EXTRA_KEYS
from ..compiled import untraced
from ..families import FAMILIES, family_of
from ..offers import Offer, ask
from ..transformer import core_name, stranger

OVERRIDE = "optimized_attention_override"


@dataclass(frozen=True, eq=False)
class OwnAttention:
    """One attention call over the picture's own tokens.

    q: `[B, H, L, d]`. k, v: `[B, H, L + extra, d]`, rotated.
    bias: added to the logits of every key, `[B or 1, H or 1, 1, L + extra]`, or None.
    scale: the model's own factor on the logits, or None for `d^-1/2`.
    layer: names the attention within the model; its first two entries are block type and number if known.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    scale: float | None
    grid: Grid
    layer: tuple[Hashable, ...]
    options: dict  # transformer_options

    @property
    def extra(self) -> int:
        return self.k.shape[2] - self.q.shape[2]


Attend = Callable[[OwnAttention], Tensor | None]


def take_over(model_options: dict, attend: Attend, passed_on: Callable[[str], None] | None = None) -> None:
    """Have `attend` answer the attention of the picture's own tokens in this run, `[B, H, L, d]`, or None to pass on.

    Args:
        passed_on: called with the reason, in words, for each call of self-attention that `attend` does not get.
    """
    token_grid.install(model_options)
    options = model_options["transformer_options"]
    earlier = options.get(OVERRIDE)

    @untraced  # what it finds in the options changes from call to call
    def override(func: Callable, *args: Any, **kwargs: Any) -> Tensor:
        ask(kwargs.get("transformer_options") or {}, "attention override")
        found = own_attention(args, kwargs)
        answer = attend(found) if isinstance(found, OwnAttention) else None
        if answer is not None:
            return answer if kwargs.get("skip_output_reshape") else answer.transpose(1, 2).flatten(2)
        if isinstance(found, str) and passed_on is not None:
            passed_on(found)
        return func(*args, **kwargs) if earlier is None else earlier(func, *args, **kwargs)

    options[OVERRIDE] = override


OTHER_LENGTH = "self-attention of another length than the picture's"


def own_attention(args: tuple, kwargs: dict) -> OwnAttention | str | None:
    """The arguments of ComfyUI's attention in one layout. A reason in words, or None, if other tokens attend."""
    options = kwargs.get("transformer_options") or {}
    tokens: token_grid.Tokens | None = options.get(token_grid.TOKENS)
    if tokens is None or not tokens.grids:
        return "" if tokens is None else tokens.reason
    given = dict(zip(("q", "k", "v", "heads", "mask", "attn_precision", "skip_reshape"), args, strict=False)) | kwargs
    heads, reshaped = given["heads"], given.get("skip_reshape", False)
    q, k, v = (_by_head(given[name], heads, reshaped) for name in "qkv")

    length, keys = q.shape[2], k.shape[2]
    grid = tokens.grid(length)
    if keys < length:
        return None
    if grid is None:  # Flux KV Cache takes the references out after the first evaluation
        return OTHER_LENGTH if length >= min(each.picture for each in tokens.grids) else None
    layer = tokens.layer(options)
    if keys - length != extra_keys(options):
        # Cross-attention to a text longer than the picture looks the same, so no reason is given.
        return None
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    bias = key_bias(given.get("mask"), q, keys)
    if isinstance(bias, str):
        return bias
    return OwnAttention(q, k, v, bias, given.get("scale"), grid, layer, options)


def _by_head(x: Tensor, heads: int, reshaped: bool) -> Tensor:
    """`[B, H, L, d]`, unchanged or from `[B, L, H * d]` or `[B, L, H, d]`, the layout of SD3's values."""
    if reshaped:
        return x
    if x.ndim == 4:
        return x.transpose(1, 2)
    return x.unflatten(2, (-1, x.shape[2] // heads)).transpose(1, 2)


def extra_keys(options: dict) -> int:
    """How many keys `host/attention.py` has put behind those of the running block."""
    block = (options.get("block_type", ""), options.get("block_index", -1))
    given = [keys.conditions for keys in options.get(EXTRA_KEYS, ())]
    return sum(parts[0][block][0].shape[2] for parts in given if all(block in part for part in parts))


def key_bias(mask: Tensor | None, q: Tensor, keys: int) -> Tensor | str | None:
    """A mask as a bias on the logits of each key, `[B or 1, H or 1, 1, keys]`, or in words why it is not one.

    Args:
        mask: in ComfyUI's layout: `[Lq, keys]`, `[B, Lq, keys]` or `[B, H, Lq, keys]`, additive or bool.
    """
    if mask is None:
        return None
    if mask.ndim == 2:
        mask = mask[None]
    if mask.ndim == 3:
        mask = mask[:, None]
    if mask.ndim != 4 or mask.shape[-1] != keys or mask.shape[0] not in (1, q.shape[0]):
        return "an attention mask has an unknown shape"
    if mask.shape[1] not in (1, q.shape[1]):
        return "an attention mask has an unknown shape"
    if mask.shape[2] != 1 and mask.stride(2) != 0:
        return "an attention mask differs from query to query"
    mask = mask[:, :, :1]
    return additive(mask, q.dtype) if mask.dtype == torch.bool else mask


def require_known_tokens(model: ModelPatcher, node: str) -> None:
    """Refuse models whose token order we do not know. `node` is the display name of the node that asks.

    Raises:
        ValueError: such a model.
    """
    if family_of(model).grids is not None:
        return
    who = stranger(model)
    if who is not None:
        raise ValueError(Offer(node, "attention override").refused_by(who))
    *known, last = (family.listed or family.name for family in FAMILIES if family.grids is not None and family.tested)
    raise ValueError(
        f"{node} does not know where the picture's tokens are in a {core_name(model)} model. It works with "
        f"{', '.join(known)} and {last}."
    )
