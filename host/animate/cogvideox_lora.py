"""LoRAs for CogVideoX in the layouts that people publish, loaded by ComfyUI's own code."""

from __future__ import annotations

from typing import Any

import comfy.sd
import folder_paths
from comfy.model_patcher import ModelPatcher

from ...models.animate.dynamictrl_keys import lora_names
from ...models.checkpoint import shown
from .. import model_files
from ..families import cogvideox

NODE = "Load CogVideoX LoRA"
FOLDER = "loras"


def names() -> list[str]:
    return folder_paths.get_filename_list(FOLDER)


def load(model: ModelPatcher, name: str, strength: float) -> tuple[ModelPatcher, str]:
    """A clone of `model` with a LoRA on it, and one line on how much of the file it took.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another model, a damaged file, or a LoRA for another model.
    """
    cogvideox.require_cogvideox(model, NODE)
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
    patched: Any = comfy.sd.load_lora_for_models(model, None, renamed, strength, 0.0)[0]
    taken = sum(map(len, patched.patches.values())) - before
    if not taken:
        raise ValueError(
            f"{name} names layers of CogVideoX, and none of them is in this model. Get a LoRA for its size."
        )
    left = f"; {len(strange)} keys name no layer of it, {shown(strange[0])} first" if strange else ""
    return patched, f"{name}: {taken} weights of the model changed{left}"
