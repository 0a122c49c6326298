"""Stage `base`: transformer and text encoder, trained together."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dit_toolkit.models.tiny_text import PAD, SLOTS, VOCABULARY

from . import checkpoints, data, loop, world
from .checkpoints import Recipe
from .data import LEVELS
from .embedded import Base
from .flux import Size, export
from .optim import optimisers, schedule
from .vae import load_vae


def size_of(recipe: Recipe) -> Size:
    return Size(live=recipe.live)


def _ids(words) -> frozenset[int]:
    return frozenset(VOCABULARY.index(word) for word in words)


_NOUNS = _ids(("hair", "ground", *world.MORE_BOTTOMS, *world.CUTS))
_ADJECTIVES = _ids((*world.COLOURS, *world.HAIR, *world.GROUNDS, *world.MORE_PATTERNS, *world.MORE_HAIRSTYLES))
_PRINTED = VOCABULARY.index("printed")


def brief(ids: list[int], rng: np.random.Generator) -> list[int]:
    """The caption without some of what it says of hair, garments and ground. What is shown stays named."""
    said: list[int] = []
    unsaid = False  # whether the last noun was left out: what is printed on it goes too
    for before, word in zip([PAD, *ids], ids, strict=False):
        if word in _NOUNS and rng.random() < 0.45:
            unsaid = True
            while said and said[-1] in _ADJECTIVES:
                said.pop()
        elif word != PAD and not (unsaid and _PRINTED in (before, word)):
            unsaid = unsaid and word == _PRINTED
            said.append(word)
    return said + [PAD] * (len(ids) - len(said))


_KINDS = torch.tensor([VOCABULARY.index(kind) for kind in world.OBJECTS])


SHARES = (0.46, 0.32, 0.22)  # of a batch: objects alone, dolls with an object, dolls alone. Shapes are the hardest.


def groups_of(ids: Tensor) -> list[np.ndarray]:
    """Rows of the pool with objects alone, dolls with an object, dolls alone."""
    doll = (ids == VOCABULARY.index("doll")).any(1)
    toy = torch.isin(ids.long(), _KINDS).any(1)
    return [torch.nonzero(rows)[:, 0].numpy() for rows in (~doll, doll & toy, doll & ~toy)]


def batch_of(recipe, latents: Tensor, ids: Tensor, groups: list[np.ndarray], step: int, device, shares=SHARES) -> tuple:
    """The same step gives the same batch, whenever it runs. `shares`: how often each group of the pool comes."""
    rng = np.random.default_rng((recipe.seed, 11, step))
    index = torch.from_numpy(np.array([rng.choice(groups[k]) for k in rng.choice(len(shares), recipe.batch, p=shares)]))
    x0, words = latents[index].float(), ids[index].long()
    for row in np.flatnonzero(rng.random(recipe.batch) < recipe.brief):
        words[row] = torch.tensor(brief(words[row].tolist(), rng))
    words[torch.from_numpy(rng.random(recipe.batch) < recipe.drop)] = PAD
    noise = torch.from_numpy(rng.standard_normal(tuple(x0.shape), np.float32))
    guidance = torch.from_numpy(rng.uniform(1.0, 5.0, recipe.batch).astype(np.float32))
    return tuple(part.to(device) for part in (x0, noise, loop.noise_levels(rng, recipe.batch), words, guidance))


Model = TypeVar("Model", bound=nn.Module)


def run_stage(path: Path, recipe, steps: int, model: Model, loss_of, every: int = 300) -> Model:
    """The training loop of transformers. `loss_of(model, step)` -> loss. Returns the average.

    Frozen weights stay as they are. `path` keeps the checkpoint.
    """
    device = loop.device_of()
    model.to(device)
    quick = loop.compiled(model)
    average = copy.deepcopy(model).requires_grad_(False)
    optims = optimisers(model, recipe.lr, recipe.muon_lr)
    start, losses = 0, []
    if path.exists():
        kept = torch.load(path, weights_only=True, map_location=device)
        model.load_state_dict(kept["model"])
        average.load_state_dict(kept["ema"])
        for optim, state in zip(optims, kept["optimisers"], strict=True):
            optim.load_state_dict(state)
        start, losses = kept["step"], kept["losses"]
    rates = [[recipe.muon_lr], [recipe.lr]]
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=path.stem, mininterval=5)
    for step in bar:
        with loop.fast_matrices(device):
            loss = loss_of(quick, step)
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = schedule(step, steps)
        for optim, base in zip(optims, rates, strict=True):
            for group, rate in zip(optim.param_groups, base, strict=True):
                group["lr"] = rate * factor
            with loop.fast_matrices(device):
                optim.step()
        decay = min(recipe.ema, (step + 1) / (step + 10))
        for a, b in zip(average.parameters(), model.parameters(), strict=True):
            a.data.lerp_(b.data, 1 - decay)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise RuntimeError(
                f"{path.stem}: the loss is {losses[-1]} at step {step}. Delete {path.name} and lower the rate."
            )
        bar.set_postfix(loss=f"{np.mean(losses[-100:]):.4f}", refresh=False)
        if (step + 1) % every == 0 or step + 1 == steps:
            state = {"model": model.state_dict(), "ema": average.state_dict()}
            state["optimisers"] = [optim.state_dict() for optim in optims]
            checkpoints.save(path, {**state, "step": step + 1, "losses": losses})
            loop.plot(path.with_suffix(".png"), losses)
    return average


def pool_of(recipe: Recipe, workers: int) -> tuple[Tensor, Tensor]:
    return data.latent_pool(
        checkpoints.work(recipe) / "pool.pt", load_vae(recipe), recipe.pool, recipe.pixels, LEVELS, recipe.seed, workers
    )


def learned(recipe: Recipe, size: Size, path: Path, workers: int) -> Base:
    """A base of `size`, trained on the first world as `recipe` says; its checkpoint is `path`."""
    device = loop.device_of()
    latents, ids = pool_of(recipe, workers)
    groups = groups_of(ids)
    torch.manual_seed(recipe.seed)

    def loss_of(model: Base, step: int) -> Tensor:
        return velocity_loss(model, batch_of(recipe, latents, ids, groups, step, device))

    return run_stage(path, recipe, recipe.base_steps, Base(size), loss_of)


def velocity_loss(model: Base, batch: tuple) -> Tensor:
    x0, noise, t, words, guidance = batch
    x = torch.lerp(x0, noise, t[:, None, None, None])
    return F.mse_loss(model(x, t, words, guidance).float(), noise - x0)


def train_base(recipe: Recipe, workers: int) -> None:
    path = checkpoints.work(recipe) / "base.pt"
    export_base(learned(recipe, size_of(recipe), path, workers), recipe, "base")


def load_base(recipe: Recipe, stage: str) -> Base:
    model = Base(size_of(recipe))
    path = checkpoints.work(recipe) / f"{stage}.pt"
    model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu")["ema"])
    return model.requires_grad_(False).eval()


def export_base(model: Base, recipe: Recipe, stage: str) -> None:
    size = model.flux.size
    about = {"stage": stage, "recipe": asdict(recipe), "size": size.asdict()}
    note = {"dit_toolkit": json.dumps(about)}
    checkpoints.write("tiny_flux.safetensors", export(model.flux.state_dict(), size.live), note)
    config = {"tiny_text": {"dim": size.text_dim, "pooled_dim": size.pooled_dim, "slots": SLOTS}}
    checkpoints.write("tiny_text_encoder.safetensors", model.text.state_dict(), {"dit_toolkit": json.dumps(config)})
