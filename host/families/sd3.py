"""SD3 and SD3.5.

Tokens: text, picture; some blocks have a second attention over the picture alone. Values reach attention by head,
`[B, L, H, d]`, queries and keys flat. Blocks: img, txt; they make new tensors, and after the last one txt is None.
Attention does not know its block. Between blocks: ControlNet.

The second half of this file is for DiT4SR, which needs SD3.5 Medium. All of it goes through the live modules and core's
own functions, so that fp8 weights, offloading and weight patches apply.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import comfy.ops
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
from einops import rearrange
from torch import Tensor

from ...models.accelerate.sparse_attention import Grid
from .family import Build, Family, Given, Grids, Sizes, cells, double_blocks, length_of_text, of_width


def grids(transformer: Any, x: Tensor, text: int, conds: dict) -> Grids:
    """Joint attention, and that of the picture alone. Unknown if another network reads the text first."""
    if transformer.context_processor is not None:
        return ()
    picture = cells(x.shape[-2:], transformer.x_embedder.patch_size)
    return (Grid(*picture, before=text + transformer.register_length), Grid(*picture))


def build(transformer: Any) -> Build:
    _, blocks, dual = sizes(transformer)
    return of_width(transformer.hidden_size, transformer.num_heads, blocks, len(dual))


def given(transformer: Any, prompt: Mapping[str, Any]) -> Given:
    text = length_of_text(prompt)
    return Given(text, text + transformer.register_length, {})


SD3 = Family(
    "SD3",
    (OpenAISignatureMMDITWrapper,),
    listed="SD3.5",
    asked="Stable Diffusion 3.5 Medium",
    grids=grids,
    kinds=double_blocks("joint_blocks", "img", "txt"),
    numbered=False,
    build=build,
    given=given,
)


def sizes(transformer: Any) -> Sizes:
    blocks = transformer.joint_blocks
    dual = frozenset(i for i, block in enumerate(blocks) if block.x_block.x_block_self_attn)
    return Sizes(transformer.hidden_size, len(blocks), dual)


def token_grid(transformer: Any, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of tokens of a latent of this size."""
    rows, columns = cells((height, width), transformer.x_embedder.patch_size)
    return rows, columns


def most_tokens(transformer: Any) -> int | None:
    """Along one side, which the table of positions has room for; None where there is no table."""
    return None if transformer.pos_embed is None else transformer.pos_embed_max_size


def tokens(base: Any, latent: Tensor) -> Tensor:
    """A latent as a VAE gives it, `[B, C, h, w]`, as the model's tokens with their positions, `[B, N, D]`."""
    transformer, dtype = base.diffusion_model, base.get_dtype_inference()
    embedded = transformer.x_embedder(base.process_latent_in(latent).to(dtype))
    positions = transformer.cropped_pos_embed(latent.shape[-2:], device=latent.device)
    return embedded + comfy.ops.cast_to_input(positions, embedded)


def attention(transformer: Any, options: dict) -> Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]:
    """Core's attention as the blocks call it: q, k, v `[B, L, D]`, a mask or None, to `[B, L, D]`."""
    return partial(_attention, heads=transformer.num_heads, transformer_options=options)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **rest: Any) -> Tensor:
    return optimized_attention(q, k, v, mask=mask, **rest)


def control_of_parts(control: dict, transformer: Any, size: tuple[int, int], parts: Sequence[Any]) -> dict:
    """What ControlNets add to the picture's tokens, for a call with `parts` of it side by side in the batch.

    Args:
        control: "output" has `[B, N, D]` or None for each block.
        size: height and width of the whole latent.
        parts: windows of it, at whole tokens.

    Raises:
        ValueError: it adds something else than one value for each token.
    """
    grid, patch = token_grid(transformer, *size), transformer.patch_size

    def cut(added: Tensor | None) -> Tensor | None:
        if added is None:
            return None
        if added.ndim != 3 or added.shape[1] != grid[0] * grid[1]:
            raise ValueError(
                f"Apply DiT4SR cannot cut what a ControlNet adds into tiles: {list(added.shape)} for "
                f"{grid[0]} x {grid[1]} tokens. Remove the ControlNet, or set 'tile' to 0."
            )
        rows = rearrange(added, "b (h w) d -> b d h w", h=grid[0])
        return torch.cat([rearrange(part.of(rows, patch), "b d h w -> b (h w) d") for part in parts])

    return {kind: [cut(added) for added in each] for kind, each in control.items()}
