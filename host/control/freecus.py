"""FreeCus on ComfyUI's MODEL: a subject carried from a picture into a new one, without training.

Hooks: an APPLY_MODEL wrapper hands the attention patch of `host/attention.py` keys that do not exist yet. The first
vital block that asks for them has the model denoise the reference, at the same evaluation; an evaluation that a step
cache forecasts asks for nothing and costs nothing. PREPARE_SAMPLING asks core to leave room for keys and values.

The reference pass is the plain model: same prompt, timestep, guidance and LoRAs, attention as sparse as the picture's,
no ControlNet, no reference latents of an edit model, no other feature's keys, no step cache, no wrappers around the
transformer; its conditions are lanes of their own.

State: `freecus_run.py`, for one run. The reference is encoded when a run starts, since only then its size is known.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor
from torch.nn import functional as F

from ...models.control.freecus import (
    KEY_SCALE,
    PUBLISHED_DEPTH,
    REFERENCE_SHIFT,
    Grid,
    ShiftMode,
    in_bytes,
    layers_from,
    reference_sigma,
    subject_tokens,
)
from .. import attention
from ..attention import Block
from ..families import flux
from ..part_of_run import WHOLE_RUN, PartOfRun
from ..run import KEY, Run
from ..run import attach as attach_description
from .freecus_run import NO_CONCAT, ReferenceRun

logger = logging.getLogger(__name__)

NODE = "Apply FreeCus"
PIXELS = 8  # of one cell of the latent

Fit = Literal["crop", "pad", "stretch"]
Prompts = Literal["positive only", "positive and negative"]


@dataclass(frozen=True, eq=False)
class Reference:
    """The picture of a subject, brought to the size of the output when a run starts.

    image: `[1, H, W, C]`, 0 to 1.
    mask: of the subject, `[1, h, w]` of any size over the whole image; None is all of it.
    """

    image: Tensor
    mask: Tensor | None
    vae: Any
    fit: Fit = "crop"
    _kept: dict[Grid, Tensor] = field(default_factory=dict)  # no state: the same size gives the same latent

    def latent(self, height: int, width: int) -> Tensor:
        """As the VAE gives it, `[1, C, height, width]`."""
        if (height, width) not in self._kept:
            pixels = self.image[..., :3].movedim(-1, 1)
            if pixels.shape[1] == 1:
                pixels = pixels.expand(-1, 3, -1, -1)  # grey
            fitted = fit(pixels, height * PIXELS, width * PIXELS, self.fit, resize_picture)
            encoded = self.vae.encode(fitted.movedim(1, -1))
            if encoded.ndim != 4 or encoded.shape[-2:] != (height, width):
                raise ValueError(
                    f"{NODE}: the VAE made {tuple(encoded.shape)} of the reference, the picture's latent is "
                    f"{height} x {width}. Connect the VAE of the FLUX.1 model."
                )
            flux.require_latent(encoded, f"{NODE}: the reference")
            self._kept.clear()
            self._kept[height, width] = encoded
        return self._kept[height, width]

    def tokens(self, height: int, width: int, grid: Grid) -> Tensor:
        """Numbers of the subject's tokens, `[S]`, on a latent of this size.

        Raises:
            ValueError: where none is left.
        """
        if self.mask is None:
            mask = self.image.new_ones((1, 1, *self.image.shape[1:3]))
        else:
            height_of_image, width_of_image = self.image.shape[1:3]
            mask = resize_mask(in_bytes(self.mask)[:, None], height_of_image, width_of_image)
        size = (height * PIXELS, width * PIXELS)
        mask = fit(mask, *size, self.fit, resize_mask, fill=0.0)
        whole = tuple(2 * PIXELS * n for n in grid)  # odd latents: the last token is half outside
        found = subject_tokens(F.pad(mask, (0, whole[1] - size[1], 0, whole[0] - size[0]))[0, 0], grid)
        if not len(found):
            raise ValueError(
                f"{NODE}: no token of the picture shows the subject, because the mask is empty, too fine, or cropped "
                "away. Paint the mask over the subject, or set 'fit' to 'pad'."
            )
        return found


@dataclass(frozen=True, eq=False)
class FreeCus:
    """One reference on one MODEL. Off is an empty range, which is refused; there is no neutral scale.

    blocks: the vital ones. key_scale: on the subject's keys. text_key_scale: on the text's own, in these blocks.
    shift_mode, reference_shift: the reference's noise level, see `models/control/freecus.py`.
    part: of the run that it acts in.
    seed: of the reference's own noise; None takes the noise that the picture starts from, as published.
    prompts: which prompts see the reference.
    """

    reference: Reference
    blocks: frozenset[Block]
    key_scale: float = KEY_SCALE
    text_key_scale: float = KEY_SCALE
    shift_mode: ShiftMode = "reversed"
    reference_shift: float = REFERENCE_SHIFT
    part: PartOfRun = WHOLE_RUN
    seed: int | None = None
    prompts: Prompts = "positive only"

    innermost = True  # its pass of the reference goes by what sparse attention has said of the call

    def __post_init__(self):
        for title, value in (("key_scale", self.key_scale), ("text_key_scale", self.text_key_scale)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{title} must be a number above 0, got {value}.")
        if not (math.isfinite(self.reference_shift) and abs(self.reference_shift) <= 20):
            raise ValueError(f"reference_shift must be between -20 and 20, got {self.reference_shift}.")
        if self.prompts not in get_args(Prompts):
            raise ValueError(f"prompts must be one of {', '.join(get_args(Prompts))}, got '{self.prompts}'.")
        reference_sigma(0.5, 0.0, self.shift_mode, self.reference_shift)

    def bind(self, run: Run, model_options: dict) -> None:
        reference = ReferenceRun(self, run)
        attention.install(model_options)
        for kind, wrapper in (
            (WrappersMP.PREPARE_SAMPLING, reference.reserve),
            (WrappersMP.APPLY_MODEL, reference.apply_model),
        ):
            add_wrapper_with_key(kind, KEY, wrapper, model_options, is_model_options=True)


def attach(
    model: ModelPatcher,
    image: Tensor,
    mask: Tensor | None,
    vae: Any,
    *,
    layers: str,
    fit: Fit = "crop",
    **settings: Any,
) -> ModelPatcher:
    """A clone of `model` that carries the subject of `image` into what it draws.

    Args:
        image: `[1, H, W, C]`. mask: `[1, H, W]` or `[H, W]`, 0 to 1, or None for the whole picture.
        layers: as `models/control/freecus.py` reads them.
        settings: the other fields of `FreeCus`.

    Raises:
        ValueError: another model family, a model that takes a second picture in its channels, several images, an empty
            mask, or settings that mean nothing.
    """
    transformer = flux.require_flux1(model, NODE)
    if transformer.in_channels > transformer.out_channels:
        raise ValueError(NO_CONCAT)
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
    return attach_description(model, FreeCus(Reference(image, mask, vae, fit), blocks, **settings))


def resize_picture(pixels: Tensor, height: int, width: int, crop: str = "disabled") -> Tensor:
    return comfy.utils.common_upscale(pixels, width, height, "lanczos", crop)


def resize_mask(mask: Tensor, height: int, width: int, crop: str = "disabled") -> Tensor:
    """By area where it shrinks: what is thinner than a pixel of the result leaves a trace."""
    if tuple(mask.shape[-2:]) == (height, width):
        return mask
    shrinks = height < mask.shape[-2] or width < mask.shape[-1]
    return comfy.utils.common_upscale(mask, width, height, "area" if shrinks else "bilinear", crop)


def fit(
    pixels: Tensor, height: int, width: int, how: Fit, resize: Callable[..., Tensor], fill: float | None = None
) -> Tensor:
    """Bring `[1, C, H, W]` to `height` x `width`: cropped, padded evenly, or stretched.

    Args:
        resize: `resize_picture` or `resize_mask`.
        fill: what pads; None repeats the border.
    """
    if how != "pad":
        if pixels.shape[-2:] == (height, width):
            return pixels
        return resize(pixels, height, width, "center" if how == "crop" else "disabled")
    factor = min(height / pixels.shape[-2], width / pixels.shape[-1])
    inner = [
        max(min(round(side * factor), most), 1) for side, most in zip(pixels.shape[-2:], (height, width), strict=True)
    ]
    if tuple(inner) != tuple(pixels.shape[-2:]):
        pixels = resize(pixels, inner[0], inner[1])
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    around = (left, width - inner[1] - left, top, height - inner[0] - top)
    if fill is None:
        return F.pad(pixels, around, mode="replicate")
    return F.pad(pixels, around, value=fill)
