"""Tiny random models of every family, as ComfyUI detects, loads and samples them, on the CPU in milliseconds a step.

A family's sizes are read from the shapes of its weights wherever core reads them. Where core has them written down for
the published checkpoints only, `load_with_sizes` tells it the tiny ones after the family is recognised: Chroma (its
modulation network), QwenImage, Lumina 2, Z-Image and PixArt. Wan and LTX take theirs from the file's metadata, as
core allows. Classes, forward passes, schedules and latent formats are always core's own.

Weights are seeded, and strong enough that every part of a model shows in its result: see `weights`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import comfy.ldm.chroma.model
import comfy.ldm.cogvideo.model
import comfy.ldm.flux.model
import comfy.ldm.genmo.joint_model.asymm_models_joint
import comfy.ldm.hunyuan_video.model
import comfy.ldm.lightricks.model
import comfy.ldm.lumina.model
import comfy.ldm.modules.diffusionmodules.mmdit
import comfy.ldm.pixart.pixartms
import comfy.ldm.qwen_image.model
import comfy.ldm.wan.model
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from dit_toolkit.host import families as host
from dit_toolkit.host.animate import cogvideox_sampling
from dit_toolkit.models.accelerate.sparse_attention import Grid
from dit_toolkit.tests.host import tiny
from dit_toolkit.tests.host.shared import shared

TEXT, POOLED, TOKENS = 32, 24, 6


@dataclass(frozen=True)
class Family:
    """A tiny model, what it takes, and what the tests of all families expect of it."""

    name: str
    load: Callable[[], ModelPatcher]  # loaded once; nobody may change it, every test shares it
    latent_shape: tuple[int, ...]  # [C, h, w], or [C, frames, h, w]
    prompt: Callable[..., list]  # (seed) to the CONDITIONING of a random text; `length` sets its tokens
    of: str  # the name of its family in host/families
    core: str  # ComfyUI's classes: configuration, model, transformer
    grid: Grid | None = None  # of the first attention over the picture's tokens; None where no node reaches any
    attentions: int = 3  # over the picture's tokens, in one call of the model
    silent: tuple[str, ...] = ()  # how names of matrices begin that have no part in the picture

    @property
    def answers(self) -> host.Family:
        """What host/families says of it."""
        return next(family for family in host.FAMILIES if family.name == self.of)


def weights(network: Callable[..., torch.nn.Module], gain: float = 0.7, **sizes: Any) -> dict[str, Tensor]:
    """Random weights of a network of ComfyUI's.

    A matrix changes the scale of what it is given by `gain`; biases and modulation tables are smaller than what they
    are added to. Norm weights lie around 1, learned tokens and position tables are of order 1. The gain is set by
    what the prompt does to a picture: some families multiply more matrices before a gate opens than others.
    """
    shapes = network(**sizes, operations=comfy.ops.disable_weight_init, dtype=torch.float32, device="meta").state_dict()
    generator = torch.Generator().manual_seed(0)
    return {name: weight(name, like.shape, gain, generator) for name, like in shapes.items()}


def weight(name: str, shape: torch.Size, gain: float, generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1 and name.endswith(".weight"):
        return 1 + 0.1 * noise  # a norm
    if name.endswith(("pos_embed", "pad_token", "y_embedding")):
        return noise
    return noise * gain / (shape[1:].numel() if len(shape) > 1 else shape[0]) ** 0.5


def load(state: dict[str, Tensor], sizes: dict[str, Any] | None = None) -> ModelPatcher:
    """As UNETLoader does it. `sizes` go into the file's metadata, which core reads for Wan and LTX."""
    metadata = None if sizes is None else {"config": json.dumps({"transformer": sizes})}
    model = comfy.sd.load_diffusion_model_state_dict(dict(state), metadata=metadata)
    assert model is not None
    return model


