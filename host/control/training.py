"""Makes ComfyUI's Train LoRA train a MODEL correctly: additions out of place, one caption per picture.

Three things go wrong in ComfyUI 0.30.0 on FLUX.1 and its relatives:

- Their blocks add to their streams in place (`img += ...` in `comfy/ldm/flux/layers.py`). Autograd needs the value
  before the addition, so it raises an error. With gradient checkpointing it does not: that computes blocks a second
  time, partly from overwritten streams, and its gradients are silently wrong.
- Train LoRA hands in one condition per picture of a batch. The sampler's code takes them for parts of one prompt: it
  runs each on every picture and averages the results. This happens in every family.
- With offloading, ComfyUI checkpoints single layers. Its function gives the weights of a layer no gradient if the
  layer's input asks for none, such as the first layer that reads the text.

Hooks, in training only: every block gets its streams as `Residual`, whose `+=` makes a new tensor. A CALC_COND_BATCH
wrapper stacks the conditions of a batch, row by row, by ComfyUI's own rules for stacking, and makes them ask for
gradients. It computes pictures apart if their conditions do not stack, for example texts of different lengths.

No state: `Training` binds to training runs only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch
from comfy.ldm.flux.layers import DoubleStreamBlock, SingleStreamBlock
from comfy.ldm.lightricks.model import LTXVModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ..blocks import BlockArgs, RunBlock, Wrap, wrap_block
from ..families import family_of
from ..run import KEY, Run
from ..run import attach as attach_description
from ..transformer import class_of, core_name, transformer_of

NODE = "Prepare Model for Train LoRA"

# Entries that limit a condition to an area or a time, or run something else beside it.
PLACED = ("area", "mask", "control", "gligen", "hooks", "default", "strength", "timestep_start", "timestep_end")

Conditions = list[dict[str, Any]]

logger = logging.getLogger(__name__)


class Residual(Tensor):
    """A tensor whose `+=` makes a new one. All other operations on it give plain tensors, as on a Parameter."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    def __iadd__(self, other: Tensor) -> Tensor:
        return (self + other).as_subclass(Residual)


@dataclass(frozen=True)
class Training:
    """Corrects gradients and captions of Train LoRA. Outside training it binds nothing."""


def bind(training: Training, run: Run, model_options: dict) -> None:
    if not comfy.model_management.in_training:
        return
    wrapper = WrappersMP.CALC_COND_BATCH
    add_wrapper_with_key(wrapper, f"{KEY}.training", CaptionPerPicture(), model_options, is_model_options=True)
    family = family_of(run.model)
    if family.in_place:
        for key in family.block_keys(transformer_of(run.model)):
            wrap_block(model_options, key, out_of_place(family.streams(key[0])))


def attach(model: ModelPatcher) -> ModelPatcher:
    """A clone of `model` that Train LoRA trains correctly. It samples exactly as `model`, to the last bit.

    Raises:
        ValueError: blocks of `model` overwrite values that gradients need, and this module cannot prevent it.
    """
    kinds = {class_of(model, path) for path, _ in transformer_of(model).named_modules()}
    overwrites = any(issubclass(kind, DoubleStreamBlock | SingleStreamBlock) for kind in kinds)
    if issubclass(class_of(model), LTXVModel) or (overwrites and not family_of(model).kinds):
        raise ValueError(
            f"{NODE} cannot prepare {core_name(model)}: its blocks overwrite what gradients are computed from, in a "
            "way that this node does not know. Connect a FLUX.1 model to 'model'."
        )
    return attach_description(model, Training(), bind)


def out_of_place(streams: Sequence[str]) -> Wrap:
    """A wrap for blocks that add to `streams` of their args, each `[B, T, D]`: their inputs stay unchanged.

    The wrap stands outside gradient checkpointing, so a repeated block gets the same unchanged `Residual`.
    """

    def wrap(args: BlockArgs, run_block: RunBlock) -> dict[str, Any]:
        out = run_block({**args, **{name: args[name].as_subclass(Residual) for name in streams}})
        return {**out, **{name: out[name].as_subclass(Tensor) for name in streams}}

    return wrap


class CaptionPerPicture:
    """CALC_COND_BATCH: gives each picture its own condition. Logs once if that takes several calls."""

    def __init__(self) -> None:
        self.told = False

    def __call__(
        self, executor: Callable, model: Any, conds: list, x: Tensor, timestep: Tensor, options: dict
    ) -> list[Tensor]:
        captions, others = conds[0], conds[1:]
        if len(captions) != x.shape[0]:
            found = f"{len(captions)} captions for {x.shape[0]} pictures"
            raise RuntimeError(f"Train LoRA gave {found}; {NODE} needs one each.")
        groups = grouped(captions)
        if len(groups) > 1 and not self.told:
            self.told = True
            logger.info("Captions of a batch differ in length: a step computes each length by itself.")
        parts = []
        for rows in groups:
            own, at = (x, timestep) if len(groups) == 1 else (x[rows], timestep[rows])
            parts.append(executor(model, [[stacked([captions[i] for i in rows])], *others], own, at, options))
        if len(parts) == 1:
            return parts[0]
        order = torch.tensor([i for rows in groups for i in rows], device=x.device).argsort()
        return [torch.cat(results)[order] for results in zip(*parts, strict=True)]


def grouped(captions: Conditions) -> list[list[int]]:
    """Groups of conditions that stack, by number; groups and members in their first order."""
    groups: list[list[int]] = []
    for i, caption in enumerate(captions):
        group = next((rows for rows in groups if stackable(captions[rows[0]], caption)), None)
        if group is None:
            groups.append([i])
        else:
            group.append(i)
    return groups


def stackable(first: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two conditions stack, by ComfyUI's rules for several conditions in one call of the model."""
    if any(name in caption for caption in (first, other) for name in PLACED):
        return False
    ours, theirs = of_one_picture(first), of_one_picture(other)
    return ours.keys() == theirs.keys() and all(ours[name].can_concat(theirs[name]) for name in ours)


def stacked(captions: Conditions) -> dict[str, Any]:
    """One condition with a row for each of `captions`, which must be `stackable`.

    Its tensors are new, because the given ones were made in inference mode, which autograd refuses. They ask for
    gradients
    that nobody reads: with offloading, ComfyUI gives a layer's weights no gradient if the layer's input asks for none.
    """
    first, *others = [of_one_picture(caption) for caption in captions]
    joint = {name: own._copy_with(own.concat([other[name] for other in others])) for name, own in first.items()}
    for value in joint.values():
        if isinstance(value.cond, Tensor) and value.cond.is_floating_point():
            value.cond = value.cond.requires_grad_().clone()  # a clone is no leaf, so a model may write into it
    return {**captions[0], "model_conds": joint}


def of_one_picture(caption: dict[str, Any]) -> dict[str, Any]:
    """The model's inputs for one picture. Core makes some of them as large as the whole training set."""
    return {name: value.process_cond(batch_size=1, area=None) for name, value in caption["model_conds"].items()}
