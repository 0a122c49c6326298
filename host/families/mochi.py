"""Mochi 1.

Tokens: video, then the part of the text that its mask lets through. Blocks: img, txt; they make new tensors, and the
last one hands txt on unchanged. Attention does not know its block. Nothing runs between blocks.
"""

from __future__ import annotations

from typing import Any

from comfy.ldm.genmo.joint_model.asymm_models_joint import AsymmDiTJoint
from torch import Tensor

from ...models.accelerate.sparse_attention import Grid
from .family import Family, Grids, double_blocks


def grids(transformer: Any, x: Tensor, text: int, conds: dict) -> Grids:
    """ComfyUI refuses sizes that are not a whole number of patches."""
    frames, height, width = x.shape[-3:]
    patch, shown = transformer.patch_size, conds.get("num_tokens", 256)
    return (Grid(height // patch, width // patch, frames, after=min(text, shown)),)


MOCHI = Family("Mochi", (AsymmDiTJoint,), grids=grids, kinds=double_blocks("blocks", "img", "txt"), numbered=False)
