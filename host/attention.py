"""Where features meet in the attention of FLUX-like models: extra keys, scales on the text's keys, one mask over all.

Features do not patch attention themselves. They hand over what they want for one call of the model (`with_keys`). One
`attn1_patch` puts it together; a run installs it once, behind all earlier patches. Order: the result of earlier
patches, then RoPE, then the scale on the text's own keys, then extra keys and values at the end of the key axis, then
the mask over them all. A feature may also make a call only to record its attention (`with_recorder`), which stays as it
is.

The patch applies RoPE because the extra keys are rotated already, to positions that the model's `pe` does not know. It
then returns `pe=None`. If an earlier patch returned `pe=None`, its queries and keys are rotated already.

It runs in every block, so nothing in it may wait for a GPU: no value is read, no list of numbers becomes a tensor, and
masks are made once for each call of the model.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from comfy.ldm.flux.math import apply_rope, apply_rope1
from torch import Tensor
from torch.nn import functional as F

from ..models.control.conditions import KeysValues
from .compiled import untraced
from .offers import Offer, ask, offer
from .transformer import Block

EXTRA_KEYS = "dit_toolkit.extra_keys"  # in transformer_options: a tuple of ExtraKeys
TEXT_SCALES = "dit_toolkit.text_scales"  # in transformer_options: a tuple of TextScale
RECORDER = "dit_toolkit.recorder"  # in transformer_options: the Recorder that listens
MASKS = "dit_toolkit.masks"  # there too: the masks that the call has made, for the blocks that need the same
OURS = (EXTRA_KEYS, TEXT_SCALES, RECORDER, MASKS)  # all that features hand to one call of the model

KeysByBlock = Mapping[Block, KeysValues]  # each [1 or rows, H, T, d]


@dataclass(frozen=True)
class ExtraKeys:
    """Keys and values that text and picture attend to beside their own, in one call of the model.

    conditions: one entry per condition of the chunk, in its order, all with the same blocks and equally many keys. K
        and V may be made, or fetched, only when a block asks for them.
    log_weight: added to the logits of these keys. 0 is neutral and costs no mask.
    blind: conditions, by number, that do not see these keys. They cost a mask.
    feature: the feature that hands them over, as people call it.
    """

    conditions: Sequence[KeysByBlock]
    log_weight: float = 0.0
    blind: frozenset[int] = field(default_factory=frozenset)
    feature: str = ""


@dataclass(frozen=True)
class TextScale:
    """A factor on the keys of the text's own tokens in some blocks, in one call of the model. The largest wins where
    several features ask for one.

    factors: one per condition of the chunk, in its order. Neutral value: 1.
    """

    blocks: frozenset[Block]
    factors: Sequence[float]


class Recorder(Protocol):
    """Listens to the attention of one call of the model."""

    def record(self, block: Block, k: Tensor, v: Tensor, text: int) -> None:
        """K after QK norm and RoPE and V of a block it wants, `[B, H, L, d]`, the first `text` tokens being text.

        They belong to the model: clone what you keep.
        """

    def wants(self, block: Block) -> bool: ...


def install(model_options: dict) -> None:
    """Put the patch behind all others of this run. Later calls change nothing."""
    patches = model_options["transformer_options"].setdefault("patches", {}).setdefault("attn1_patch", [])
    if append_extra_keys not in patches:
        patches.append(append_extra_keys)


def with_keys(options: dict, keys: ExtraKeys) -> dict:
    """transformer_options of one model call, with `keys` beside those already handed over."""
    if keys.feature:
        options = offer(options, Offer(keys.feature, "attention patch", frozenset(keys.conditions[0])))
    return {**options, EXTRA_KEYS: (*options.get(EXTRA_KEYS, ()), keys), MASKS: {}}


def with_text_scale(options: dict, scale: TextScale) -> dict:
    """transformer_options of one model call, with `scale` beside those already handed over."""
    return {**options, TEXT_SCALES: (*options.get(TEXT_SCALES, ()), scale)}


def with_recorder(options: dict, recorder: Recorder) -> dict:
    """transformer_options of one more model call, which `recorder` records and no other feature of ours touches."""
    return {**{key: value for key, value in options.items() if key not in OURS}, RECORDER: recorder}


@untraced  # what it finds in the options changes from call to call
def append_extra_keys(q: Tensor, k: Tensor, v: Tensor, pe=None, attn_mask=None, extra_options=None) -> dict:
    """attn1_patch of FLUX-like models. q, k, v `[B, H, L, d]`; returns what it changed."""
    options = extra_options or {}
    block: Block = (options.get("block_type", ""), options.get("block_index", -1))
    recorder: Recorder | None = options.get(RECORDER)
    if recorder is not None:
        if recorder.wants(block):
            recorder.record(block, k if pe is None else apply_rope1(k, pe), v, length_of_text(options))
        return {}
    ask(options, "attention patch", block)
    extras = [keys for keys in options.get(EXTRA_KEYS, ()) if all(block in part for part in keys.conditions)]
    scales = [scale.factors for scale in options.get(TEXT_SCALES, ()) if block in scale.blocks]
    factors = [max(each) for each in zip(*scales, strict=True)]
    if not extras and all(factor == 1 for factor in factors):
        return {}

    if pe is not None:
        q, k = apply_rope(q, k, pe)
    added = [[part[block] for part in keys.conditions] for keys in extras]
    weights = [(parts[0][0].shape[2], _log_weights(keys)) for parts, keys in zip(added, extras, strict=True)]
    mask = _mask_of_call(options.get(MASKS), attn_mask, q, k.shape[2], weights)
    v = joined(v, [[own_v for _, own_v in parts] for parts in added])
    k = joined(k, [[own_k for own_k, _ in parts] for parts in added])
    if any(factor != 1 for factor in factors):
        scale_text(k, length_of_text(options), factors)
    return {"q": q, "k": k, "v": v, "pe": None, "attn_mask": mask}


@untraced
def length_of_text(options: dict) -> int:
    """How many tokens of text stand in front of the picture's, as the block says."""
    if "img_slice" not in options:
        raise ValueError(
            "Apply FreeCus needs to know which tokens are the prompt's, and the model's blocks do not say so, because "
            "another node replaced them. Remove that node, or Apply FreeCus."
        )
    return options["img_slice"][0]


