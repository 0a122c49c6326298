"""Train the embedded default: `python -m scripts.tiny STAGE`.

Stages, in order: `vae` (components, then the decoder), `base` (transformer and text encoder), the EasyControl adapters
`edge`, `pose` and `subject`, the try-on LoRAs `try_on` and, taught by them, `try_on_8_steps`; `in_context`, an
In-Context LoRA by ComfyUI's own nodes. From the try-on on they train on the weights in `weights/`. `all` runs every
one but `try_on_8_steps`. A stage that was stopped goes on where it was, and one that is done is only exported again;
`--fresh` starts over. (`in_context` always starts over.)
"""

from __future__ import annotations

import argparse
import shutil
import time

import torch

from .adapters import KINDS, AdapterRecipe, train_adapter
from .in_context import InContextRecipe, train_in_context
from .train import Recipe, train_base, train_vae, work
from .try_on import FastRecipe, TryOnRecipe, train_fast, train_try_on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["vae", "base", *KINDS, "try_on", "try_on_8_steps", "in_context", "all"])
    parser.add_argument("--fresh", action="store_true", help="forget this recipe's checkpoints and start over")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2, help="processes that render the pool")
    for field in ("vae_steps", "base_steps", "pool", "pixels", "batch"):
        parser.add_argument(f"--{field.replace('_', '-')}", type=int, default=getattr(Recipe, field))
    options = vars(parser.parse_args())
    stage, threads, workers = (options.pop(name) for name in ("stage", "threads", "workers"))
    torch.set_num_threads(threads)
    fresh = options.pop("fresh")
    recipe, started = Recipe(**options), time.time()
    if fresh:
        shutil.rmtree(work(recipe), ignore_errors=True)
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
    print(f"{stage}: {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
