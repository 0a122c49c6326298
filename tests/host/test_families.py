"""The tiny models are what they stand for, and every part of them shows in what is sampled."""

from __future__ import annotations

import pytest
import torch
from comfy.patcher_extension import WrappersMP

from dit_toolkit.tests.host.families import FAMILIES, RELATIVES, sample

pytestmark = pytest.mark.comfy

CLASSES = {
    "flux": ("Flux", "Flux", "Flux"),
    "kontext": ("Flux", "Flux", "Flux"),
    "chroma": ("Chroma", "Chroma", "Chroma"),
    "sd35": ("SD3", "SD3", "OpenAISignatureMMDITWrapper"),
    "qwen": ("QwenImage", "QwenImage", "QwenImageTransformer2DModel"),
    "wan": ("WAN21_T2V", "WAN21", "WanModel"),
    "hunyuan_video": ("HunyuanVideo", "HunyuanVideo", "HunyuanVideo"),
    "cogvideox": ("CogVideoX_T2V", "CogVideoX", "CogVideoXTransformer3DModel"),
    "lumina2": ("Lumina2", "Lumina2", "NextDiT"),
    "z_image": ("ZImage", "Lumina2", "NextDiT"),
    "pixart": ("PixArtSigma", "PixArt", "PixArtMS"),
    "ltx": ("LTXV", "LTXV", "LTXVModel"),
    "flux2": ("Flux2", "Flux2", "Flux"),
    "wan_vace": ("WAN21_Vace", "WAN21_Vace", "VaceWanModel"),
    "qwen_edit": ("QwenImage", "QwenImage", "QwenImageTransformer2DModel"),
}

# The head reads no text: what the last block makes of it is for nobody.
QWEN = "transformer_blocks.2."
LAST_TEXT = {name: (f"{QWEN}txt_mlp", f"{QWEN}attn.add_q", f"{QWEN}attn.to_add") for name in ("qwen", "qwen_edit")}

ALL = FAMILIES | RELATIVES
every_family = pytest.mark.parametrize("family", ALL.values(), ids=ALL.keys())


@every_family
def test_it_is_loaded_as_what_it_is(family):
    base = family.load().model
    found = tuple(type(part).__name__ for part in (base.model_config, base, base.diffusion_model))
    assert found == CLASSES[family.name]
    assert family.load() is family.load()


@every_family
def test_the_seed_and_the_prompt_make_the_picture(family):
    out = sample(family)
    assert out.shape == (1, *family.latent_shape)
    assert torch.isfinite(out).all()
    assert torch.equal(out, sample(family))
    for other in (sample(family, seed=8), sample(family, positive=family.prompt(5))):
        assert (other - out).abs().mean() > 1e-2 * out.abs().mean()


@every_family
def test_guidance_and_batches_work(family):
    one, plain = sample(family, cfg=3.0), sample(family)
    assert (one - plain).abs().mean() > 1e-2 * plain.abs().mean()
    two = sample(family, cfg=3.0, batch=2)
    assert two.shape[0] == 2
    assert torch.isfinite(two).all()
    assert not torch.equal(two[0], two[1])


@every_family
def test_every_matrix_has_a_part_in_the_picture(family):
    """One call of the model, and another with each matrix set to zero in turn."""
    silent = set()

    def call(executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        for name, weight in executor.class_obj.diffusion_model.named_parameters():
            if weight.ndim == 1:
                continue
            kept = weight.detach().clone()
            weight.zero_()
            if (executor(*args, **kwargs) - out).abs().max() < 1e-4 * out.abs().max():
                silent.add(name)
            weight.copy_(kept)
        return out

    model = family.load().clone()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "silence", call)
    sample(family, model, 1)
    assert {name for name in silent if not name.startswith(LAST_TEXT.get(family.name, "nothing"))} == set()
