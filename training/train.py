"""Stages of the embedded default: autoencoder, then transformer and text encoder. `python -m training` runs them.

Every stage can be stopped and started again and continues at its last checkpoint; the same seed and thread count give
the same weights. Checkpoints and plots: `.training/`; results: `weights/`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dit_toolkit.models.tiny_text import PAD, SLOTS, VOCABULARY, TinyTextEncoder
from dit_toolkit.models.tiny_vae import PATCH, TinyVAE, fit_components

from . import data, world
from .flux import Flux, Size, export, trim
from .optim import optimisers, schedule
from .pictures import to_unit, training_picture

ROOT = Path(__file__).resolve().parents[1]
WORK, WEIGHTS = ROOT / ".training", ROOT / "weights"
SHIPPED = ("tiny_flux.safetensors", "tiny_text_encoder.safetensors", "tiny_vae.safetensors")  # what LoRAs train on
WIDTHS = (96, 48, 32)
LEVELS = (1.0, 1.2, 2.2, 1.6)  # how often each difficulty of the world comes


@dataclass(frozen=True)
class Recipe:
    """What decides the weights, apart from the code."""

    pixels: int = 96
    live: int = 8
    seed: int = 1
    pool: int = 120_000
    batch: int = 64
    vae_steps: int = 2_400
    base_steps: int = 3_900
    lr: float = 1.5e-3
    muon_lr: float = 0.015
    ema: float = 0.998
    drop: float = 0.08  # captions left empty, for classifier-free guidance
    brief: float = 0.25  # captions that leave things unsaid, as people's do


def digest(*parts) -> str:
    """A short name for a recipe: other values, another name."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:8]


def contents(*paths: Path) -> str:
    """A short name for what files hold: other weights, another name."""
    return digest(*(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths))


def work(recipe: Recipe) -> Path:
    """Where the checkpoints of `recipe` are kept. Another recipe, or another world, never meets them."""
    return WORK / digest(world.VERSION, recipe)


def device_of() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fast_matrices(device: torch.device) -> torch.autocast:
    """bfloat16 matrix products where the processor has them (12 times float32 on AMX), else plain float32."""
    with_amx = "amx_bf16" in Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else False
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" or with_amx)


