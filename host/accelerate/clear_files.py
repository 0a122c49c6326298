"""CLEAR's files as ComfyUI weight patches: find them, read them, and put them on a MODEL.

The tensors replace the model's own, so they go in front of all other patches of a weight. LoRAs then act on top of
them, whatever the order of nodes. Core applies them where and when it applies LoRAs, to fp8 weights too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import comfy.model_patcher
from comfy.model_patcher import ModelPatcher

from ...models.accelerate.clear import Variant, variant_of
from ...models.accelerate.clear_keys import ClearWeights, parse
from .. import model_files
from ..families import flux

FOLDER = "clear"
NODE = "Apply CLEAR"  # its display name


@dataclass(frozen=True, eq=False)
class ClearFile:
    """A loaded file. Only its published name tells the radius it was trained for."""

    name: str
    weights: ClearWeights

    def variant(self, radius: int, factor: int) -> Variant:
        """The pattern to use with these weights. 0 means as trained.

        Raises:
            ValueError: the radius is unknown, or the file has no weights for such cells.
        """
        published = variant_of(self.name)
        if not radius and published is None:
            raise ValueError(
                f"The name of {self.name} does not say its radius. Set 'radius' to what it was trained with, "
                "or give it its published name, like clear_local_16_down_4.safetensors."
            )
        trained = self.weights.factor
        if factor not in (0, trained):
            has = f"for cells of {trained}" if trained else "without pooled cells"
            raise ValueError(f"{self.name} was trained {has}, 'pooling' is {factor}. Set it to 0.")
        return Variant(radius or cast(Variant, published).radius, trained)


def load(name: str) -> ClearFile:
    """Read a file of the "clear" kind by its name in the list.

    Raises:
        FileNotFoundError: no such file in any of the folders.
        ValueError: it is no CLEAR file, or a damaged one.
    """
    return ClearFile(name, parse(model_files.read(model_files.path_of(FOLDER, name), name).tensors, name))


def with_weights(model: ModelPatcher, file: ClearFile) -> ModelPatcher:
    """A clone of `model` with the attention weights of `file`.

    Raises:
        ValueError: another model family or size, or weights that core cannot patch.
    """
    transformer = flux.FLUX1.require(model, NODE)
    weights = file.weights
    made_for = (weights.dim, weights.double, weights.single)
    has = (transformer.hidden_size, len(transformer.double_blocks), len(transformer.single_blocks))
    if made_for != has:
        raise ValueError(
            f"{file.name} is made for hidden size {made_for[0]} and {made_for[1]}+{made_for[2]} blocks, "
            f"the model has {has[0]} and {has[1]}+{has[2]}. Use FLUX.1-dev or a fine-tune of it."
        )
    for patch in weights.patches:
        _refuse_packed(model, f"diffusion_model.{patch.key}", patch.value.shape[1:])

    patched = model.clone()
    patches: dict[Any, Any] = {}
    for patch in weights.patches:
        rows = (0, patch.start, patch.value.shape[0])
        patches[f"diffusion_model.{patch.key}", rows] = ("set", (patch.value,))
    earlier = {key: len(patched.patches.get(key, ())) for key, _ in patches}
    if len(patched.add_patches(patches)) != len(patches):
        raise ValueError(f"{NODE} found no place for the weights of {file.name}: the model has other layers.")
    for key, count in earlier.items():
        added = patched.patches[key]
        patched.patches[key] = [*added[count:], *added[:count]]
    return patched


def _refuse_packed(model: ModelPatcher, key: str, columns: tuple[int, ...]) -> None:
    """Refuse weights without replaceable rows. Floating point, fp8 and core's own quantised weights have them."""
    weight, _, _ = comfy.model_patcher.get_key_weight(model.model, key)
    usable = weight is not None and weight.dtype.is_floating_point and tuple(weight.shape[1:]) == tuple(columns)
    if not usable:
        kind = "unknown" if weight is None else f"{weight.dtype} {tuple(weight.shape)}"
        raise ValueError(
            f"{NODE} cannot replace the weights of a model that is quantised like this ({key} is {kind}). "
            "Load the model in 16 bits or fp8, or choose 'none (mask only)'."
        )
