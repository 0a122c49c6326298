"""Stages `sd3_vae` and `sd3`: the second base, in the layout of Stable Diffusion 3.5 Medium.

Its autoencoder has seen photographs. The transformer is ComfyUI's own MMDiT, which autograd can follow.
"""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dit_toolkit.models.tiny_text import PAD, SLOTS, TinyTextEncoder

from . import checkpoints, data, loop, photographs, world
from .base import SHARES, brief, groups_of, run_stage
from .data import CHUNK, LEVELS, padded_ids
from .vae import Autoencoder, load_vae

SCENES, CROPS, PHOTOGRAPHS = range(3)
KINDS = (0.62, 0.20, 0.18)  # of a batch: whole scenes, parts of larger ones, parts of photographs


@dataclass(frozen=True)
class SD3Recipe:
    """What decides the weights, apart from the code."""

    pixels: int = 128
    live: int = 16
    depth: int = 3  # blocks and heads; 64 channels a head
    dual: tuple[int, ...] = (0, 1)  # blocks with a second attention, over the picture alone
    places: int = 64  # tokens on a side of the table of positions
    text_dim: int = 128
    pooled_dim: int = 64
    seed: int = 2
    pool: int = 60_000
    batch: int = 64
    vae_steps: int = 2_400
    base_steps: int = 2_600
    lr: float = 1.5e-3
    muon_lr: float = 0.015
    ema: float = 0.998
    drop: float = 0.08
    brief: float = 0.25


# ---------------------------------------------------------------------------------------------------------- pictures


def part_of_scene(scene: world.Scene, size: int, rng: np.random.Generator) -> np.ndarray:
    """A square of the scene drawn 1.5 to 3 times as large, mostly where something is."""
    whole = int(size * rng.uniform(1.5, 3)) // 8 * 8
    image = world.render(scene, whole).image
    thing = scene.things[rng.integers(len(scene.things))]
    middle = np.array([thing.y, thing.x]) + rng.normal(0, 0.22, 2)
    top, left = np.clip(middle * whole - size / 2, 0, whole - size).astype(int)
    return image[top : top + size, left : left + size]


def vae_pictures(recipe: SD3Recipe, seed: int, count: int) -> np.ndarray:
    """What the autoencoder is trained on: scenes, parts of scenes and, mostly, photographs."""
    rng, stream = np.random.default_rng(seed), world.scenes(seed, (*LEVELS, 0.5))
    made = []
    for roll in rng.random(count):
        if roll < 0.6:
            made.append(photographs.crop(rng, recipe.pixels))
        elif roll < 0.8:
            made.append(part_of_scene(next(stream), recipe.pixels, rng))
        else:
            made.append(world.render(next(stream), recipe.pixels).image)
    return np.stack(made)


VAE = Autoencoder("tiny_sd3_vae.safetensors", "SD3", vae_pictures, widths=(128, 64, 32))


