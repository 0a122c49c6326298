"""Where the picture's tokens are in the attention of the model call that is running, family by family.

Hook: an APPLY_MODEL wrapper, the one hook that every model has (SD3 has no other), puts `Tokens` into
transformer_options. The grid follows from the latent's size, the live model's patch size and what else the call is
given, never from a number of tokens. Attention of any other length is not the picture's.

Order of tokens, read from ComfyUI 0.30.0 and held by the tests:

- **FLUX.1**, **FLUX.2**: text, picture, reference pictures. **Chroma**: text, picture.
- **SD3**, **SD3.5**: text, picture; some blocks have a second attention over the picture alone.
- **QwenImage**: text, picture, reference pictures. A picture may have several layers: frames.
- **HunyuanVideo**, **HunyuanImage**: text with what is joined to it, reference picture, video.
- **CogVideoX**: text, video.
- **Lumina 2**, **Z-Image**: text, padded in Z-Image, picture, padding. With reference pictures: unknown.
- **Wan**: reference picture, video, reference videos; text in an attention of its own. **LTX**: video, the same;
  with keyframes unknown. Where the text is as long as the video, the two cannot be told apart: unknown.

Unknown: all other families, and subclasses with a forward pass of their own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from comfy.ldm.chroma.model import Chroma
from comfy.ldm.cogvideo.model import CogVideoXTransformer3DModel
from comfy.ldm.flux.model import Flux
from comfy.ldm.hunyuan_video.model import HunyuanVideo
from comfy.ldm.lightricks.model import LTXVModel
from comfy.ldm.lumina.model import NextDiT
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.ldm.wan.model import CameraWanModel, VaceWanModel, WanModel
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ..models.accelerate.sparse_attention import Grid
from .run import KEY
from .transformer import transformer_of

TOKENS = "dit_toolkit.tokens"  # in transformer_options: the Tokens of the call


@dataclass(eq=False)
class Tokens:
    """One call of the model.

    grids: of every kind of attention in it that has the picture's tokens; none where the family is unknown.
    reason: why there are none, for people.
    """

    grids: tuple[Grid, ...]
    reason: str = ""
    _seen: Counter[Hashable] = field(default_factory=Counter)

    def grid(self, length: int) -> Grid | None:
        """The grid of an attention over this many tokens."""
        return next((grid for grid in self.grids if grid.length == length), None)

    def layer(self, options: dict) -> Hashable:
        """A name for the attention that asks, the same in every call of the model.

        Block type and number where the family tells them, then how often that block asked before. Families that tell
        nothing (SD3, CogVideoX, LTX) are counted through: there a name holds while every block is run.
        """
        block = (options.get("block_type", ""), options.get("block_index", -1))
        self._seen[block] += 1
        return (*block, self._seen[block] - 1)


def install(model_options: dict) -> None:
    """Have `Tokens` in every call of this run. Once is enough, however many features ask."""
    wrappers = model_options["transformer_options"].get("wrappers", {})
    if apply_model not in wrappers.get(WrappersMP.APPLY_MODEL, {}).get(KEY, ()):
        add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, apply_model, model_options, is_model_options=True)


def apply_model(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **conds):
    """APPLY_MODEL: say where the picture's tokens are."""
    options = {**(transformer_options or {}), TOKENS: tokens(executor.class_obj.diffusion_model, x, c_crossattn, conds)}
    return executor(x, t, c_concat, c_crossattn, control, options, **conds)


def tokens(transformer: Any, x: Tensor, context: Tensor | None, conds: dict) -> Tokens:
    """Where the picture's tokens are in a call of `transformer`.

    Args:
        x: the latent, `[B, C, (frames,) h, w]`.
        context: the text, `[B, T, D]`.
        conds: the other arguments of the model.
    """
    transformer = transformer_of(transformer)
    find = FAMILIES.get(type(transformer))
    if find is None:
        return Tokens((), f"{type(transformer).__name__} is not among the families whose tokens are known")
    grids = find(transformer, x, 0 if context is None else context.shape[1], conds)
    return Tokens(grids, "" if grids else "this combination of text, references and size is not known for sure")


Grids = tuple[Grid, ...]


def _flux(model: Any, x: Tensor, text: int, conds: dict) -> Grids:
    p = model.patch_size
    references = sum(_count(ref.shape[-2:], (p, p)) for ref in conds.get("ref_latents") or ())
    return (Grid(*_cells(x.shape[-2:], (p, p)), before=text, after=references),)


