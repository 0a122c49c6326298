"""FreeCus: the settings that hang on the MODEL, and the reference brought to the size of the picture.

A run encodes the reference when it starts, because only then the size is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import comfy.utils
from torch import Tensor
from torch.nn import functional as F

from ...models.control.freecus import KEY_SCALE, REFERENCE_SHIFT, ShiftMode, in_bytes, reference_sigma, subject_tokens
from ...models.control.pixels import Fit
from ...models.control.positions import GridSize
from ..families.family import require_latent
from ..part_of_run import WHOLE_RUN, PartOfRun
from ..transformer import Block

NODE = "Apply FreeCus"
PIXELS = 8  # of one cell of the latent
DARK = 0.25  # of the brightness, for what is not the subject

Prompts = Literal["positive only", "positive and negative"]


@dataclass(frozen=True, eq=False)
class Reference:
    """The picture of a subject, brought to the size of the output when a run starts.

    image: `[1, H, W, C]`, 0 to 1.
    mask: of the subject, `[1, h, w]` of any size, over the whole image; None selects all of it.
    show: gets what the model sees, whenever it is encoded.
    """

    image: Tensor
    mask: Tensor | None
    vae: Any
    fit: Fit = "crop"
    show: Callable[[Tensor], None] | None = None
    _latents: dict[GridSize, Tensor] = field(default_factory=dict)  # by size

    def latent(self, height: int, width: int) -> Tensor:
        """The reference's latent straight from the VAE, `[1, C, height, width]`."""
        if (height, width) not in self._latents:
            encoded = self.vae.encode(self.picture(height, width))
            if encoded.ndim != 4 or encoded.shape[-2:] != (height, width):
                raise ValueError(
                    f"{NODE}: the VAE made {tuple(encoded.shape)} of the reference, the picture's latent is "
                    f"{height} x {width}. Connect the VAE of the FLUX.1 model."
                )
            require_latent(encoded, f"{NODE}: the reference")
            self._latents.clear()
            self._latents[height, width] = encoded
            if self.show is not None:
                self.show(self.seen(height, width, (-(-height // 2), -(-width // 2))))
        return self._latents[height, width]

    def seen(self, height: int, width: int, grid: GridSize) -> Tensor:
        """What the model sees at this size, `[1, 8 * height, 8 * width, 3]`: dark where no token shows the subject."""
        shown = self.picture(height, width)
        counts = shown.new_full((grid[0] * grid[1],), DARK)
        counts[self.tokens(height, width, grid).to(counts.device)] = 1.0
        cells = counts.view(*grid).repeat_interleave(2 * PIXELS, 0).repeat_interleave(2 * PIXELS, 1)
        return shown * cells[: shown.shape[1], : shown.shape[2], None]

    def picture(self, height: int, width: int) -> Tensor:
        """The reference at the size of a latent, `[1, 8 * height, 8 * width, 3]`."""
        pixels = self.image[..., :3].movedim(-1, 1)
        if pixels.shape[1] == 1:
            pixels = pixels.expand(-1, 3, -1, -1)  # grey
        return fitted(pixels, height * PIXELS, width * PIXELS, self.fit, resize_picture).movedim(1, -1)

    def tokens(self, height: int, width: int, grid: GridSize) -> Tensor:
        """Numbers of the subject's tokens, `[S]`, on a latent of this size.

        Raises:
            ValueError: no token shows the subject.
        """
        if self.mask is None:
            mask = self.image.new_ones((1, 1, *self.image.shape[1:3]))
        else:
            height_of_image, width_of_image = self.image.shape[1:3]
            mask = resize_mask(in_bytes(self.mask)[:, None], height_of_image, width_of_image)
        size = (height * PIXELS, width * PIXELS)
        mask = fitted(mask, *size, self.fit, resize_mask, fill=0.0)
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
    """One reference on one MODEL. It has no neutral value: no scale turns it off, and an empty part is an error.

    blocks: the vital ones. key_scale: on the subject's keys. text_key_scale: on the text's own, in these blocks.
    shift_mode, reference_shift: the reference's noise level, see `models/control/freecus.py`.
    part: the part of the run in which it acts.
    seed: seed of the reference's own noise; None takes the picture's starting noise, as published.
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

    innermost = True  # its reference pass needs what sparse attention adds to the call

    def __post_init__(self):
        for title, value in (("key_scale", self.key_scale), ("text_key_scale", self.text_key_scale)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{title} must be a number above 0, got {value}.")
        if not (math.isfinite(self.reference_shift) and abs(self.reference_shift) <= 20):
            raise ValueError(f"reference_shift must be between -20 and 20, got {self.reference_shift}.")
        if self.prompts not in get_args(Prompts):
            raise ValueError(f"prompts must be one of {', '.join(get_args(Prompts))}, got '{self.prompts}'.")
        reference_sigma(0.5, 0.0, self.shift_mode, self.reference_shift)


def resize_picture(pixels: Tensor, height: int, width: int, crop: str = "disabled") -> Tensor:
    return comfy.utils.common_upscale(pixels, width, height, "lanczos", crop)


def resize_mask(mask: Tensor, height: int, width: int, crop: str = "disabled") -> Tensor:
    """Resize by area if the mask shrinks, so that parts thinner than a pixel leave a trace."""
    if tuple(mask.shape[-2:]) == (height, width):
        return mask
    shrinks = height < mask.shape[-2] or width < mask.shape[-1]
    return comfy.utils.common_upscale(mask, width, height, "area" if shrinks else "bilinear", crop)


def fitted(
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
