"""Chroma: FLUX.1's blocks under one modulation network.

Tokens: text, picture. Blocks as in FLUX.1, but `vec` changes from block to block too. Between them: ControlNet.
"""

from __future__ import annotations

from typing import Any

from comfy.ldm.chroma.model import Chroma
from torch import Tensor

from ...models.accelerate.sparse_attention import Grid
from .family import Family, Grids, cells, double_and_single_blocks
from .flux import build


def grids(transformer: Any, x: Tensor, text: int, conds: dict) -> Grids:
    patch = (transformer.patch_size, transformer.patch_size)
    return (Grid(*cells(x.shape[-2:], patch), before=text),)


CHROMA = Family("Chroma", (Chroma,), grids=grids, kinds=double_and_single_blocks(), in_place=True, build=build)
