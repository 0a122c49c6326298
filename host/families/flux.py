"""FLUX.1 with Kontext and Fill, and the models that share its code: FLUX.2, LongCat and Ovis. Chroma has its own file.

Tokens: text, picture, reference pictures. Double blocks: img, txt. Single blocks: img, which is text and picture
joined, text first. Blocks write into their args. Between them: ControlNet. In float16 the model replaces infinities
between double and single blocks, which `Family.joined` does not.

Below the families stand answers that only FLUX.1 gives, to EasyControl, FreeCus, try-on and the step caches: tokens,
positions, modulation and the parts of a block. They go through the live modules and core's own functions, so that fp8
and GGUF weights, offloading, weight patches and RoPE options apply.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from comfy.ldm.flux.layers import timestep_embedding
from comfy.ldm.flux.math import apply_rope1
from comfy.ldm.flux.model import Flux
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor
from torch.nn import functional as F

from ...models.accelerate.sparse_attention import Grid
from ..attention import KeysByBlock, KeysValues
from ..transformer import Block, class_of, transformer_of
from .family import (
    Build,
    Family,
    Given,
    Grids,
    cells,
    count,
    double_and_single_blocks,
    of_width,
    text_and_references,
)

apply_rope = apply_rope1  # (x, pe) to x rotated


def grids(transformer: Any, x: Tensor, text: int, conds: dict) -> Grids:
    """Text, picture, reference pictures."""
    patch = (transformer.patch_size, transformer.patch_size)
    references = sum(count(ref.shape[-2:], patch) for ref in conds.get("ref_latents") or ())
    return (Grid(*cells(x.shape[-2:], patch), before=text, after=references),)


def build(transformer: Any) -> Build:
    blocks = len(transformer.double_blocks) + len(transformer.single_blocks)
    return of_width(transformer.hidden_size, transformer.num_heads, blocks)


PADDED = 512  # core pads FLUX.2's text to so many tokens


def given_padded(transformer: Any, prompt: Mapping[str, Any]) -> Given:
    text, _, conds = text_and_references(transformer, prompt)
    return Given(max(text, PADDED), max(text, PADDED), conds)


def like_flux1(transformer: Any) -> bool:
    """Own modulation per block, pooled text, 2 x 2 patches."""
    p = transformer.params
    others = p.global_modulation or p.yak_mlp or p.txt_norm or p.mlp_silu_act
    return not others and p.vec_in_dim is not None and p.patch_size == 2


def like_flux2(transformer: Any) -> bool:
    """One modulation for all blocks."""
    return not like_flux1(transformer) and transformer.params.global_modulation


FLUX1 = Family(
    "FLUX.1",
    (Flux,),
    like_flux1,
    listed="FLUX.1 (dev, Fill, Kontext)",
    grids=grids,
    kinds=double_and_single_blocks(),
    in_place=True,
    build=build,
    given=text_and_references,
)
FLUX2 = replace(FLUX1, name="FLUX.2", among=like_flux2, listed="", given=given_padded)
LIKE_FLUX = replace(  # the rest
    FLUX1, name="LongCat or Ovis", among=lambda transformer: True, listed="", tested=False
)


def is_flux1(model: Any) -> bool:
    """FLUX.1 dev, schnell, Fill, Kontext and fine-tunes: own modulation per block, pooled text, 2 x 2 patches.

    Args:
        model: a MODEL, a running BaseModel, or its transformer.
    """
    return issubclass(class_of(model), Flux) and like_flux1(transformer_of(model))


def grid_size(transformer: Flux, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of tokens of a latent of this size; odd sizes are padded up, as the model does."""
    patch = transformer.patch_size
    return (height + patch // 2) // patch, (width + patch // 2) // patch


def latent_tokens(base: Any, latent: Tensor, channels: int) -> Tensor:
    """A latent as a VAE gives it, `[N, C, h, w]`, as tokens `[N, T, channels * 4]` in the model's scale.

    Models that take more channels than a latent has (Fill, control models) get zeros for the others.
    """
    transformer = base.diffusion_model
    patched, _ = transformer.process_img(base.process_latent_in(latent).to(base.get_dtype_inference()))
    return F.pad(patched, (0, channels * transformer.patch_size**2 - patched.shape[-1]))


def modulation_vector(
    transformer: Any, timestep: float, guidance: Tensor | None, pooled: Tensor | None, like: Tensor
) -> Tensor:
    """The vector that modulates every block, `[B, D]`, computed as the model computes its own.

    Args:
        timestep: noise level, 0 to 1.
        guidance: `[B]`; only guidance-distilled models read it.
        pooled: pooled text `[B, P]`, or None for zeros.
        like: sets dtype and device.
    """
    rows = next((x.shape[0] for x in (pooled, guidance) if x is not None), 1)
    noise_level = torch.full((rows,), timestep, device=like.device)
    vec = transformer.time_in(timestep_embedding(noise_level, 256).to(like))
    if transformer.params.guidance_embed and guidance is not None:
        vec = vec + transformer.guidance_in(timestep_embedding(guidance.to(like), 256).to(like))
    width = transformer.params.vec_in_dim
    pooled = like.new_zeros((rows, width)) if pooled is None else pooled[:, :width].to(like)
    return vec + transformer.vector_in(pooled)


def rotations(transformer: Flux, ids: Tensor, options: dict) -> Tensor:
    """RoPE matrices of position ids `[T, 3]`, under the same scale and shift as the picture's own."""
    rope = options.get("rope_options") or {}
    scales = (1.0, rope.get("scale_y", 1.0), rope.get("scale_x", 1.0))
    shifts = (rope.get(f"shift_{axis}", 0.0) for axis in "tyx")
    axes = [at * scale + shift for at, scale, shift in zip(ids.unbind(-1), scales, shifts, strict=True)]
    return transformer.pe_embedder(torch.stack(axes, -1)[None])  # [1, 1, T, d/2, 2, 2]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Core's attention without a mask: q, k, v `[B, H, T, d]` to `[B, T, H*d]`."""
    return optimized_attention(q, k, v, q.shape[1], skip_reshape=True)


def by_block(transformer: Flux, keys: list[KeysValues]) -> KeysByBlock:
    """Keys and values, given double blocks first, by the block names that attention patches see."""
    return dict(zip(block_names(transformer), keys, strict=True))


def block_names(transformer: Flux) -> list[Block]:
    """The names of all blocks as attention patches see them, in the order they run, double blocks first."""
    doubles: list[Block] = [("double", i) for i in range(len(transformer.double_blocks))]
    return doubles + [("single", i) for i in range(len(transformer.single_blocks))]


def block(transformer: Any, kind: str, index: int) -> Any:
    """The live module of ("double_block" or "single_block", index)."""
    transformer = transformer_of(transformer)
    return (transformer.double_blocks if kind == "double_block" else transformer.single_blocks)[index]


def parts_of(block: Any) -> list[Any]:
    """The modules of a block whose gated outputs are added to the stream, in the order they run."""
    if hasattr(block, "linear2"):
        return [block.linear2]
    return [block.img_attn.proj, block.img_mlp, block.txt_attn.proj, block.txt_mlp]


def parts_per_stream(kind: str) -> int:
    """How many of `parts_of` give an output of the shape of each stream."""
    return 2 if kind == "double_block" else 1


@contextmanager
def recorded_outputs(block: Any) -> Iterator[deque[Tensor]]:
    """The outputs of `parts_of(block)` while the block runs, in that order, `[B, T, D]` each.

    The attention of a block may run the whole model once more, for a reference. So only the last outputs count.
    """
    parts = parts_of(block)
    outputs: deque[Tensor] = deque(maxlen=len(parts))
    hooks = [part.register_forward_hook(lambda _, __, output: outputs.append(output)) for part in parts]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def block_from_outputs(block: Any, args: dict, outputs: Sequence[Tensor]) -> dict:
    """The result of a block from stored `outputs` of its attention and MLPs: computes its modulation only.

    Source: TaylorSeer, arXiv:2503.06923, on FLUX. `x + gate1 * attention + gate2 * mlp`, gates of the current `vec`.
    """
    if hasattr(block, "linear2"):
        mod, _ = block.modulation(args["vec"])
        return {"img": args["img"] + mod.gate * outputs[0]}
    streams = {}
    for name, attention, mlp in (("img", *outputs[:2]), ("txt", *outputs[2:])):
        first, second = getattr(block, f"{name}_mod")(args["vec"])
        streams[name] = args[name] + first.gate * attention + second.gate * mlp
    return streams
