"""Added weights that run beside the model, as ComfyUI models: core moves, offloads and maps them like any other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from uuid import UUID

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
        disable_dynamic: no dynamic VRAM, as in core's factories.
    """
    offload = comfy.model_management.unet_offload_device()
    lora = make(operations=comfy.ops.manual_cast, device=offload, dtype=next(iter(weights.values())).dtype)
    kind = ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    made = kind(lora, load_device=comfy.model_management.get_torch_device(), offload_device=offload)
    for name, weight in lora.named_parameters():
        weight.data = weight.data.to(weights[name].dtype)  # else loading would cast all to the dtype of the first
    lora.load_state_dict(dict(weights), assign=made.is_dynamic())  # after the patcher: dynamic VRAM maps the file
    lora.requires_grad_(False)
    return made


def module_in(model: ModelPatcher, adapter: UUID) -> nn.Module | None:
    """The module of an adapter as it hangs on `model`, by the uuid that all its clones have; None where it does not."""
    return next((each.model for each in model.get_additional_models() if each.clone_base_uuid == adapter), None)


def beside(model: ModelPatcher, adapter: ModelPatcher) -> ModelPatcher:
    """The adapter on the device of `model`: itself, or a copy, made the way core copies models to another GPU.

    Raises:
        ValueError: it needs a copy, and does not come from a file.
    """
    device = model.load_device
    if adapter.load_device == device:
        return adapter
    if adapter.cached_patcher_init is None:
        raise ValueError(
            f"This LoRA cannot be copied to {device}, because it does not come from a file. Load it from one."
        )
    if device.type == "cpu" and adapter.is_dynamic():
        adapter = adapter.clone(disable_dynamic=True)
    moved = adapter.deepclone_multigpu(new_load_device=device)
    moved.offload_device = model.offload_device
    return moved
