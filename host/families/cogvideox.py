"""CogVideoX. Tokens: text, video. Attention does not know its block. ComfyUI calls no block replacement."""

from __future__ import annotations

from typing import Any

from comfy.ldm.cogvideo.model import CogVideoXTransformer3DModel
from torch import Tensor

from ...models.accelerate.sparse_attention import Grid
from .family import Family, Grids, cells


def grids(transformer: Any, x: Tensor, text: int, conds: dict) -> Grids:
    patch = (transformer.patch_size_t or 1, transformer.patch_size, transformer.patch_size)
    frames, height, width = cells(x.shape[-3:], patch)
    return (Grid(height, width, frames, before=text),)


COGVIDEOX = Family("CogVideoX", (CogVideoXTransformer3DModel,), grids=grids, numbered=False)
