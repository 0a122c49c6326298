"""Train the embedded default: `python -m training STAGE`.

Stages, in order: `vae` (components, then the decoder), `base` (transformer and text encoder), the EasyControl adapters
`edge`, `pose` and `subject`, the try-on LoRAs `try_on` and, taught by them, `try_on_8_steps`; `in_context`, an
In-Context LoRA by ComfyUI's own nodes; `sd3_vae` and `sd3`, the second base, in SD3.5's
layout, and `dit4sr`, a patch for it; `video_vae`, `cogvideox` and `dynamictrl`, a video model in CogVideoX's layout and
its poses. From the try-on on they train on the weights in `weights/`. `all` runs every
one but `try_on_8_steps`, and the stages of the second edition, which is in the making: `start`, `second_vae`,
`second_base`, `second_guided`. A stage that was stopped goes on where it was, and one that is done is only exported
again; `--fresh` starts it over and leaves what the others made. (`in_context` always starts over. The components of the
autoencoder are what all latents are made of: only `all --fresh` fits them again.)
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import torch

from . import checkpoints
from .base import train_base
from .checkpoints import Recipe, work
from .dit4sr import RestoreRecipe, train_dit4sr
from .dynamictrl import VideoRecipe, train_cogvideox, train_dynamictrl
from .easycontrol import KINDS, AdapterRecipe, train_adapter
from .in_context import InContextRecipe, train_in_context
from .sd3 import VAE as SD3_VAE
from .sd3 import SD3Recipe, train_sd3
from .second import SecondRecipe, train_second_base, train_second_guided, train_second_vae, train_start
from .try_on import TryOnRecipe, train_try_on
from .try_on_8_steps import FastRecipe, train_fast
from .vae import train_vae
from .video_vae import VideoVAERecipe, train_video_vae

OWN = {  # what each stage keeps in the folder of its recipe
    "vae": ("vae.*",),
    "base": ("pool.pt", "base.*"),
    **{kind: (f"pool-{kind}-*", f"easycontrol-{kind}-*") for kind in KINDS},
    "try_on": ("try-on-pool-*", "try-on-lora-*"),
    "try_on_8_steps": ("try-on-journeys-*", "try-on-8-steps-*"),
    "in_context": (),
    "sd3_vae": ("vae.*",),
    "sd3": ("pool.pt", "sd3.*"),
    "dit4sr": ("dit4sr-*",),
    "video_vae": ("encoder.*", "decoder.*"),
    "cogvideox": ("clips-*", "cogvideox-*"),
    "dynamictrl": ("dynamictrl-*",),
    "start": ("start.*",),
    "second_vae": ("vae.*",),
    "second_base": ("second-pool.*", "second.*"),
    "second_guided": ("guided.*",),
}
SD3 = ("sd3_vae", "sd3", "dit4sr")
SECOND = ("start", "second_vae", "second_base", "second_guided")
VIDEO = ("video_vae", "cogvideox", "dynamictrl")


def recipe_of(stage: str, options: dict) -> Recipe | SD3Recipe | VideoVAERecipe | SecondRecipe:
    """The recipe whose folder a stage works in. `options` change that of the first base only."""
    if stage in VIDEO:
        return VideoVAERecipe()
    if stage in SECOND:
        return SecondRecipe()
    return SD3Recipe() if stage in SD3 else Recipe(**options)


def forget(folder: Path, stage: str) -> None:
    """Delete what `stage` keeps in `folder`, and nothing else; all of it for `all`."""
    if stage == "all":
        shutil.rmtree(folder, ignore_errors=True)
        return
    for pattern in OWN[stage]:
        for path in folder.glob(pattern):
            path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*OWN, "all"])
    parser.add_argument("--fresh", action="store_true", help="forget the stage's checkpoints and start it over")
    parser.add_argument("--work", type=Path, default=checkpoints.WORK, help="where checkpoints are kept")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2, help="processes that render the pool")
    for field in ("vae_steps", "base_steps", "pool", "pixels", "batch"):
        parser.add_argument(f"--{field.replace('_', '-')}", type=int, default=getattr(Recipe, field))
    options = vars(parser.parse_args())
    stage, threads, workers = (options.pop(name) for name in ("stage", "threads", "workers"))
    torch.set_num_threads(threads)
    checkpoints.WORK = options.pop("work")
    fresh = options.pop("fresh")
    recipe, started = Recipe(**options), time.time()
    if fresh:
        forget(work(recipe_of(stage, options)), stage)
        if stage == "all":
            forget(work(SD3Recipe()), stage)
            forget(work(VideoVAERecipe()), stage)
    if stage in ("vae", "all"):
        train_vae(recipe)
    if stage in ("base", "all"):
        train_base(recipe, workers)
    for kind in KINDS:
        if stage in (kind, "all"):
            train_adapter(kind, recipe, AdapterRecipe())
    if stage in ("try_on", "all"):
        train_try_on(recipe, TryOnRecipe())
    if stage == "try_on_8_steps":  # not in "all": eight plain steps are as good on this world (weights/README.md)
        train_fast(recipe, TryOnRecipe(), FastRecipe())
    if stage in ("in_context", "all"):
        train_in_context(InContextRecipe())
    if stage in ("sd3_vae", "all"):
        train_vae(SD3Recipe(), SD3_VAE)
    if stage in ("sd3", "all"):
        train_sd3(SD3Recipe(), workers)
    if stage in ("dit4sr", "all"):
        train_dit4sr(RestoreRecipe(), SD3Recipe(), workers)
    if stage in ("video_vae", "all"):
        train_video_vae(VideoVAERecipe(), workers)
    if stage in ("cogvideox", "all"):
        train_cogvideox(VideoRecipe(), VideoVAERecipe(), workers)
    if stage in ("dynamictrl", "all"):
        train_dynamictrl(VideoRecipe(), VideoVAERecipe(), workers)
    if stage == "start":
        train_start(SecondRecipe(), workers)
    if stage == "second_vae":
        train_second_vae(SecondRecipe())
    if stage == "second_base":
        train_second_base(SecondRecipe(), workers)
    if stage == "second_guided":
        train_second_guided(SecondRecipe(), workers)
    print(f"{stage}: {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
