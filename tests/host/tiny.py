"""A tiny random FLUX.1 that ComfyUI loads and samples by itself, and a random EasyControl LoRA for it."""

from __future__ import annotations

import comfy.ldm.flux.model
import comfy.ops
import comfy.sample
import comfy.sd
import torch

from dit_toolkit.host.control import easycontrol, easycontrol_files
from dit_toolkit.models.control.easycontrol import ConditionLora, published_state

HIDDEN, DOUBLE, SINGLE = 128, 2, 2  # one head: tests take half the time of two
WIDE = 256  # two heads, for what is held to its definition
TEXT, POOLED, RANK = 48, 32, 8
FLUX1 = dict(
    out_channels=16,
    vec_in_dim=POOLED,
    context_in_dim=TEXT,
    mlp_ratio=4.0,
    num_heads=HIDDEN // 128,
    axes_dim=[16, 56, 56],
    theta=10000,
    patch_size=2,
    qkv_bias=True,
    guidance_embed=True,
    txt_ids_dims=[],
)


def flux_state(seed=0, channels=16, double=DOUBLE, single=SINGLE, hidden=HIDDEN) -> dict[str, torch.Tensor]:
    """Weights large enough that every part of the model shows in the result."""
    sizes = dict(in_channels=channels, hidden_size=hidden, depth=double, depth_single_blocks=single)
    sizes["num_heads"] = hidden // 128
    model = comfy.ldm.flux.model.Flux(
        **{**FLUX1, **sizes}, operations=comfy.ops.disable_weight_init, dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, weight in model.state_dict().items():
        noise = torch.randn(weight.shape, generator=generator)
        width = weight.shape[-1]
        state[name] = 1 + 0.1 * noise if name.endswith("_norm.weight") else noise * (0.7 / width**0.5)
    return state


def load_flux(state: dict[str, torch.Tensor], **options):
    own = {name: weight.clone() for name, weight in state.items()}  # core's conversion writes into what it is given
    model = comfy.sd.load_diffusion_model_state_dict(own, model_options=options)
    assert model is not None
    return model


def lora_state(seed=1, slots=1, double=DOUBLE, single=SINGLE, dim=HIDDEN) -> dict[str, torch.Tensor]:
    """A file in the published layout, strong enough to show."""
    loras = []
    generator = torch.Generator().manual_seed(seed)
    for _ in range(slots):
        lora = ConditionLora(dim, double, single, RANK, operations=torch.nn)
        for weight in lora.parameters():
            weight.data = torch.randn(weight.shape, generator=generator) * 0.6 / weight.shape[-1] ** 0.5
        loras.append(lora)
    return published_state(loras)


def lora_file(seed=1, **options):
    return easycontrol_files.from_state(lora_state(seed, **options), f"random{seed}.safetensors")


def latent(seed=2, size=(6, 6), batch=1) -> torch.Tensor:
    return torch.randn(batch, 16, *size, generator=torch.Generator().manual_seed(seed))


def controlled(model, seed=1, kind="spatial", file=None, slot=0, condition=None, **settings):
    """`model` with one EasyControl condition."""
    file = lora_file(seed) if file is None else file
    condition = latent(seed + 10) if condition is None else condition
    return easycontrol.attach(model, file, slot, condition, kind=kind, **settings)


def prompt(seed=3, length=5, guidance=3.5, **values):
    """CONDITIONING of a random text."""
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(1, POOLED, generator=generator)
    text = torch.randn(1, length, TEXT, generator=generator)
    return [[text, {"pooled_output": pooled, "guidance": guidance, **values}]]


def sample(model, steps=3, *, sampler="euler", cfg=1.0, size=(8, 8), batch=1, positive=None, negative=None, noise=None):
    """What ComfyUI's KSampler makes of it, `[batch, 16, *size]`."""
    noise = latent(seed=7, size=size, batch=batch) if noise is None else noise
    return comfy.sample.sample(
        model,
        noise,
        steps,
        cfg,
        sampler,
        "simple",
        prompt() if positive is None else positive,
        prompt(4) if negative is None else negative,
        torch.zeros_like(noise),
        disable_pbar=True,
        seed=0,
    )


def close(a, b, atol=2e-5) -> None:
    """Equal up to rounding: latents are of order 1, and float32 sums in another order differ by some 1e-6 a step."""
    torch.testing.assert_close(a, b, rtol=0, atol=atol)
