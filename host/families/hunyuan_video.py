"""HunyuanVideo. HunyuanImage runs the same code; we have not run it.

Tokens: text with ByT5 and vision tokens, reference picture, video. Blocks as in FLUX.1; they write into their args. The
model drops a reference's tokens before the head. Between blocks: ControlNet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy.ldm.hunyuan_video.model import HunyuanVideo
from torch import Tensor

from ...models.accelerate.sparse_attention import Grid
from .family import Family, Given, Grids, cells, count, double_and_single_blocks, length_of_text
from .flux import build


def grids(transformer: Any, x: Tensor, text: int, conds: dict) -> Grids:
    patch = tuple(transformer.patch_size)
    *frames, height, width = cells(x.shape[-len(patch) :], patch)
    byt5, vision, reference = (conds.get(name) for name in ("txt_byt5", "clip_fea", "ref_latent"))
    if byt5 is not None and transformer.byt5_in is not None:
        text += byt5.shape[1]
    if vision is not None:
        text += vision.shape[1]
    if reference is not None:
        text += count(reference.shape[-len(patch) :], patch)
    return (Grid(height, width, *frames, before=text),)


def given(transformer: Any, prompt: Mapping[str, Any]) -> Given:
    text = length_of_text(prompt)
    byt5, seen = prompt.get("conditioning_byt5small"), prompt.get("clip_vision_output")
    byt5 = byt5 if transformer.byt5_in is not None else None
    vision = None if seen is None or transformer.vision_in is None else seen.last_hidden_state
    stream = text + sum(x.shape[1] for x in (byt5, vision) if x is not None)
    return Given(text, stream, {"txt_byt5": byt5, "clip_fea": vision, "ref_latent": prompt.get("ref_latent")})


HUNYUAN_VIDEO = Family(
    "HunyuanVideo",
    (HunyuanVideo,),
    grids=grids,
    kinds=double_and_single_blocks(),
    in_place=True,
    build=build,
    given=given,
)
