"""How DiT4SR is sampled: the schedule its authors use, made of ComfyUI's own parts.

Euler on 40 steps of the schedule "normal" at shift 3 has the noise levels of the authors' code. ComfyUI's other
schedules have other ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import comfy.samplers
from comfy.model_patcher import ModelPatcher
from comfy.model_sampling import CONST, ModelSamplingDiscreteFlow
from torch import Tensor

from ..families import sd3

STEPS, CFG, SHIFT = 40, 8.0, 3.0  # of the authors' command line; their demo has 20 steps and 7


class Flow(ModelSamplingDiscreteFlow, CONST):
    """As SD3 samples."""


class Sampling(NamedTuple):
    model: ModelPatcher
    sampler: Any
    sigmas: Tensor


def sampling(model: ModelPatcher, steps: int, shift: float) -> Sampling:
    """A clone of `model` at this shift, with its sampler and schedule.

    Raises:
        ValueError: another model family.
    """
    sd3.SD3.require(model, "DiT4SR Sampling")
    flow = Flow(model.model.model_config)
    flow.set_parameters(shift=shift, multiplier=1000)
    patched = model.clone()
    patched.add_object_patch("model_sampling", flow)
    sigmas = comfy.samplers.calculate_sigmas(flow, "normal", steps)
    return Sampling(patched, comfy.samplers.sampler_object("euler"), sigmas)