def scale_text(k: Tensor, text: int, factors: Sequence[float]) -> None:
    """Multiply the first `text` keys of K `[B, H, L, d]`, in place, by one factor per condition of the batch."""
    for part, factor in zip(k.chunk(len(factors)), factors, strict=True):
        rounded = float(torch.tensor(factor, dtype=k.dtype))  # as a tensor of factors would hold it
        part[:, :, :text].mul_(rounded)


def joined(own: Tensor, extras: Sequence[Sequence[Tensor]]) -> Tensor:
    """Keys or values with the extra ones behind them, in one copy: `[B, H, L + added, d]`.

    Args:
        own: the block's, `[B, H, L, d]`.
        extras: of each feature one for each condition of the batch, `[1 or rows, H, T, d]`.
    """
    length, counts = own.shape[2], [parts[0].shape[2] for parts in extras]
    out = own.new_empty((*own.shape[:2], length + sum(counts), own.shape[3]))
    out[:, :, :length] = own
    for parts, behind in zip(extras, out[:, :, length:].split(counts, dim=2), strict=True):
        for part, rows in zip(parts, behind.chunk(len(parts)), strict=True):
            rows.copy_(part)  # one row is for all pictures of its condition
    return out


Weight = float | tuple[float, ...]  # added to logits: for all rows of a batch, or for each condition in it


def _log_weights(keys: ExtraKeys) -> Weight:
    """The weight to add to the logits of these keys."""
    if not keys.blind:
        return keys.log_weight
    return tuple(float("-inf") if i in keys.blind else keys.log_weight for i in range(len(keys.conditions)))


def _mask_of_call(
    made: dict[Hashable, Any] | None, mask: Tensor | None, q: Tensor, own: int, added: Sequence[tuple[int, Weight]]
) -> Tensor | None:
    """`widen_mask`, once for all blocks of a call that need the same. `made`: what the call has made so far."""
    if made is None:
        return widen_mask(mask, q, own, added)
    key = (id(mask), q.shape[0], q.shape[2], q.dtype, own, *added)
    if key not in made:
        made[key] = mask, widen_mask(mask, q, own, added)  # with the mask, so that its id stays its own
    return made[key][1]


def widen_mask(mask: Tensor | None, q: Tensor, own: int, added: Sequence[tuple[int, Weight]]) -> Tensor | None:
    """The attention mask over `own` keys and the `added` ones behind them.

    Args:
        mask: the model's own, `[..., Lq, own]`: additive, bool (True is seen), or None.
        added: (count, log weight) each.

    Returns:
        None if there is nothing to mask, else `[..., Lq, own + added]`. Every query sees the added keys.
    """
    counts = [n for n, _ in added]
    if all(weight == 0 for _, weight in added):
        return None if mask is None else F.pad(mask, (0, sum(counts)), value=True if mask.dtype == torch.bool else 0.0)

    by_row = any(isinstance(weight, tuple) for _, weight in added)
    weights = q.new_zeros((q.shape[0], 1, 1, own + sum(counts)) if by_row else (own + sum(counts),))
    for (_, weight), behind in zip(added, weights[..., own:].split(counts, dim=-1), strict=True):
        each = weight if isinstance(weight, tuple) else (weight,)
        for value, rows in zip(each, behind.chunk(len(each)) if by_row else (behind,), strict=True):
            rows.fill_(value)
    if mask is None:
        return weights.expand((*weights.shape[:-2], q.shape[2], -1))
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))
    if by_row and mask.ndim == 3:
        mask = mask[:, None]  # [B, 1, Lq, own]
    return F.pad(mask, (0, sum(counts))) + weights.to(mask)


def makes_sparse(description: object) -> bool:
    """Whether a description makes attention sparse: its class says `sparse_attention = True`. A MODEL may have one."""
    return getattr(description, "sparse_attention", False)
