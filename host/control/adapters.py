"""LoRAs that run beside the model, as ComfyUI models: core moves, offloads and maps them as it does any other."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import comfy.model_management
import comfy.model_patcher
import comfy.ops
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn


def patcher(
    make: Callable[..., nn.Module], weights: Mapping[str, Tensor], disable_dynamic: bool = False
) -> ModelPatcher:
    """An adapter with `weights`.

    Args:
        make: builds the module from `operations`, `device` and `dtype`.
        disable_dynamic: as core's factories have it: no dynamic VRAM.
    """
    offload = comfy.model_management.unet_offload_device()
    lora = make(operations=comfy.ops.manual_cast, device=offload, dtype=next(iter(weights.values())).dtype)
    kind = ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    made = kind(lora, load_device=comfy.model_management.get_torch_device(), offload_device=offload)
    lora.load_state_dict(dict(weights), assign=made.is_dynamic())  # after the patcher: dynamic VRAM maps the file
    lora.requires_grad_(False)
    return made
