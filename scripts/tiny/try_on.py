"""Train the try-on LoRAs of the embedded default, and measure them: `python -m scripts.tiny.try_on`.

Stage `try_on`: the frozen base draws a doll in garment G from two pictures, the doll in another shirt with the shirt
masked, and G laid flat. Both are condition tokens, encoded by the very function that the node runs; only the two branch
LoRAs learn (`models/control/mc_vton.py`).

Stage `try_on_8_steps`: MC-VTON, arXiv:2501.03630, distils its first stage into 8 steps in latent space, with low-rank
weights only; its losses are not known. Here the first stage draws with many steps and guidance, and an ordinary LoRA on
the base learns to go from node to node of the 8-step schedule in one straight step without guidance.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dit_toolkit.models.control.conditions import KeysValues, encode_condition
from dit_toolkit.models.control.mc_vton import BranchLora, layers
from dit_toolkit.models.control.mc_vton_keys import BRANCHES, Checkpoint, Settings, parse, write, write_metadata
from dit_toolkit.models.control.positions import beside_ids, spatial_ids
from dit_toolkit.models.tiny_text import PAD

from . import data, train, world
from .flux import Flux, apply_rope, attention, patchify, rope
from .optim import Muon, schedule
from .score import agreement, pose_of, read_doll, score, silhouette_agreement

SIDE = 96
GREY = 127  # of the masked shirt
PROMPT = "a doll"
NAME, FAST = "try_on/tiny_try_on.safetensors", "loras/dit_toolkit_demo_try_on_8_steps.safetensors"
TEACHER = (*train.SHIPPED, NAME)  # of the 8 steps
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


# --------------------------------------------------------------------------------------------------------- pictures


def masked(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture with grey where the mask is set, `[H, W, 3]` uint8."""
    return np.where(mask[..., None] > 127, np.uint8(GREY), picture)


def widened(shirt: np.ndarray, pixels: int, box: bool = False) -> np.ndarray:
    """The mask grown by `pixels` all around, or its bounding box grown so; uint8 0 or 255."""
    if box and shirt.any():
        x, y, w, h = cv2.boundingRect(shirt)
        shirt = np.zeros_like(shirt)
        shirt[y : y + h, x : x + w] = 255
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * pixels + 1,) * 2)
    return cv2.dilate(shirt, kernel) if pixels else shirt


def redressed(scene: world.Scene, rng: np.random.Generator) -> world.Scene:
    """The same scene with another shirt on the doll."""
    doll = scene.things[0]
    colour = rng.choice([c for c in world.COLOURS if c != doll.colour])
    other = replace(doll, colour=str(colour), pattern=str(rng.choice(world.PATTERNS)))
    return replace(scene, things=(other, *scene.things[1:]))


@cache
def flat(colour: str, pattern: str, size: int) -> np.ndarray:
    """The shirt alone on white. All dolls' shirts have one cut."""
    return world.garment_flat(world.Thing("doll", 0.5, 0.5, 0.9, colour, pattern), size)


