"""Condition images on ComfyUI's MODEL: their tokens run once beside the model and reach it as keys and values.

The engine of every feature whose images travel this way: EasyControl, try-on. A feature derives its description from
`ConditionImage`, says where its images lie and how it is called, and hands over its LoRA.

Hooks: an APPLY_MODEL wrapper looks up, for every condition of the call, the keys and values of
`models/control/easycontrol.py` and hands them to the attention patch of `host/attention.py`; PREPARE_SAMPLING asks core
to leave room for them. The picture's own stream keeps its tokens, so ControlNets, caches, masks and samplers see
nothing new.

State: `conditions_run.py`. The LoRA is an additional model of the MODEL: core moves and offloads it, and base weights
are never touched. It is found by its uuid: where core spreads a MODEL over several GPUs, it copies each additional
model once for every device, whatever the keys it stands under.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args
from uuid import UUID

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from .. import attention
from ..families import flux
from ..part_of_run import WHOLE_RUN, PartOfRun
from ..run import KEY, Run
from ..run import attach as attach_description
from . import adapters
from .conditions_run import Encoder

PATCH = 16  # pixels per token

Cache = Literal["on GPU", "offload to CPU", "off"]
Place = Callable[..., Tensor]  # (own token grid, the picture's, device) to position ids [T, 3]


@dataclass(frozen=True, eq=False)
class ConditionImage:
    """One condition on one MODEL. Neutral values: `strength` 0 and `influence` 0 are off, `influence` 1 is as trained.

    adapter: uuid that all clones of the LoRA have, on every device; None without one. name: the file's, for messages.
    latent: as a VAE gives it, `[N, C, h, w]`; N is 1, or one per picture of the batch.
    kind: where the image lies, a key of `places`.
    strength: factor on the LoRA. influence: factor on the weight of the condition's keys in every softmax, 0 to 1.
    part: of the run that it acts in.
    """

    feature: ClassVar[str]  # as users call it
    node: ClassVar[str]  # display name of the node that hangs it on the MODEL
    images: ClassVar[str]  # what is given, in the plural
    kind_input: ClassVar[str]  # inputs of the node, for messages
    size_input: ClassVar[str]
    prefix: ClassVar[str]  # of its keys among the additional models
    places: ClassVar[Mapping[str, Place]]
    over: ClassVar[frozenset[str]]  # kinds that lie over the picture: a tile of it sees its own part of them

    adapter: UUID | None
    name: str
    latent: Tensor
    kind: str
    strength: float = 1.0
    part: PartOfRun = WHOLE_RUN
    influence: float = 1.0
    cache: Cache = "on GPU"

    def __post_init__(self):
        check_numbers(self.strength, self.influence)
        choices = ((self.kind_input, self.kind, tuple(self.places)), ("kv_cache", self.cache, get_args(Cache)))
        for title, value, allowed in choices:
            if value not in allowed:
                raise ValueError(f"{title} must be one of {', '.join(allowed)}, got '{value}'.")
        flux.require_latent(self.latent, "The condition")

    @property
    def off(self) -> bool:
        return self.strength == 0 or self.influence == 0

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


def check_numbers(strength: float, influence: float = 1.0) -> None:
    """Refuse what means nothing. ComfyUI does not check values that come over a link, and NaN passes its checks."""
    if not math.isfinite(strength):
        raise ValueError(f"strength must be a finite number, got {strength}.")
    if not 0 <= influence <= 1:  # NaN too
        raise ValueError(f"influence must be between 0 and 1, got {influence}.")


def attach(
    model: ModelPatcher, image: ConditionImage, adapter: ModelPatcher | None, made_for: tuple[int, int, int]
) -> ModelPatcher:
    """A clone of `model` on which the condition acts; `model` itself where `image` is off.

    Args:
        image: its `adapter` is filled in here.
        adapter: the LoRA; None for plain tokens, which only the base weights see.
        made_for: hidden size, double and single blocks of the model that the LoRA was trained for.

    Raises:
        ValueError: another model family, a LoRA for another size, or a latent of another VAE.
    """
    transformer = flux.require_flux1(model, image.node)
    has = (transformer.hidden_size, len(transformer.double_blocks), len(transformer.single_blocks))
    if made_for != has:
        raise ValueError(
            f"{image.name} is made for hidden size {made_for[0]} and {made_for[1]}+{made_for[2]} blocks, "
            f"the model has {has[0]} and {has[1]}+{has[2]}. Use a LoRA that was trained for this model."
        )
    channels = model.model.latent_format.latent_channels
    if image.latent.ndim != 4 or image.latent.shape[1] != channels:
        raise ValueError(
            f"The condition's latent must be [N, {channels}, h, w], got {tuple(image.latent.shape)}. Use its VAE."
        )
    if image.off:
        return model
    if adapter is None:
        return attach_description(model, replace(image, adapter=None))
    adapter = adapters.beside(model, adapter)
    patched = attach_description(model, replace(image, adapter=adapter.clone_base_uuid))
    key = f"{image.prefix}.{sum(key.startswith(image.prefix) for key in model.additional_models)}"
    patched.set_additional_models(key, [adapter])
    return patched
