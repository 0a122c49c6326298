"""A patch out of a published DiT4SR transformer: what it adds to the base model, and nothing else.

Training left the base weights in the file as they were, so they need not be kept. To be sure of that, the file may be
compared with the base model first.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Literal

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from ...models.checkpoint import shown
from ...models.restore.dit4sr_keys import Checkpoint, parse, write
from .. import model_files
from ..families import sd3
from ..families.family import Sizes
from ..progress import each_of
from ..transformer import transformer_of
from .dit4sr_files import contents, output_folder, path_of

NODE = "Extract DiT4SR Patch"

Precision = Literal["as in the file", "float16", "bfloat16"]


def target_of(name: str) -> str:
    """A new file in output/dit4sr, called so and with a number that is free.

    Raises:
        ValueError: a name that is no name of a file.
    """
    if not re.fullmatch(r"\w[\w .()-]{0,99}", name):
        raise ValueError(
            f"{NODE}: 'name' must be at most 100 letters, digits, blanks, dots, brackets and dashes, and "
            f"begin with a letter or a digit; got {shown(name)}."
        )
    folder = output_folder()
    number = 1
    while (path := folder / f"{name}_{number:05}.safetensors").exists():
        number += 1
    return str(path)


def extract(name: str, target: str, precision: Precision = "as in the file", model: ModelPatcher | None = None) -> str:
    """Write the control weights of a published transformer into a patch at `target`. Returns a line on what was done.

    Args:
        model: whose weights the base tensors of the file must be; None checks nothing.

    Raises:
        ValueError: a file that is no whole transformer, one made on another base, or a disk that takes no more.
    """
    state, metadata = contents(path_of(name), name)
    checkpoint = parse(state, name, metadata)
    if not checkpoint.base:
        raise ValueError(f"{name} is a patch already: it holds nothing but control weights. Use it as it is.")
    checked = "" if model is None else f"; {compared(state, checkpoint, name, model)}"
    tensors, said = write(checkpoint.weights, checkpoint.variant)
    dtype = None if precision == "as in the file" else getattr(torch, precision)
    tensors = {key: tensors[key].to(dtype or tensors[key].dtype).contiguous() for key in each_of(tensors)}
    overflown = next((key for key, weight in tensors.items() if not weight.float().isfinite().all()), None)
    if overflown is not None:
        raise ValueError(f"{name}: {shown(overflown)} is too large for {precision}. Choose bfloat16.")
    partly = f"{target}.part"
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        save_file(tensors, partly, said)
        comfy.model_management.throw_exception_if_processing_interrupted()
        os.replace(partly, target)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{os.path.basename(target)} cannot be written: {model_files.in_one_line(error)}.") from error
    finally:
        if os.path.exists(partly):
            os.remove(partly)
    size = os.path.getsize(target) / 2**20
    what = f"{size:.1f} MiB, {precision}, variant {checkpoint.variant}"
    return f"{os.path.basename(target)}: {what}; {checkpoint.summary}{checked}"


LAYERS = {  # of a block, by their names in ComfyUI, and the tensors in the file that they are made of
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
}
NEAR = {1: 0.08, 2: 0.01, 4: 0.01}  # relative error of a layer, by the bytes of a weight: fp8 keeps 3 bits


def compared(state: Mapping[str, Tensor], checkpoint: Checkpoint, name: str, model: ModelPatcher) -> str:
    """Whether some layers of the model compute what the base tensors of the file compute.

    The layers themselves are run, on random numbers, so that offloaded and quantised weights are compared, too.

    Raises:
        ValueError: they do not, or the model has other sizes.
    """
    transformer = sd3.SD3.require(model, NODE)
    made_for, has = Sizes(checkpoint.dim, checkpoint.blocks, checkpoint.dual), sd3.sizes(transformer)
    if made_for != has:
        raise ValueError(f"{name} is made for {made_for}; the model has {has}. Connect Stable Diffusion 3.5 Medium.")
    comfy.model_management.load_models_gpu([model])
    blocks = sorted({0, checkpoint.blocks // 2, checkpoint.blocks - 1})
    for i in each_of(blocks):
        block = transformer_of(model).joint_blocks[i]
        for path, parts in LAYERS.items():
            keys = [f"{checkpoint.prefix}transformer_blocks.{i}.{part}" for part in parts]
            if not all(f"{key}.{leaf}" in state for key in keys for leaf in ("weight", "bias")):
                raise ValueError(f"{name} is incomplete: {shown(keys[0])} is missing. Get the whole file again.")
            weight, bias = (torch.cat([state[f"{key}.{leaf}"].float() for key in keys]) for leaf in ("weight", "bias"))
            error = _error(block.get_submodule(path), weight, bias, model)
            if not error <= NEAR.get(model.model.get_dtype().itemsize, 0.08):
                raise ValueError(
                    f"{name} was not made on this model: its block {i} computes something else ({path}, off by "
                    f"{100 * error:.0f} %). Connect Stable Diffusion 3.5 Medium straight from its loader, or nothing."
                )
    return f"base weights compared in blocks {', '.join(map(str, blocks))}"


def _error(layer: torch.nn.Module, weight: Tensor, bias: Tensor, model: ModelPatcher) -> float:
    """Relative difference between what a layer makes of random numbers and what a weight and a bias do."""
    device, dtype = model.load_device, model.model.get_dtype_inference()
    probe = torch.randn(16, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(device, dtype)
    with torch.inference_mode():
        found = layer(probe).float().cpu()
    expected = F.linear(probe.float().cpu(), weight, bias)
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))
