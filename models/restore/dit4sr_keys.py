"""File layout of DiT4SR's control weights: parse, tell the variants apart, write back.

Source: the checkpoints published with DiT4SR, arXiv:2503.23580. A published file holds the whole transformer of Stable
Diffusion 3.5 Medium under the names of diffusers, and in it what DiT4SR adds. For block `i`:

    transformer_blocks.{i}.attn.to_{q,k,v,out}_control.{weight,bias}     [D, D], [D]
    transformer_blocks.{i}.attn2.to_{q,k,v,out}_control.{weight,bias}    the same, where a block has a second attention
    transformer_blocks.{i}.ff.control_conv.{weight,bias}                 [4 D, 1, 3, 3], [4 D]

These are the control weights. A *patch* file holds nothing else, under the same names. It says its variant in the
metadata, see `checkpoint.py`: `{"format": 1, "dit4sr": {"variant": "v1"}}`.

Two variants are published, which differ in the key of the low-resolution stream: v1 takes the picture's own key, r1 has
a projection of its own, `to_k_control`. Training never reaches that projection in v1, where it began at zero. So files
that do not say their variant are v1 where it is zero throughout, and r1 where it is not. A v1 patch may leave it out.

The published second attention also carries layers for a text that it never sees (`attn2.add_*`, `attn2.to_add_out`,
`attn2.norm_added_*`). They are known, counted and left out. A key that fits nowhere refuses the file, and so does one
that is missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from ..checkpoint import NUMBER, Keys, about, checked_weight, described, put, require, shown

Variant = Literal["v1", "r1"]
Asked = Literal["auto", Variant]

SECTION, FORMAT = "dit4sr", 1  # of the metadata
PARTS = ("q", "k", "v", "out")
ATTENTIONS = ("attn", "attn2")
LEAVES = ("weight", "bias")
BLOCK = rf"transformer_blocks\.(?:{NUMBER})"
LINEAR = r"\.(?:weight|bias)"

CONTROL = (
    rf"transformer_blocks\.(?P<block>{NUMBER})\."
    r"(?P<layer>(?P<attention>attn2?)\.to_(?P<part>q|k|v|out)_control|ff\.control_conv)\.(?P<leaf>weight|bias)"
)
UNUSED = rf"{BLOCK}\.attn2\.(?:(?:add_[qkv]_proj|to_add_out){LINEAR}|norm_added_[qk]\.weight)"
BASE = "|".join(
    (
        rf"{BLOCK}\.attn2?\.(?:to_[qkv]|to_out\.0){LINEAR}",
        rf"{BLOCK}\.attn\.(?:add_[qkv]_proj|to_add_out){LINEAR}",
        rf"{BLOCK}\.attn2?\.norm_[qk]\.weight",
        rf"{BLOCK}\.attn\.norm_added_[qk]\.weight",
        rf"{BLOCK}\.(?:norm1|norm1_context)\.linear{LINEAR}",
        rf"{BLOCK}\.(?:ff|ff_context)\.net\.(?:0\.proj|2){LINEAR}",
        rf"pos_embed\.(?:pos_embed|proj{LINEAR})",
        rf"time_text_embed\.(?:timestep|text)_embedder\.linear_[12]{LINEAR}",
        rf"(?:context_embedder|norm_out\.linear|proj_out){LINEAR}",
    )
)
KEYS = Keys(
    "DiT4SR file",
    re.compile(f"{CONTROL}|(?P<unused>{UNUSED})|(?P<base>{BASE})"),
    "transformer_blocks.0.attn.to_q_control.weight",
    ("", "transformer.", "module.", "model."),
    "The base model goes into Load Diffusion Model.",
)


@dataclass(frozen=True)
class Checkpoint:
    """The control weights of a parsed file, for a model with `blocks` blocks of `dim` channels.

    weights: by their names above: the state_dict of `ControlBranch`, but for keys that its variant does without.
    dual: blocks that have a second attention.
    variant: as the file says, or as its weights do.
    base, unused: how many tensors of the base model, and of layers that are never used, the file has beside them.
    """

    weights: dict[str, Tensor]
    dim: int
    blocks: int
    dual: frozenset[int]
    variant: Variant
    prefix: str = ""
    base: int = 0
    unused: int = 0

    @property
    def has_keys(self) -> bool:
        return any(".to_k_control." in name for name in self.weights)

    @property
    def summary(self) -> str:
        millions = sum(weight.numel() for weight in self.weights.values()) / 1e6
        parts = [f"{self.blocks} blocks ({len(self.dual)} with a second attention)", f"hidden size {self.dim}"]
        parts.append(f"{millions:.1f} million control weights")
        if self.base:
            parts.append(f"a whole transformer, whose {self.base} base tensors are left out")
        if self.unused:
            parts.append(f"{self.unused} tensors that DiT4SR never uses are left out, too")
        return ", ".join(parts)

    def used_as(self, variant: Variant) -> dict[str, Tensor]:
        """The state_dict of a `ControlBranch` of this variant."""
        keys = variant == "r1"
        return {name: weight for name, weight in self.weights.items() if keys or ".to_k_control." not in name}


def parse(
    state: Mapping[str, Tensor], name: str = "This file", metadata: Mapping[str, str] | None = None
) -> Checkpoint:
    """Read a checkpoint: a published transformer or a patch.

    Args:
        state: the file's tensors by their published names. Only those of the control weights are looked at, so
            `state` may read each when it is asked for.
        name: what to call the file in an error.
        metadata: the safetensors metadata, texts by key.

    Raises:
        ValueError: no DiT4SR file, an unknown or missing key, or tensors that do not fit each other.
    """
    said = _said_variant(metadata, name)
    prefix = KEYS.prefix(state, name)
    weights: dict[str, Tensor] = {}
    base = unused = blocks = 0
    dual: set[int] = set()
    for key, match in KEYS.find(state, name):
        if match["block"] is None:
            base += match["base"] is not None
            unused += match["unused"] is not None
            continue
        block = int(match["block"])
        blocks = max(blocks, block + 1)
        if match["attention"] == "attn2":
            dual.add(block)
        axes = 1 if match["leaf"] == "bias" else 4 if match["attention"] is None else 2
        put(weights, key[len(prefix) :], checked_weight(state[key], axes, key, name), key, name)
    if not weights:
        raise KEYS.other(state, name)

    has_keys = any(".to_k_control." in key for key in weights)
    if said == "r1" and not has_keys:
        raise ValueError(f"{name} says that it is r1, and has no 'to_k_control'. Get the whole file again.")
    require((prefix + key for key in names(blocks, frozenset(dual), has_keys)), state, name)
    dim = _checked_dim(weights, name)
    variant = said or ("r1" if has_keys and _any_key(weights) else "v1")
    return Checkpoint(weights, dim, blocks, frozenset(dual), variant, prefix, base, unused)


def chosen(checkpoint: Checkpoint, asked: Asked, name: str) -> Variant:
    """The variant to run a file as. "auto" is what it says, or what its weights say.

    Raises:
        ValueError: r1 is asked for, and the file has no weights for it.
    """
    if asked == "r1" and not checkpoint.has_keys:
        raise ValueError(f"{name} is a v1 patch without 'to_k_control', and cannot run as r1. Set 'variant' to auto.")
    return checkpoint.variant if asked == "auto" else asked


def write(weights: Mapping[str, Tensor], variant: Variant) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a patch file.

    Args:
        weights: by their published names: a `ControlBranch`'s state_dict, or those of a parsed file. Keys that v1
            does without are left out.
    """
    kept = {name: w for name, w in weights.items() if variant == "r1" or ".to_k_control." not in name}
    return kept, described(SECTION, {"variant": variant}, FORMAT)