def jittered(garment: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The flat garment a little larger or smaller, and not quite centred, on white."""
    size, zoom = garment.shape[0], rng.uniform(0.75, 1.05)
    x, y = size / 2 * (1 - zoom) + rng.uniform(-0.05, 0.05, 2) * size
    where = np.array([[zoom, 0, x], [0, zoom, y]], np.float32)
    return cv2.warpAffine(garment, where, (size, size), flags=cv2.INTER_LINEAR, borderValue=world.WHITE)


@dataclass(frozen=True)
class Fitting:
    """One example: `shown` is to come out of `person` and `garment`; all `[H, W, 3]`. `mask` is the agnostic one."""

    shown: np.ndarray
    person: np.ndarray
    garment: np.ndarray
    mask: np.ndarray


def training_fitting(scene: world.Scene, size: int, rng: np.random.Generator) -> Fitting:
    """Masks as people bring them: mostly generous, some boxes, some so tight or shifted that the old shirt shows."""
    picture, roll = world.render(scene, size), rng.random()
    shirt = world.garment_mask(picture, 1)
    tight = roll < 0.1
    if tight:
        shift = rng.integers(-2, 3, 2) * size // 96
        mask = np.roll(widened(shirt, int(rng.integers(2)) * size // 96), shift, (0, 1))
    else:
        mask = widened(shirt, int(rng.integers(2, 7)) * size // 96, box=roll < 0.25)
    before = world.render(redressed(scene, rng), size) if tight else picture  # else the mask hides all that differs
    garment = flat(scene.things[0].colour, scene.things[0].pattern, size)
    garment = garment if rng.random() < 0.3 else jittered(garment, rng)
    return Fitting(picture.image, masked(before.image, mask), garment, mask)


def user_fitting(scene: world.Scene, rng: np.random.Generator, size: int = SIDE, grow: int = 3) -> Fitting:
    """As a user does it: the doll in another shirt, that shirt's mask grown by `grow` pixels, the flat garment."""
    before = world.render(redressed(scene, rng), size)
    mask = widened(world.garment_mask(before, 1), grow)
    doll = scene.things[0]
    garment = flat(doll.colour, doll.pattern, size)
    return Fitting(world.render(scene, size).image, masked(before.image, mask), garment, mask)


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


def pool(base: train.Recipe, recipe: TryOnRecipe, vae) -> dict[str, Tensor]:
    """Latents of the wanted pictures, persons and garments, weight of the loss, word ids."""
    path = place(base, "pool", recipe, files=train.SHIPPED[-1:])  # in the terms of the autoencoder
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
    train.save(path, made)
    return made


def place(
    base: train.Recipe, what: str, *recipes: TryOnRecipe | FastRecipe, files: Sequence[str] = train.SHIPPED
) -> Path:
    """Where a stage keeps what it makes. With other recipes, or other weights in `files`, it never meets it again.

    Args:
        files: of `weights/`, on which the stage trains.
    """
    made_from = train.contents(*(train.WEIGHTS / name for name in files))
    return train.work(base) / f"try-on-{what}-{train.digest(*recipes, made_from)}.pt"


# ----------------------------------------------------------------------------------------------------------- models


class Branches(nn.ModuleDict):
    """The two LoRAs by name."""

    def __init__(self, size, ranks: dict[str, dict[str, int]]):
        made = {
            name: BranchLora(size.hidden, size.double, size.single, ranks.get(name, {}), operations=nn)
            for name in BRANCHES
        }
        super().__init__(made)


def new_branches(size, rank: int, seed: int) -> Branches:
    """Both on all layers that matter, as training starts: the last block gives keys and values only."""
    last = f"single_blocks.{size.single - 1}."
    names = [n for n in layers(size.double, size.single) if not n.startswith(last) or n[-2:] in (".k", ".v")]
    names.append(f"{last}mod")
    loras = Branches(size, dict.fromkeys(BRANCHES, dict.fromkeys(names, rank)))
    for number, name in enumerate(BRANCHES):
        loras[name].init_for_training(torch.Generator().manual_seed(seed + number))
    return loras


def condition_keys(
    flux: Flux, loras: nn.ModuleDict, person: Tensor, garment: Tensor, pooled: Tensor, guidance: Tensor
) -> list[KeysValues]:
    """Keys and values of every block, the person's tokens and then the garment's.

    Args:
        person, garment: latents `[B, live, h, w]`; the person's is as large as the picture's.
    """
    grid = (person.shape[-2] // 2, person.shape[-1] // 2)
    vec = flux.vec(torch.zeros_like(guidance), guidance, pooled)
    kept = []
    for name, latent, place_of in (("person", person, spatial_ids), ("garment", garment, beside_ids)):
        own = (latent.shape[-2] // 2, latent.shape[-1] // 2)
        pe = rope(place_of(own, grid, latent.device)[None])
        tokens = patchify(latent)
        kept.append(encode_condition(flux, loras[name], tokens, vec, pe, attention=attention, apply_rope=apply_rope))
    return [(torch.cat((k1, k2), 2), torch.cat((v1, v2), 2)) for (k1, v1), (k2, v2) in zip(*kept, strict=True)]


class Dressed(nn.Module):
    """Base and LoRAs in one module, so that one compilation covers both."""

    def __init__(self, base: train.Base, loras: nn.ModuleDict):
        super().__init__()
        self.base, self.loras = base, loras

    def forward(self, x: Tensor, t: Tensor, ids: Tensor, guidance: Tensor, person: Tensor, garment: Tensor) -> Tensor:
        context, pooled = self.base.text(ids)
        extra = condition_keys(self.base.flux, self.loras, person, garment, pooled, guidance)
        return self.base.flux(x, t, context, pooled, guidance, extra)


def levels_of(steps: int) -> Tensor:
    """Noise levels of ComfyUI's `simple` schedule with Flux's shift 1.15, `[steps + 1]`, from 1 to 0."""
    t, shift = 1 - torch.arange(steps + 1) / steps, math.exp(1.15)
    return torch.where(t > 0, shift / (shift + (1 / t.clamp(min=1e-9) - 1)), torch.zeros(()))


Velocity = Callable[[Tensor, Tensor], Tensor]  # x, noise level [B] -> like x


@torch.no_grad()
def velocity_of(
    model: train.Base, loras: nn.ModuleDict | None, ids: Tensor, person: Tensor, garment: Tensor, cfg: float
) -> Velocity:
    """The model with both conditions in place, and guidance. `loras` None: without conditions."""
    strength = torch.full((ids.shape[0],), 3.5)
    rows = []
    for words in (ids,) if cfg == 1.0 else (ids, torch.full_like(ids, PAD)):
        context, pooled = model.text(words)
        extra = None if loras is None else condition_keys(model.flux, loras, person, garment, pooled, strength)
        rows.append((context, pooled, extra))

    def velocity(x: Tensor, level: Tensor) -> Tensor:
        found = [model.flux(x, level, context, pooled, strength, extra) for context, pooled, extra in rows]
        return found[0] if len(found) == 1 else found[1] + cfg * (found[0] - found[1])

    return velocity


@torch.no_grad()
def draw(velocity: Velocity, noise: Tensor, levels: Tensor) -> Tensor:
    """Euler from the first level to the last. Live latents `[B, live, h, w]`."""
    x = noise
    for now, then in pairwise(levels):
        x = x + (then - now) * velocity(x, now.expand(x.shape[0]))
    return x


# --------------------------------------------------------------------------------------------------------- training


def learn(name: Path, module: nn.Module, steps: int, lr: float, loss_of: Callable[[int], Tensor]) -> dict[str, Tensor]:
    """Muon on the matrices of `module`; returns the average of its weights. Goes on where it was stopped."""
    device = train.device_of()
    optimiser = Muon(module.parameters(), lr=lr, weight_decay=0.0)
    average = {k: v.detach().clone() for k, v in module.state_dict().items()}
    start, losses = 0, []
    if name.exists():
        kept = torch.load(name, weights_only=True, map_location=device)
        module.load_state_dict(kept["model"])
        optimiser.load_state_dict(kept["optimiser"])
        average, start, losses = kept["ema"], kept["step"], kept["losses"]
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name.stem, mininterval=5)
    for step in bar:
        with train.fast_matrices(device):
            loss = loss_of(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = lr * schedule(step, steps, warm_up=30)
        with train.fast_matrices(device):
            optimiser.step()
        decay = min(0.995, (step + 1) / (step + 10))
        for key, value in module.state_dict().items():
            average[key].lerp_(value, 1 - decay)
        losses.append(loss.item())
        bar.set_postfix(loss=f"{np.mean(losses[-100:]):.4f}", refresh=False)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            state = {"model": module.state_dict(), "ema": average, "optimiser": optimiser.state_dict()}
            train.save(name, {**state, "step": step + 1, "losses": losses})
            train.plot(name.with_suffix(".png"), losses)
    return average


def train_try_on(base: train.Recipe, recipe: TryOnRecipe) -> None:
    device = train.device_of()
    model, vae = train.load_shipped()
    stock = pool(base, recipe, vae)
    model.to(device)
    loras = new_branches(model.flux.size, recipe.rank, recipe.seed).to(device)
    quick = torch.compile(Dressed(model, loras))

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng((recipe.seed, 31, step))
        index = torch.from_numpy(rng.integers(stock["ids"].shape[0], size=recipe.batch))
        x0, person, garment, weight = (
            stock[n][index].float().to(device) for n in ("shown", "person", "garment", "weight")
        )
        noise = torch.from_numpy(rng.standard_normal(tuple(x0.shape), np.float32)).to(device)
        t = train.noise_levels(rng, recipe.batch).to(device)
        x = torch.lerp(x0, noise, t[:, None, None, None])
        guidance = torch.from_numpy(rng.uniform(1, 5, recipe.batch).astype(np.float32)).to(device)
        v = quick(x, t, stock["ids"][index].long().to(device), guidance, person, garment)
        return (weight * (v.float() - (noise - x0)).square()).mean() / weight.mean()

    loras.load_state_dict(learn(place(base, "lora", recipe), loras, recipe.steps, recipe.muon_lr, loss_of))
    export_try_on(loras, model.flux.size)


def export_try_on(loras: nn.ModuleDict, size) -> None:
    branches = {name: loras[name].cpu().branch() for name in BRANCHES}
    made = Checkpoint(branches, size.hidden, 4 * size.hidden, size.double, size.single, Settings(prompt=PROMPT))
    train.write(NAME, write(made), write_metadata(made))


def load_try_on(size) -> Branches:
    """The shipped LoRAs in float32."""
    path = train.WEIGHTS / NAME
    made = parse(load_file(path), path.name)
    loras = Branches(size, {name: branch.ranks for name, branch in made.branches.items()})
    for name, branch in made.branches.items():
        loras[name].load_state_dict({k: v.float() for k, v in branch.weights.items()})
    return loras.requires_grad_(False)


# ----------------------------------------------------------------------------------------------------- eight steps


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


def journeys(base: train.Recipe, first: TryOnRecipe, recipe: FastRecipe) -> dict[str, Tensor]:
    """The teacher's states at the nodes of the student's schedule, `[N, 9, live, h, w]`, and their conditions."""
    path = place(base, "journeys", first, recipe, files=TEACHER)
    if path.exists():
        return torch.load(path, weights_only=True)
    model, vae = train.load_shipped()
    loras, stock = load_try_on(model.flux.size), pool(base, first, vae)
    kept = {name: stock[name][: recipe.pool] for name in ("person", "garment")}
    levels, part, nodes = levels_of(8 * recipe.substeps), 64, []
    noise = torch.randn((recipe.pool, *kept["person"].shape[1:]), generator=torch.Generator().manual_seed(recipe.seed))
    for rows in tqdm(torch.arange(recipe.pool).split(part), desc="the teacher draws"):
        ids = torch.tensor([data.padded_ids(PROMPT)]).expand(len(rows), -1)
        x, seen = noise[rows], [noise[rows]]
        with train.fast_matrices(torch.device("cpu")):
            person, garment = (kept[name][rows].float() for name in ("person", "garment"))
            velocity = velocity_of(model, loras, ids, person, garment, recipe.cfg)
            for start in range(0, 8 * recipe.substeps, recipe.substeps):
                x = draw(velocity, x, levels[start : start + recipe.substeps + 1]).float()
                seen.append(x)
        nodes.append(torch.stack(seen, 1).half())
    made = {**kept, "nodes": torch.cat(nodes)}
    train.save(path, made)
    return made


def train_fast(base: train.Recipe, first: TryOnRecipe, recipe: FastRecipe) -> None:
    """At node i the student learns the velocity (x_{i+1} - x_i) / (s_{i+1} - s_i) of the teacher's own journey."""
    device = train.device_of()
    stock = journeys(base, first, recipe)
    model, _ = train.load_shipped()
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
    student.load_state_dict(learn(path, student, recipe.steps, recipe.muon_lr, loss_of))
    export_fast(student)


def export_fast(student: nn.ModuleDict) -> None:
    """In the plain layout that every LoRA loader reads: the model's own layer names behind `diffusion_model`."""
    state = {}
    for name, low in student.items():
        key = f"diffusion_model.{name.replace('/', '.')}"
        state[f"{key}.lora_A.weight"], state[f"{key}.lora_B.weight"] = (low[end].weight for end in ("down", "up"))
    train.write(FAST, state, {})


def with_fast(model: train.Base) -> train.Base:
    """The base with the shipped 8-step LoRA merged, as ComfyUI's loader merges it. Changes `model`."""
    state = load_file(train.WEIGHTS / FAST)
    for key in (key for key in state if key.endswith(".lora_A.weight")):
        layer = key.removeprefix("diffusion_model.").removesuffix(".lora_A.weight")
        weight = model.flux.get_submodule(layer).weight
        weight.data += state[key.replace("lora_A", "lora_B")].float() @ state[key].float()
    return model


# -------------------------------------------------------------------------------------------------------- measuring


def worn(image: np.ndarray, scene: world.Scene) -> dict[str, bool]:
    """What of the scene's doll a picture shows, RGB uint8 `[S, S, 3]`: `garment` is the shirt's colour and pattern."""
    doll, seen = scene.things[0], read_doll(image)
    same = agreement(seen, doll)
    found = {"garment": same["shirt"] and same["pattern"], "colour": same["shirt"], "pattern": same["pattern"]}
    found["pose"] = seen is not None and pose_of(seen.arms) == pose_of(doll.arms)
    found |= {"hair": same["hair"], "trousers or skirt": same["bottom"] and same["garment"], "skin": same["skin"]}
    return found


def likeness(image: np.ndarray, wanted: np.ndarray, where: np.ndarray) -> float:
    """PSNR in dB of `[S, S, 3]` uint8 pictures over the pixels `where`, `[S, S]` bool."""
    away = (image.astype(np.float64) - wanted)[where]
    return float(10 * np.log10(255**2 / max(np.square(away).mean(), 1e-9)))


def tally(images: np.ndarray, scenes: list[world.Scene], fittings: list[Fitting]) -> dict[str, float]:
    """Shares of pictures that are right, and means."""
    lines: list[dict[str, float]] = []
    for image, scene, fitting in zip(images, scenes, fittings, strict=True):
        whole = score(image, scene)
        line = {**worn(image, scene), "ground and things": whole.ground and whole.objects}
        line["silhouette IoU"] = silhouette_agreement(image, scene)
        hidden = fitting.mask > 0
        line["outside the mask, dB"] = likeness(image, fitting.person, ~hidden)
        line["under the mask, dB"] = likeness(image, fitting.shown, hidden)
        lines.append(line)
    return {name: round(float(np.mean([line[name] for line in lines])), 3) for name in lines[0]}


def held_out(count: int, seed: int = 8) -> tuple[list[world.Scene], list[Fitting]]:
    stream, rng = world.scenes(seed, LEVELS, test=True), np.random.default_rng(seed)
    scenes = [next(stream) for _ in range(count)]
    return scenes, [user_fitting(scene, rng) for scene in scenes]


def pictures(vae, latents: Tensor) -> np.ndarray:
    """Live latents -> uint8 RGB `[N, H, W, 3]`."""
    with torch.no_grad():
        shown = vae.decode_live(latents)
    return ((shown.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(1, -1).numpy()


def wear(
    model: train.Base, vae, loras: nn.ModuleDict | None, persons: np.ndarray, garments: np.ndarray, seed: int = 1,
    steps: int = 20, cfg: float = 2.5,
) -> np.ndarray:  # fmt: skip
    """Pictures of the persons in the garments, `[N, H, W, 3]` uint8 each. `loras` None: from the words alone."""
    person, garment = data.encode(vae, persons), data.encode(vae, garments)
    ids = torch.tensor([data.padded_ids(PROMPT)]).expand(len(persons), -1)
    noise = torch.randn(person.shape, generator=torch.Generator().manual_seed(seed))
    velocity = velocity_of(model, loras, ids, person, garment, cfg)
    return pictures(vae, draw(velocity, noise, levels_of(steps)))


def measure(count: int = 32) -> dict[str, dict[str, float]]:
    """All figures of the model card, on held-out scenes with the same seeds."""
    model, vae = train.load_shipped()
    size = model.flux.size
    loras = load_try_on(size)
    scenes, fittings = held_out(count)
    persons, garments = (np.stack([getattr(f, name) for f in fittings]) for name in ("person", "garment"))
    swapped = np.roll(garments, 1, 0)
    as_swapped = [
        replace(s, things=(replace(s.things[0], colour=o.things[0].colour, pattern=o.things[0].pattern), *s.things[1:]))
        for s, o in zip(scenes, scenes[-1:] + scenes[:-1], strict=True)
    ]

    whole = np.ones((SIDE, SIDE), bool)
    teacher = wear(model, vae, loras, persons, garments, steps=24)  # as `journeys` draws

    def line(loras, garments=garments, judged=scenes, **options) -> dict[str, float]:
        images = wear(model, vae, loras, persons, garments, **options)
        like = [likeness(image, other, whole) for image, other in zip(images, teacher, strict=True)]
        return {**tally(images, judged, fittings), "to 24 steps, dB": round(float(np.mean(like)), 3)}

    shown = np.stack([fitting.shown for fitting in fittings])
    found = {
        "world's own pictures": tally(shown, scenes, fittings),
        "after the autoencoder": tally(pictures(vae, data.encode(vae, shown)), scenes, fittings),
        "20 steps": line(loras),
        "20 steps, cfg 1": line(loras, cfg=1.0),
        "without": line(None),
        "somebody else's garment": line(loras, swapped),
        "the same, judged by that garment": line(loras, swapped, as_swapped),
        "untrained LoRA": line(new_branches(size, 4, 0).requires_grad_(False)),
        "8 steps": line(loras, steps=8),
        **{f"{steps} steps, cfg 1": line(loras, steps=steps, cfg=1.0) for steps in (8, 4, 2)},
    }
    if (train.WEIGHTS / FAST).exists():
        model = with_fast(model)
        found["8 steps, cfg 1, 8-step LoRA"] = line(loras, steps=8, cfg=1.0)
        found["4 steps, cfg 1, 8-step LoRA"] = line(loras, steps=4, cfg=1.0)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=32)
    print(json.dumps(measure(parser.parse_args().count), indent=1))


if __name__ == "__main__":
    main()
