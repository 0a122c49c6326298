"""Stages `edge`, `pose` and `subject`: the EasyControl adapters of the embedded default.

The frozen base draws, the condition's keys and values come from the very function that the node runs
(`models/control/conditions.py`), and only the condition LoRA learns. Loss and noise levels are the base's, guidance
is 1, as the authors train on FLUX.1-dev.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dit_toolkit.models.control.conditions import encode_condition
from dit_toolkit.models.control.easycontrol import ConditionLora, published_state
from dit_toolkit.models.control.easycontrol_keys import write_metadata
from dit_toolkit.models.control.positions import spatial_ids, subject_ids
from dit_toolkit.models.tiny_text import PAD

from . import checkpoints, data, loop, world
from .base import load_base, size_of
from .checkpoints import Recipe
from .embedded import Base
from .flux import Flux, apply_rope, attention, patchify, rope
from .pictures import edges_as_a_user_would
from .vae import load_vae

KINDS = ("edge", "pose", "subject")


@dataclass(frozen=True)
class AdapterRecipe:
    rank: int = 32
    pool: int = 24_000
    steps: int = 3_000
    batch: int = 48
    muon_lr: float = 1e-2
    drop: float = 0.2  # captions left empty
    silent: float = 0.65  # captions that leave place and pose to the condition


def condition_picture(kind: str, scene: world.Scene, size: int, rng: np.random.Generator) -> np.ndarray:
    """What the adapter is shown for a scene, `[size, size, 3]` uint8."""
    if kind == "edge":
        return edges_as_a_user_would(world.render(scene, size), rng)
    if kind == "pose":
        return world.pose_map(scene, size)
    return world.cut_out(subject_alone(scene), 0, size, (127, 127, 127))


def subject_alone(scene: world.Scene) -> world.Scene:
    """The first thing of a scene in a neutral pose: the reference shows who it is, not how it stands."""
    first = scene.things[0]
    return replace(
        scene, things=(replace(first, arms=(30.0, 30.0), legs=(8.0, 8.0)) if first.kind == "doll" else first,)
    )


def caption_for(kind: str, scene: world.Scene) -> str:
    """Captions that leave to the condition what the condition shows."""
    if kind == "subject" and scene.things[0].kind == "doll":
        pose = {"": "", "waving": ", waving"}.get(scene.pose, f", arms {scene.pose}")
        toy = (
            f", a {scene.things[1].colour} {scene.things[1].kind} on the {scene.relation}"
            if len(scene.things) > 1
            else ""
        )
        return f"a doll{pose}{toy}, on a {scene.ground} ground"
    return world.caption(scene)


CHUNK = 500  # pictures that are rendered and encoded at once
LEVELS = {"edge": data.LEVELS, "pose": (0, 0, 1.0, 0.6), "subject": (0, 0, 1.0, 0.6)}


def pool_place(kind: str, base: Recipe, recipe: AdapterRecipe) -> Path:
    """Beside the components of the autoencoder, in whose terms it is."""
    return checkpoints.work(base) / f"pool-{kind}-{checkpoints.digest(recipe)}.pt"


def place(kind: str, base: Recipe, recipe: AdapterRecipe, stage: str = "base") -> Path:
    """Beside the base it is trained on. Another base, or the same one trained further, never meets it."""
    trained_on = checkpoints.contents(checkpoints.work(base) / f"{stage}.pt")
    return checkpoints.work(base) / f"easycontrol-{kind}-{checkpoints.digest(recipe, trained_on)}.pt"


def pool(kind: str, base: Recipe, recipe: AdapterRecipe) -> dict[str, Tensor]:
    """Latents of pictures and conditions, and word ids."""
    path = pool_place(kind, base, recipe)
    if path.exists():
        return torch.load(path, weights_only=True)
    vae, rng = load_vae(base), np.random.default_rng(base.seed)
    stream = world.scenes(90_000 + base.seed, LEVELS[kind])
    kept: dict[str, list[Tensor]] = {"latents": [], "conditions": [], "ids": []}
    for _ in tqdm(range(recipe.pool // CHUNK), desc=f"rendering for {kind}"):
        shown, conditions, ids = [], [], []
        for scene in (next(stream) for _ in range(CHUNK)):
            shown.append(world.render(scene, base.pixels).image)
            conditions.append(condition_picture(kind, scene, base.pixels, rng))
            silent = kind != "subject" and rng.random() < recipe.silent
            told = replace(scene, relation="", pose="") if silent else scene
            ids.append(data.padded_ids(caption_for(kind, told)))
        kept["latents"].append(data.encode(vae, np.stack(shown)).half())
        kept["conditions"].append(data.encode(vae, np.stack(conditions)).half())
        kept["ids"].append(torch.tensor(ids, dtype=torch.uint8))
    made = {name: torch.cat(parts) for name, parts in kept.items()}
    checkpoints.save(path, made)
    return made


def condition_keys(
    kind: str,
    flux: Flux,
    lora: ConditionLora,
    condition: Tensor,
    pooled: Tensor,
    guidance: Tensor,
    grid: tuple[int, int],
):
    """Keys and values of every block for condition latents `[B, live, h, w]` beside a picture of `grid` tokens."""
    own = (condition.shape[-2] // 2, condition.shape[-1] // 2)
    ids = (subject_ids if kind == "subject" else spatial_ids)(own, grid, condition.device)
    vec = flux.vec(torch.zeros_like(guidance), guidance, pooled)
    return encode_condition(
        flux, lora, patchify(condition), vec, rope(ids[None]), attention=attention, apply_rope=apply_rope
    )


class Controlled(nn.Module):
    """Base and adapter in one module, so that one compilation covers both."""

    def __init__(self, kind: str, base: Base, lora: ConditionLora):
        super().__init__()
        self.kind, self.base, self.lora = kind, base, lora

    def forward(self, x: Tensor, t: Tensor, ids: Tensor, guidance: Tensor, condition: Tensor) -> Tensor:
        context, pooled = self.base.text(ids)
        grid = (x.shape[-2] // 2, x.shape[-1] // 2)
        extra = condition_keys(self.kind, self.base.flux, self.lora, condition, pooled, guidance, grid)
        return self.base.flux(x, t, context, pooled, guidance, extra)


def train_adapter(kind: str, base: Recipe, recipe: AdapterRecipe, stage: str = "base") -> None:
    device = loop.device_of()
    model = load_base(base, stage).to(device)
    stock = pool(kind, base, recipe)
    size = model.flux.size
    lora = ConditionLora(size.hidden, size.double, size.single, recipe.rank, operations=nn).to(device)
    lora.init_for_training(torch.Generator().manual_seed(base.seed))
    quick = loop.compiled(Controlled(kind, model, lora))

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng((base.seed, KINDS.index(kind), step))
        index = torch.from_numpy(rng.integers(stock["latents"].shape[0], size=recipe.batch))
        x0, condition = stock["latents"][index].float().to(device), stock["conditions"][index].float().to(device)
        words = stock["ids"][index].long()
        words[torch.from_numpy(rng.random(recipe.batch) < recipe.drop)] = PAD
        noise = torch.from_numpy(rng.standard_normal(tuple(x0.shape), np.float32)).to(device)
        t = loop.noise_levels(rng, recipe.batch).to(device)
        guidance = torch.ones(recipe.batch, device=device)
        v = quick(torch.lerp(x0, noise, t[:, None, None, None]), t, words.to(device), guidance, condition)
        return F.mse_loss(v.float(), noise - x0)

    loop.learn(place(kind, base, recipe, stage), lora, recipe.steps, recipe.muon_lr, loss_of)
    export_adapter(kind, base, recipe, stage)


def load_adapter(kind: str, base: Recipe, recipe: AdapterRecipe, stage: str = "base") -> ConditionLora:
    size = size_of(base)
    lora = ConditionLora(size.hidden, size.double, size.single, recipe.rank, operations=nn)
    lora.load_state_dict(torch.load(place(kind, base, recipe, stage), weights_only=True, map_location="cpu")["ema"])
    return lora.requires_grad_(False)


def export_adapter(kind: str, base: Recipe, recipe: AdapterRecipe, stage: str = "base") -> None:
    """In the published layout, so that the loader has one path for theirs and ours. It says its kind."""
    state = published_state([load_adapter(kind, base, recipe, stage)])
    about = write_metadata("subject" if kind == "subject" else "spatial")
    checkpoints.write(f"easycontrol/tiny_{kind}.safetensors", state, about)
