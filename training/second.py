"""Stages `start`, `second_vae`, `second_base` and `second_guided`: the second edition's base, on the second world.

A wider base at 128 x 128 pixels. It learns the first world (`start`), then the second one (`second_base`), where it
goes on from the first: shapes, colours and places are the same there. Last, guidance is distilled into it
(`second_guided`, arXiv:2210.03142, stage one), so that one pass per step with guidance g is what two passes with
classifier-free guidance `strength_of(g)` were.

Until the second edition ships, its files are written to the folder of its checkpoints, not to `weights/`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dit_toolkit.models.tiny_text import EDITIONS, PAD, ROWS, SLOTS, VOCABULARY

from . import checkpoints, data, loop, world
from .base import batch_of, learned, run_stage, velocity_loss
from .checkpoints import Recipe
from .embedded import Base
from .flux import Size, export
from .pictures import training_picture
from .vae import Autoencoder, load_vae, train_vae

EDITION = 2
SHARES = (0.16, 0.22, 0.24, 0.26, 0.12)  # of a batch and of the pool, by difficulty
EVERY = 50  # steps between checkpoints
START = Recipe(pixels=128, pool=60_000, base_steps=1_500)


@dataclass(frozen=True)
class SecondRecipe:
    """What decides the weights, apart from the code and from how long each stage is."""

    pixels: int = 128
    live: int = 12
    hidden: int = 256
    seed: int = 3
    pool: int = 48_000
    batch: int = 64
    lr: float = 1.2e-3
    muon_lr: float = 0.012
    ema: float = 0.998
    drop: float = 0.1  # captions left empty
    brief: float = 0.25  # captions that leave things unsaid
    start: Recipe = START
    world: int = world.second.VERSION
    vae_steps: int = field(default=2_400, repr=False)
    base_steps: int = field(default=2_400, repr=False)
    guided_steps: int = field(default=400, repr=False)


def size_of(recipe: SecondRecipe) -> Size:
    return Size(live=recipe.live, hidden=recipe.hidden, words=EDITIONS[EDITION].rows)


# Stage `start`


def train_start(recipe: SecondRecipe, workers: int) -> None:
    """A base of the same width on the first world, in the latents of its own autoencoder."""
    size = Size(live=recipe.start.live, hidden=recipe.hidden)
    learned(recipe.start, size, checkpoints.work(recipe) / "start.pt", workers)


# Stage `second_vae`


def more_components(patches: Tensor, first: dict[str, Tensor], live: int, power: float = 0.3) -> dict[str, Tensor]:
    """`first` and the strongest components of what they leave over, so that its latents stay the first channels.

    Args:
        patches: `[N, 3, 8, 8]` in -1..1.
        first: weights of `patch_in` and `patch_out`, as `fit_components` gives them with the same `power`.
    """
    flat = patches.flatten(1).double()
    n = first["patch_in.weight"].shape[0]
    kept, _ = torch.linalg.qr(first["patch_out.weight"].double().flatten(1))  # [192, n]
    rest = torch.eye(flat.shape[1]).double() - kept @ kept.T
    mean, covariance = flat.mean(0), torch.cov(flat.T)
    values, vectors = torch.linalg.eigh(rest @ covariance @ rest)
    values, basis = values.flip(0)[: live - n], vectors.flip(1)[:, : live - n]
    rows = first["patch_in.weight"].double().flatten(1)
    unit = (rows.norm(dim=1) / first["eigenvalues"][:n].double() ** ((power - 1) / 2)).mean()  # of their scale
    scale = unit * values ** ((power - 1) / 2)
    forward, back = (basis * scale).T, basis / scale
    shape = (-1, *patches.shape[1:])
    return {
        "patch_in.weight": torch.cat([first["patch_in.weight"], forward.reshape(shape).float()]),
        "patch_in.bias": torch.cat([first["patch_in.bias"], (-forward @ mean).float()]),
        "patch_out.weight": torch.cat([first["patch_out.weight"], back.reshape(-1, live - n, 1, 1).float()], 1),
        "patch_out.bias": (kept @ (kept.T @ first["patch_out.bias"].double()) + rest @ mean).float(),
        "eigenvalues": torch.cat([first["eigenvalues"][:n], values.float()]),
    }


def _fit(patches: Tensor, recipe: SecondRecipe) -> dict[str, Tensor]:
    load_vae(recipe.start)  # fits its components
    first = torch.load(checkpoints.work(recipe.start) / "components.pt", weights_only=True)
    return more_components(patches, first, recipe.live)


def _pictures(recipe: SecondRecipe, seed: int, count: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack(
        [training_picture(scene, recipe.pixels, rng) for scene in islice(world.second.scenes(seed, SHARES), count)]
    )


def autoencoder(recipe: SecondRecipe) -> Autoencoder:
    """Its file is beside the checkpoints."""
    file = str((checkpoints.work(recipe) / "tiny_vae.safetensors").resolve())
    return Autoencoder(file, "FLUX.1", _pictures, fit=_fit, edges=0.15)


def train_second_vae(recipe: SecondRecipe) -> None:
    train_vae(recipe, autoencoder(recipe))


# Stage `second_base`

_LIKE = {"tee": "shirt", "vest": "shirt", "coat": "shirt", "dress": "skirt", "shorts": "trousers", "tied": "long",
         "checked": "spotted", "pointing": "waving"}  # fmt: skip


def widened(start: dict[str, Tensor], size: Size, live: int) -> dict[str, Tensor]:
    """Weights of a base with `live` channels and the first edition's words -> of one of `size`, which draws the same.

    What comes in by new channels is not looked at yet, and nothing is said of them. New words begin as the known ones
    that are most like them.
    """
    made = dict(start)
    more = (size.live - live) * 4
    made["flux.img_in.weight"] = F.pad(start["flux.img_in.weight"], (0, more))
    made["flux.final_layer.linear.weight"] = F.pad(start["flux.final_layer.linear.weight"], (0, 0, 0, more))
    made["flux.final_layer.linear.bias"] = F.pad(start["flux.final_layer.linear.bias"], (0, more))
    known = start["text.words.weight"]
    words = torch.cat([known, known[: size.words - ROWS].clone()])
    spread = torch.Generator().manual_seed(0)
    new = [i for i, word in enumerate(VOCABULARY[: size.words]) if i >= ROWS or word in ("small", "dress", "checked")]
    typical = known.std()
    for i in new:
        noise = torch.randn(known.shape[1], generator=spread) * typical
        like = _LIKE.get(VOCABULARY[i])
        words[i] = known[VOCABULARY.index(like)] + 0.3 * noise if like else noise
    made["text.words.weight"] = words
    return made


_DOLL, _PRINTED = VOCABULARY.index("doll"), VOCABULARY.index("printed")
_KINDS = [VOCABULARY.index(kind) for kind in world.OBJECTS]


def levels_of(ids: Tensor) -> Tensor:
    """Difficulty of every caption of a pool, `[N]`: a printed star is no object."""
    ids = ids.long()
    printed = torch.roll(ids, 1, 1) == _PRINTED
    toys = (torch.isin(ids, torch.tensor(_KINDS)) & ~printed).sum(1)
    dolls = (ids == _DOLL).sum(1)
    return torch.where(dolls == 2, 4, torch.where(dolls == 1, 2 + toys, toys - 1))


def second_pool(recipe: SecondRecipe, workers: int) -> tuple[Tensor, Tensor, list[np.ndarray]]:
    """Latents, word ids, and the rows of every difficulty."""
    latents, ids = data.latent_pool(
        checkpoints.work(recipe) / "second-pool.pt", load_vae(recipe, autoencoder(recipe)), recipe.pool, recipe.pixels,
        SHARES, recipe.seed, workers, EDITION,
    )  # fmt: skip
    levels = levels_of(ids)
    return latents, ids, [torch.nonzero(levels == k)[:, 0].numpy() for k in range(len(SHARES))]


def train_second_base(recipe: SecondRecipe, workers: int) -> None:
    latents, ids, groups = second_pool(recipe, workers)
    device = loop.device_of()
    start = torch.load(checkpoints.work(recipe) / "start.pt", weights_only=True, map_location="cpu")["ema"]
    model = Base(size_of(recipe))
    model.load_state_dict(widened(start, size_of(recipe), recipe.start.live))

    def loss_of(model: Base, step: int) -> Tensor:
        return velocity_loss(model, batch_of(recipe, latents, ids, groups, step, device, SHARES))

    path = checkpoints.work(recipe) / "second.pt"
    run_stage(path, recipe, recipe.base_steps, model, loss_of, every=EVERY)
    export_second(recipe, "second")


def load_second(recipe: SecondRecipe, stage: str) -> Base:
    """The averaged weights of stage `second` or `guided`, as far as it is trained."""
    model = Base(size_of(recipe))
    kept = torch.load(checkpoints.work(recipe) / f"{stage}.pt", weights_only=True, map_location="cpu")
    model.load_state_dict(kept["ema"])
    return model.requires_grad_(False).eval()


# Stage `second_guided`


def strength_of(guidance: Any) -> Any:
    """Scale of classifier-free guidance that a guidance value stands for: 1 is none, FLUX's usual 3.5 is 2.5."""
    return 1 + 0.6 * (guidance - 1)