def save(path: Path, state: dict) -> None:
    """Written beside, then moved: a stopped run leaves the earlier checkpoint whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def write(name: str, weights: dict[str, Tensor], metadata: dict[str, str]) -> Path:
    """float16 safetensors in `weights/`, keys sorted: the same weights give the same file. Anyone may read it."""
    path = WEIGHTS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    half = {key: value.detach().half().contiguous().cpu() for key, value in sorted(weights.items())}
    save_file(half, path, {"format": "pt", **metadata})
    path.chmod(0o644)  # safetensors leaves it to its owner alone
    return path


def plot(file: Path, losses: list[float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if len(losses) < 20:
        return
    window = max(1, len(losses) // 200)
    smooth = np.convolve(losses, np.ones(window) / window, "valid")
    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    axes.plot(np.arange(len(smooth)) + window, smooth)
    axes.set(xlabel="step", ylabel="loss", yscale="log", title=file.stem)
    figure.tight_layout()
    figure.savefig(file, dpi=90)
    pyplot.close(figure)


# ------------------------------------------------------------------------------------------------------ autoencoder


def _pictures(recipe: Recipe, seed: int, count: int) -> np.ndarray:
    rng, stream = np.random.default_rng(seed), world.scenes(seed, (*LEVELS, 0.5))
    return np.stack([training_picture(next(stream), recipe.pixels, rng) for _ in range(count)])


def load_vae(recipe: Recipe) -> TinyVAE:
    """The autoencoder with its components; they are fitted on the first call (seconds) and then fixed."""
    vae = TinyVAE(recipe.live, WIDTHS, operations=nn)
    path = work(recipe) / "components.pt"
    if not path.exists():
        x = torch.from_numpy(to_unit(_pictures(recipe, recipe.seed, 3_000)))
        patches = (
            x.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, PATCH, PATCH)
        )
        save(path, fit_components(patches, recipe.live))
    parts = torch.load(path, weights_only=True)
    vae.load_state_dict({k: v for k, v in parts.items() if k.startswith("patch_")}, strict=False)
    decoder = work(recipe) / "vae.pt"
    if decoder.exists():
        vae.load_state_dict(torch.load(decoder, weights_only=True)["ema"])
    return vae.requires_grad_(False)


def train_vae(recipe: Recipe) -> None:
    """The decoder's residual; latent noise up to 0.3 makes it forgive the transformer's errors."""
    device, batch = device_of(), 24
    torch.manual_seed(recipe.seed)
    vae = load_vae(recipe).to(device)
    vae.decoder.requires_grad_(True)
    nn.init.zeros_(vae.decoder.conv_out.weight)
    nn.init.zeros_(vae.decoder.conv_out.bias)
    average = copy.deepcopy(vae)
    optimiser = torch.optim.AdamW(vae.decoder.parameters(), lr=2e-3, weight_decay=0.01)
    path, start, losses = work(recipe) / "vae.pt", 0, []
    if path.exists():
        kept = torch.load(path, weights_only=True, map_location=device)
        vae.load_state_dict(kept["model"])
        average.load_state_dict(kept["ema"])
        optimiser.load_state_dict(kept["optimiser"])
        start, losses = kept["step"], kept["losses"]
    stock: np.ndarray | None = None
    bar = tqdm(range(start, recipe.vae_steps), initial=start, total=recipe.vae_steps, desc="vae")
    for step in bar:
        if stock is None or step % 200 == 0:
            stock = _pictures(recipe, 7_000_000 + recipe.seed * 10_000 + step // 200, 200 * batch // 4)
        rng = np.random.default_rng((recipe.seed, step))
        x = torch.from_numpy(to_unit(stock[rng.integers(len(stock), size=batch)])).to(device)
        z = vae.patch_in(x)
        noise = torch.from_numpy(rng.random((batch, 1, 1, 1), np.float32) * 0.3).to(device)
        noise[: batch // 4] = 0
        z = z + noise * torch.from_numpy(rng.standard_normal(tuple(z.shape), np.float32)).to(device)
        out = vae.decode_live(z)
        loss = F.mse_loss(out, x) + 0.1 * F.l1_loss(out, x)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.decoder.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * schedule(step, recipe.vae_steps, flat=0.2)
        optimiser.step()
        decay = min(0.998, (step + 1) / (step + 10))
        for a, b in zip(average.decoder.parameters(), vae.decoder.parameters(), strict=True):
            a.data.lerp_(b.data, 1 - decay)
        losses.append(loss.item())
        bar.set_postfix(loss=f"{np.mean(losses[-50:]):.4f}")
        if (step + 1) % 300 == 0 or step + 1 == recipe.vae_steps:
            state = {"model": vae.state_dict(), "ema": average.state_dict(), "optimiser": optimiser.state_dict()}
            save(path, {**state, "step": step + 1, "losses": losses})
            plot(path.with_suffix(".png"), losses)
    export_vae(recipe)


def export_vae(recipe: Recipe) -> None:
    config = {"live": recipe.live, "widths": WIDTHS}
    write("tiny_vae.safetensors", load_vae(recipe).state_dict(), {"dit_toolkit": json.dumps({"tiny_vae": config})})


# ------------------------------------------------------------------------------------------------------ transformer


def noise_levels(rng: np.random.Generator, batch: int) -> Tensor:
    """Noise levels in 0..1: logit-normal(0, 1) shifted by e^0.6, and 15 % uniform."""
    t = 1 / (1 + np.exp(-rng.standard_normal(batch)))
    t = math.exp(0.6) * t / (1 + (math.exp(0.6) - 1) * t)
    t = np.where(rng.random(batch) < 0.15, rng.random(batch), t)
    return torch.from_numpy(np.clip(t, 1e-3, 1.0).astype(np.float32))


class Base(nn.Module):
    """Transformer and text encoder, trained together."""

    def __init__(self, size: Size):
        super().__init__()
        self.flux = Flux(size)
        self.text = TinyTextEncoder(size.text_dim, size.pooled_dim, operations=nn)
        for name in ("words", "places"):
            nn.init.normal_(getattr(self.text, name).weight, std=0.3)

    def forward(self, x: Tensor, t: Tensor, ids: Tensor, guidance: Tensor, extra=None) -> Tensor:
        return self.flux(x, t, *self.text(ids), guidance, extra)


def size_of(recipe: Recipe) -> Size:
    return Size(live=recipe.live)


_NOUNS = frozenset(VOCABULARY.index(word) for word in ("hair", "shirt", "trousers", "skirt", "ground"))
_ADJECTIVES = frozenset(
    VOCABULARY.index(word) for word in (*world.COLOURS, *world.HAIR, *world.GROUNDS, *world.PATTERNS, *world.HAIRSTYLES)
)


def brief(ids: list[int], rng: np.random.Generator) -> list[int]:
    """The caption without some of what it says of hair, garments and ground. What is shown stays named."""
    said: list[int] = []
    for word in ids:
        if word in _NOUNS and rng.random() < 0.45:
            while said and said[-1] in _ADJECTIVES:
                said.pop()
        elif word != PAD:
            said.append(word)
    return said + [PAD] * (len(ids) - len(said))


_KINDS = torch.tensor([VOCABULARY.index(kind) for kind in world.OBJECTS])
SHARES = (0.46, 0.32, 0.22)  # of a batch: objects alone, dolls with an object, dolls alone. Shapes are the hardest.


def groups_of(ids: Tensor) -> list[np.ndarray]:
    """Rows of the pool with objects alone, dolls with an object, dolls alone."""
    doll = (ids == VOCABULARY.index("doll")).any(1)
    toy = torch.isin(ids.long(), _KINDS).any(1)
    return [torch.nonzero(rows)[:, 0].numpy() for rows in (~doll, doll & toy, doll & ~toy)]


def batch_of(recipe: Recipe, latents: Tensor, ids: Tensor, groups: list[np.ndarray], step: int, device) -> tuple:
    """The same step gives the same batch, whenever it runs."""
    rng = np.random.default_rng((recipe.seed, 11, step))
    index = torch.from_numpy(np.array([rng.choice(groups[k]) for k in rng.choice(3, recipe.batch, p=SHARES)]))
    x0, words = latents[index].float(), ids[index].long()
    for row in np.flatnonzero(rng.random(recipe.batch) < recipe.brief):
        words[row] = torch.tensor(brief(words[row].tolist(), rng))
    words[torch.from_numpy(rng.random(recipe.batch) < recipe.drop)] = PAD
    noise = torch.from_numpy(rng.standard_normal(tuple(x0.shape), np.float32))
    guidance = torch.from_numpy(rng.uniform(1.0, 5.0, recipe.batch).astype(np.float32))
    return tuple(part.to(device) for part in (x0, noise, noise_levels(rng, recipe.batch), words, guidance))


def run_stage(name: str, recipe: Recipe, steps: int, model: Base, loss_of, every: int = 300) -> Base:
    """The training loop both transformer stages share. `loss_of(model, step)` -> loss. Returns the average."""
    device = device_of()
    model.to(device)
    quick = torch.compile(model)  # minutes to compile, then twice as fast
    average = copy.deepcopy(model).requires_grad_(False)
    optims = optimisers(model.flux, model.text, recipe.lr, recipe.muon_lr)
    path, start, losses = work(recipe) / f"{name}.pt", 0, []
    if path.exists():
        kept = torch.load(path, weights_only=True, map_location=device)
        model.load_state_dict(kept["model"])
        average.load_state_dict(kept["ema"])
        for optim, state in zip(optims, kept["optimisers"], strict=True):
            optim.load_state_dict(state)
        start, losses = kept["step"], kept["losses"]
    rates = [[recipe.muon_lr], [recipe.lr]]
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=5)
    for step in bar:
        with fast_matrices(device):
            loss = loss_of(quick, step)
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = schedule(step, steps)
        for optim, base in zip(optims, rates, strict=True):
            for group, rate in zip(optim.param_groups, base, strict=True):
                group["lr"] = rate * factor
            with fast_matrices(device):
                optim.step()
        decay = min(recipe.ema, (step + 1) / (step + 10))
        for a, b in zip(average.parameters(), model.parameters(), strict=True):
            a.data.lerp_(b.data, 1 - decay)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise RuntimeError(
                f"{name}: the loss is {losses[-1]} at step {step}. Delete {path.name} and lower the rate."
            )
        bar.set_postfix(loss=f"{np.mean(losses[-100:]):.4f}", refresh=False)
        if (step + 1) % every == 0 or step + 1 == steps:
            state = {"model": model.state_dict(), "ema": average.state_dict()}
            state["optimisers"] = [optim.state_dict() for optim in optims]
            save(path, {**state, "step": step + 1, "losses": losses})
            plot(path.with_suffix(".png"), losses)
    return average


def pool_of(recipe: Recipe, workers: int) -> tuple[Tensor, Tensor]:
    return data.latent_pool(
        work(recipe) / "pool.pt", load_vae(recipe), recipe.pool, recipe.pixels, LEVELS, recipe.seed, workers
    )


def train_base(recipe: Recipe, workers: int) -> None:
    device = device_of()
    latents, ids = pool_of(recipe, workers)
    groups = groups_of(ids)
    torch.manual_seed(recipe.seed)

    def loss_of(model: Base, step: int) -> Tensor:
        x0, noise, t, words, guidance = batch_of(recipe, latents, ids, groups, step, device)
        x = torch.lerp(x0, noise, t[:, None, None, None])
        return F.mse_loss(model(x, t, words, guidance).float(), noise - x0)

    export_base(run_stage("base", recipe, recipe.base_steps, Base(size_of(recipe)), loss_of), recipe, "base")


def load_base(recipe: Recipe, stage: str) -> Base:
    model = Base(size_of(recipe))
    model.load_state_dict(torch.load(work(recipe) / f"{stage}.pt", weights_only=True, map_location="cpu")["ema"])
    return model.requires_grad_(False).eval()


def export_base(model: Base, recipe: Recipe, stage: str) -> None:
    size = model.flux.size
    about = {"stage": stage, "recipe": asdict(recipe), "size": size.asdict()}
    note = {"dit_toolkit": json.dumps(about)}
    write("tiny_flux.safetensors", export(model.flux.state_dict(), size.live), note)
    config = {"tiny_text": {"dim": size.text_dim, "pooled_dim": size.pooled_dim, "slots": SLOTS}}
    write("tiny_text_encoder.safetensors", model.text.state_dict(), {"dit_toolkit": json.dumps(config)})


def load_shipped() -> tuple[Base, TinyVAE]:
    """The weights in `weights/`, as plain torch modules in float32."""
    vae_weights = load_file(WEIGHTS / "tiny_vae.safetensors")
    live = vae_weights["patch_in.weight"].shape[0]
    vae = TinyVAE(live, WIDTHS, operations=nn)
    vae.load_state_dict({k: v.float() for k, v in vae_weights.items()})
    model = Base(Size(live=live))
    flux = {k: v.float() for k, v in load_file(WEIGHTS / "tiny_flux.safetensors").items()}
    model.flux.load_state_dict(trim(flux, live))
    model.text.load_state_dict({k: v.float() for k, v in load_file(WEIGHTS / "tiny_text_encoder.safetensors").items()})
    return model.requires_grad_(False).eval(), vae.requires_grad_(False).eval()


@torch.no_grad()
def sample(
    model: Base, ids: Tensor, shape: tuple[int, int], seed: int, steps: int = 20, guidance: float = 3.5,
    cfg: float = 1.0, extra=None,
) -> Tensor:  # fmt: skip
    """Euler sampling on ComfyUI's `simple` schedule with Flux's shift 1.15. Live latents `[B, live, h, w]`."""
    b, live = ids.shape[0], model.flux.size.live
    x = torch.randn((b, live, *shape), generator=torch.Generator().manual_seed(seed))
    shift = math.exp(1.15)
    t = 1 - torch.arange(steps + 1) / steps
    sigmas = torch.where(t > 0, shift / (shift + (1 / t.clamp(min=1e-9) - 1)), torch.zeros(()))
    strength = torch.full((b,), guidance)
    for now, then in pairwise(sigmas):
        level = now.expand(b)
        v = model(x, level, ids, strength, extra)
        if cfg != 1.0:
            empty = model(x, level, torch.full_like(ids, PAD), strength, extra)
            v = empty + cfg * (v - empty)
        x = x + (then - now) * v
    return x
