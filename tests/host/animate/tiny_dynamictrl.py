"""A tiny random DynamiCtrl on CogVideoX 1.5, loaded and sampled by ComfyUI itself, and a stand-in for its VAE."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import comfy.sample
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from safetensors.torch import save_file
from torch import Tensor

from dit_toolkit.host.animate import dynamictrl_files
from dit_toolkit.host.animate.dynamictrl_conditions import with_pose
from dit_toolkit.host.animate.dynamictrl_settings import Pose
from dit_toolkit.tests.host import families
from dit_toolkit.tests.host.shared import SHARED, share
from dit_toolkit.tests.models.animate import dynamictrl_reference as reference

OTHER = "b_dynamictrl.safetensors"
LORA, OTHER_LORA = "x_cogvideox_lora.safetensors", "y_cogvideox_lora.safetensors"
TEXT, SIZE, FRAMES = 48, (6, 8), 4  # channels of the text; the latent's sides and frames


@cache
def published(version: str = "1.5", seed: int = 0, **sizes: Any) -> dict[str, Tensor]:
    """A whole published file. Nobody may change it."""
    return reference.random_weights(version, text=TEXT, seed=seed, **sizes)


def loaded(version: str = "1.5", seed: int = 0, **sizes: Any) -> ModelPatcher:
    """As the loader gives it. Nobody may change it: every test shares it."""
    name = f"tiny_dynamictrl, {version}, {seed}, {sizes}"
    if name not in SHARED:
        share(name, dynamictrl_files.from_state(published(version, seed, **sizes), "tiny.safetensors").model)
    return SHARED[name][0]


def write_files() -> None:
    """Into the tests' models folder: two transformers, the first of which comes first in the list, and two LoRAs."""
    for kind, files in (
        (dynamictrl_files.FOLDER, {"a_dynamictrl.safetensors": published(), OTHER: published(seed=1)}),
        ("loras", {LORA: lora(0), OTHER_LORA: lora(1)}),
    ):
        folder = Path(folder_paths.models_dir) / kind
        folder.mkdir(parents=True, exist_ok=True)
        for name, state in files.items():
            save_file(state, folder / name)
        folder_paths.filename_list_cache.pop(kind, None)


def lora(seed: int) -> dict[str, Tensor]:
    """A LoRA in the names of diffusers."""
    layer, generator = "transformer.transformer_blocks.0.attn1.to_q", torch.Generator().manual_seed(seed)
    sizes = {"lora_A": (4, 128), "lora_B": (128, 4)}
    return {f"{layer}.{leaf}.weight": torch.randn(size, generator=generator) / 5 for leaf, size in sizes.items()}


def latent(seed: int, frames: int = FRAMES, size: tuple[int, int] = SIZE, batch: int = 1) -> Tensor:
    return torch.randn(batch, 16, frames, *size, generator=torch.Generator().manual_seed(seed))


def prompt(seed: int = 3, length: int = 6, pose: Tensor | Pose | None = None, **values: Any) -> list:
    made = families.text(seed, length=length, width=TEXT, **values)
    if pose is None:
        return made
    return with_pose(made, pose if isinstance(pose, Pose) else Pose(pose))


def sample(
    model: ModelPatcher,
    steps: int = 3,
    *,
    positive: list | None = None,
    negative: list | None = None,
    sampler: str = "euler",
    cfg: float = 1.0,
    batch: int = 1,
    noise: Tensor | None = None,
    start: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """What ComfyUI's KSampler makes of it, `[batch, 16, T, h, w]`."""
    noise = latent(7, batch=batch) if noise is None else noise
    positive = prompt() if positive is None else positive
    negative = prompt(4) if negative is None else negative
    start = torch.zeros_like(noise) if start is None else start
    return comfy.sample.sample(
        model, noise, steps, cfg, sampler, "simple", positive, negative, start,
        disable_pbar=True, seed=0, noise_mask=mask,
    )  # fmt: skip


def close(a: Tensor, b: Tensor, atol: float = 1e-3) -> None:
    """Equal up to rounding: a run begins at sigma 4519, where the last digit of float32 is 5e-4."""
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


class VideoVae:
    """A latent frame for the first picture and for each four after it; 8 pixels to one latent pixel, 16 channels."""

    def encode(self, pixels: Tensor) -> Tensor:
        """`[F, H, W, 3]` to `[1, 16, T, h, w]`."""
        cells = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8).repeat(1, 6, 1, 1)[:, :16]  # [F, 16, h, w]
        first, rest = cells[:1], cells[1:]
        rest = rest[: len(rest) // 4 * 4].unflatten(0, (-1, 4)).mean(1) if len(rest) >= 4 else rest[:0]
        return torch.cat([first, rest]).movedim(0, 1)[None] - 0.5
