"""Stage `dit4sr`: a DiT4SR patch for the second base, trained on pictures and their worn small copies.

What is trained are the control weights alone, through the very function that the nodes run. The variant is r1, the
paper's. The authors begin with projections of zero; here those of queries, keys and values begin as identities, so that
the low-resolution stream starts as a second copy of the picture's, and a tiny model gets by with few steps.
"""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dit_toolkit.models.restore.dit4sr import ControlBranch, joint_block
from dit_toolkit.models.restore.dit4sr_keys import write
from dit_toolkit.models.tiny_text import PAD, SLOTS

from . import checkpoints, data, loop, photographs, world
from .base import brief, run_stage
from .data import CHUNK, LEVELS, padded_ids
from .degrade import degraded, enlarged
from .sd3 import CROPS, PHOTOGRAPHS, SCENES, VAE, SD3Base, SD3Recipe, load_sd3, part_of_scene
from .vae import load_vae

SHARES = {SCENES: 0.3, CROPS: 0.35, PHOTOGRAPHS: 0.35}


@dataclass(frozen=True)
class RestoreRecipe:
    """What decides the weights, apart from the base and the code."""

    seed: int = 3
    pool: int = 24_000
    batch: int = 48
    steps: int = 1_500
    lr: float = 1.5e-3
    muon_lr: float = 0.01
    ema: float = 0.995
    drop: float = 0.2  # captions left empty
    brief: float = 0.3


class Restored(nn.Module):
    """The frozen base with its third stream."""

    def __init__(self, base: SD3Base, recipe: SD3Recipe):
        super().__init__()
        self.base = base.requires_grad_(False)
        dim = 64 * recipe.depth
        self.control = ControlBranch(dim, recipe.depth, recipe.dual, "r1", operations=nn)
        for block, own in zip(base.transformer.joint_blocks, self.control.transformer_blocks, strict=True):
            for name in ("attn", "attn2"):
                attention = getattr(own, name)
                if attention is None:
                    continue
                for layer in (attention.to_q_control, attention.to_k_control, attention.to_v_control):
                    nn.init.eye_(layer.weight)
                    nn.init.zeros_(layer.bias)
                attention.to_out_control.load_state_dict(getattr(block.x_block, name).proj.state_dict())
            nn.init.zeros_(own.ff.control_conv.weight)
            nn.init.zeros_(own.ff.control_conv.bias)

    def forward(self, x: Tensor, small: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """Velocity of `x`, at noise levels `t`, `[B]`, beside the enlarged small picture; both `[B, live, h, w]`."""
        model = self.base.transformer
        context, pooled = self.base.text(ids)
        vec = model.t_embedder(1000 * t, dtype=x.dtype) + model.y_embedder(pooled)
        grid = (x.shape[-2] // 2, x.shape[-1] // 2)
        places = model.cropped_pos_embed(x.shape[-2:])
        img, lr, txt = model.x_embedder(x) + places, model.x_embedder(small) + places, model.context_embedder(context)
        for block, own in zip(model.joint_blocks, self.control.transformer_blocks, strict=True):
            img, lr, txt = joint_block(block, own, img, lr, txt, vec, grid, attention=attention, cross_stream_scale=1.0)
        return model.unpatchify(model.final_layer(img, vec), hw=x.shape[-2:])


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Over heads of 64 channels; all `[B, L, D]`."""
    q, k, v = (x.unflatten(2, (-1, 64)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


def _chunk(size: int, job: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`CHUNK` pictures of one kind, their worn copies at the same size, and their word ids."""
    seed, kind = job
    rng, stream = np.random.default_rng(seed), world.scenes(seed, LEVELS)
    images, worn, ids = [], [], []
    for _ in range(CHUNK):
        scene = next(stream)
        if kind == PHOTOGRAPHS:
            image = photographs.crop(rng, size)
        else:
            image = world.render(scene, size).image if kind == SCENES else part_of_scene(scene, size, rng)
        images.append(image)
        worn.append(enlarged(degraded(image, rng), size, size))
        ids.append(padded_ids("" if kind == PHOTOGRAPHS else world.caption(scene)))
    return np.stack(images), np.stack(worn), np.array(ids, np.uint8)


def pool_of(recipe: RestoreRecipe, base: SD3Recipe, workers: int) -> tuple[Tensor, Tensor, Tensor]:
    """Live latents of pictures and of their worn copies, float16 `[N, live, h, w]`, and word ids."""
    path = checkpoints.work(base) / f"dit4sr-pool-{checkpoints.digest(recipe.seed, recipe.pool, SHARES)}.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    vae = load_vae(base, VAE)
    jobs = [
        (recipe.seed * 1_000_003 + kind * 100_003 + k, kind)
        for kind, share in SHARES.items()
        for k in range(int(recipe.pool * share) // CHUNK)
    ]
    parts: list[tuple[Tensor, ...]] = []
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        made = pool.imap(partial(_chunk, base.pixels), jobs)
        for images, worn, ids in tqdm(made, total=len(jobs), desc="rendering the pool"):
            latents = (data.encode(vae, pictures).half() for pictures in (images, worn))
            parts.append((*latents, torch.from_numpy(ids)))
    pools = tuple(torch.cat(part) for part in zip(*parts, strict=True))
    checkpoints.save(path, pools)
    return pools


def batch_of(recipe: RestoreRecipe, pools: tuple[Tensor, ...], step: int, device) -> tuple[Tensor, ...]:
    """Pictures, worn copies, noise, noise levels and words. The same step gives the same batch."""
    rng = np.random.default_rng((recipe.seed, 13, step))
    rows = torch.from_numpy(rng.integers(len(pools[0]), size=recipe.batch))
    words = pools[2][rows].long()
    for row, roll in enumerate(rng.random(recipe.batch)):
        if roll < recipe.drop:
            words[row] = PAD
        elif roll < recipe.drop + recipe.brief:
            words[row] = torch.tensor(brief(words[row].tolist(), rng)[:SLOTS])
    x0, small = pools[0][rows].float(), pools[1][rows].float()
    noise = torch.from_numpy(rng.standard_normal(tuple(x0.shape), np.float32))
    return tuple(part.to(device) for part in (x0, small, noise, loop.noise_levels(rng, recipe.batch), words))


def train_dit4sr(recipe: RestoreRecipe, base_recipe: SD3Recipe, workers: int) -> None:
    device = loop.device_of()
    pools = pool_of(recipe, base_recipe, workers)
    torch.manual_seed(recipe.seed)
    model = Restored(load_sd3(base_recipe), base_recipe)

    def loss_of(model: Restored, step: int) -> Tensor:
        x0, small, noise, t, words = batch_of(recipe, pools, step, device)
        x = torch.lerp(x0, noise, t[:, None, None, None])
        return F.mse_loss(model(x, small, t, words).float(), noise - x0)

    trained_on = checkpoints.contents(checkpoints.work(base_recipe) / "sd3.pt")
    path = checkpoints.work(base_recipe) / f"dit4sr-{checkpoints.digest(recipe, trained_on)}.pt"
    export_dit4sr(run_stage(path, recipe, recipe.steps, model, loss_of))


def export_dit4sr(model: Restored) -> None:
    checkpoints.write("dit4sr/tiny_dit4sr.safetensors", *write(model.control.state_dict(), "r1"))
