"""Where features meet in the attention of FLUX-like models: extra keys, and what is to come of masks and patterns.

Features do not patch attention themselves. They hand over what they want for one call of the model (`with_keys`), and
one `attn1_patch`, installed once per run behind every patch that was there before, puts it together. Order: what
earlier patches return, then RoPE, then extra keys and values at the end of the key axis, then the mask over them all.

RoPE moves in here because the extra keys are rotated already, to other positions than the model's `pe` knows; the
patch then returns `pe=None`. An earlier patch may have done so before: its queries and keys are rotated then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import comfy.model_management
import torch
from comfy.ldm.flux.math import apply_rope
from torch import Tensor
from torch.nn import functional as F

from .compiled import untraced

EXTRA_KEYS = "dit_toolkit.extra_keys"  # in transformer_options: a tuple of ExtraKeys

Block = tuple[str, int]  # ("double" or "single", number), as ComfyUI's block_type and block_index
BlockKeys = Mapping[Block, tuple[Tensor, Tensor]]  # K and V, each [1 or rows, H, T, d], normalised and rotated


@dataclass(frozen=True)
class ExtraKeys:
    """Keys and values that text and picture attend to beside their own, in one call of the model.

    conditions: one entry per condition of the chunk, in its order. K and V may lie on another device.
    log_weight: added to the logits of these keys. 0 is neutral and costs no mask.
    """

    conditions: Sequence[BlockKeys]
    log_weight: float = 0.0


def install(model_options: dict) -> None:
    """Put the patch behind all others of this run. Once is enough, however many features ask."""
    patches = model_options["transformer_options"].setdefault("patches", {}).setdefault("attn1_patch", [])
    if append_extra_keys not in patches:
        patches.append(append_extra_keys)


def with_keys(options: dict, keys: ExtraKeys) -> dict:
    """transformer_options of one model call, with `keys` beside those already handed over."""
    return {**options, EXTRA_KEYS: (*options.get(EXTRA_KEYS, ()), keys)}


@untraced  # what it finds in the options changes from call to call
def append_extra_keys(q: Tensor, k: Tensor, v: Tensor, pe=None, attn_mask=None, extra_options=None) -> dict:
    """attn1_patch of FLUX-like models. q, k, v `[B, H, L, d]`; returns what it changed."""
    options = extra_options or {}
    block: Block = (options.get("block_type", ""), options.get("block_index", -1))
    extras = [keys for keys in options.get(EXTRA_KEYS, ()) if all(block in part for part in keys.conditions)]
    if not extras:
        return {}

    if pe is not None:
        q, k = apply_rope(q, k, pe)
    added = [_rows(keys, block, k) for keys in extras]
    counts = [(part.shape[2], keys.log_weight) for (part, _), keys in zip(added, extras, strict=True)]
    mask = widen_mask(attn_mask, q, k.shape[2], counts)
    k = torch.cat([k, *[part for part, _ in added]], dim=2)
    v = torch.cat([v, *[part for _, part in added]], dim=2)
    return {"q": q, "k": k, "v": v, "pe": None, "attn_mask": mask}


def _rows(keys: ExtraKeys, block: Block, like: Tensor) -> tuple[Tensor, Tensor]:
    """K and V for every row of the batch: conditions one after the other, one row broadcast over its pictures."""
    rows = like.shape[0] // len(keys.conditions)
    eager = comfy.model_management.device_supports_non_blocking(like.device)
    moved = [[x.to(like, non_blocking=eager).expand(rows, -1, -1, -1) for x in part[block]] for part in keys.conditions]
    if len(moved) == 1:
        return moved[0][0], moved[0][1]
    return torch.cat([k for k, _ in moved]), torch.cat([v for _, v in moved])


def widen_mask(mask: Tensor | None, q: Tensor, own: int, added: Sequence[tuple[int, float]]) -> Tensor | None:
    """The attention mask over `own` keys and those added behind them, given as (count, log weight).

    Args:
        mask: what came in, `[..., Lq, own]`: additive, bool (True is seen), or None.

    Returns:
        None where there is nothing to mask, else `[..., Lq, own + added]`. Added keys are visible to every row.
    """
    count = sum(n for n, _ in added)
    if all(weight == 0 for _, weight in added):
        return None if mask is None else F.pad(mask, (0, count), value=True if mask.dtype == torch.bool else 0.0)

    weights = torch.cat([q.new_zeros(own), *[q.new_full((n,), weight) for n, weight in added]])  # [own + added]
    if mask is None:
        return weights.expand(q.shape[2], -1)
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))
    return F.pad(mask, (0, count)) + weights.to(mask)
