"""CogVideoX. Tokens: text, video. Attention does not know its block. ComfyUI calls no block replacement.

The second half of this file is for DynamiCtrl. All of it goes through the live modules, so that fp8 weights, offloading
and weight patches apply.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.ldm.common_dit
import torch
from comfy.ldm.cogvideo.model import CogVideoXTransformer3DModel
from torch import Tensor

from ...models.accelerate.sparse_attention import Grid
from ..compiled import untraced
from ..transformer import transformer_of
from .family import Build, Family, Grids, Sizes, cells, of_width


def grids(transformer: Any, x: Tensor, text: int, conds: dict) -> Grids:
    patch = (transformer.patch_size_t or 1, transformer.patch_size, transformer.patch_size)
    frames, height, width = cells(x.shape[-3:], patch)
    return (Grid(height, width, frames, before=text),)


def build(transformer: Any) -> Build:
    return of_width(transformer.dim, transformer.num_attention_heads, len(transformer.blocks))


COGVIDEOX = Family("CogVideoX", (CogVideoXTransformer3DModel,), grids=grids, numbered=False, build=build)

AddToNorm = Callable[
    [int, Tensor, Tensor], Tensor
]  # block, norm1 of its video `[B, N, D]`, e `[B, E]`: what it becomes


def sizes(transformer: Any) -> Sizes:
    return Sizes(transformer.dim, len(transformer.blocks))


def frames_per_token(transformer: Any) -> int:
    """Latent frames in one token: 2 in CogVideoX 1.5, else 1."""
    return transformer.patch_size_t or 1


def tokens(base: Any, latent: Tensor, text_width: int) -> Tensor:
    """A latent as a VAE gives it, `[B, C, T, h, w]`, as the model's video tokens with their positions, `[B, N, D]`.

    Models that take more channels than a latent has get it more than once, as DynamiCtrl's authors do.

    Args:
        text_width: channels of the model's text. The patch embedding wants one, so it gets a token of zeros.
    """
    transformer, dtype = transformer_of(base), base.get_dtype_inference()
    patch = (frames_per_token(transformer), transformer.patch_size, transformer.patch_size)
    video = comfy.ldm.common_dit.pad_to_patch_size(base.process_latent_in(latent).to(dtype), patch)
    video = video.repeat(1, transformer.in_channels // latent.shape[1], 1, 1, 1)
    text = video.new_zeros(len(video), 1, text_width)
    return transformer.patch_embed(text, video.movedim(2, 1))[:, 1:]


def override_norms(transformer: Any, add: AddToNorm) -> Callable[[], None]:
    """Let `add` change what `norm1` of every block gives for the video. Returns what undoes it.

    Each module's own `forward` still runs, or whatever another pack has put in its place. No module is replaced, so
    names of weights, LoRAs and offloading stay as they are.
    """
    norms = [getattr(block, "_orig_mod", block).norm1 for block in transformer_of(transformer).blocks]
    before = [vars(norm).get("forward") for norm in norms]

    def overridden(i: int, forward: Callable) -> Callable:
        @untraced  # `add` changes from call to call
        def changed(hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor) -> tuple[Tensor, ...]:
            video, *rest = forward(hidden_states, encoder_hidden_states, temb)
            return add(i, video, temb), *rest

        return changed

    for i, norm in enumerate(norms):
        norm.forward = overridden(i, norm.forward)

    def undo() -> None:
        for norm, earlier in zip(norms, before, strict=True):
            if earlier is None:
                vars(norm).pop("forward", None)
            else:
                norm.forward = earlier

    return undo


def frames_of(window: Any) -> list[int]:
    """The latent frames of a context window in the order of its tensors, ComfyUI's anchor frame in front."""
    anchor = getattr(window, "causal_anchor_index", None)
    return [*([anchor] if anchor is not None and anchor >= 0 else []), *window.index_list]


def narrowed(latent: Tensor, area: tuple[int, ...] | None) -> Tensor:
    """An area of a latent as ComfyUI cuts it: along the axes behind the channels, sizes first and then starts."""
    sides = len(area or ()) // 2
    for axis in range(sides):
        assert area is not None
        latent = latent.narrow(axis + 2, area[axis + sides], area[axis])
    return latent


def whole_pairs(frames: list[int]) -> bool:
    """Whether frames come in pairs (0, 1), (2, 3), ..., as CogVideoX 1.5 was trained on them."""
    pairs = torch.tensor(frames[: len(frames) // 2 * 2]).view(-1, 2)
    return len(frames) % 2 == 0 and bool((pairs[:, 0] % 2 == 0).all()) and bool((pairs.diff(dim=1) == 1).all())
