"""LTX video, without sound.

Tokens: video; text in an attention of its own. Unknown with keyframes, or if the text is as long as the video. Blocks:
img; txt is the same for all of them. They write into their args. Attention does not know its block. Nothing runs
between blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy.ldm.lightricks.model import LTXVModel
from torch import Tensor

from ...models.accelerate.sparse_attention import Grid
from .family import Build, Family, Given, Grids, double_blocks, length_of_text, of_width


def grids(transformer: Any, x: Tensor, text: int, conds: dict) -> Grids:
    keyframes = conds.get("keyframe_idxs")
    if x.ndim != 5 or (keyframes is not None and keyframes.shape[2] > 0):
        return ()
    frames, height, width = x.shape[-3:]
    grid = Grid(height, width, frames)
    return () if grid.length == text else (grid,)


def build(transformer: Any) -> Build:
    return of_width(transformer.inner_dim, transformer.num_attention_heads, len(transformer.transformer_blocks))


def given(transformer: Any, prompt: Mapping[str, Any]) -> Given:
    return Given(length_of_text(prompt), 0, {"keyframe_idxs": prompt.get("keyframe_idxs")})


LTX = Family(
    "LTX video",
    (LTXVModel,),
    grids=grids,
    kinds=double_blocks("transformer_blocks", "img"),
    in_place=True,
    numbered=False,
    build=build,
    given=given,
)
