"""Wan 2.1 and 2.2, and two of their relatives, VACE and Camera.

Tokens: reference picture, video, reference videos; text in an attention of its own. Unknown if the text is as long as
the video, since length alone tells the two apart. Blocks: img; txt is the same for all of them. They make new tensors.
Between them: `double_block` patches (Uni3C); in VACE then a block of the control videos, every few blocks.

The first VACE block reads the embedded picture. So a feature that skips the first block of a VACE model with several
control videos must return a clone of `img`. We have not studied the blocks of the other relatives. Wan 2.2 runs the
tested code; we have not run it.
"""

from __future__ import annotations

from typing import Any

from comfy.ldm.wan.model import CameraWanModel, VaceWanModel, WanModel
from torch import Tensor

from ...models.accelerate.sparse_attention import Grid
from .family import Family, Grids, cells, count, double_blocks


def grids(transformer: Any, x: Tensor, text: int, conds: dict) -> Grids:
    frames, height, width = cells(x.shape[-3:], transformer.patch_size)
    more = conds.get("time_dim_concat")
    if more is not None:
        frames += cells(more.shape[-3:], transformer.patch_size)[0]
    reference = conds.get("reference_latent")
    before = 0
    if reference is not None and transformer.ref_conv is not None:
        before = count(reference.shape[-2:], transformer.patch_size[1:])
    after = sum(count(ref.shape[-3:], transformer.patch_size) for ref in conds.get("context_latents") or ())
    grid = Grid(height, width, frames, before=before, after=after)
    return () if grid.length in _other_lengths(transformer, text, conds.get("clip_fea")) else (grid,)


def _other_lengths(transformer: Any, text: int, clip: Tensor | None) -> set[int]:
    """Lengths that attention over text and a picture's features may have."""
    lengths = {text, max(text, transformer.text_len)}
    return lengths if clip is None else lengths | {clip.shape[-2]} | {n + clip.shape[-2] for n in lengths}


WAN = Family("Wan", (WanModel,), grids=grids, kinds=double_blocks("blocks", "img"))
VACE = Family("Wan VACE", (VaceWanModel,), grids=grids, kinds=double_blocks("blocks", "img"))
CAMERA = Family("Wan Camera", (CameraWanModel,), tested=False, grids=grids)
