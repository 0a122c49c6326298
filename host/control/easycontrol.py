"""EasyControl on ComfyUI's MODEL: its description, and how it resizes images.

Hooks, memory and cache are those of `conditions.py`.
"""

from __future__ import annotations

from typing import Any, Literal

import comfy.utils
from comfy.model_patcher import ModelPatcher
from torch import Tensor
from torch.nn import functional as F

from ...models.control.easycontrol_keys import Kind
from ...models.control.positions import spatial_ids, subject_ids
from . import conditions
from .conditions_settings import PATCH, ConditionImage
from .easycontrol_files import EasyControlFile

Padding = Literal["grey", "black"]


class EasyControl(ConditionImage):
    """One condition image of EasyControl. spatial: it lies over the picture. subject: below it."""

    feature = "EasyControl"
    node = "Apply EasyControl"
    images = "condition images"
    kind_input = "kind"
    size_input = "condition_size"
    prefix = "dit_toolkit.easycontrol"
    position_ids = {"spatial": spatial_ids, "subject": subject_ids}  # noqa: RUF012
    over = frozenset({"spatial"})


def attach(model: ModelPatcher, file: EasyControlFile, slot: int, latent: Tensor, **settings: Any) -> ModelPatcher:
    """A clone of `model` on which the condition acts; `model` itself where strength or influence is 0.

    Args:
        slot: which LoRA of the file.
        latent: the condition image straight from a VAE, `[N, C, h, w]`.
        settings: the other fields of `ConditionImage`.

    Raises:
        ValueError: another model family, a LoRA for another size, or settings that mean nothing.
    """
    adapter = file.patcher(slot)
    made_for = (file.checkpoint.dim, file.checkpoint.double, file.checkpoint.single)
    return conditions.attach(model, EasyControl(None, file.name, latent, **settings), adapter, made_for)


def prepare_image(image: Tensor, kind: Kind, size: int, padding: Padding = "grey") -> Tensor:
    """Bring an IMAGE `[N, H, W, C]`, C being 1, 3 or 4, to `size` x `size` pixels, as the authors' pipeline does.

    spatial: stretched; the positions undo that. subject: scaled until its long side is `size`, both sides rounded down
    to whole tokens, then padded evenly on all sides.

    Returns:
        `[N, size, size, 3]`.
    """
    pixels = image[..., :3].movedim(-1, 1)
    if pixels.shape[1] == 1:
        pixels = pixels.expand(-1, 3, -1, -1)  # grey
    if kind == "spatial":
        return _resize(pixels, size, size).movedim(1, -1)
    long = max(pixels.shape[-2:])
    height, width = (max(side * size // long // PATCH, 1) * PATCH for side in pixels.shape[-2:])
    top, left = (size - height) // 2, (size - width) // 2
    around = (left, size - width - left, top, size - height - top)
    padded = F.pad(_resize(pixels, height, width), around, value=0.5 if padding == "grey" else 0.0)
    return padded.movedim(1, -1)


def _resize(pixels: Tensor, height: int, width: int) -> Tensor:
    if pixels.shape[-2:] == (height, width):
        return pixels
    return comfy.utils.common_upscale(pixels, width, height, "lanczos", "disabled")
