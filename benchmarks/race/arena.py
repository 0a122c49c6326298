"""What the race is run on: a MODEL, the same weights in diffusers' modules, and the pictures to make.

Two arenas. The embedded model, trained, whose pictures can be judged; its blocks are so cheap that any bookkeeping
shows. And random weights with all of FLUX.1's blocks; only time and memory count there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import comfy.ldm.flux.model
import comfy.model_management
import comfy.ops
import comfy.sample
import comfy.sd
import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from dit_toolkit.host import embedded
from dit_toolkit.training import world

SIDES = {"FLUX.1": 96, "SD3.5": 128}  # pixels: what the embedded models were trained at
SCENES = 31  # seed of the held-out scenes that are judged
CALIBRATION = 7031  # seed of others, which settings may be chosen on; their noise is counted from here too
LEVELS = (1, 1, 1, 1)  # all difficulties alike; two dolls were not trained


@dataclass(frozen=True)
class Heat:
    """One picture to make: CONDITIONING of one prompt, noise `[1, 16, h, w]`, and the negative prompt for guidance."""

    prompt: Any
    noise: Tensor
    negative: Any = None


@dataclass
class Arena:
    """Where a race is run.

    decode: a latent as the sampler gives it to a picture `[H, W, 3]` in 0..1, where there is one to look at.
    calibration: pictures that nobody judges, for methods that measure the model first.
    """

    name: str
    model: ModelPatcher
    heats: list[Heat]
    decode: Callable[[Tensor], np.ndarray] | None = None
    calibration: list[Heat] = field(default_factory=list)

    @cached_property
    def device(self) -> torch.device:
        return comfy.model_management.get_torch_device()

    @cached_property
    def transformer(self):
        from .diffusers_flux import transformer_of

        return transformer_of(self.model, self.device)

    @cached_property
    def twin(self) -> ModelPatcher:
        from .diffusers_flux import twin_of

        return twin_of(self.model, self.transformer)

    def sample(self, model: ModelPatcher, heat: Heat, steps: int, sampler: str, cfg: float = 1.0) -> Tensor:
        """What KSampler makes of it. At cfg 1 ComfyUI evaluates the positive prompt only."""
        prompt, noise = heat.prompt, heat.noise
        negative = prompt if heat.negative is None else heat.negative
        empty = torch.zeros_like(noise)
        return comfy.sample.sample(
            model, noise, steps, cfg, sampler, "simple", prompt, negative, empty, disable_pbar=True, seed=0
        )


def together(heats: list[Heat]) -> Heat:
    """All pictures as one batch, for methods that skip by plan and not by what they see: the same pictures, sooner."""
    prompts = [heat.prompt[0] for heat in heats]
    texts = torch.cat([text for text, _ in prompts])
    extra = {**prompts[0][1], "pooled_output": torch.cat([extra["pooled_output"] for _, extra in prompts])}
    return Heat([[texts, extra]], torch.cat([heat.noise for heat in heats]), heats[0].negative)


def noise_of(seed: int, height: int, width: int) -> Tensor:
    return torch.randn(1, 16, height, width, generator=torch.Generator().manual_seed(seed))


def tiny(pictures: int, calibration: int = 1, base: str = "FLUX.1") -> Arena:
    """An embedded model, and held-out prompts of its world, each with its seed; the negative prompt is empty."""
    model, clip, vae = embedded.load_model(base), embedded.load_clip(base), embedded.load_vae(base)
    side = SIDES[base] // 8

    def encode(text: str) -> Any:
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))

    negative = encode("")

    def heats(scenes: int, noise: int, count: int) -> list[Heat]:
        stream = world.scenes(scenes, LEVELS, test=True)
        prompts = [encode(world.caption(next(stream))) for _ in range(count)]
        return [Heat(prompt, noise_of(noise + i, side, side), negative) for i, prompt in enumerate(prompts)]

    def decode(latent: Tensor) -> np.ndarray:
        return vae.decode(latent)[0].clamp(0, 1).cpu().numpy()

    return Arena(
        f"embedded {base}", model, heats(SCENES, 0, pictures), decode, heats(CALIBRATION, CALIBRATION, calibration)
    )


@dataclass(frozen=True)
class Shape:
    """Of the random model: its width, blocks of each kind, and tokens of picture and text."""

    width: int
    double: int
    single: int
    rows: int
    columns: int
    text: int


# FLUX.1 at 1024 x 1024, and what two cores can run: all blocks, a quarter of the width. Each block has less to do
# there, so bookkeeping weighs more than it would.
SHAPES = {"cpu": Shape(768, 19, 38, 8, 8, 32), "cuda": Shape(3072, 19, 38, 64, 64, 512)}
HEAD = 128
TILE = 2**16  # random numbers that are repeated through a matrix


def flux1_shape(shape: Shape, dtype: torch.dtype) -> Arena:
    """A random FLUX.1 whose blocks of one kind share their weights: one double and one single block in memory."""
    empty = comfy.ldm.flux.model.Flux(
        in_channels=16,
        out_channels=16,
        vec_in_dim=768,
        context_in_dim=4096,
        hidden_size=shape.width,
        mlp_ratio=4.0,
        num_heads=shape.width // HEAD,
        depth=1,
        depth_single_blocks=1,
        axes_dim=[16, 56, 56],
        theta=10000,
        patch_size=2,
        qkv_bias=True,
        guidance_embed=True,
        txt_ids_dims=[],
        operations=comfy.ops.disable_weight_init,
        device="meta",
    )
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, weight in empty.state_dict().items():
        tile = torch.randn(TILE, generator=generator)
        tile = 1 + 0.1 * tile if name.endswith("_norm.weight") else tile * 0.5 / weight.shape[-1] ** 0.5
        count = weight.numel()
        state[name] = tile.to(dtype).repeat(-(-count // TILE))[:count].view(weight.shape)
    model = comfy.sd.load_diffusion_model_state_dict(state, model_options={"dtype": dtype})
    model.model.manual_cast_dtype = None  # on a CPU ComfyUI would multiply in float32, many times slower
    flux: Any = model.model.diffusion_model
    flux.double_blocks.extend([flux.double_blocks[0]] * (shape.double - 1))
    flux.single_blocks.extend([flux.single_blocks[0]] * (shape.single - 1))

    text = torch.randn(1, shape.text, 4096, generator=generator)
    prompt = [[text, {"pooled_output": torch.randn(1, 768, generator=generator), "guidance": 3.5}]]
    return Arena("FLUX.1's blocks (random)", model, [Heat(prompt, noise_of(0, 2 * shape.rows, 2 * shape.columns))])
