"""QwenImage, Edit included.

Tokens: text, picture, reference pictures. Layers of a picture count as frames. Blocks: img, txt; they make new
tensors. Between them: `double_block` patches (DiffSynth), then ControlNet.
"""

from __future__ import annotations

from typing import Any

from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from torch import Tensor

from ...models.accelerate.sparse_attention import Grid
from .family import Family, Grids, cells, count, double_blocks


def grids(transformer: Any, x: Tensor, text: int, conds: dict) -> Grids:
    patch = (1, transformer.patch_size, transformer.patch_size)
    frames, height, width = cells(x.shape[-3:], patch)
    references = sum(count(ref.shape[-3:], patch) for ref in conds.get("ref_latents") or ())
    return (Grid(height, width, frames, before=text, after=references),)


QWEN_IMAGE = Family(
    "QwenImage",
    (QwenImageTransformer2DModel,),
    grids=grids,
    kinds=double_blocks("transformer_blocks", "img", "txt"),
)
