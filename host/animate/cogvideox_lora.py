"""LoRAs for CogVideoX in the layouts that people publish, loaded by ComfyUI's own code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import comfy.sd
import folder_paths
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...models.animate.dynamictrl_keys import lora_names
from ...models.checkpoint import shown
from .. import model_files
from ..families import cogvideox
from ..transformer import transformer_of

NODE = "Load CogVideoX LoRA"
FOLDER = "loras"
MATRIX = re.compile(r"diffusion_model\.(?P<layer>.+?)(?:\.|_)lora(?:\.|_)(?:(?P<into>A|down)|B|up)(?:\.\w+)?\.weight")


def names() -> list[str]:
    return folder_paths.get_filename_list(FOLDER)


def load(model: ModelPatcher, name: str, strength: float) -> tuple[ModelPatcher, str]:
    """A clone of `model` with a LoRA on it, and one line on how much of the file it took.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another model, a damaged file, or a LoRA for another model.
    """
    cogvideox.COGVIDEOX.require(model, NODE)
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        raise FileNotFoundError(f"{name} is not in models/{FOLDER}. Put it there and refresh the page.")
    state, _ = model_files.read(path, name)
    renamed, strange = lora_names(state)
    if not renamed:
        example = shown(next(iter(state), ""))
        raise ValueError(
            f"{name} is no LoRA for CogVideoX: none of its {len(state)} keys names a layer of it, {example} among them."
        )
    before = sum(map(len, model.patches.values()))
    _fits(model, renamed, name)
    patched: Any = comfy.sd.load_lora_for_models(model, None, renamed, strength, 0.0)[0]
    taken = sum(map(len, patched.patches.values())) - before
    if not taken:
        raise ValueError(
            f"{name} names layers of CogVideoX, and none of them is in this model. Get a LoRA for its size."
        )
    left = f"; {len(strange)} keys name no layer of it, {shown(strange[0])} first" if strange else ""
    return patched, f"{name}: {taken} weights of the model changed{left}"


def _fits(model: ModelPatcher, renamed: Mapping[str, Tensor], name: str) -> None:
    """Refuse matrices for layers of another size: ComfyUI would leave them out while it samples."""
    modules: dict[str, Any] = dict(transformer_of(model).named_modules())
    for key, tensor in renamed.items():
        match = MATRIX.fullmatch(key)
        layer: Any = modules.get(match["layer"]) if match else None
        if match is None or not hasattr(layer, "in_features") or tensor.ndim != 2:
            continue
        into = match["into"] is not None
        wanted, has = (layer.in_features, tensor.shape[1]) if into else (layer.out_features, tensor.shape[0])
        if wanted != has:
            raise ValueError(
                f"{name} does not fit this model: {shown(key)} is for {has} channels, and the layer has {wanted}. Get "
                "a LoRA for its size."
            )
