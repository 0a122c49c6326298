"""Wan 2.1 and 2.2, and two of their relatives, VACE and Camera.

Tokens: reference picture, video, reference videos; text in an attention of its own. Unknown if the text is as long as
the video, since length alone tells the two apart. Blocks: img; txt is the same for all of them. They make new tensors.
Between them: `double_block` patches (Uni3C); in VACE then a block of the control videos, every few blocks.

The first VACE block reads the embedded picture. So a feature that skips the first block of a VACE model with several
control videos must return a clone of `img`. We have not studied the blocks of the other relatives. Wan 2.2 runs the
tested code; we have not run it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy.ldm.wan.model import CameraWanModel, VaceWanModel, WanModel
from torch import Tensor

from ...models.accelerate.sparse_attention import Grid
from .family import Build, Family, Given, Grids, cells, count, double_blocks, length_of_text, of_width


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


def build(transformer: Any) -> Build:
    """The blocks of VACE's control videos attend as many tokens; those of several videos count once."""
    blocks = len(transformer.blocks) + len(getattr(transformer, "vace_blocks", ()))
    return of_width(transformer.dim, transformer.num_heads, blocks)


def given(transformer: Any, prompt: Mapping[str, Any]) -> Given:
    conds = {name: prompt.get(name) for name in ("time_dim_concat", "context_latents")}
    if prompt.get("reference_latents"):
        conds["reference_latent"] = prompt["reference_latents"][-1][:, :, 0]
    if prompt.get("clip_vision_output") is not None:
        conds["clip_fea"] = prompt["clip_vision_output"].penultimate_hidden_states
    return Given(length_of_text(prompt), 0, conds)


ANSWERS: dict[str, Any] = {"grids": grids, "build": build, "given": given}
WAN = Family("Wan", (WanModel,), kinds=double_blocks("blocks", "img"), **ANSWERS)
VACE = Family("Wan VACE", (VaceWanModel,), kinds=double_blocks("blocks", "img"), **ANSWERS)
CAMERA = Family("Wan Camera", (CameraWanModel,), tested=False, **ANSWERS)
