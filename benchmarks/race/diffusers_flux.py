"""FLUX.1 in diffusers' modules, with the weights of a ComfyUI MODEL and under ComfyUI's own sampler.

So that a cache written for diffusers meets the same noise, sigmas, prompts and weights as one written for ComfyUI:
`twin` is a MODEL whose transformer calls diffusers' with the same patches and position ids. Without a cache the two
agree up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from diffusers import FluxTransformer2DModel
from torch import Tensor

KEY = "race.diffusers"


@dataclass
class Place:
    """Where a run is, for caches that ask: the evaluation of so many, and whose prompt is computed."""

    evaluation: int = -1
    evaluations: int | None = None
    prompt: str = "cond"


ALIKE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
IN_DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
IN_SINGLE = {
    "modulation.lin": "norm.linear",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
    "linear2": "proj_out",
}
SPLIT = {  # one matrix here, several there: q, k, v of equal height, then what is left
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
}


def diffusers_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of ComfyUI's FLUX.1 under diffusers' names. Views of the same memory, but for the last modulation.

    Raises:
        KeyError: a weight that FLUX.1 does not have.
    """
    found = {}
    for name, weight in state.items():
        part, _, kind = name.rpartition(".")  # kind: "weight" or "bias"
        if part == "final_layer.adaLN_modulation.1":  # here shift and scale, there scale and shift
            shift, scale = weight.chunk(2)
            found[f"norm_out.linear.{kind}"] = torch.cat([scale, shift])
        elif part in ALIKE:
            found[f"{ALIKE[part]}.{kind}"] = weight
        else:
            blocks, i, inner = part.split(".", 2)
            there = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}[blocks]
            if inner in SPLIT:
                names, hidden = SPLIT[inner], state["img_in.weight"].shape[0]
                sizes = [hidden] * 3 + [weight.shape[0] - 3 * hidden] * (len(names) - 3)
                for own, rows in zip(names, weight.split(sizes), strict=True):
                    found[f"{there}.{i}.{own}.{kind}"] = rows
            else:
                own = (IN_DOUBLE if blocks == "double_blocks" else IN_SINGLE)[inner]
                found[f"{there}.{i}.{own}.{kind}"] = weight
    return found


def transformer_of(model: ModelPatcher, device: torch.device) -> FluxTransformer2DModel:
    """diffusers' transformer with the weights of `model`. Blocks that share weights there share them here."""
    flux = model.model.diffusion_model
    moved: dict[int, Tensor] = {}  # by address: what is shared is moved once
    state = {}
    for name, weight in flux.state_dict().items():
        state[name] = moved.setdefault(weight.data_ptr(), weight.to(device, flux.dtype))
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(
            in_channels=flux.img_in.weight.shape[1],
            num_layers=len(flux.double_blocks),
            num_single_layers=len(flux.single_blocks),
            num_attention_heads=flux.num_heads,
            attention_head_dim=flux.hidden_size // flux.num_heads,
            joint_attention_dim=flux.txt_in.weight.shape[1],
            pooled_projection_dim=flux.params.vec_in_dim,
            guidance_embeds=flux.params.guidance_embed,
            axes_dims_rope=tuple(flux.params.axes_dim),
        )
    transformer.load_state_dict(diffusers_state(state), assign=True)
    transformer.place = Place()
    return transformer.requires_grad_(False).eval()


def twin_of(model: ModelPatcher, transformer: FluxTransformer2DModel) -> ModelPatcher:
    """`model`, sampled by ComfyUI as always, with `transformer` in the place of its own.

    ComfyUI computes both prompts of guidance in one call. diffusers' pipelines ask twice, the positive prompt first,
    and every cache keeps the two apart; so here.
    """

    def forward(
        executor,
        x,
        timestep,
        context,
        y=None,
        guidance=None,
        ref_latents=None,
        control=None,
        transformer_options=None,
        **kwargs,
    ) -> Tensor:
        flux, place = executor.class_obj, transformer.place
        tokens, places = flux.process_img(x)
        prompts = (transformer_options or {}).get("cond_or_uncond", [0])  # 0 is the positive prompt
        rows = len(x) // len(prompts)
        place.evaluation += 1
        found = {}
        for part in sorted(range(len(prompts)), key=lambda part: prompts[part]):
            place.prompt, here = ("cond", "uncond")[prompts[part]], slice(part * rows, (part + 1) * rows)
            where = {"step_index": place.evaluation, "sigma": float(timestep[part * rows])}
            with transformer.cache_context(place.prompt, **where, num_inference_steps=place.evaluations):
                (found[part],) = transformer(
                    hidden_states=tokens[here],
                    encoder_hidden_states=context[here],
                    pooled_projections=y[here, : flux.params.vec_in_dim],
                    timestep=timestep[here],
                    img_ids=places[0],
                    txt_ids=places.new_zeros(context.shape[1], 3),
                    guidance=None if guidance is None else guidance[here],
                    return_dict=False,
                )
        out = torch.cat([found[i] for i in sorted(found)])
        h, w = x.shape[-2] // 2, x.shape[-1] // 2
        return out.unflatten(1, (h, w)).unflatten(-1, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    twin = model.clone()
    twin.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, forward)
    return twin


def cached(twin: ModelPatcher, cache: Callable[[], AbstractContextManager], place: Place) -> ModelPatcher:
    """`twin` with a cache that is switched on for each picture and off after it, as nothing of one concerns another."""

    def run(executor, *args, **kwargs):
        place.evaluation = -1
        with cache():
            return executor(*args, **kwargs)

    model = twin.clone()
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, run)
    return model
