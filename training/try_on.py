"""Stage `try_on`: the frozen base draws a doll in garment G from two pictures.

They are the doll in another shirt with the shirt masked, and G laid flat. Only the two branch LoRAs learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dit_toolkit.models.control.mc_vton_keys import BRANCHES, Checkpoint, Settings, write, write_metadata

from . import checkpoints, data, loop, world
from .checkpoints import Recipe
from .embedded import load_shipped
from .fittings import training_fitting
from .try_on_model import NAME, PROMPT, Dressed, new_branches

LEVELS = (0, 0, 1.0, 0.35)  # dolls alone, and with an object


@dataclass(frozen=True)
class TryOnRecipe:
    rank: int = 16
    pool: int = 10_000
    steps: int = 1_500
    batch: int = 32
    muon_lr: float = 1e-2
    on_garment: float = 3.0  # weight of the loss where the shirt is; 1 elsewhere
    seed: int = 1


def words_for(scene: world.Scene, rng: np.random.Generator) -> list[int]:
    """Word ids: mostly the fixed prompt, sometimes the caption without the shirt, sometimes nothing."""
    roll = rng.random()
    if roll < 0.1:
        return data.padded_ids("")
    if roll < 0.75:
        return data.padded_ids(PROMPT)
    doll = scene.things[0]
    shirt = f"{doll.colour} {'' if doll.pattern == 'plain' else doll.pattern + ' '}shirt"
    told = world.caption(scene)
    for article in ("a", "an"):
        told = told.replace(f", {article} {shirt} and ", " and ")
    return data.padded_ids(told)


def pool(base: Recipe, recipe: TryOnRecipe, vae) -> dict[str, Tensor]:
    """Latents of the wanted pictures, persons and garments, weight of the loss, word ids."""
    path = place(base, "pool", recipe, files=checkpoints.SHIPPED[-1:])  # in the terms of the autoencoder
    if path.exists():
        return torch.load(path, weights_only=True)
    rng, stream = np.random.default_rng(recipe.seed), world.scenes(95_000 + recipe.seed, LEVELS)
    kept: dict[str, list[Tensor]] = {name: [] for name in ("shown", "person", "garment", "weight", "ids")}
    for count in tqdm([min(500, recipe.pool - k) for k in range(0, recipe.pool, 500)], desc="rendering for try-on"):
        scenes = [next(stream) for _ in range(count)]
        fittings = [training_fitting(scene, base.pixels, rng) for scene in scenes]
        for name in ("shown", "person", "garment"):
            kept[name].append(data.encode(vae, np.stack([getattr(f, name) for f in fittings])).half())
        masks = torch.from_numpy(np.stack([f.mask for f in fittings])).float()[:, None] / 255
        kept["weight"].append((1 + (recipe.on_garment - 1) * F.avg_pool2d(masks, 8)).half())
        kept["ids"].append(torch.tensor([words_for(scene, rng) for scene in scenes], dtype=torch.uint8))
    made = {name: torch.cat(parts) for name, parts in kept.items()}
    checkpoints.save(path, made)
    return made


def place(base: Recipe, what: str, *recipes: object, files: Sequence[str] = checkpoints.SHIPPED) -> Path:
    """Where a stage keeps what it makes. With other recipes, or other weights in `files`, it never meets it again.

    Args:
        files: of `weights/`, on which the stage trains.
    """
    made_from = checkpoints.contents(*(checkpoints.WEIGHTS / name for name in files))
    return checkpoints.work(base) / f"try-on-{what}-{checkpoints.digest(*recipes, made_from)}.pt"


def train_try_on(base: Recipe, recipe: TryOnRecipe) -> None:
    device = loop.device_of()
    model, vae = load_shipped()
    stock = pool(base, recipe, vae)
    model.to(device)
    loras = new_branches(model.flux.size, recipe.rank, recipe.seed).to(device)
    quick = loop.compiled(Dressed(model, loras))

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng((recipe.seed, 31, step))
        index = torch.from_numpy(rng.integers(stock["ids"].shape[0], size=recipe.batch))
        x0, person, garment, weight = (
            stock[n][index].float().to(device) for n in ("shown", "person", "garment", "weight")
        )
        noise = torch.from_numpy(rng.standard_normal(tuple(x0.shape), np.float32)).to(device)
        t = loop.noise_levels(rng, recipe.batch).to(device)
        x = torch.lerp(x0, noise, t[:, None, None, None])
        guidance = torch.from_numpy(rng.uniform(1, 5, recipe.batch).astype(np.float32)).to(device)
        v = quick(x, t, stock["ids"][index].long().to(device), guidance, person, garment)
        return (weight * (v.float() - (noise - x0)).square()).mean() / weight.mean()

    loras.load_state_dict(loop.learn(place(base, "lora", recipe), loras, recipe.steps, recipe.muon_lr, loss_of))
    export_try_on(loras, model.flux.size)


def export_try_on(loras: nn.ModuleDict, size) -> None:
    branches = {name: loras[name].cpu().branch() for name in BRANCHES}
    made = Checkpoint(branches, size.hidden, 4 * size.hidden, size.double, size.single, Settings(prompt=PROMPT))
    checkpoints.write(NAME, write(made), write_metadata(made))
