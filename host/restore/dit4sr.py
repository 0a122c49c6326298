"""DiT4SR on ComfyUI's MODEL: a stream of the low-resolution picture beside the picture's own, and tiles.

Hooks: blocks are replaced (`replace_block`), inside of all wraps, so step caches and guidance that skips layers go
round both streams. An APPLY_MODEL wrapper hands each call its stream. Another one cuts the picture into windows,
outside of all features: to them each window is a call of its own, with lanes of its own. Core is asked for the memory
of a window with two streams (`host/memory.py`).

Settings: `dit4sr_settings.py`. State: `dit4sr_run.py`. The control weights are an additional model of the MODEL: core
moves, counts and offloads them. The picture's own stream keeps its tokens, so ControlNets, masks and samplers see
nothing new.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor
from torch.nn import functional as F

from ...models.restore.dit4sr_tiles import windows
from .. import adapters
from ..attention import makes_sparse
from ..blocks import replace_block, skips_middle_blocks
from ..families import sd3
from ..families.family import Sizes
from ..run import KEY, Run, attached, descriptions_in
from ..run import attach as attach_description
from ..transformer import transformer_of
from .dit4sr_run import Restorer
from .dit4sr_settings import NODE, DiT4SR

TOKEN = 16  # pixels along the side of one token
MOST = 16384  # pixels along a side of the result, as in core's own nodes


def bind(settings: DiT4SR, run: Run, model_options: dict) -> None:
    """Nodes behind ours may have brought what does not go with it: looked at now."""
    refuse_others(settings, model_options)
    if run.noise is not None and run.noise.shape[-2:] != settings.latent.shape[-2:]:
        height, width = (8 * side for side in run.noise.shape[-2:])
        raise ValueError(
            f"{NODE} prepared {8 * settings.size[1]} x {8 * settings.size[0]} pixels, and the sampler starts from "
            f"{width} x {height}. Connect the 'latent' of {NODE} to the sampler."
        )
    restorer = Restorer(settings, run)
    run.cut = restorer.cut
    if run.model is not None:
        for i in range(sd3.sizes(transformer_of(run.model)).blocks):
            replace_block(model_options, ("double_block", i), restorer.block(i))
    add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, restorer.apply_model, model_options, is_model_options=True)


def refuse_others(settings: DiT4SR, model_options: dict) -> None:
    for other in descriptions_in(model_options):
        if makes_sparse(other):
            raise ValueError(
                f"{NODE} puts a second picture into the attention, and a sparse pattern knows only one. Remove one of "
                "the two nodes."
            )
        if skips_middle_blocks(other):
            raise ValueError(
                f"{NODE} cannot work with a step cache that skips blocks in the middle, such as Apply Delta-DiT: its "
                "second stream would fall behind. Use Apply TaylorSeer instead."
            )


def attach(model: ModelPatcher, adapter: ModelPatcher, made_for: Sizes, settings: DiT4SR) -> ModelPatcher:
    """A clone of `model` that restores the picture; `model` itself where strength is 0.

    Args:
        adapter: the control weights.
        made_for: the model they were trained for.
        settings: their `adapter` is filled in here.

    Raises:
        ValueError: another model, a patch for another size, a second such node, or a picture that needs tiles.
    """
    transformer = sd3.SD3.require(model, NODE)
    if made_for != (has := sd3.sizes(transformer)):
        raise ValueError(
            f"{settings.name} is made for {made_for}; the model has {has}. Use Stable Diffusion 3.5 Medium."
        )
    channels = model.model.latent_format.latent_channels
    if settings.latent.shape[1] != channels:
        raise ValueError(
            f"The picture's latent must have {channels} channels, got {settings.latent.shape[1]}. Connect the VAE of "
            "the model."
        )
    if settings.strength == 0:
        return model
    if any(isinstance(each, DiT4SR) for each in attached(model)):
        raise ValueError(f"The model has {NODE} already, and runs one low-resolution stream. Remove one of the two.")
    refuse_too_many_tokens(transformer, settings)
    adapter = adapters.beside(model, adapter)
    patched = attach_description(model, replace(settings, adapter=adapter.clone_base_uuid), bind)
    patched.set_additional_models("dit_toolkit.dit4sr", [adapter])
    return patched


def refuse_too_many_tokens(transformer: sd3.OpenAISignatureMMDITWrapper, settings: DiT4SR) -> None:
    most = sd3.most_tokens(transformer)
    window = windows(settings.size, settings.tile, settings.overlap)[0]
    if most is None or max(sd3.token_grid(transformer, window.height, window.width)) <= most:
        return
    height, width = (8 * side for side in settings.size)
    raise ValueError(
        f"{width} x {height} pixels in one piece are more than the model has positions for: {most * TOKEN} along a "
        "side. Set 'tile' to 64 or less, or lower 'upscale_by'."
    )


class Plan(NamedTuple):
    """Sizes in pixels, each height and width."""

    sampled: tuple[int, int]  # what the model makes, in whole tokens
    final: tuple[int, int]  # what was asked for


def plan(height: int, width: int, upscale_by: float, min_side: int) -> Plan:
    """The sizes for a picture of this height and width.

    As the authors: a picture whose shorter side would come out below `min_side` is made larger for the model, and its
    sides are cut down to whole tokens. It is brought to the size that was asked for when all is done.

    Raises:
        ValueError: a result that is too large.
    """
    scale = max(upscale_by, min_side / min(height, width))
    largest = round(scale * max(height, width))
    if largest > MOST:
        raised = scale > upscale_by
        why = f", as its shorter side of {min(height, width)} is brought to {min_side}" if raised else ""
        raise ValueError(
            f"{NODE}: {width} x {height} pixels would come out {largest} pixels long{why}. The most is {MOST}. Lower "
            f"{'min_side' if raised else 'upscale_by'}, or crop the picture."
        )
    sampled = tuple(max(int(scale * side + 1e-6) // TOKEN, 1) * TOKEN for side in (height, width))
    final = tuple(max(round(upscale_by * side), 1) for side in (height, width))
    return Plan((sampled[0], sampled[1]), (final[0], final[1]))


def enlarged(image: Tensor, size: tuple[int, int]) -> Tensor:
    """An IMAGE `[N, H, W, C]`, grey or RGB, at this height and width: `[N, h, w, 3]` in 0..1.

    Bicubic with the coefficients of PIL, which the authors use.
    """
    pixels = image.movedim(-1, 1).float()
    pixels = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels
    if pixels.shape[-2:] != size:
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False)
    return pixels.clamp(0, 1).movedim(1, -1)
