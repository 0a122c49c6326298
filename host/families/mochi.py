"""Mochi 1.

Tokens: video, then the part of the text that its mask lets through. Blocks: img, txt; they make new tensors, and the
last one hands txt on unchanged. Attention does not know its block. Nothing runs between blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy.ldm.genmo.joint_model.asymm_models_joint import AsymmDiTJoint
from torch import Tensor

from ...models.accelerate.sparse_attention import Grid
from .family import Build, Family, Given, Grids, double_blocks, length_of_text


def grids(transformer: Any, x: Tensor, text: int, conds: dict) -> Grids:
    """ComfyUI refuses sizes that are not a whole number of patches."""
    frames, height, width = x.shape[-3:]
    patch, shown = transformer.patch_size, conds.get("num_tokens", 256)
    return (Grid(height // patch, width // patch, frames, after=min(text, shown)),)


def build(transformer: Any) -> Build:
    widths = {"img": transformer.hidden_size_x, "txt": transformer.hidden_size_y}
    return Build(widths, transformer.num_heads, (len(transformer.blocks),))


def given(transformer: Any, prompt: Mapping[str, Any]) -> Given:
    """How much of the text its mask lets through is a value, and not read: all of it counts."""
    text = length_of_text(prompt)
    return Given(text, text, {"num_tokens": text})


MOCHI = Family(
    "Mochi",
    (AsymmDiTJoint,),
    grids=grids,
    kinds=double_blocks("blocks", "img", "txt"),
    numbered=False,
    build=build,
    given=given,
)
