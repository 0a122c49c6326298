"""Stage `vae`: the components of the autoencoder, fitted once, then the residual of its decoder."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from dit_toolkit.models.tiny_vae import PATCH, TinyVAE, fit_components

from . import checkpoints, loop, world
from .checkpoints import Recipe
from .data import LEVELS
from .embedded import WIDTHS
from .optim import schedule
from .pictures import to_unit, training_picture


def _components(patches: torch.Tensor, recipe: Any) -> dict[str, torch.Tensor]:
    return fit_components(patches, recipe.live)


@dataclass(frozen=True)
class Autoencoder:
    """What sets one autoencoder apart from the other.

    file: in `weights/`.
    base: whose latents it makes.
    pictures: `(recipe, seed, count)` to what it is trained on, uint8 `[count, H, W, 3]`.
    fit: patches `[N, 3, 8, 8]` and the recipe to the components.
    edges: weight of the loss on differences between neighbours.
    """

    file: str
    base: str
    pictures: Callable[[Any, int, int], np.ndarray]
    widths: tuple[int, int, int] = WIDTHS
    fit: Callable[[torch.Tensor, Any], dict[str, torch.Tensor]] = _components
    edges: float = 0.0


def _pictures(recipe: Recipe, seed: int, count: int) -> np.ndarray:
    rng, stream = np.random.default_rng(seed), world.scenes(seed, (*LEVELS, 0.5))
    return np.stack([training_picture(next(stream), recipe.pixels, rng) for _ in range(count)])


FLUX1 = Autoencoder("tiny_vae.safetensors", "FLUX.1", _pictures)


def stock_of(kind: Autoencoder, recipe: Any, seed: int, count: int) -> np.ndarray:
    return kind.pictures(recipe, seed, count)


def patches_of(x: torch.Tensor) -> torch.Tensor:
    """Pictures `[B, 3, H, W]` -> their patches `[N, 3, 8, 8]`."""
    cut = x.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)
    return cut.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, PATCH, PATCH)


def edge_loss(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of the differences between neighbours, which a soft edge has wrong."""
    across = ((out[..., 1:] - out[..., :-1]) - (x[..., 1:] - x[..., :-1])).abs().mean()
    return across + ((out[..., 1:, :] - out[..., :-1, :]) - (x[..., 1:, :] - x[..., :-1, :])).abs().mean()


def load_vae(recipe, kind: Autoencoder = FLUX1) -> TinyVAE:
    """The autoencoder with its components; they are fitted on the first call (seconds) and then fixed."""
    vae = TinyVAE(recipe.live, kind.widths, kind.base, operations=nn)
    path = checkpoints.work(recipe) / "components.pt"
    if not path.exists():
        x = torch.from_numpy(to_unit(stock_of(kind, recipe, recipe.seed, 3_000)))
        checkpoints.save(path, kind.fit(patches_of(x), recipe))
    parts = torch.load(path, weights_only=True)
    vae.load_state_dict({k: v for k, v in parts.items() if k.startswith("patch_")}, strict=False)
    decoder = checkpoints.work(recipe) / "vae.pt"
    if decoder.exists():
        vae.load_state_dict(torch.load(decoder, weights_only=True)["ema"])
    return vae.requires_grad_(False)


def train_vae(recipe, kind: Autoencoder = FLUX1) -> None:
    """The decoder's residual; latent noise up to 0.3 makes it forgive the transformer's errors."""
    device, batch = loop.device_of(), 24
    torch.manual_seed(recipe.seed)
    vae = load_vae(recipe, kind).to(device)
    vae.decoder.requires_grad_(True)
    nn.init.zeros_(vae.decoder.conv_out.weight)
    nn.init.zeros_(vae.decoder.conv_out.bias)
    average = copy.deepcopy(vae)
    optimiser = torch.optim.AdamW(vae.decoder.parameters(), lr=2e-3, weight_decay=0.01)
    path, start, losses = checkpoints.work(recipe) / "vae.pt", 0, []
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
            stock = stock_of(kind, recipe, 7_000_000 + recipe.seed * 10_000 + step // 200, 200 * batch // 4)
        rng = np.random.default_rng((recipe.seed, step))
        x = torch.from_numpy(to_unit(stock[rng.integers(len(stock), size=batch)])).to(device)
        z = vae.patch_in(x)
        noise = torch.from_numpy(rng.random((batch, 1, 1, 1), np.float32) * 0.3).to(device)
        noise[: batch // 4] = 0
        z = z + noise * torch.from_numpy(rng.standard_normal(tuple(z.shape), np.float32)).to(device)
        out = vae.decode_live(z)
        loss = F.mse_loss(out, x) + 0.1 * F.l1_loss(out, x)
        if kind.edges:
            loss = loss + kind.edges * edge_loss(out, x)
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
            checkpoints.save(path, {**state, "step": step + 1, "losses": losses})
            loop.plot(path.with_suffix(".png"), losses)
    export_vae(recipe, kind)


def export_vae(recipe, kind: Autoencoder = FLUX1) -> None:
    config = {"tiny_vae": {"live": recipe.live, "widths": kind.widths, "base": kind.base}}
    checkpoints.write(kind.file, load_vae(recipe, kind).state_dict(), {"dit_toolkit": json.dumps(config)})
