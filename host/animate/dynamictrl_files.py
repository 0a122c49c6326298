"""DynamiCtrl's files: where they lie, and how a MODEL is made of them.

A file is a whole transformer: one safetensors file, the index of several, or the folder of either. ComfyUI's own loader
builds the MODEL from the renamed tensors of the base; the pose norms become an additional model of it.

Memory: tensors are read from the files one by one, as views of the mapped file, and core makes the one copy of them.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...models.animate.dynamictrl import PoseNorms
from ...models.animate.dynamictrl_keys import BLOCK_PARTS, Checkpoint, parse
from ...models.checkpoint import require
from .. import adapters, model_files, sharded_files
from ..families.family import Sizes
from ..progress import each_of
from ..transformer import transformer_of
from . import dynamictrl
from .cogvideox_sampling import mended

logger = logging.getLogger(__name__)

FOLDER = "dynamictrl"
ALSO = ("diffusion_models",)  # where people keep transformers

Dtype = Literal["default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"]
FP8 = {"fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e4m3fn_fast": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
# Only the large matrices. Norms, patch and time embeddings stay as they are: in fp8 they break CogVideoX 1.5.
IN_FP8 = {part for part in BLOCK_PARTS.values() if "norm" not in part}


class Loaded(NamedTuple):
    """A MODEL that reads poses, and one line on what was found."""

    model: ModelPatcher
    report: str


def names() -> list[str]:
    """What the loader offers: the user's files, and what ships with the pack."""
    model_files.register(FOLDER)
    return sharded_files.names(FOLDER, ALSO)


def load(name: str, dtype: Dtype = "default") -> Loaded:
    """A MODEL by its file's name in the list, by a folder's, or by a path that ends in `.safetensors`.

    Raises:
        FileNotFoundError: no such file in any of the folders.
        ValueError: it is no DynamiCtrl file, or a damaged one.
    """
    model_files.register(FOLDER)
    path = name if os.path.isabs(name) and os.path.isfile(name) else sharded_files.path_of(FOLDER, name, ALSO)
    state, _ = sharded_files.contents(path, os.path.basename(name))
    return from_state(state, os.path.basename(name) if path == name else name, dtype, path)


def from_state(state: Mapping[str, Tensor], name: str, dtype: Dtype = "default", path: str | None = None) -> Loaded:
    """Build the MODEL of a checkpoint. With a `path`, core can load its parts again for another device."""
    checkpoint = parse(state, name)
    report = f"{name}: {checkpoint.summary}" + ("" if dtype == "default" else f", large matrices in {dtype}")
    norms = _norms(checkpoint)
    model = _base(checkpoint, name, dtype)
    if path is not None:
        model.cached_patcher_init = (load_base, (path, dtype))
        norms.cached_patcher_init = (load_norms, (path,))
    if checkpoint.version == "1.5" and model.model.get_dtype_inference() == torch.float16:
        report += ". It runs in float16, which gives black videos with CogVideoX 1.5: start ComfyUI with --bf16-unet"
    made_for = Sizes(checkpoint.dim, checkpoint.blocks)
    return Loaded(dynamictrl.attach(mended(model), norms, made_for, name), report)


def load_base(path: str, dtype: Dtype, disable_dynamic: bool = False) -> ModelPatcher:
    """The factory core calls for another copy of the base."""
    name = os.path.basename(path)
    return _base(parse(sharded_files.contents(path, name)[0], name), name, dtype, disable_dynamic)


def load_norms(path: str, disable_dynamic: bool = False) -> ModelPatcher:
    """The factory core calls for another copy of the pose norms."""
    name = os.path.basename(path)
    return _norms(parse(sharded_files.contents(path, name)[0], name), disable_dynamic)


def _norms(checkpoint: Checkpoint, disable_dynamic: bool = False) -> ModelPatcher:
    make = partial(PoseNorms, checkpoint.dim, checkpoint.time_dim, checkpoint.blocks)
    return adapters.patcher(make, checkpoint.pose, disable_dynamic)


def _base(checkpoint: Checkpoint, name: str, dtype: Dtype, disable_dynamic: bool = False) -> ModelPatcher:
    names = dict.fromkeys(checkpoint.base)
    state = _in_fp8(checkpoint.base, dtype) if dtype in FP8 else dict(checkpoint.base)
    model = comfy.sd.load_diffusion_model_state_dict(state, disable_dynamic=disable_dynamic)  # empties `state`
    if model is None:
        raise ValueError(f"{name}: ComfyUI does not know this CogVideoX. Update ComfyUI.")
    require(transformer_of(model).state_dict(), {**names, **_extras(dtype, names)}, name)
    return model


# fp8, as ComfyUI's quantised files have it: layer by layer, each with a scale


def _in_fp8(base: dict[str, Tensor], dtype: Dtype) -> dict[str, Tensor]:
    """The base with its large matrices in fp8, one after the other; `base` is emptied on the way.

    fp8_e4m3fn and fp8_e5m2 save memory and multiply in the model's precision, fp8_e4m3fn_fast multiplies in fp8.
    """
    kind = FP8[dtype]
    about: dict[str, Any] = {"format": str(kind).removeprefix("torch.")}
    if dtype != "fp8_e4m3fn_fast":
        about["full_precision_matrix_mult"] = True
    said = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    found: dict[str, Tensor] = {}
    for key in each_of(list(base)):
        weight = base.pop(key)
        if not in_fp8(key):
            found[key] = weight
            continue
        layer = key.removesuffix(".weight")
        weight = weight.float()
        scale = (weight.abs().amax() / torch.finfo(kind).max).clamp(min=torch.finfo(torch.float32).tiny)
        found[key] = (weight / scale).to(kind)
        found[f"{layer}.weight_scale"] = scale
        found[f"{layer}.comfy_quant"] = said.clone()
    return found


def in_fp8(key: str) -> bool:
    """Whether a tensor is one of the large matrices."""
    parts = key.split(".", 2)
    return parts[0] == "blocks" and key.endswith(".weight") and parts[2].removesuffix(".weight") in IN_FP8


def _extras(dtype: Dtype, names: Mapping[str, Any]) -> dict[str, None]:
    """Keys that a layer in fp8 has beside its weight."""
    layers = [key.removesuffix(".weight") for key in names if in_fp8(key)] if dtype in FP8 else []
    return dict.fromkeys(f"{layer}.{extra}" for layer in layers for extra in ("weight_scale", "comfy_quant"))