def names(blocks: int, dual: frozenset[int], keys: bool) -> Iterator[str]:
    """The names of all control weights of a model. `keys`: with `to_k_control`."""
    for i in range(blocks):
        for attention in ATTENTIONS[: 2 if i in dual else 1]:
            parts = (part for part in PARTS if keys or part != "k")
            yield from (f"transformer_blocks.{i}.{attention}.to_{p}_control.{leaf}" for p in parts for leaf in LEAVES)
        yield from (f"transformer_blocks.{i}.ff.control_conv.{leaf}" for leaf in LEAVES)


def _said_variant(metadata: Mapping[str, str] | None, name: str) -> Variant | None:
    variant = about(metadata, SECTION, ("variant",), name, FORMAT).get("variant")
    if variant is not None and variant not in get_args(Variant):
        raise ValueError(f"{name} must say 'v1' or 'r1' as its variant, got {shown(variant)}.")
    return variant


def _any_key(weights: Mapping[str, Tensor]) -> bool:
    return any(bool((weight.float() != 0).any()) for key, weight in weights.items() if ".to_k_control." in key)


def _checked_dim(weights: Mapping[str, Tensor], name: str) -> int:
    """Hidden size, once the shape of every tensor follows from it."""
    dim = weights["transformer_blocks.0.attn.to_q_control.weight"].shape[1]
    for key, weight in weights.items():
        expected = (4 * dim, 1, 3, 3) if ".control_conv." in key else (dim, dim)
        expected = expected[:1] if key.endswith(".bias") else expected
        if tuple(weight.shape) != expected:
            raise ValueError(
                f"{name}: {shown(key)} must be {list(expected)} for hidden size {dim}, got {list(weight.shape)}. "
                "The file is damaged; download it again."
            )
    return dim
