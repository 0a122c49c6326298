"""Condition images on ComfyUI's MODEL: their tokens run once beside the model and reach it as keys and values.

EasyControl and try-on both work this way. A feature derives its description from `ConditionImage`, sets there its name
and where its images lie, and hands over its LoRA.

Hooks: for every condition of a call, an APPLY_MODEL wrapper looks up the keys and values of
`models/control/conditions.py` and hands them to the attention patch of `host/attention.py`. Core is asked to leave room
for them (`host/memory.py`). The picture's own stream keeps its tokens, so ControlNets, caches, masks and samplers see
nothing new.

Settings: `conditions_settings.py`. State: `conditions_run.py`. The LoRA is an additional model of the MODEL: core moves
and offloads it, and base weights stay untouched. The run finds the LoRA by its uuid, because core copies each
additional model once per device when it spreads a MODEL over several GPUs, whatever its keys.
"""

from __future__ import annotations

from dataclasses import replace

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from .. import adapters, attention
from ..families import flux
from ..run import KEY, Run
from ..run import attach as attach_description
from .conditions_run import Encoder
from .conditions_settings import ConditionImage


def bind(image: ConditionImage, run: Run, model_options: dict) -> None:
    encoder = Encoder(image, run)
    attention.install(model_options)
    add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, encoder.apply_model, model_options, is_model_options=True)


def attach(
    model: ModelPatcher, image: ConditionImage, adapter: ModelPatcher | None, made_for: tuple[int, int, int]
) -> ModelPatcher:
    """A clone of `model` on which the condition acts; `model` itself where `image` is off.

    Args:
        image: the description; this function fills in its `adapter`.
        adapter: the LoRA; None for plain tokens, which run through the base weights alone.
        made_for: hidden size, double and single blocks of the model that the LoRA was trained for.

    Raises:
        ValueError: another model family, a LoRA for another size, or a latent of another VAE.
    """
    transformer = flux.FLUX1.require(model, image.node)
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
        return attach_description(model, replace(image, adapter=None), bind)
    adapter = adapters.beside(model, adapter)
    patched = attach_description(model, replace(image, adapter=adapter.clone_base_uuid), bind)
    key = f"{image.prefix}.{sum(key.startswith(image.prefix) for key in model.additional_models)}"
    patched.set_additional_models(key, [adapter])
    return patched
