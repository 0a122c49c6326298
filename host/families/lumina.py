"""Lumina 2, and Z-Image, which shares its network and pads text and picture to multiples of 32 tokens.

Tokens: text (padded in Z-Image), picture, padding. Unknown with reference pictures. Heads may share keys. ComfyUI calls
no block replacement.
"""

from __future__ import annotations

from typing import Any

from comfy.ldm.lumina.model import NextDiT
from torch import Tensor

from ...models.accelerate.sparse_attention import Grid
from .family import Family, Grids, cells


def grids(transformer: Any, x: Tensor, text: int, conds: dict) -> Grids:
    if any(len(conds.get(name) or ()) for name in ("ref_latents", "ref_contexts", "siglip_feats")):
        return ()
    height, width = cells(x.shape[-2:], (transformer.patch_size, transformer.patch_size))
    multiple = transformer.pad_tokens_multiple or 1
    return (Grid(height, width, before=text + -text % multiple, after=-(height * width) % multiple),)


def pads(transformer: Any) -> bool:
    return transformer.pad_tokens_multiple is not None


Z_IMAGE = Family("Z-Image", (NextDiT,), pads, grids=grids)
LUMINA2 = Family("Lumina 2", (NextDiT,), lambda transformer: not pads(transformer), grids=grids)
