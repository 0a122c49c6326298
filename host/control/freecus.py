"""FreeCus on ComfyUI's MODEL: carries a subject from a picture into a new one, without training.

Hooks: an APPLY_MODEL wrapper hands the attention patch of `host/attention.py` keys that do not exist yet. When the
first vital block asks for them, the model denoises the reference at the same evaluation. If a step cache forecasts the
evaluation, no block asks, and the reference costs nothing. Core is asked to leave room for keys, values and the pass
(`host/memory.py`).

The reference pass is the plain model: same prompt, timestep, guidance and LoRAs, and attention as sparse as the
picture's. It has no ControlNet, no reference latents of an edit model, no other feature's keys, no step cache and no
wrappers around the transformer. Its conditions have lanes of their own.

Settings: `freecus_settings.py`. State: `freecus_run.py`, for one run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, get_args

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ...models.control.freecus import PUBLISHED_DEPTH, in_bytes, layers_from
from .. import attention
from ..families import flux
from ..run import KEY, Run
from ..run import attach as attach_description
from .freecus_run import NO_CONCAT, ReferenceRun
from .freecus_settings import DARK, NODE, Fit, FreeCus, Reference, resize_mask

logger = logging.getLogger(__name__)


def bind(settings: FreeCus, run: Run, model_options: dict) -> None:
    reference = ReferenceRun(settings, run)
    attention.install(model_options)
    add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, reference.apply_model, model_options, is_model_options=True)


def attach(
    model: ModelPatcher,
    image: Tensor,
    mask: Tensor | None,
    vae: Any,
    *,
    layers: str,
    fit: Fit = "crop",
    show: Callable[[Tensor], None] | None = None,
    **settings: Any,
) -> ModelPatcher:
    """A clone of `model` that carries the subject of `image` into its pictures.

    Args:
        image: `[1, H, W, C]`. mask: `[1, H, W]` or `[H, W]`, 0 to 1, or None for the whole picture.
        layers: as `models/control/freecus.py` reads them.
        show: gets what the model sees, when a run has encoded it.
        settings: the other fields of `FreeCus`.

    Raises:
        ValueError: another model family, a model that takes a second picture in its channels, several images, an empty
            mask, or settings that mean nothing.
    """
    transformer = flux.FLUX1.require(model, NODE)
    if transformer.in_channels > transformer.out_channels:
        raise ValueError(NO_CONCAT)
    mask = checked(image, mask)
    if fit not in get_args(Fit):
        raise ValueError(f"fit must be one of {', '.join(get_args(Fit))}, got '{fit}'.")
    names = flux.block_names(transformer)
    doubles = len(transformer.double_blocks)
    depth = (doubles, len(names) - doubles)
    chosen = layers_from(layers, *depth)
    if layers.strip().lower() == "published" and depth != PUBLISHED_DEPTH:
        logger.info(
            "FreeCus: the published layers are those of FLUX.1-dev. This model has %d double and %d single blocks, "
            "so all of them see the subject",
            *depth,
        )
    blocks = frozenset(names[i] for i in chosen)
    return attach_description(model, FreeCus(Reference(image, mask, vae, fit, show), blocks, **settings), bind)


def checked(image: Tensor, mask: Tensor | None) -> Tensor | None:
    """Check picture and mask; return the mask as `[1, H, W]`."""
    if image.ndim != 4 or image.shape[0] != 1:
        raise ValueError(
            f"{NODE} takes one reference picture, got {image.shape[0]}. Chain the node, once for each picture."
        )
    if not torch.isfinite(image).all():
        raise ValueError(f"{NODE}: the reference holds NaN or infinite values. Check the image.")
    if mask is not None:
        mask = mask[None] if mask.ndim == 2 else mask
        if mask.ndim != 3 or mask.shape[0] != 1:
            raise ValueError(f"{NODE} takes one mask `[1, H, W]` for its picture, got {tuple(mask.shape)}.")
        if not torch.isfinite(mask).all():
            raise ValueError(f"{NODE}: the mask holds NaN or infinite values. Check it.")
        if not (in_bytes(mask) > 0).any():
            raise ValueError(f"{NODE}: the mask is empty. Paint it over the subject, or disconnect it.")
    return mask


def given(image: Tensor, mask: Tensor | None) -> Tensor:
    """Picture and mask as they are given, `[1, H, W, 3]`: dark where the mask is 0. Sizes come with the run."""
    shown = image[..., :3].expand(-1, -1, -1, 3)
    if mask is None:
        return shown
    weight = resize_mask(in_bytes(mask)[:, None], image.shape[1], image.shape[2])[:, 0, ..., None]
    return shown * (weight > 0).to(shown).clamp(min=DARK)
