"""Measure the second edition's base at any time of its training: `python -m training.measure.second`.

Prints, for held-out captions and for held-out garments, how much of the second world's own pictures, of those after the
autoencoder, and of those that the base draws the scorer finds right. `--sheet` draws a contact sheet with the first
seeds: nothing on it is chosen.
"""

from __future__ import annotations

import argparse
from collections import Counter
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import torch

from .. import checkpoints, data, world
from ..embedded import Base, sample
from ..score_second import judge
from ..second import EDITION, SHARES, SecondRecipe, autoencoder, load_second
from ..vae import load_vae
from . import SAVE, tell
from .shipped import pictures

PROMPTS = (
    "a doll with long blonde hair, a red striped dress, waving, on a pale ground",
    "a doll with short black hair, a blue shirt printed with a star and yellow trousers, arms up, on a white ground",
    "a doll with tied brown hair, a green coat and orange shorts, arms down, on a spotted grey ground",
    "a doll with short brown hair, a yellow tee printed with the letter h and a purple skirt, pointing, "
    "on a dark ground",
    "a doll with long black hair, a purple spotted vest and green trousers, arms out, on a striped pale ground",
    "a doll with tied blonde hair, a pink dress printed with a heart, arms up, a small blue star on the left, "
    "on a grey ground",
    "a doll with short blonde hair, a red checked shirt and blue shorts, waving, a green house on the right, "
    "on a white ground",
    "a doll in a blue spotted tee left of a doll in an orange coat, on a checked pale ground",
    "a yellow star, on a dark ground",
    "a red fish above a small green tree, on a white ground",
    "a purple moon left of an orange heart, on a striped grey ground",
    "a doll",
)  # what pictures of the second edition are first seen with


def some(count: int, test: str = "captions", seed: int = 5, levels: tuple[float, ...] = SHARES) -> list[world.Scene]:
    return list(islice(world.second.scenes(seed, levels, test), count))


def tally(images: np.ndarray, scenes: list[world.Scene]) -> dict[str, float]:
    """Share of pictures that are right, by what is asked, and by difficulty."""
    right, asked = Counter(), Counter()
    for image, scene in zip(images, scenes, strict=True):
        found = judge(image, scene)
        dolls = [thing.kind for thing in scene.things].count("doll")
        level = 4 if dolls == 2 else 2 * dolls + len(scene.things) - 1
        parts = {"all": found.all, "object": found.objects, "colour": found.colours, "position": found.position,
                 "ground": found.ground, f"all, {world.LEVELS[level]}": found.all}  # fmt: skip
        garment = [found.details[name] for name in ("cut", "pattern") if name in found.details]
        worn = {"garment and colours": found.colours and all(garment)} if garment else {}
        for name, value in {**parts, **found.details, **worn}.items():
            right[name] += bool(value)
            asked[name] += 1
    return {name: round(right[name] / asked[name], 3) for name in sorted(asked)}


def draw(model: Base, vae, captions: list[str], pixels: int, seed: int = 1, **options) -> np.ndarray:
    ids = torch.tensor([data.padded_ids(caption, EDITION) for caption in captions])
    with torch.no_grad():
        return pictures(vae, sample(model, ids, (pixels // 8, pixels // 8), seed, **options))


def sheet(images: np.ndarray, columns: int, zoom: int = 2) -> np.ndarray:
    """Pictures in rows, `[N, S, S, 3]` -> one picture."""
    edged = [cv2.copyMakeBorder(image, 2, 2, 2, 2, cv2.BORDER_CONSTANT, value=(255, 255, 255)) for image in images]
    edged += [np.full_like(edged[0], 255)] * (-len(edged) % columns)
    rows = [np.concatenate(edged[k : k + columns], 1) for k in range(0, len(edged), columns)]
    return cv2.resize(np.concatenate(rows), None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=checkpoints.WORK, help="where checkpoints are kept")
    parser.add_argument("--stage", choices=("second", "guided"), default="second")
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--cfg", type=float, nargs="*", default=[1.0, 2.5])
    parser.add_argument("--tests", nargs="*", default=["captions"], choices=world.second.KINDS_OF_TEST)
    parser.add_argument("--truth", action="store_true", help="also the world's own pictures, and after the autoencoder")
    parser.add_argument("--sheet", type=Path, help="a picture file for the contact sheet")
    parser.add_argument("--save", action="store_true", help=SAVE)
    options = parser.parse_args()
    checkpoints.WORK, recipe = options.work, SecondRecipe()
    model, vae = load_second(recipe, options.stage), load_vae(recipe, autoencoder(recipe))
    side, found = recipe.pixels, {}
    for test in options.tests:
        scenes = some(options.count, test)
        captions = [world.caption(scene) for scene in scenes]
        if options.truth:
            truth = np.stack([world.render(scene, side).image for scene in scenes])
            found[f"{test}: the world's own"] = tally(truth, scenes)
            found[f"{test}: after the autoencoder"] = tally(pictures(vae, data.encode(vae, truth)), scenes)
        for cfg in options.cfg:
            found[f"{test}: cfg {cfg}"] = tally(draw(model, vae, captions, side, cfg=cfg), scenes)
    if options.sheet:
        shown = [draw(model, vae, list(PROMPTS), side, cfg=cfg) for cfg in options.cfg]
        cv2.imwrite(str(options.sheet), sheet(np.concatenate(shown), len(PROMPTS) // 2)[..., ::-1])
    if found:
        tell("second", found, options.save)


if __name__ == "__main__":
    main()