def _chroma(model: Any, x: Tensor, text: int, conds: dict) -> Grids:
    p = model.patch_size
    return (Grid(*_cells(x.shape[-2:], (p, p)), before=text),)


def _sd3(model: Any, x: Tensor, text: int, conds: dict) -> Grids:
    if model.context_processor is not None:
        return ()
    picture = _cells(x.shape[-2:], model.x_embedder.patch_size)
    return (Grid(*picture, before=text + model.register_length), Grid(*picture))


def _qwen(model: Any, x: Tensor, text: int, conds: dict) -> Grids:
    patch = (1, model.patch_size, model.patch_size)
    frames, height, width = _cells(x.shape[-3:], patch)
    references = sum(_count(ref.shape[-3:], patch) for ref in conds.get("ref_latents") or ())
    return (Grid(height, width, frames, before=text, after=references),)


def _hunyuan(model: Any, x: Tensor, text: int, conds: dict) -> Grids:
    patch = tuple(model.patch_size)
    *frames, height, width = _cells(x.shape[-len(patch) :], patch)
    byt5, vision, reference = (conds.get(name) for name in ("txt_byt5", "clip_fea", "ref_latent"))
    if byt5 is not None and model.byt5_in is not None:
        text += byt5.shape[1]
    if vision is not None:
        text += vision.shape[1]
    if reference is not None:
        text += _count(reference.shape[-len(patch) :], patch)
    return (Grid(height, width, *frames, before=text),)


def _cogvideox(model: Any, x: Tensor, text: int, conds: dict) -> Grids:
    frames, height, width = _cells(x.shape[-3:], (model.patch_size_t or 1, model.patch_size, model.patch_size))
    return (Grid(height, width, frames, before=text),)


def _lumina(model: Any, x: Tensor, text: int, conds: dict) -> Grids:
    if any(len(conds.get(name) or ()) for name in ("ref_latents", "ref_contexts", "siglip_feats")):
        return ()
    height, width = _cells(x.shape[-2:], (model.patch_size, model.patch_size))
    multiple = model.pad_tokens_multiple or 1
    return (Grid(height, width, before=text + -text % multiple, after=-(height * width) % multiple),)


def _wan(model: Any, x: Tensor, text: int, conds: dict) -> Grids:
    frames, height, width = _cells(x.shape[-3:], model.patch_size)
    more = conds.get("time_dim_concat")
    if more is not None:
        frames += _cells(more.shape[-3:], model.patch_size)[0]
    reference = conds.get("reference_latent")
    before = 0 if reference is None or model.ref_conv is None else _count(reference.shape[-2:], model.patch_size[1:])
    after = sum(_count(ref.shape[-3:], model.patch_size) for ref in conds.get("context_latents") or ())
    grid = Grid(height, width, frames, before=before, after=after)
    clip = conds.get("clip_fea")
    seen = {text, max(text, model.text_len)}
    seen |= set() if clip is None else {clip.shape[-2]} | {n + clip.shape[-2] for n in seen}
    return () if grid.length in seen else (grid,)


def _ltx(model: Any, x: Tensor, text: int, conds: dict) -> Grids:
    keyframes = conds.get("keyframe_idxs")
    if x.ndim != 5 or (keyframes is not None and keyframes.shape[2] > 0):
        return ()
    frames, height, width = x.shape[-3:]
    grid = Grid(height, width, frames)
    return () if grid.length == text else (grid,)


FAMILIES: dict[type, Callable[[Any, Tensor, int, dict], Grids]] = {
    Flux: _flux,
    Chroma: _chroma,
    OpenAISignatureMMDITWrapper: _sd3,
    QwenImageTransformer2DModel: _qwen,
    HunyuanVideo: _hunyuan,
    CogVideoXTransformer3DModel: _cogvideox,
    NextDiT: _lumina,
    WanModel: _wan,
    VaceWanModel: _wan,
    CameraWanModel: _wan,
    LTXVModel: _ltx,
}


def _cells(size: tuple[int, ...] | Any, patch: tuple[int, ...] | Any) -> tuple[int, ...]:
    """Patches along every axis; odd sizes are padded up, as all these models do."""
    return tuple(-(-n // p) for n, p in zip(size, patch, strict=True))


def _count(size: tuple[int, ...] | Any, patch: tuple[int, ...] | Any) -> int:
    return math.prod(_cells(size, patch))
