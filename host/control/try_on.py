"""Try-on on ComfyUI's MODEL: a masked person and a garment, each a condition image with a LoRA of its own.

After MC-VTON, arXiv:2501.03630: a reconstruction (see `models/control/mc_vton.py`). Hooks, memory and cache are those
of `conditions.py`.
"""

from __future__ import annotations

from typing import Any

from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...models.control.pixels import resize, rgb
from ...models.control.positions import beside_ids, spatial_ids, subject_ids
from ..families import flux
from . import conditions
from .conditions_settings import PATCH, ConditionImage
from .try_on_files import TryOnFile

NODE = "Apply Try-On"


class Person(ConditionImage):
    """The masked person, over the picture."""

    feature = "Try-On"
    node = NODE
    images = "person pictures"
    kind_input = "position of the person"
    size_input = "person_size"
    prefix = "dit_toolkit.try_on"
    position_ids = {"over": spatial_ids}  # noqa: RUF012
    over = frozenset({"over"})


class Garment(ConditionImage):
    """The garment, right of the picture or below it."""

    feature = "Try-On"
    node = NODE
    images = "garment pictures"
    kind_input = "garment_position"
    size_input = "garment_size"
    prefix = "dit_toolkit.try_on"
    position_ids = {"beside": beside_ids, "below": subject_ids}  # noqa: RUF012
    over = frozenset()


def attach(
    model: ModelPatcher,
    file: TryOnFile,
    person: Tensor | None,
    garment: Tensor | None,
    *,
    position: str | None = None,
    person_strength: float = 1.0,
    garment_strength: float = 1.0,
    **settings: Any,
) -> ModelPatcher:
    """A clone of `model` that puts the garment on the person; `model` itself where both strengths are 0.

    Args:
        person, garment: latents straight from a VAE, `[N, C, h, w]`; N is 1, or the number of pictures in the batch.
            May be None if the branch has strength 0.
        position: of the garment, "beside" or "below"; None takes the file's.
        person_strength, garment_strength: factor on the LoRA of a branch. 0 leaves the branch out.
        settings: part, cache of `ConditionImage`.

    Raises:
        ValueError: another model family, a LoRA for another size, batches that do not go together, or settings that
            mean nothing.
    """
    transformer = flux.FLUX1.require(model, NODE)
    images: list[tuple[type[ConditionImage], str, Tensor, str, float]] = []
    for image_class, branch, latent, kind, strength in (
        (Person, "person", person, "over", person_strength),
        (Garment, "garment", garment, position or file.checkpoint.settings.position, garment_strength),
    ):
        if strength == 0:
            continue
        if latent is None:
            raise ValueError(f"Give a {branch}, or set {branch}_strength to 0.")
        images.append((image_class, branch, latent, kind, strength))
    counts = [latent.shape[0] for _, _, latent, _, _ in images]
    if len(counts) == 2 and 1 not in counts and counts[0] != counts[1]:
        raise ValueError(f"Got {counts[0]} persons and {counts[1]} garments. Give one of either, or as many of both.")
    size = size_of(transformer)
    made_for = size_made_for(file, transformer)
    for image_class, branch, latent, kind, strength in images:
        image = image_class(None, f"{file.name} ({branch})", latent, kind, strength, **settings)
        model = conditions.attach(model, image, file.adapter(branch, size[1:]) if made_for == size else None, made_for)
    return model


def size_of(transformer: Any) -> tuple[int, int, int]:
    """Hidden size, double and single blocks."""
    return transformer.hidden_size, len(transformer.double_blocks), len(transformer.single_blocks)


def size_made_for(file: TryOnFile, transformer: Any) -> tuple[int, int, int]:
    """The size of the models that a file is made for: the size of `transformer` if the file fits it.

    A file that does not say its depth reaches up to the last block it touches. The model may have more, not fewer.

    Raises:
        ValueError: only the size of the MLP does not fit.
    """
    checkpoint, (dim, double, single) = file.checkpoint, size_of(transformer)
    if checkpoint.dim != dim or checkpoint.double > double or checkpoint.single > single:
        return checkpoint.dim, checkpoint.double, checkpoint.single
    hidden = int(dim * transformer.params.mlp_ratio)
    if checkpoint.hidden != hidden:
        raise ValueError(
            f"{file.name} is made for {checkpoint.hidden} channels in the MLP, the model has {hidden}. "
            "Use a LoRA that was trained for this model."
        )
    return dim, double, single


def brought_to(image: Tensor, long_side: int) -> Tensor:
    """An IMAGE `[N, H, W, C]` as `[N, h, w, 3]` in whole tokens.

    Args:
        long_side: pixels of the longer side; 0 keeps its size.
    """
    factor = long_side / max(image.shape[1:3]) if long_side else 1.0
    height, width = (max(round(side * factor / PATCH), 1) * PATCH for side in image.shape[1:3])
    return resize(rgb(image), height, width)
