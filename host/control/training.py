"""What ComfyUI's Train LoRA needs of a MODEL to train it right: additions out of place, one caption per picture.

Three things go wrong in ComfyUI 0.30.0 on FLUX.1, and on its relatives:

- Their blocks add to their streams in place (`img += ...` in `comfy/ldm/flux/layers.py`). Autograd needs the value
  before the addition and refuses, unless gradient checkpointing is on: that computes blocks a second time, partly from
  streams that were overwritten meanwhile, and its gradients are wrong without a word.
- Train LoRA hands in one condition per picture of a batch. The sampler's code takes them for parts of one prompt: each
  is run on every picture, and the results are averaged. This one holds for every family.
- With offloading, single layers are checkpointed by a function that gives no gradient to the weights of a layer whose
  input asks for none, such as the first that reads the text.

Hooks, in training only: every block gets its streams as `Residual`, whose `+=` makes a new tensor. A CALC_COND_BATCH
wrapper stacks the conditions of a batch, row by row, by ComfyUI's own rules of which can be stacked, and has them ask
for gradients. Pictures whose conditions cannot be stacked, as with texts of different lengths, are computed apart.

No state: `Training` binds to the training run as to any other, and to none outside of training.
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

# Entries of a condition by which ComfyUI places it in the picture or in time, or runs something else beside it.
PLACED = ("area", "mask", "control", "gligen", "hooks", "default", "strength", "timestep_start", "timestep_end")

Conditions = list[dict[str, Any]]

logger = logging.getLogger(__name__)


class Residual(Tensor):
    """A tensor whose `+=` makes a new one. What anything else makes of it is a plain tensor, as of a Parameter."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    def __iadd__(self, other: Tensor) -> Tensor:
        return (self + other).as_subclass(Residual)


@dataclass(frozen=True)
class Training:
    """Gradients and captions of Train LoRA put right. Outside of training nothing is bound."""


def bind(training: Training, run: Run, model_options: dict) -> None:
    if not comfy.model_management.in_training:
        return
    wrapper = WrappersMP.CALC_COND_BATCH
    add_wrapper_with_key(wrapper, f"{KEY}.training", CaptionPerPicture(), model_options, is_model_options=True)
    family = family_of(run.model)
    if family.in_place:
        for key in family.keys(transformer_of(run.model)):
            wrap_block(model_options, key, out_of_place(family.streams(key[0])))


def attach(model: ModelPatcher) -> ModelPatcher:
    """A clone of `model` that Train LoRA trains right. Sampled, it is `model` to the last bit.

    Raises:
        ValueError: blocks of `model` overwrite what gradients are computed from where this module cannot keep it.
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
    """A wrap of blocks that add to `streams` of their args, each `[B, T, D]`, so that what came in stays as it was.

    It is a hook around the block, outside of what gradient checkpointing repeats: the block is repeated on the same
    `Residual`, unchanged since.
    """

    def wrap(args: BlockArgs, run_block: RunBlock) -> dict[str, Any]:
        out = run_block({**args, **{name: args[name].as_subclass(Residual) for name in streams}})
        return {**out, **{name: out[name].as_subclass(Tensor) for name in streams}}

    return wrap


class CaptionPerPicture:
    """CALC_COND_BATCH: as many conditions as pictures belong to the pictures one by one. Says once if it takes time."""

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
    """Numbers of conditions that can be stacked, together; the groups and their members in the order they came."""
    groups: list[list[int]] = []
    for i, caption in enumerate(captions):
        group = next((rows for rows in groups if stackable(captions[rows[0]], caption)), None)
        if group is None:
            groups.append([i])
        else:
            group.append(i)
    return groups


def stackable(first: dict[str, Any], other: dict[str, Any]) -> bool:
    """By ComfyUI's rules for one call of the model with several conditions."""
    if any(name in caption for caption in (first, other) for name in PLACED):
        return False
    ours, theirs = of_one_picture(first), of_one_picture(other)
    return ours.keys() == theirs.keys() and all(ours[name].can_concat(theirs[name]) for name in ours)


def stacked(captions: Conditions) -> dict[str, Any]:
    """One condition with a row for each of `captions`, which must be `stackable`.

    Its tensors are new ones. Those that came were made in inference mode, and autograd refuses to keep them. They ask
    for gradients, which nobody reads: with offloading, ComfyUI's checkpoints of single layers give none to the weights
    of a layer whose input asks for none.
    """
    first, *others = [of_one_picture(caption) for caption in captions]
    joint = {name: own._copy_with(own.concat([other[name] for other in others])) for name, own in first.items()}
    for value in joint.values():
        if isinstance(value.cond, Tensor) and value.cond.is_floating_point():
            value.cond = value.cond.requires_grad_().clone()  # clone: no leaf, so a model may write into it
    return {**captions[0], "model_conds": joint}


def of_one_picture(caption: dict[str, Any]) -> dict[str, Any]:
    """The inputs of the model for one picture. Core makes some for as many as there are in the whole training set."""
    return {name: value.process_cond(batch_size=1, area=None) for name, value in caption["model_conds"].items()}
