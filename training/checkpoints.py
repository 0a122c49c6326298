"""What a recipe's checkpoints are called, where they are kept, and how weights are written.

Every stage can be stopped and started again and continues at its last checkpoint; the same seed and thread count give
the same weights. Checkpoints and plots: `.training/`; results: `weights/`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from . import world

ROOT = Path(__file__).resolve().parents[1]
WORK, WEIGHTS = ROOT / ".training", ROOT / "weights"
SHIPPED = ("tiny_flux.safetensors", "tiny_text_encoder.safetensors", "tiny_vae.safetensors")  # what LoRAs train on


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


def save(path: Path, state: dict) -> None:
    """Written beside, then moved: a stopped run leaves the earlier checkpoint whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def write(name: str, weights: dict[str, Tensor], metadata: dict[str, str]) -> Path:
    """float16 safetensors in `weights/`, keys sorted. safetensors itself puts the metadata in any order."""
    path = WEIGHTS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    half = {key: value.detach().half().contiguous().cpu() for key, value in sorted(weights.items())}
    save_file(half, path, {"format": "pt", **metadata})
    path.chmod(0o644)  # safetensors leaves it to its owner alone
    return path
