"""Lumina 2, and Z-Image, which shares its network and pads text and picture to multiples of 32 tokens.

Tokens: text (padded in Z-Image), picture, padding. Unknown with reference pictures. Heads may share keys. ComfyUI calls
no block replacement.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy.ldm.lumina.model import NextDiT
from torch import Tensor

from ...models.accelerate.sparse_attention import Grid
from .family import Build, Family, Given, Grids, cells, length_of_text, of_width


def grids(transformer: Any, x: Tensor, text: int, conds: dict) -> Grids:
    if any(len(conds.get(name) or ()) for name in ("ref_latents", "ref_contexts", "siglip_feats")):
        return ()
    height, width = cells(x.shape[-2:], (transformer.patch_size, transformer.patch_size))
    multiple = transformer.pad_tokens_multiple or 1
    return (Grid(height, width, before=text + -text % multiple, after=-(height * width) % multiple),)


def build(transformer: Any) -> Build:
    return of_width(transformer.dim, transformer.n_heads, len(transformer.layers))


def given(transformer: Any, prompt: Mapping[str, Any]) -> Given:
    names = {"reference_latents": "ref_latents", "clip_vision_outputs": "siglip_feats"}
    names["reference_latents_text_embeds"] = "ref_contexts"
    conds = {ours: prompt.get(core) for core, ours in names.items()}
    return Given(length_of_text(prompt), length_of_text(prompt), conds)


def pads(transformer: Any) -> bool:
    return transformer.pad_tokens_multiple is not None


ANSWERS: dict[str, Any] = {"grids": grids, "build": build, "given": given}
Z_IMAGE = Family("Z-Image", (NextDiT,), pads, **ANSWERS)
LUMINA2 = Family("Lumina 2", (NextDiT,), lambda transformer: not pads(transformer), **ANSWERS)
