"""The blocks of every model family that can be wrapped: where they are, what flows between them, what the head reads.

For features that skip blocks, or put something else in their place, through ComfyUI's `patches_replace["dit"]`. A
block is named by its `Key`, as there: ("double_block", 3). It is called as `replacement(args, {"original_block": run})`
and returns a dict. What changes from block to block, the *streams*, are the entries that `streams` names; all else in
`args` is the same for every block of a kind, Chroma's `vec` excepted. To skip a block is to return its `args`.

Facts per family, read from ComfyUI 0.30.0 and held by the tests. Fill, LongCat, Ovis, HunyuanImage and Wan 2.2 run the
code that is tested, and were not run themselves:

- **FLUX.1** with Kontext and Fill, **FLUX.2**, **LongCat**, **Ovis**, **Chroma**. Double blocks: img, txt. Single
  blocks: img, which is text and picture joined, text first. Blocks write into their args. Between: ControlNet.
- **HunyuanVideo**, **HunyuanImage**: the same. Tokens of a reference stand before the picture's own, and are dropped
  before the head.
- **SD3**, **SD3.5**: img, txt. After the last block txt is None. Blocks make new tensors. Between: ControlNet.
- **QwenImage**: img, txt. Blocks make new tensors. Between: `double_block` patches (DiffSynth), then ControlNet.
- **Wan 2.1, 2.2**: img; txt is the same for all blocks. Blocks make new tensors. Between: `double_block` patches
  (Uni3C); in **Wan VACE** then a block of the control videos, every few blocks.
- **LTX video**: img; txt is the same for all blocks. Blocks write into their args. Between: nothing.

What runs between two blocks runs after skipped ones too, and adds its residual **in place** to the tensor a block
returned. So:

- clone what is to be kept: args before the block runs, its result before it is returned;
- never return a tensor that is kept, return a clone of it;
- record and inject at the same place, in the last of the wrapped blocks: the residual is then added both times.

Limits. In float16 the FLUX model replaces infinities between double and single blocks, which `joined` does not. A
first VACE block reads the embedded picture: who skips the first block of a VACE model with several control videos
must return a clone of `img`. Guidance that skips layers (SkipLayerGuidance) puts its own replacements over ours for
one more pass of the model: in that pass, wraps of those blocks are not called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from comfy.ldm.chroma.model import Chroma
from comfy.ldm.flux.model import Flux
from comfy.ldm.hunyuan_video.model import HunyuanVideo
from comfy.ldm.lightricks.model import LTXVModel
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.ldm.wan.model import VaceWanModel, WanModel
from comfy.model_patcher import set_model_options_patch_replace
from torch import Tensor

from .compiled import untraced
from .flux import is_flux1
from .transformer import class_of, transformer_of

Key = tuple[str, int]  # ("double_block", 3), as in patches_replace["dit"]
BlockArgs = dict[str, Any]
RunBlock = Callable[[BlockArgs], dict[str, Any]]
Wrap = Callable[[BlockArgs, RunBlock], dict[str, Any]]


@dataclass(frozen=True)
class BlockKind:
    """Blocks of one kind, which run one after the other."""

    kind: str  # "double_block" or "single_block"
    modules: str  # the transformer's list of them
    streams: tuple[str, ...]


@dataclass(frozen=True)
class BlockFamily:
    """Transformers whose blocks ComfyUI lets us wrap. See the list above."""

    name: str  # what users call it
    kinds: tuple[BlockKind, ...]  # in the order they run
    in_place: bool  # blocks write into the streams of their args

    def keys(self, transformer: Any) -> tuple[Key, ...]:
        """All blocks, in the order they run."""
        return tuple((kind.kind, i) for kind in self.kinds for i in range(len(getattr(transformer, kind.modules))))

    def streams(self, kind: str) -> tuple[str, ...]:
        """The entries of a block's dict that change from block to block."""
        return self._kind(kind).streams

    def joined(self, streams: Mapping[str, Tensor], kind_from: str, kind_to: str) -> dict[str, Tensor]:
        """The streams at the door of a `kind_to` block, from those at the door of a `kind_from` block before it.

        Args:
            streams: `img` and `txt` (where it is a stream), each `[B, T, D]`; taken as they are, never written.

        Returns:
            The same, unless the model joins its streams there: then `img` is `[B, T_txt + T_img, D]`, text first.
        """
        order = [self._kind(kind_from), self._kind(kind_to)]
        if order[0] is order[1]:
            return {name: streams[name] for name in order[0].streams}
        if order != list(self.kinds):
            raise ValueError(f"{self.name} runs no {kind_from} before a {kind_to}")
        return {"img": torch.cat((streams["txt"], streams["img"]), 1)}

    @untraced
    def picture(self, args: BlockArgs, out: Mapping[str, Tensor]) -> slice:
        """The rows of `out["img"]` `[B, T, D]` that the head reads after the last block.

        Reference tokens are among them wherever the model keeps them until then.

        Args:
            args, out: what the last block was given and what came of it.
        """
        if "txt" in args:
            return slice(0, out["img"].shape[1])
        options = args.get("transformer_options", {})
        if "img_slice" not in options:
            raise ValueError(
                "The model's blocks do not say which of their tokens are the picture's, because another node replaced "
                "its forward pass. Remove that node, or the step cache."
            )
        return slice(*options["img_slice"])  # a single block, text in front

    def _kind(self, name: str) -> BlockKind:
        for kind in self.kinds:
            if kind.kind == name:
                return kind
        raise ValueError(f"{self.name} has no {name}, but {', '.join(kind.kind for kind in self.kinds)}")