def load_with_sizes(state: dict[str, Tensor], sizes: dict[str, Any], recognise: dict[str, Any] | None = None):
    """As UNETLoader does it, for families whose sizes core has written down.

    Args:
        sizes: entries of the detected `unet_config` that the tiny model has otherwise.
        recognise: entries by which core tells families apart where the tiny model has another value.
    """
    detection, management = comfy.model_detection, comfy.model_management
    detected = detection.detect_unet_config(state, "")
    config = detection.model_config_from_unet_config({**detected, **(recognise or {})}, state, "")
    assert config is not None
    config.unet_config.update({**detected, **sizes})
    device, offload = management.get_torch_device(), management.unet_offload_device()
    config.set_inference_dtype(torch.float32, management.unet_manual_cast(torch.float32, device, [torch.float32]))
    model = config.get_model(state, "")
    patcher = comfy.model_patcher.CoreModelPatcher(model, load_device=device, offload_device=offload)
    model.load_model_weights(dict(state), "", assign=patcher.is_dynamic())
    return patcher


def text(seed: int, *, length: int = TOKENS, width: int = TEXT, pooled: int = 0, mask: bool = False, **values) -> list:
    """CONDITIONING of a random text, `[1, length, width]`."""
    generator = torch.Generator().manual_seed(seed)
    if pooled:
        values["pooled_output"] = torch.randn(1, pooled, generator=generator)
    if mask:
        values["attention_mask"] = torch.ones(1, length, dtype=torch.int64)
    return [[torch.randn(1, length, width, generator=generator), values]]


@shared
def flux() -> ModelPatcher:
    """FLUX.1 dev: guidance, 2 double and 2 single blocks."""
    return tiny.load_flux(tiny.flux_state())


def kontext_prompt(seed: int, length: int = 5, **values) -> list:
    """A text that looks at one reference picture, of another size than the latent."""
    values = {"reference_latents": [random_latent(16, 6, 4)], "reference_latents_method": "offset", **values}
    return tiny.prompt(seed, length, **values)


@shared
def chroma() -> ModelPatcher:
    """2 double and 2 single blocks. The width of the modulation network (5120) and its output (3072) are written down
    in core."""
    modulation = {"in_dim": 64, "hidden_dim": 64, "out_dim": 128, "n_layers": 2}
    shared = {key: tiny.FLUX1[key] for key in ("mlp_ratio", "axes_dim", "theta", "patch_size", "qkv_bias")}
    state = weights(
        comfy.ldm.chroma.model.Chroma,
        **{**shared, **modulation, "in_channels": 64, "out_channels": 64, "context_in_dim": TEXT, "vec_in_dim": None},
        **{"hidden_size": 128, "num_heads": 1, "depth": 2, "depth_single_blocks": 2, "txt_ids_dims": []},
    )
    return load_with_sizes(state, modulation)


@shared
def sd35() -> ModelPatcher:
    """SD3.5: RMS norms of queries and keys. 3 blocks, of which the first has a second attention, as SD3.5 medium."""
    size = 3
    context = {"target": "torch.nn.Linear", "params": {"in_features": TEXT, "out_features": 64 * size}}
    state = weights(
        comfy.ldm.modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper,
        **{"depth": size, "input_size": None, "in_channels": 16, "out_channels": 16, "adm_in_channels": POOLED},
        **{"context_embedder_config": context, "num_patches": 16 * 16, "pos_embed_max_size": 16, "qk_norm": "rms"},
        x_block_self_attn_layers=[0],
    )
    return load(state)


@shared
def qwen() -> ModelPatcher:
    """3 blocks. Heads, their size, the text's width and the axes are written down in core."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 32, "joint_attention_dim": TEXT}
    sizes |= {"axes_dims_rope": (8, 12, 12)}
    state = weights(comfy.ldm.qwen_image.model.QwenImageTransformer2DModel, gain=1.2, num_layers=3, **sizes)
    return load_with_sizes(state, sizes)


@shared
def wan() -> ModelPatcher:
    """Wan 2.1, text to video: 3 blocks of one head. The text's width comes with the metadata."""
    sizes = {"dim": 128, "ffn_dim": 256, "num_heads": 1, "num_layers": 3}
    state = weights(comfy.ldm.wan.model.WanModel, text_dim=TEXT, **sizes)
    return load(state, {"text_dim": TEXT})


