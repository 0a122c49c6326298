"""Stage `in_context`: an In-Context LoRA for the embedded default, trained with ComfyUI's own nodes.

In-Context LoRA, arXiv:2410.23775: sets of related pictures as panels of one canvas, one joint caption per canvas, an
ordinary LoRA. Here a set is one doll in two scenes, side by side on 192 x 96 pixels. Most captions are silent on what
the doll wears, so that the panels must take it from each other.

There is no trainer here. The sets are written to a folder as a user would keep them, and the nodes run one after the
other: Panel Layout, Panel Sets From Folder, Make Training Dataset, Prepare Model for Train LoRA, Train LoRA, Save
LoRA. Only that the small world has fewer channels than FLUX.1 is put right by `trainable`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from . import checkpoints, loop, world
from .comfyui import comfyui

SIDE = 96
NAME = "loras/dit_toolkit_demo_in_context.safetensors"

SILENCE = "A picture."  # filler to the tiny text encoder, which reads it as the empty prompt

Set = tuple[world.Scene, world.Scene]


@dataclass(frozen=True)
class InContextRecipe:
    """`named`, `empty`: shares of captions that say what the doll wears, and that say nothing."""

    sets: int = 1000
    named: float = 0.3
    empty: float = 0.1
    rank: int = 16
    lr: float = 3e-3
    steps: int = 900
    batch: int = 32
    seed: int = 0


def layout(given: str = "") -> Any:
    """Two panels of 96 x 96 side by side, from the node. `given`: numbers of the panels that come as pictures."""
    return comfyui().PanelLayout.execute("custom", 1, 2, SIDE, SIDE, "auto", "", "", "", given).result[0]


def captions(sets: Sequence[Set], recipe: InContextRecipe) -> list[str]:
    """A caption per set, in the shares that the recipe asks for."""
    rolls = np.random.default_rng(recipe.seed).random(len(sets))
    named = recipe.empty + recipe.named
    return [
        SILENCE if r < recipe.empty else world.set_caption(s, named=r < named) for s, r in zip(sets, rolls, strict=True)
    ]


def write_sets(folder: Path, recipe: InContextRecipe) -> None:
    """`recipe.sets` folders with 1.png, 2.png and caption.txt. What lay in `folder` is overwritten."""
    sets = list(islice(world.sets(recipe.seed + 1), recipe.sets))
    for number, (scenes, text) in enumerate(zip(sets, captions(sets, recipe), strict=True)):
        place = folder / f"set_{number:05}"
        place.mkdir(parents=True, exist_ok=True)
        for panel, scene in enumerate(scenes, 1):
            cv2.imwrite(str(place / f"{panel}.png"), world.render(scene, SIDE).image[..., ::-1])
        (place / "caption.txt").write_text(text, encoding="utf-8")


def trainable(model: Any, live: int) -> Any:
    """`model`, a MODEL, as Prepare Model for Train LoRA gives it, with `live` channels that count.

    Of the 16 latent channels only `live` carry anything. The base leaves noise in the others; the LoRA must not spend
    itself on removing it. Here they count as right.
    """
    host = comfyui()

    def alive(run: Callable, *args: Any) -> list[Tensor]:
        denoised, *rest = run(*args)
        return [torch.cat([denoised[:, :live], torch.zeros_like(denoised[:, live:])], 1), *rest]

    (patched,) = host.PrepareTraining.execute(model).result
    wrapper = host.comfy.patcher_extension.WrappersMP.CALC_COND_BATCH
    patched.add_wrapper_with_key(wrapper, "dit_toolkit.live_channels", alive)
    return patched


def train_in_context(recipe: InContextRecipe) -> list[float]:
    """The LoRA of `recipe` in `weights/`, by way of ComfyUI's nodes. Returns the loss of every step."""
    host = comfyui()
    name = f"dolls_{checkpoints.digest(world.VERSION, recipe)}"
    write_sets(Path(host.folder_paths.get_input_directory()) / name, recipe)
    clip, vae, model = host.embedded.load_clip(), host.embedded.load_vae(), host.embedded.load_model()
    live = vae.first_stage_model.live
    with torch.inference_mode():  # as ComfyUI runs every node
        canvases, texts = host.PanelSets.execute(folder=name, panels=layout(), fit="crop").result
        latents, conditioning = host.MakeTrainingDataset.execute(canvases, [vae], [clip], texts).result
        torch.manual_seed(recipe.seed)  # Train LoRA draws batches, noise levels and first weights from torch's own
        lora, losses, steps = host.TrainLora.execute(**one_each(
            model=trainable(model, live), batch_size=recipe.batch, steps=recipe.steps, grad_accumulation_steps=1,
            learning_rate=recipe.lr, rank=recipe.rank, optimizer="AdamW", loss_function="MSE", seed=recipe.seed,
            training_dtype="bf16", lora_dtype="fp32", quantized_backward=False, algorithm="LoRA",
            gradient_checkpointing=False, checkpoint_depth=1, offloading=False, existing_lora="[None]",
            bucket_mode=False, bypass_mode=False,
        ), latents=latents, positive=conditioning).result  # fmt: skip
        host.SaveLora.execute(lora, f"loras/{name}", steps)
    export(Path(host.folder_paths.get_output_directory()) / "loras", f"{name}_{steps}_steps_*.safetensors")
    checkpoints.WORK.mkdir(exist_ok=True)
    loop.plot(checkpoints.WORK / f"{name}.png", losses["loss"])
    return losses["loss"]


def one_each(**inputs: Any) -> dict[str, list]:
    """Inputs as a node with `is_input_list` gets them."""
    return {name: [value] for name, value in inputs.items()}


def export(folder: Path, pattern: str) -> Path:
    """The newest file that Save LoRA wrote, as float16 in `weights/`."""
    newest = max(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
    return checkpoints.write(NAME, load_file(newest), {})
