"""What DynamiCtrl's conditions and latent are made of: pictures, poses, masks and prompts, brought to one size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import comfy.utils
import torch
from comfy.model_management import intermediate_device
from torch import Tensor
from torch.nn import functional as F

from ...models.animate.dynamictrl import latent_frames, latent_mask, nearest_length, nearest_side
from ..families.family import require_latent
from ..part_of_run import PartOfRun
from .dynamictrl_conditions import with_pose
from .dynamictrl_settings import NODE, Pose

Crop = Literal["center", "stretch"]
CELL = 8  # pixels along a side of a cell of the latent
CHANNELS = 16
LONGEST_TEXT = 226  # tokens of the text that CogVideoX was trained with


@dataclass(frozen=True)
class Asked:
    """What the user asks for. Sides in pixels, length in frames."""

    width: int
    height: int
    length: int
    crop: Crop
    ref_latent_scale: float


class Prepared(NamedTuple):
    """What goes to the sampler. noteworthy: something is other than it was asked for."""

    positive: list
    negative: list
    latent: dict[str, Tensor]
    report: str
    noteworthy: bool


class Size(NamedTuple):
    """Of the video. Sides in pixels, both multiples of 16; length in frames, 8 k + 5."""

    width: int
    height: int
    length: int

    @property
    def cells(self) -> tuple[int, int, int]:
        """Frames, height and width of the latent."""
        return latent_frames(self.length), self.height // CELL, self.width // CELL


def prepared(
    positive: list,
    negative: list,
    vae: Any,
    reference: Tensor,
    pose: Tensor | None,
    mask: Tensor | None,
    asked: Asked,
    strength: float = 1.0,
    part: PartOfRun | None = None,
) -> Prepared:
    """Conditions with the picture and the poses, and the latent to begin with.

    Args:
        reference: `[1 or more, H, W, C]`; only the first counts. pose: one picture for each frame, or None.
        mask: where the person may move, `[1 or F, H, W]` or `[H, W]`; None: everywhere.

    Raises:
        ValueError: a VAE that gives no latents of a video for CogVideoX.
    """
    size = Size(nearest_side(asked.width), nearest_side(asked.height), nearest_length(asked.length))
    said = rounded(asked, size)
    if len(reference) > 1:
        said.append(f"of {len(reference)} reference pictures the first is used")

    posed = pose is not None and strength > 0
    progress = comfy.utils.ProgressBar(1 + posed + (mask is not None))

    picture = fitted(reference[:1], size, asked.crop)
    first = encoded(vae, picture, size, "reference", frames=1)
    progress.update(1)
    shown = first.new_zeros(1, CHANNELS, *size.cells)
    shown[:, :, :1] = first * asked.ref_latent_scale
    conditions = [with_picture(each, shown) for each in (positive, negative)]

    if posed and pose is not None:
        poses = of_length(pose, size.length, "pose", said)
        latent = encoded(vae, fitted(poses, size, asked.crop), size, "pose", frames=size.cells[0])
        progress.update(1)
        given = Pose(latent, strength) if part is None else Pose(latent, strength, part)
        conditions = [with_pose(each, given) for each in conditions]

    latent = {"samples": torch.zeros(1, CHANNELS, *size.cells, device=intermediate_device())}
    if mask is not None:
        still = picture.expand(size.length, -1, -1, -1)
        latent["samples"] = encoded(vae, still, size, "reference", frames=size.cells[0])
        progress.update(1)
        latent["noise_mask"] = moving(mask, size, asked.crop, said)
    longest = max((text.shape[1] for each in (positive, negative) for text, _ in each), default=0)
    if longest > LONGEST_TEXT:
        said.append(f"a prompt of {longest} tokens is longer than the {LONGEST_TEXT} that CogVideoX was trained with")
    line = f"{size.width} x {size.height} pixels, {size.length} frames, {size.cells[0]} latent frames"
    return Prepared(conditions[0], conditions[1], latent, "; ".join([line, *said]), bool(said))


def rounded(asked: Asked, size: Size) -> list[str]:
    """What was rounded to what, in words."""
    wanted = Size(asked.width, asked.height, asked.length)
    units = {"width": "multiple of 16", "height": "multiple of 16", "length": "length 8k + 5"}
    return [
        f"{name} {before} was rounded to {after}, the nearest {units[name]}"
        for name, before, after in zip(Size._fields, wanted, size, strict=True)
        if before != after
    ]


def fitted(image: Tensor, size: Size, crop: Crop) -> Tensor:
    """An IMAGE `[F, H, W, C]`, grey, RGB or RGB with alpha, as RGB of this size: `[F, h, w, 3]` in 0..1."""
    pixels = image[..., :3].movedim(-1, 1).float()
    pixels = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels
    if pixels.shape[-2:] != (size.height, size.width):
        pixels = cut(pixels, size, crop)
        pixels = F.interpolate(pixels, (size.height, size.width), mode="bilinear", antialias=True, align_corners=False)
    return pixels.clamp(0, 1).movedim(1, -1)


def cut(pixels: Tensor, size: Size, crop: Crop) -> Tensor:
    """The largest middle part of `[F, C, H, W]` that has the shape of this size; all of it where it is stretched."""
    height, width = pixels.shape[-2:]
    if crop == "stretch":
        return pixels
    across = max(min(round(height * size.width / size.height), width), 1)
    down = max(min(round(width * size.height / size.width), height), 1)
    top, left = (height - down) // 2, (width - across) // 2
    return pixels[..., top : top + down, left : left + across]


def of_length(frames: Tensor, length: int, name: str, said: list[str]) -> Tensor:
    """Frames `[F, ...]` as `length` of them: the last is held, or the rest cut off, and either is said."""
    given = len(frames)
    if given > length:
        said.append(f"of {given} frames of '{name}' the first {length} are used")
    elif given < length:
        said.append(f"'{name}' has {given} frames, so its last is held for {length - given} more")
        frames = torch.cat([frames, frames[-1:].expand(length - given, *frames.shape[1:])])
    return frames[:length]


def encoded(vae: Any, pixels: Tensor, size: Size, name: str, frames: int) -> Tensor:
    """Pixels `[F, H, W, 3]` as a latent, `[1, 16, frames, h, w]`."""
    latent = vae.encode(pixels)
    wanted = (1, CHANNELS, frames, *size.cells[1:])
    if tuple(latent.shape) != wanted:
        raise ValueError(
            f"{NODE}: 'vae' makes a latent of shape {list(latent.shape)} of '{name}', and CogVideoX needs "
            f"{list(wanted)}. Connect CogVideoX's VAE."
        )
    require_latent(latent, f"{NODE}: the encoded '{name}'")
    return latent


def with_picture(conditioning: list, shown: Tensor) -> list:
    """A CONDITIONING whose every entry has this latent beside the noise.

    `noise_concat` reaches the model as it is. `concat_latent_image` would be scaled by the latent format, which is
    another one for the small models, and which this node cannot know.
    """
    return [[text, {**values, "noise_concat": shown}] for text, values in conditioning]


def moving(mask: Tensor, size: Size, crop: Crop, said: list[str]) -> Tensor:
    """The sampler's noise mask, `[1, 1, T, h, w]`: 1 in every cell that the person may touch."""
    frames = (mask[None] if mask.ndim == 2 else mask).float()[:, None].clamp(0, 1)  # [F, 1, H, W]
    if frames.shape[-2:] != (size.height, size.width):
        shape = (size.height, size.width)
        frames = F.interpolate(cut(frames, size, crop), shape, mode="bilinear", antialias=True, align_corners=False)
    if len(frames) > 1:
        frames = of_length(frames, size.length, "background_mask", said)
    frames = frames.expand(size.length, -1, -1, -1)
    return latent_mask(frames[:, 0].clamp(0, 1), size.cells[1:])
