"""Stand-ins for other packs: what they put into a MODEL, in our words, as if it stood in their modules."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from types import FunctionType, MethodType
from unittest.mock import patch

import torch
from comfy.ldm.flux.layers import DoubleStreamBlock, SingleStreamBlock, timestep_embedding
from comfy.ldm.flux.math import attention
from comfy.ldm.flux.model import Flux
from comfy.model_patcher import ModelPatcher


def module(pack: str) -> str:
    """The name under which ComfyUI imports `nodes.py` of a pack."""
    return f"/srv/ComfyUI/custom_nodes/{pack}.nodes"


def of_pack(pack: str, function: Callable, name: str = "") -> FunctionType:
    """`function` as if it stood in a pack. `name`: its qualified name there."""
    assert isinstance(function, FunctionType)
    world = {**function.__globals__, "__name__": module(pack)}
    moved = FunctionType(function.__code__, world, function.__name__, function.__defaults__, function.__closure__)
    moved.__qualname__, moved.__module__ = name or function.__qualname__, module(pack)
    moved.__kwdefaults__ = function.__kwdefaults__
    return moved


def forward_orig(
    self, img, img_ids, txt, txt_ids, timesteps, y, guidance, control=None, *, transformer_options, tell=(), **_
):
    """FLUX's forward pass as packs of 2025 carry it.

    tell: what blocks are told beside their tensors: "options", what other nodes hand over; "text", where it ends.
    """
    img, txt = self.img_in(img), self.txt_in(txt)
    vec = self.time_in(timestep_embedding(timesteps, 256).to(img.dtype))
    vec = vec + self.guidance_in(timestep_embedding(guidance, 256).to(img.dtype)) + self.vector_in(y)
    shared = {"vec": vec, "pe": self.pe_embedder(torch.cat((txt_ids, img_ids), 1))}
    replace = transformer_options.get("patches_replace", {}).get("dit", {})

    def run(block, key, **streams):
        def original(args):
            rest = {name: args[name] for name in args.keys() - streams.keys()}
            out = block(*[args[name] for name in streams], **rest)
            return dict(zip(streams, out if isinstance(out, tuple) else (out,), strict=True))

        told = {**transformer_options, "block_type": key[0].removesuffix("_block"), "block_index": key[1]}
        if "text" in tell:
            told["img_slice"] = [txt.shape[1], img.shape[1]]
        args = {**streams, **shared, **({"transformer_options": told} if "options" in tell else {})}
        return replace[key](args, {"original_block": original}) if key in replace else original(args)

    for i, block in enumerate(self.double_blocks):
        out = run(block, ("double_block", i), img=img, txt=txt)
        img, txt = out["img"], out["txt"]
    img = torch.cat((txt, img), 1)
    for i, block in enumerate(self.single_blocks):
        img = run(block, ("single_block", i), img=img)["img"]
    return self.final_layer(img[:, txt.shape[1] :], vec)


def considerate_forward_orig(self, *args, transformer_options, **rest):
    """The same, in a pack that goes with the time."""
    return forward_orig(self, *args, transformer_options=transformer_options, tell=("options", "text"), **rest)


def half_considerate_forward_orig(self, *args, transformer_options, **rest):
    """The same, in a pack that stopped half-way."""
    return forward_orig(self, *args, transformer_options=transformer_options, tell=("options",), **rest)


def without_options(model: ModelPatcher, pack="ComfyUI-IPAdapter-Flux", forward=forward_orig) -> ModelPatcher:
    """An object patch on the forward pass: IPAdapter-Flux, PuLID."""
    patched = model.clone()
    own = MethodType(of_pack(pack, forward), model.model.diffusion_model)
    patched.add_object_patch("diffusion_model.forward_orig", own)
    return patched


def around_the_model(model: ModelPatcher, pack: str, name: str) -> ModelPatcher:
    """A function around the model that replaces the forward pass meanwhile: TeaCache, MagCache, TaylorSeer."""
    patched, transformer = model.clone(), model.model.diffusion_model
    own = MethodType(of_pack(pack, forward_orig), transformer)

    def unet_wrapper_function(model_function, kwargs):
        with patch.multiple(transformer, forward_orig=own):
            return model_function(kwargs["input"], kwargs["timestep"], **kwargs["c"])

    patched.set_model_unet_function_wrapper(of_pack(pack, unet_wrapper_function, name))
    return patched


class ReDouble(DoubleStreamBlock):
    """Attention of its own, as RES4LYF's blocks: no patches, no override."""

    __module__ = module("RES4LYF")

    def forward(self, img, txt, vec, pe, **_):
        both = []
        for stream, x in (("txt", txt), ("img", img)):
            mod, _ = getattr(self, f"{stream}_mod")(vec)
            own = getattr(self, f"{stream}_attn")
            qkv = own.qkv((1 + mod.scale) * getattr(self, f"{stream}_norm1")(x) + mod.shift)
            q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            both.append((*own.norm(q, k, v), v, mod))
        out = attention(*(torch.cat([part[i] for part in both], 2) for i in range(3)), pe=pe)
        split = txt.shape[1]
        txt = txt + both[0][3].gate * self.txt_attn.proj(out[:, :split])
        return img + both[1][3].gate * self.img_attn.proj(out[:, split:]), txt


class ReSingle(SingleStreamBlock):
    __module__ = module("RES4LYF")

    def forward(self, img, vec, pe, **_):
        mod, _ = self.modulation(vec)
        return img + mod.gate * self.pre_norm(img)


class ReFlux(Flux):
    """A class of its own, with a forward pass without wrappers and replacements."""

    __module__ = module("RES4LYF")

    def forward(self, x, timestep, context, y=None, guidance=None, ref_latents=None, control=None, **rest):
        return self._forward(x, timestep, context, y, guidance, None, None, **rest)

    def forward_orig(self, *args, transformer_options, **rest):
        return forward_orig(self, *args, transformer_options={}, **rest)


def re_flux(model: ModelPatcher) -> ModelPatcher:
    """Object patches on the classes: RES4LYF's ReFluxPatcher."""
    patched = model.clone()
    for kind, blocks in (("double", ReDouble), ("single", ReSingle)):
        for i in range(len(getattr(model.model.diffusion_model, f"{kind}_blocks"))):
            patched.add_object_patch(f"diffusion_model.{kind}_blocks.{i}.__class__", blocks)
    patched.add_object_patch("diffusion_model.__class__", ReFlux)
    return patched


@contextmanager
def cache_dit(model: ModelPatcher, every: int = 2, first: int = 1):
    """A forward on the module itself, which answers every `every`th call behind the `first` with its last result.

    It stays there when the node is gone.
    """
    transformer = model.model.diffusion_model
    state = {"calls": 0, "skipped": 0}

    def cached_forward(*args, **kwargs):
        state["calls"] += 1
        if state["calls"] > first and (state["calls"] - first) % every == 0:
            state["skipped"] += 1
            return state["last"]
        state["last"] = transformer._original_forward(*args, **kwargs)
        return state["last"]

    transformer._original_forward = transformer.forward
    transformer.forward = of_pack("ComfyUI-CacheDiT", cached_forward)
    try:
        yield state
    finally:
        del transformer.forward, transformer._original_forward
