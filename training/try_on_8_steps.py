"""Stage `try_on_8_steps`: an ordinary LoRA on the base learns to draw what the try-on draws, in 8 steps.

MC-VTON, arXiv:2501.03630, distils its first stage into 8 steps in latent space, with low-rank weights only; its losses
are not known. Here the first stage draws with many steps and guidance, and the LoRA learns to go from node to node of
the 8-step schedule in one straight step without guidance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from . import checkpoints, data, loop
from .checkpoints import Recipe
from .embedded import Base, load_shipped
from .flux import Flux
from .try_on import TryOnRecipe, place, pool
from .try_on_model import NAME, PROMPT, Dressed, draw, levels_of, load_try_on, velocity_of

FAST = "loras/dit_toolkit_demo_try_on_8_steps.safetensors"
TEACHER = (*checkpoints.SHIPPED, NAME)  # of the 8 steps


@dataclass(frozen=True)
class FastRecipe:
    rank: int = 16
    pool: int = 512  # pictures that the teacher draws
    substeps: int = 3  # of the teacher, per step of the student
    cfg: float = 2.5  # of the teacher
    steps: int = 400
    batch: int = 48
    muon_lr: float = 4e-3
    seed: int = 2


class Adapted(nn.Module):
    """A frozen linear layer plus an ordinary LoRA."""

    def __init__(self, layer: nn.Linear, rank: int, generator: torch.Generator):
        super().__init__()
        self.layer = layer
        self.down, self.up = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, False)
        nn.init.normal_(self.down.weight, std=1 / rank, generator=generator)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


def adapt(flux: Flux, rank: int, seed: int) -> nn.ModuleDict:
    """Put a LoRA on every linear layer of the blocks, in place; returns the LoRAs by layer, dots as slashes."""
    generator, made = torch.Generator().manual_seed(seed), nn.ModuleDict()
    for name, layer in list(flux.named_modules()):
        if isinstance(layer, nn.Linear) and "blocks." in name:
            parent, _, child = name.rpartition(".")
            adapted = Adapted(layer, rank, generator)
            setattr(flux.get_submodule(parent), child, adapted)
            made[name.replace(".", "/")] = nn.ModuleDict({"down": adapted.down, "up": adapted.up})
    return made


def journeys(base: Recipe, first: TryOnRecipe, recipe: FastRecipe) -> dict[str, Tensor]:
    """The teacher's states at the nodes of the student's schedule, `[N, 9, live, h, w]`, and their conditions."""
    path = place(base, "journeys", first, recipe, files=TEACHER)
    if path.exists():
        return torch.load(path, weights_only=True)
    model, vae = load_shipped()
    loras, stock = load_try_on(model.flux.size), pool(base, first, vae)
    kept = {name: stock[name][: recipe.pool] for name in ("person", "garment")}
    levels, part, nodes = levels_of(8 * recipe.substeps), 64, []
    noise = torch.randn((recipe.pool, *kept["person"].shape[1:]), generator=torch.Generator().manual_seed(recipe.seed))
    for rows in tqdm(torch.arange(recipe.pool).split(part), desc="the teacher draws"):
        ids = torch.tensor([data.padded_ids(PROMPT)]).expand(len(rows), -1)
        x, seen = noise[rows], [noise[rows]]
        with loop.fast_matrices(torch.device("cpu")):
            person, garment = (kept[name][rows].float() for name in ("person", "garment"))
            velocity = velocity_of(model, loras, ids, person, garment, recipe.cfg)
            for start in range(0, 8 * recipe.substeps, recipe.substeps):
                x = draw(velocity, x, levels[start : start + recipe.substeps + 1]).float()
                seen.append(x)
        nodes.append(torch.stack(seen, 1).half())
    made = {**kept, "nodes": torch.cat(nodes)}
    checkpoints.save(path, made)
    return made


def train_fast(base: Recipe, first: TryOnRecipe, recipe: FastRecipe) -> None:
    """At node i the student learns the velocity (x_{i+1} - x_i) / (s_{i+1} - s_i) of the teacher's own journey."""
    device = loop.device_of()
    stock = journeys(base, first, recipe)
    model, _ = load_shipped()
    loras = load_try_on(model.flux.size)
    student = adapt(model.flux, recipe.rank, recipe.seed).to(device)
    quick = Dressed(model, loras).to(device)  # too few steps to earn a compilation
    levels = levels_of(8)
    words = torch.tensor([data.padded_ids(PROMPT)] * recipe.batch, device=device)
    guidance = torch.full((recipe.batch,), 3.5, device=device)

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng((recipe.seed, 37, step))
        row = torch.from_numpy(rng.integers(stock["nodes"].shape[0], size=recipe.batch))
        node = torch.from_numpy(rng.integers(8, size=recipe.batch))
        x, then = (stock["nodes"][row, at].float() for at in (node, node + 1))
        wanted = (then - x) / (levels[node + 1] - levels[node])[:, None, None, None]
        person, garment = (stock[name][row].float().to(device) for name in ("person", "garment"))
        v = quick(x.to(device), levels[node].to(device), words, guidance, person, garment)
        return F.mse_loss(v.float(), wanted.to(device))

    path = place(base, "8-steps", first, recipe, files=TEACHER)
    student.load_state_dict(loop.learn(path, student, recipe.steps, recipe.muon_lr, loss_of))
    export_fast(student)


def export_fast(student: nn.ModuleDict) -> None:
    """In the plain layout that every LoRA loader reads: the model's own layer names behind `diffusion_model`."""
    state = {}
    for name, low in student.items():
        key = f"diffusion_model.{name.replace('/', '.')}"
        state[f"{key}.lora_A.weight"], state[f"{key}.lora_B.weight"] = (low[end].weight for end in ("down", "up"))
    checkpoints.write(FAST, state, {})


def with_fast(model: Base) -> Base:
    """The base with the shipped 8-step LoRA merged, as ComfyUI's loader merges it. Changes `model`."""
    state = load_file(checkpoints.WEIGHTS / FAST)
    for key in (key for key in state if key.endswith(".lora_A.weight")):
        layer = key.removeprefix("diffusion_model.").removesuffix(".lora_A.weight")
        weight = model.flux.get_submodule(layer).weight
        weight.data += state[key.replace("lora_A", "lora_B")].float() @ state[key].float()
    return model
