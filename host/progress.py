"""A progress bar on the node that is running, and a stop where somebody interrupts, for loops that may take seconds."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any, TypeVar

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

T = TypeVar("T")


def one_by_one(items: Iterable[T], count: int) -> Iterator[T]:
    """The items, with a progress bar; stops where the user interrupts."""
    progress = comfy.utils.ProgressBar(count)
    for item in items:
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield item
        progress.update(1)


def each_of(items: Collection[T]) -> Iterator[T]:
    """`one_by_one` of something whose length is known: for the loops of `models/`, which know no progress bar."""
    return one_by_one(items, len(items))


def encoded(vae: Any, *batches: Tensor) -> list[Tensor]:
    """The latents of batches of pictures `[N, H, W, C]`, each `[N, C, h, w]`, encoded picture by picture."""
    pictures = [picture for batch in batches for picture in batch.split(1)]
    latents = iter([vae.encode(picture) for picture in each_of(pictures)])
    return [torch.cat([next(latents) for _ in range(len(batch))]) for batch in batches]


def decoded(vae: Any, latents: Tensor) -> Tensor:
    """What a VAE makes of latents `[N, ...]`, one by one."""
    return torch.cat([vae.decode(latent) for latent in each_of(latents.split(1))])