def _chunk(size: int, job: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """`CHUNK` pictures of one kind and their word ids."""
    seed, kind = job
    rng, stream = np.random.default_rng(seed), world.scenes(seed, LEVELS)
    images, ids = [], []
    for _ in range(CHUNK):
        if kind == PHOTOGRAPHS:
            images.append(photographs.crop(rng, size))
            ids.append(padded_ids(""))
            continue
        scene = next(stream)
        images.append(world.render(scene, size).image if kind == SCENES else part_of_scene(scene, size, rng))
        ids.append(padded_ids(world.caption(scene)))
    return np.stack(images), np.array(ids, np.uint8)


def pool_of(recipe: SD3Recipe, workers: int) -> list[tuple[Tensor, Tensor]]:
    """Live latents, float16 `[N, live, h, w]`, and word ids of every kind of picture."""
    path = checkpoints.work(recipe) / "pool.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    vae, pools = load_vae(recipe, VAE), []
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        for kind, share in enumerate(KINDS):
            count = int(recipe.pool * share) // CHUNK
            jobs = [(recipe.seed * 1_000_003 + kind * 100_003 + k, kind) for k in range(count)]
            made = list(tqdm(pool.imap(partial(_chunk, recipe.pixels), jobs), total=count, desc="rendering the pool"))
            latents = torch.cat([data.encode(vae, images).half() for images, _ in made])
            pools.append((latents, torch.cat([torch.from_numpy(ids) for _, ids in made])))
    checkpoints.save(path, pools)
    return pools


# ------------------------------------------------------------------------------------------------------------- model


class SD3Base(nn.Module):
    """Transformer and text encoder, trained together."""

    def __init__(self, recipe: SD3Recipe):
        super().__init__()
        self.transformer = transformer_of(recipe)
        self.text = TinyTextEncoder(recipe.text_dim, recipe.pooled_dim, operations=nn)

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """Velocity of `x`, `[B, live, h, w]`, at noise levels `t`, `[B]`."""
        context, pooled = self.text(ids)
        return self.transformer(x, 1000 * t, context=context, y=pooled)


def transformer_of(recipe: SD3Recipe) -> Any:
    """ComfyUI's MMDiT, its weights as they are before training."""
    from .comfyui import comfyui

    comfyui()
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper, get_2d_sincos_pos_embed

    width = 64 * recipe.depth
    model = OpenAISignatureMMDITWrapper(
        input_size=None, patch_size=2, in_channels=recipe.live, depth=recipe.depth, adm_in_channels=recipe.pooled_dim,
        context_embedder_config={
            "target": "torch.nn.Linear", "params": {"in_features": recipe.text_dim, "out_features": width},
        },
        num_patches=recipe.places**2, pos_embed_max_size=recipe.places, qk_norm="rms",
        x_block_self_attn_layers=list(recipe.dual), dtype=torch.float32, operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    places = get_2d_sincos_pos_embed(width, recipe.places)
    model.pos_embed.copy_(torch.from_numpy(places).float()[None])
    initialise(model)
    return model


def initialise(model: nn.Module) -> None:
    """As the FLUX.1 base is: `flux.py`."""
    for name, parameter in model.named_parameters():
        if "ln_q" in name or "ln_k" in name:
            nn.init.ones_(parameter)
        elif name.endswith("bias") or "adaLN_modulation" in name or name == "final_layer.linear.weight":
            nn.init.zeros_(parameter)
        elif name.startswith(("t_embedder", "y_embedder")):
            nn.init.normal_(parameter, std=0.02)
        else:
            nn.init.xavier_uniform_(parameter.flatten(1))


# ---------------------------------------------------------------------------------------------------------- training


def batch_of(recipe: SD3Recipe, pools: list, groups: list[np.ndarray], step: int, device) -> tuple[Tensor, ...]:
    """Latents, noise, noise levels and words. The same step gives the same batch, whenever it runs."""
    rng = np.random.default_rng((recipe.seed, 11, step))
    latents, words = [], []
    for kind in rng.choice(3, recipe.batch, p=KINDS):
        rows = groups[rng.choice(3, p=SHARES)] if kind == SCENES else len(pools[kind][0])
        row = int(rng.choice(rows))
        latents.append(pools[kind][0][row].float())
        ids = pools[kind][1][row].tolist()
        # A caption tells of the whole scene: a part of it is shown without one, mostly, as a photograph always is.
        if rng.random() < (0.7 if kind == CROPS else recipe.drop):
            ids = [PAD] * SLOTS
        elif rng.random() < recipe.brief:
            ids = brief(ids, rng)
        words.append(torch.tensor(ids))
    x0 = torch.stack(latents)
    noise = torch.from_numpy(rng.standard_normal(tuple(x0.shape), np.float32))
    return tuple(part.to(device) for part in (x0, noise, loop.noise_levels(rng, recipe.batch), torch.stack(words)))


def train_sd3(recipe: SD3Recipe, workers: int) -> None:
    device = loop.device_of()
    pools = pool_of(recipe, workers)
    groups = groups_of(pools[SCENES][1])
    torch.manual_seed(recipe.seed)
    model = SD3Base(recipe)
    words = load_file(checkpoints.WEIGHTS / "tiny_text_encoder.safetensors")  # it knows them already
    model.text.load_state_dict({key: value.float() for key, value in words.items()})

    def loss_of(model: SD3Base, step: int) -> Tensor:
        x0, noise, t, words = batch_of(recipe, pools, groups, step, device)
        x = torch.lerp(x0, noise, t[:, None, None, None])
        return F.mse_loss(model(x, t, words).float(), noise - x0)

    path = checkpoints.work(recipe) / "sd3.pt"
    export_sd3(run_stage(path, recipe, recipe.base_steps, model, loss_of), recipe)


def load_sd3(recipe: SD3Recipe) -> SD3Base:
    """The trained base, its weights averaged."""
    model = SD3Base(recipe)
    path = checkpoints.work(recipe) / "sd3.pt"
    model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu")["ema"])
    return model.requires_grad_(False).eval()


def export_sd3(model: SD3Base, recipe: SD3Recipe) -> None:
    about = {"stage": "sd3", "recipe": asdict(recipe)}
    checkpoints.write("tiny_sd3.safetensors", model.transformer.state_dict(), {"dit_toolkit": json.dumps(about)})
    config = {"tiny_text": {"dim": recipe.text_dim, "pooled_dim": recipe.pooled_dim, "slots": SLOTS}}
    note = {"dit_toolkit": json.dumps(config)}
    checkpoints.write("tiny_sd3_text_encoder.safetensors", model.text.state_dict(), note)