def _double_and_single(name: str) -> BlockFamily:
    double = BlockKind("double_block", "double_blocks", ("img", "txt"))
    return BlockFamily(name, (double, BlockKind("single_block", "single_blocks", ("img",))), in_place=True)


def _double(name: str, modules: str, *streams: str, in_place: bool = False) -> BlockFamily:
    return BlockFamily(name, (BlockKind("double_block", modules, streams),), in_place)


FLUX1, FLUX2, FLUX_LIKE = (_double_and_single(name) for name in ("FLUX.1", "FLUX.2", "LongCat or Ovis"))

# By exact class: a subclass may run its blocks in another way, as LTX with sound and most relatives of Wan do.
FAMILIES: dict[type, BlockFamily] = {
    Chroma: _double_and_single("Chroma"),
    HunyuanVideo: _double_and_single("HunyuanVideo"),
    OpenAISignatureMMDITWrapper: _double("SD3", "joint_blocks", "img", "txt"),
    QwenImageTransformer2DModel: _double("QwenImage", "transformer_blocks", "img", "txt"),
    WanModel: _double("Wan", "blocks", "img"),
    VaceWanModel: _double("Wan VACE", "blocks", "img"),
    LTXVModel: _double("LTX video", "transformer_blocks", "img", in_place=True),
}


def block_family(model: Any) -> BlockFamily | None:
    """How the blocks of a MODEL, a BaseModel or a transformer are wrapped.

    Returns:
        None where ComfyUI calls no replacement (CogVideoX, Lumina 2, Z-Image, PixArt, U-Nets), and for models whose
        blocks were not looked into: LTX with sound, Wan's relatives other than VACE, and others.
    """
    kind = class_of(model)
    if kind is not Flux:
        return FAMILIES.get(kind)
    if is_flux1(model):
        return FLUX1
    return FLUX2 if transformer_of(model).params.global_modulation else FLUX_LIKE


def wrap_block(model_options: dict, key: Key, wrap: Wrap) -> None:
    """Run `wrap(args, run_block)` in place of block `key`, around whatever replaces it already.

    Args:
        model_options: those of the run, which are changed; dicts that others may share are copied first.
        wrap: gets the block's args and what runs it, or the replacement that was there before. Returns what the
            block returns. The last one to come is the outermost. It is never traced by torch.compile; functions
            that it calls are, see `untraced`.
    """
    untraced(wrap)
    earlier = model_options["transformer_options"].get("patches_replace", {}).get("dit", {}).get(key)

    @untraced
    def replacement(args: BlockArgs, extra: dict[str, Any]) -> dict[str, Any]:
        if earlier is None:
            return wrap(args, extra["original_block"])
        return wrap(args, lambda inner: earlier(inner, extra))

    set_model_options_patch_replace(model_options, replacement, "dit", *key)
