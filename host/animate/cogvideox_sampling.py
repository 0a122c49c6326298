"""CogVideoX's sampling, which ComfyUI 0.30 gets wrong: v-prediction with zero terminal SNR, and the authors' steps.

ComfyUI gives CogVideoX `V_PREDICTION_DDPM`, whose input is not scaled, and which multiplies the first noise by 4519. So
its own KSampler makes noise of noise. Its `ModelSamplingDiscrete` with v-prediction has the noise levels of CogVideoX's
schedulers, and fits.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.model_sampling import V_PREDICTION, ModelSamplingDiscrete
from torch import Tensor

from ...models.animate.cogvideox_sampling import trailing
from ..families import cogvideox

NODE = "CogVideoX Sampling Preset"
SamplerName = Literal["DPM", "DDIM"]
# ComfyUI's samplers: "midpoint" and eta 1 are the defaults of the first. Largest difference: 1.3e-3 and 5e-4 of 1.
SAMPLERS: dict[SamplerName, str] = {"DPM": "dpmpp_2m_sde", "DDIM": "euler"}
SCHEDULER = "simple"  # of ComfyUI's, the one with the same steps where their number divides 1000


class VPrediction(ModelSamplingDiscrete, V_PREDICTION):
    """As CogVideoX was trained."""


class Sampling(NamedTuple):
    model: ModelPatcher
    sampler: Any
    sigmas: Tensor
    sampler_name: str
    scheduler: str


def mended(model: ModelPatcher) -> ModelPatcher:
    """A clone of a CogVideoX `model` that samplers run as it was trained."""
    patched = model.clone()
    patched.add_object_patch("model_sampling", VPrediction(model.model.model_config, zsnr=True))
    return patched


def sampling(model: ModelPatcher, sampler: SamplerName, steps: int) -> Sampling:
    """A mended clone of `model`, with the sampler and the noise levels of CogVideoX's own schedulers.

    Raises:
        ValueError: another model family.
    """
    cogvideox.COGVIDEOX.require(model, NODE)
    patched = mended(model)
    levels: Any = patched.get_model_object("model_sampling").sigmas
    sigmas = torch.cat([levels[trailing(steps, len(levels))], levels.new_zeros(1)])
    name = SAMPLERS[sampler]
    return Sampling(patched, comfy.samplers.sampler_object(name), sigmas, name, SCHEDULER)
