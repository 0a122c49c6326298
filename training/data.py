"""Pools of latents for training, rendered once and kept under `.training/`."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dit_toolkit.models.tiny_text import PAD, SLOTS, word_ids
from dit_toolkit.models.tiny_vae import TinyVAE

from . import world
from .pictures import to_unit

CHUNK = 500
LEVELS = (1.0, 1.2, 2.2, 1.6)  # how often each difficulty of the world comes


def padded_ids(text: str, edition: int = 1) -> list[int]:
    ids = word_ids(text, edition)[0][:SLOTS]
    return ids + [PAD] * (SLOTS - len(ids))


def _render_chunk(job: tuple[int, int, tuple[float, ...], int]) -> tuple[np.ndarray, np.ndarray]:
    seed, size, levels, edition = job
    stream = world.scenes(seed, levels) if edition == 1 else world.second.scenes(seed, levels)
    images, ids = [], []
    for _ in range(CHUNK):
        scene = next(stream)
        images.append(world.render(scene, size).image)
        ids.append(padded_ids(world.caption(scene), edition))
    return np.stack(images), np.array(ids, np.uint8)


@torch.no_grad()
def encode(vae: TinyVAE, images: np.ndarray) -> torch.Tensor:
    """uint8 pictures `[N, H, W, 3]` -> live latents `[N, live, H/8, W/8]` of about unit variance."""
    return vae.patch_in(torch.from_numpy(to_unit(images)))


def latent_pool(
    path: Path,
    vae: TinyVAE,
    count: int,
    size: int,
    levels: tuple[float, ...],
    seed: int,
    workers: int,
    edition: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` latents (float16) and word ids of training scenes, from `path` if it was made before.

    `edition`: of the world.
    """
    if path.exists():
        kept = torch.load(path, weights_only=True)
        if kept["latents"].shape[0] >= count:
            return kept["latents"][:count], kept["ids"][:count]
    latents, ids = [], []
    jobs = [(seed * 1_000_003 + k, size, levels, edition) for k in range((count + CHUNK - 1) // CHUNK)]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        for images, words in tqdm(pool.imap(_render_chunk, jobs), total=len(jobs), desc="rendering the pool"):
            latents.append(encode(vae, images).half())
            ids.append(torch.from_numpy(words))
    made = {"latents": torch.cat(latents)[:count], "ids": torch.cat(ids)[:count]}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(made, path)
    return made["latents"], made["ids"]
