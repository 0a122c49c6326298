"""A tiny random SD3.5 with a DiT4SR branch, loaded and sampled by ComfyUI itself."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.sd
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from safetensors.torch import save_file
from torch import Tensor

from dit_toolkit.host.restore import dit4sr, dit4sr_files
from dit_toolkit.host.restore.dit4sr_files import DiT4SRFile
from dit_toolkit.host.restore.dit4sr_settings import DiT4SR
from dit_toolkit.models.restore.dit4sr_keys import Variant, parse, write
from dit_toolkit.tests.host.families import text
from dit_toolkit.tests.host.shared import SHARED, share
from dit_toolkit.tests.models.restore import dit4sr_reference as reference

TEXT, POOLED, SIDE = 32, 24, 16  # SIDE: tokens along a side that there are positions for
TILE, OVERLAP = 8, 4
VARIANTS = ("v1", "r1")


@cache
def published(variant: str = "r1", seed: int = 0) -> dict[str, Tensor]:
    """A whole published file. Nobody may change it."""
    weights = reference.random_weights(3, (0, 1), TEXT, POOLED, SIDE, seed)
    return weights if variant == "r1" else reference.as_v1(weights)


def base(seed: int = 0) -> ModelPatcher:
    """The base model in it, as "Load Diffusion Model" loads it. Nobody may change it: every test shares it."""
    name = f"the base of tiny_dit4sr, {seed}"
    if name not in SHARED:
        share(name, comfy.sd.load_diffusion_model_state_dict({k: v.clone() for k, v in published(seed=seed).items()}))
    return SHARED[name][0]


def file(variant: Variant = "r1", seed: int = 0) -> DiT4SRFile:
    made_of, name = published(variant, seed), f"tiny_{variant}.safetensors"
    shared = f"the patch of tiny_dit4sr, {variant}, {seed}"
    if shared not in SHARED:
        share(shared, dit4sr_files.from_state(made_of, name).patcher)
    return DiT4SRFile(name, parse(made_of), variant, SHARED[shared][0])


def write_files() -> None:
    """Into the tests' models folder: a whole transformer, which comes first in the list, a patch, and another one."""
    folder = Path(folder_paths.models_dir) / dit4sr_files.FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    save_file(published("v1"), folder / "a_whole_transformer.safetensors")
    tensors, metadata = write(file("r1", 1).checkpoint.weights, "r1")
    save_file(tensors, folder / "b_patch.safetensors", metadata)
    save_file(published("r1", 1), folder / "c_another_transformer.safetensors")
    folder_paths.filename_list_cache.pop(dit4sr_files.FOLDER, None)


def latent(seed: int, size: tuple[int, int] = (8, 8), batch: int = 1) -> Tensor:
    return torch.randn(batch, 16, *size, generator=torch.Generator().manual_seed(seed))


def restored(model: ModelPatcher | None = None, variant: str = "r1", lr: Tensor | None = None, **settings: Any):
    """`model` with one DiT4SR stream; tiles of 8 x 8 cells where the picture is larger."""
    loaded, model = file(variant), base() if model is None else model
    settings = {"tile": TILE, "overlap": OVERLAP, **settings}
    description = DiT4SR(None, loaded.name, latent(12) if lr is None else lr, **settings)
    return dit4sr.attach(model, loaded.patcher, loaded.made_for, description)


def prompt(seed: int = 3, length: int = 6, **values: Any) -> list:
    return text(seed, length=length, width=TEXT, pooled=POOLED, **values)


def sample(
    model: ModelPatcher,
    steps: int = 3,
    *,
    sampler: str = "euler",
    cfg: float = 1.0,
    size: tuple[int, int] = (8, 8),
    batch: int = 1,
    positive: list | None = None,
    negative: list | None = None,
    noise: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """What ComfyUI's KSampler makes of it, `[batch, 16, *size]`."""
    noise = latent(7, size, batch) if noise is None else noise
    positive = prompt() if positive is None else positive
    negative = prompt(4) if negative is None else negative
    return comfy.sample.sample(
        model, noise, steps, cfg, sampler, "normal", positive, negative, torch.zeros_like(noise),
        disable_pbar=True, seed=0, noise_mask=mask,
    )  # fmt: skip


def close(a: Tensor, b: Tensor, atol: float = 2e-5) -> None:
    """Equal up to rounding: latents are of order 1, and float32 sums in another order differ by some 1e-6 a step."""
    torch.testing.assert_close(a, b, rtol=0, atol=atol)