def train_second_guided(recipe: SecondRecipe, workers: int) -> None:
    """The student sees the guidance value, and learns what the teacher says with and without the caption together."""
    latents, ids, groups = second_pool(recipe, workers)
    device = loop.device_of()
    teacher = load_second(recipe, "second").to(device)
    quick = loop.compiled(teacher)
    student = Base(size_of(recipe))
    student.load_state_dict(teacher.state_dict())
    gentle = replace(recipe, seed=recipe.seed + 100, lr=recipe.lr / 4, muon_lr=recipe.muon_lr / 4)

    def loss_of(model: Base, step: int) -> Tensor:
        x0, noise, t, words, guidance = batch_of(gentle, latents, ids, groups, step, device, SHARES)
        x = torch.lerp(x0, noise, t[:, None, None, None])
        with torch.no_grad():
            told, empty = (quick(x, t, said, guidance).float() for said in (words, torch.full_like(words, PAD)))
            wanted = empty + strength_of(guidance)[:, None, None, None] * (told - empty)
        return F.mse_loss(model(x, t, words, guidance).float(), wanted)

    run_stage(checkpoints.work(recipe) / "guided.pt", gentle, recipe.guided_steps, student, loss_of, every=EVERY)
    export_second(recipe, "guided")


def export_second(recipe: SecondRecipe, stage: str) -> None:
    model, folder = load_second(recipe, stage), checkpoints.work(recipe).resolve()
    size = model.flux.size
    note = {"dit_toolkit": json.dumps({"stage": stage, "recipe": asdict(recipe), "size": size.asdict()})}
    checkpoints.write(str(folder / "tiny_flux.safetensors"), export(model.flux.state_dict(), size.live), note)
    config = {"dim": size.text_dim, "pooled_dim": size.pooled_dim, "slots": SLOTS, "edition": EDITION}
    note = {"dit_toolkit": json.dumps({"tiny_text": config})}
    checkpoints.write(str(folder / "tiny_text_encoder.safetensors"), model.text.state_dict(), note)
