"""EasyControl on ComfyUI's MODEL: condition images whose keys and values are computed once per run.

Hooks: an APPLY_MODEL wrapper looks up, for every condition of the call, the keys and values of
`models/control/easycontrol.py` and hands them to the attention patch of `host/attention.py`; PREPARE_SAMPLING asks core
to leave room for them. The picture's own stream keeps its tokens, so ControlNets, caches, masks and samplers see
nothing new.

State: `easycontrol_run.py`. The LoRA is an additional model of the MODEL: core moves and offloads it, and base weights
are never touched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor
from torch.nn import functional as F

from .. import attention, flux
from ..run import KEY, Run
from ..run import attach as attach_description
from .easycontrol_files import EasyControlFile
from .easycontrol_run import Encoder

ADAPTER = "dit_toolkit.easycontrol"  # additional models of the MODEL, one key per condition
PATCH = 16  # pixels per token

Kind = Literal["spatial", "subject"]
Cache = Literal["on GPU", "offload to CPU", "off"]
Padding = Literal["grey", "black"]


@dataclass(frozen=True, eq=False)
class EasyControl:
    """One condition on one MODEL. Neutral values: `strength` 0 and `influence` 0 are off, `influence` 1 is as trained.

    adapter: key of the LoRA among the MODEL's additional models. name: the file's, for messages.
    latent: as a VAE gives it, `[N, C, h, w]`; N is 1, or one per picture of the batch.
    strength: factor on the LoRA. influence: factor on the weight of the condition's keys in every softmax, 0 to 1.
    start, end: part of the run it acts in, 0 to 1, as in core's own nodes.
    """

    adapter: str
    name: str
    latent: Tensor
    kind: Kind
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    influence: float = 1.0
    cache: Cache = "on GPU"

    def __post_init__(self):
        check_numbers(self.strength, self.start, self.end, self.influence)
        for title, value, choices in (("kind", self.kind, Kind), ("kv_cache", self.cache, Cache)):
            if value not in get_args(choices):
                raise ValueError(f"{title} must be one of {', '.join(get_args(choices))}, got '{value}'.")
        if not torch.isfinite(self.latent).all():
            raise ValueError("The condition holds NaN or infinite values. Check the image, or the VAE that encoded it.")

    @property
    def offloaded(self) -> bool:
        return self.cache == "offload to CPU"

    def bind(self, run: Run, model_options: dict) -> None:
        encoder = Encoder(self, run)
        attention.install(model_options)
        for kind, wrapper in (
            (WrappersMP.PREPARE_SAMPLING, encoder.reserve),
            (WrappersMP.APPLY_MODEL, encoder.apply_model),
        ):
            add_wrapper_with_key(kind, KEY, wrapper, model_options, is_model_options=True)

    def acts_at(self, sigma: float, model_sampling: Any) -> bool:
        """Whether the condition acts at this noise level. Ranges that meet do not overlap."""
        first = math.inf if self.start <= 0 else model_sampling.percent_to_sigma(self.start)
        last = -math.inf if self.end >= 1 else model_sampling.percent_to_sigma(self.end)
        return last < sigma <= first


def check_numbers(strength: float, start: float, end: float, influence: float) -> None:
    """Refuse what means nothing. ComfyUI does not check values that come over a link, and NaN passes its checks."""
    for title, value in (("strength", strength), ("start_percent", start), ("end_percent", end)):
        if not math.isfinite(value):
            raise ValueError(f"{title} must be a finite number, got {value}.")
    if not 0 <= influence <= 1:  # NaN too
        raise ValueError(f"influence must be between 0 and 1, got {influence}.")
    if start >= end:
        raise ValueError(f"start_percent ({start:g}) must be below end_percent ({end:g}).")


def attach(model: ModelPatcher, file: EasyControlFile, slot: int, latent: Tensor, **settings: Any) -> ModelPatcher:
    """A clone of `model` on which the condition acts; `model` itself where strength or influence is 0.

    Args:
        slot: which LoRA of the file.
        latent: the condition as a VAE gives it, `[N, C, h, w]`.
        settings: the other fields of `EasyControl`.

    Raises:
        ValueError: another model family, a LoRA for another size, or settings that mean nothing.
    """
    transformer = flux.require_flux1(model, "Apply EasyControl")
    adapter = file.patcher(slot)
    made_for = (file.checkpoint.dim, file.checkpoint.double, file.checkpoint.single)
    has = (transformer.hidden_size, len(transformer.double_blocks), len(transformer.single_blocks))
    if made_for != has:
        raise ValueError(
            f"{file.name} is made for hidden size {made_for[0]} and {made_for[1]}+{made_for[2]} blocks, "
            f"the model has {has[0]} and {has[1]}+{has[2]}. Use a LoRA that was trained for this model."
        )
    channels = model.model.latent_format.latent_channels
    if latent.ndim != 4 or latent.shape[1] != channels:
        raise ValueError(
            f"The condition's latent must be [N, {channels}, h, w], got {tuple(latent.shape)}. Use its VAE."
        )

    number = sum(key.startswith(ADAPTER) for key in model.additional_models)
    description = EasyControl(f"{ADAPTER}.{number}", file.name, latent, **settings)
    if description.strength == 0 or description.influence == 0:
        return model
    patched = attach_description(model, description)
    patched.set_additional_models(description.adapter, [adapter])
    return patched


def prepare_image(image: Tensor, kind: Kind, size: int, padding: Padding = "grey") -> Tensor:
    """Bring an IMAGE `[N, H, W, C]`, C being 1, 3 or 4, to `size` x `size` pixels, as the authors' pipeline does.

    spatial: stretched; the positions undo the aspect ratio. subject: the long side becomes `size`, both sides are cut
    down to whole tokens, and the rest is filled evenly around it.

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
