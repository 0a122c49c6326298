"""QwenImage, Edit included.

Tokens: text, picture, reference pictures. Layers of a picture count as frames. Blocks: img, txt; they make new
tensors. Between them: `double_block` patches (DiffSynth), then ControlNet.
"""

from __future__ import annotations

from typing import Any

from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from torch import Tensor

from ...models.accelerate.sparse_attention import Grid
from .family import Build, Family, Grids, cells, count, double_blocks, of_width, text_and_references


def grids(transformer: Any, x: Tensor, text: int, conds: dict) -> Grids:
    patch = (1, transformer.patch_size, transformer.patch_size)
    frames, height, width = cells(x.shape[-3:], patch)
    references = sum(count(ref.shape[-3:], patch) for ref in conds.get("ref_latents") or ())
    return (Grid(height, width, frames, before=text, after=references),)


def build(transformer: Any) -> Build:
    blocks = transformer.transformer_blocks
    return of_width(transformer.inner_dim, blocks[0].attn.heads, len(blocks))


QWEN_IMAGE = Family(
    "QwenImage",
    (QwenImageTransformer2DModel,),
    grids=grids,
    kinds=double_blocks("transformer_blocks", "img", "txt"),
    build=build,
    given=text_and_references,
)