@shared
def hunyuan_video() -> ModelPatcher:
    """HunyuanVideo: guidance, 2 double and 2 single blocks of one head."""
    sizes = {"in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": TEXT, "hidden_size": 128}
    sizes |= {"mlp_ratio": 4.0, "num_heads": 1, "depth": 2, "depth_single_blocks": 2, "axes_dim": [16, 56, 56]}
    sizes |= {"theta": 256, "patch_size": [1, 2, 2], "qkv_bias": True, "guidance_embed": True, "byt5": False}
    sizes |= {"meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False}
    return load(weights(comfy.ldm.hunyuan_video.model.HunyuanVideo, **sizes))


@shared
def cogvideox() -> ModelPatcher:
    """CogVideoX 1.0 with rotary positions: 3 blocks of 2 heads."""
    state = weights(
        comfy.ldm.cogvideo.model.CogVideoXTransformer3DModel,
        gain=2.0,
        **{"num_attention_heads": 2, "time_embed_dim": 64, "text_embed_dim": TEXT, "num_layers": 3},
        use_rotary_positional_embeddings=True,
    )
    return load(state)


LUMINA = {"patch_size": 2, "in_channels": 16, "dim": 64, "n_layers": 3, "cap_feat_dim": TEXT, "qk_norm": True}
LUMINA_SIZES = {"n_heads": 2, "n_kv_heads": 1, "axes_dims": [8, 12, 12], "axes_lens": [300, 512, 512]}
LUMINA_SIZES |= {"rope_theta": 10000.0, "ffn_dim_multiplier": 1.0}


@shared
def lumina2() -> ModelPatcher:
    """2 + 2 refining blocks and 3 main ones; two heads share keys. Core knows the heads for a width of 2304 only."""
    return load_with_sizes(weights(comfy.ldm.lumina.model.NextDiT, **LUMINA, **LUMINA_SIZES), LUMINA_SIZES)


@shared
def z_image() -> ModelPatcher:
    """Lumina's network, padded to multiples of 32 tokens; no shared keys. Core tells it by its width of 3840.

    Its modulation vector has 256 channels, and no width below that works.
    """
    sizes = {**LUMINA_SIZES, "n_kv_heads": 2, "axes_dims": [32, 48, 48], "rope_theta": 256.0}
    sizes |= {"z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32}
    state = weights(comfy.ldm.lumina.model.NextDiT, **{**LUMINA, "dim": 256}, **sizes)
    return load_with_sizes(state, sizes, recognise={"dim": 3840})


@shared
def pixart() -> ModelPatcher:
    """PixArt Sigma: 2 blocks. Width, heads and the text's width are written down in core."""
    sizes = {"hidden_size": 64, "num_heads": 2, "caption_channels": TEXT}
    state = weights(
        comfy.ldm.pixart.pixartms.PixArtMS, depth=2, in_channels=4, micro_condition=False, model_max_length=8, **sizes
    )
    return load_with_sizes(state, sizes)


@shared
def ltx() -> ModelPatcher:
    """LTX video: 3 blocks. Heads and the text's width come with the metadata."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 32, "cross_attention_dim": 64, "caption_channels": TEXT}
    return load(weights(comfy.ldm.lightricks.model.LTXVModel, num_layers=3, **sizes), sizes)


@shared
def mochi() -> ModelPatcher:
    """3 blocks of 2 heads. Core writes all sizes down, and asserts an MLP of 12288 channels."""
    sizes = {"depth": 3, "num_heads": 2, "hidden_size_x": 64, "hidden_size_y": 32, "mlp_ratio_x": 192.0}
    sizes |= {"t5_feat_dim": TEXT}
    fixed = {"patch_size": 2, "in_channels": 12, "learn_sigma": False, "use_t5": True, "qk_norm": True}
    fixed |= {"qkv_bias": False, "timestep_scale": 1000.0, "posenc_preserve_area": True}
    state = weights(comfy.ldm.genmo.joint_model.asymm_models_joint.AsymmDiTJoint, **sizes, **fixed)
    return load_with_sizes(state, sizes)


LAST_TEXT = tuple(f"transformer_blocks.2.{part}" for part in ("txt_mlp", "attn.add_q", "attn.to_add"))

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("flux", flux, (16, 8, 8), tiny.prompt, "FLUX.1", "Flux Flux Flux", Grid(4, 4, before=5), 4),
        Family(
            "kontext", flux, (16, 8, 8), kontext_prompt, "FLUX.1", "Flux Flux Flux", Grid(4, 4, before=5, after=6), 4
        ),
        Family("chroma", chroma, (16, 8, 8), text, "Chroma", "Chroma Chroma Chroma", Grid(4, 4, before=6), 4),
        Family(
            "sd35",
            sd35,
            (16, 8, 8),
            partial(text, pooled=POOLED),
            "SD3",
            "SD3 SD3 OpenAISignatureMMDITWrapper",
            Grid(4, 4, before=6),
            4,
        ),
        Family(
            "qwen",
            qwen,
            (16, 1, 8, 8),
            text,
            "QwenImage",
            "QwenImage QwenImage QwenImageTransformer2DModel",
            Grid(4, 4, before=6),
            silent=LAST_TEXT,
        ),
        Family("wan", wan, (16, 3, 6, 6), text, "Wan", "WAN21_T2V WAN21 WanModel", Grid(3, 3, 3)),
        Family(
            "hunyuan_video",
            hunyuan_video,
            (16, 3, 6, 6),
            partial(text, pooled=768, guidance=6.0),
            "HunyuanVideo",
            "HunyuanVideo HunyuanVideo HunyuanVideo",
            Grid(3, 3, 3, before=6),
            4,
        ),
        Family(
            "cogvideox",
            cogvideox,
            (16, 3, 6, 6),
            text,
            "CogVideoX",
            "CogVideoX_T2V CogVideoX CogVideoXTransformer3DModel",
            Grid(3, 3, 3, before=6),
        ),
        Family("lumina2", lumina2, (16, 8, 8), text, "Lumina 2", "Lumina2 Lumina2 NextDiT", Grid(4, 4, before=6)),
        Family(
            "z_image",
            z_image,
            (16, 8, 8),
            text,
            "Z-Image",
            "ZImage Lumina2 NextDiT",
            Grid(4, 4, before=32, after=16),
        ),
        # Positions are scaled by round(size / 64): 32 would divide by 0.
        Family("pixart", pixart, (4, 34, 34), text, "PixArt", "PixArtSigma PixArt PixArtMS"),
        Family(
            "ltx",
            ltx,
            (128, 3, 3, 3),
            partial(text, mask=True),
            "LTX video",
            "LTXV LTXV LTXVModel",
            Grid(3, 3, 3),
        ),
        Family(
            "mochi",
            mochi,
            (12, 3, 6, 6),
            partial(text, mask=True),
            "Mochi",
            "GenmoMochi GenmoMochi AsymmDiTJoint",
            Grid(3, 3, 3, after=6),
        ),
    )
}


@shared
def flux2() -> ModelPatcher:
    """FLUX.2: shared modulation, patches of one, 2 double and 2 single blocks. Core pads the text to 512 tokens."""
    sizes = {**tiny.FLUX1, "in_channels": 128, "out_channels": 128, "vec_in_dim": None, "context_in_dim": TEXT}
    sizes |= {"hidden_size": 128, "mlp_ratio": 3.0, "num_heads": 1, "depth": 2, "depth_single_blocks": 2}
    sizes |= {"axes_dim": [32] * 4, "theta": 2000, "patch_size": 1, "qkv_bias": False, "guidance_embed": False}
    sizes |= {"global_modulation": True, "mlp_silu_act": True, "ops_bias": False, "txt_ids_dims": [3]}
    return load(weights(comfy.ldm.flux.model.Flux, gain=1.2, **sizes))


@shared
def wan_vace() -> ModelPatcher:
    """Wan VACE: 4 blocks, of which the first and the third are followed by a block of the control videos."""
    sizes = {"dim": 128, "ffn_dim": 256, "num_heads": 1, "num_layers": 4, "vace_layers": 2, "vace_in_dim": 96}
    state = weights(comfy.ldm.wan.model.VaceWanModel, text_dim=TEXT, **sizes)
    return load(state, {"text_dim": TEXT})


@shared
def cogvideox_i2v() -> ModelPatcher:
    """CogVideoX 1.5 image-to-video: 3 blocks of 2 heads, patches of two latent frames, sampled as it was trained."""
    state = weights(
        comfy.ldm.cogvideo.model.CogVideoXTransformer3DModel,
        **{"num_attention_heads": 2, "time_embed_dim": 64, "ofs_embed_dim": 64, "text_embed_dim": TEXT},
        **{"num_layers": 3, "in_channels": 32, "patch_size_t": 2, "use_rotary_positional_embeddings": True},
    )
    return cogvideox_sampling.mended(load(state))


def with_values(family: Family, name: str, grid: Grid | None = None, **values) -> Family:
    """`family` with more in its CONDITIONING. `grid`: what becomes of its tokens then."""
    return replace(family, name=name, prompt=partial(family.prompt, **values), grid=grid or family.grid)


def random_latent(*shape: int) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(50))


# Relatives that run through code of their own.
RELATIVES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("flux2", flux2, (128, 4, 4), text, "FLUX.2", "Flux2 Flux2 Flux", Grid(4, 4, before=512), 4),
        Family(
            "wan_vace",
            wan_vace,
            (16, 3, 6, 6),
            text,
            "Wan VACE",
            "WAN21_Vace WAN21_Vace VaceWanModel",
            Grid(3, 3, 3),
            6,
        ),
        Family(
            "cogvideox_i2v",
            cogvideox_i2v,
            (16, 4, 6, 6),
            text,
            "CogVideoX",
            "CogVideoX_I2V CogVideoX CogVideoXTransformer3DModel",
            Grid(3, 3, 2, before=6),
        ),
        with_values(
            FAMILIES["qwen"],
            "qwen_edit",
            Grid(4, 4, before=6, after=6),
            reference_latents=[random_latent(16, 1, 4, 6)],
        ),
    )
}
ALL = FAMILIES | RELATIVES


def random_noise(family: Family, batch: int = 1, seed: int = 7, size: tuple[int, ...] = ()) -> Tensor:
    shape = (*family.latent_shape[: len(family.latent_shape) - len(size)], *size)
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))


def sample(
    family: Family,
    model: ModelPatcher | None = None,
    steps: int = 4,
    *,
    sampler: str = "euler",
    cfg: float = 1.0,
    batch: int = 1,
    scheduler: str = "simple",
    seed: int = 7,
    size: tuple[int, ...] = (),
    noise: Tensor | None = None,
    positive: list | None = None,
    negative: list | None = None,
) -> Tensor:
    """What ComfyUI's KSampler makes of `family`'s model, or of a patched one: `[batch, *latent_shape]`.

    size: the last sides of the latent, where they are others than the family's.
    """
    noise = random_noise(family, batch, seed, size) if noise is None else noise
    return comfy.sample.sample(
        family.load() if model is None else model,
        noise,
        steps,
        cfg,
        sampler,
        scheduler,
        family.prompt(3) if positive is None else positive,
        family.prompt(4) if negative is None else negative,
        torch.zeros_like(noise),
        disable_pbar=True,
        seed=seed,
    )
