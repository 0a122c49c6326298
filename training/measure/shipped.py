"""Measure the shipped weights: `python -m training.measure.shipped [--count 200]`. Prints the table of the model card.

Held-out prompts and scenes only. The scorer is `training.score`; the tests use the same one.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from dit_toolkit.models.control.easycontrol import ConditionLora
from dit_toolkit.models.control.easycontrol_keys import parse

from .. import checkpoints, data, world
from ..easycontrol import KINDS, caption_for, condition_keys, condition_picture
from ..embedded import load_shipped, sample
from ..pictures import to_unit, training_picture
from ..score import edge_agreement, edge_distance, score, silhouette_agreement
from . import SAVE, tell

SIDE = 96


def pictures(vae, latents: torch.Tensor) -> np.ndarray:
    """Live latents -> uint8 RGB `[N, H, W, 3]`."""
    with torch.no_grad():
        shown = torch.cat([vae.decode_live(part) for part in latents.split(50)])
    return ((shown.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(1, -1).numpy()


def tally(images: np.ndarray, scenes: list[world.Scene]) -> dict[str, float]:
    """Share of pictures that are right, by what is asked, and by difficulty."""
    right, asked = Counter(), Counter()
    for image, scene in zip(images, scenes, strict=True):
        result = score(image, scene)
        level = (2 if scene.things[0].kind == "doll" else 0) + len(scene.things) - 1
        parts = {"object": result.objects, "colour": result.colours, "position": result.position,
                 "ground": result.ground, "all": result.all, f"all, {world.LEVELS[level]}": result.all}  # fmt: skip
        for name, value in {**parts, **result.details}.items():
            right[name] += bool(value)
            asked[name] += 1
    return {name: round(right[name] / asked[name], 3) for name in asked}


def some(count: int, levels, seed: int = 5) -> list[world.Scene]:
    stream = world.scenes(seed, levels, test=True)
    return [next(stream) for _ in range(count)]


def draw(model, vae, scenes, seed: int = 1, captions=None, **options) -> np.ndarray:
    ids = torch.tensor([data.padded_ids(c) for c in (captions or [world.caption(s) for s in scenes])])
    return pictures(vae, sample(model, ids, (SIDE // 8, SIDE // 8), seed, **options))


def prompts(model, vae, count: int, scales=(1.0, 2.5)) -> dict:
    scenes = some(count, data.LEVELS)
    truth = np.stack([world.render(s, SIDE).image for s in scenes])
    found = {"ground truth": tally(truth, scenes), "autoencoder": tally(pictures(vae, data.encode(vae, truth)), scenes)}
    for cfg in scales:
        found[f"cfg {cfg}"] = tally(draw(model, vae, scenes, cfg=cfg), scenes)
    return found


def autoencoder(vae, count: int = 200) -> dict[str, float]:
    rng = np.random.default_rng(3)
    scenes = some(count, data.LEVELS, 6)

    def psnr(shown: np.ndarray) -> float:
        x = torch.from_numpy(to_unit(shown))
        with torch.no_grad():
            back = vae.decode_live(vae.patch_in(x)).clamp(-1, 1)
        return round(float(-10 * torch.log10(((back - x) / 2).square().mean())), 2)

    edges = np.stack([condition_picture("edge", s, SIDE, rng) for s in scenes])
    mixed = np.stack([training_picture(s, SIDE, rng) for s in scenes])
    return {
        "scenes": psnr(np.stack([world.render(s, SIDE).image for s in scenes])),
        "edge maps": psnr(edges),
        "all kinds": psnr(mixed),
    }


def load_lora(kind: str, size) -> ConditionLora:
    slot = parse(load_file(checkpoints.WEIGHTS / "easycontrol" / f"tiny_{kind}.safetensors")).slots[0]
    rank = next(iter(slot.ranks.values()))
    lora = ConditionLora(size.hidden, size.double, size.single, rank, operations=nn)
    lora.load_state_dict({k: v.float() for k, v in slot.weights.items()})
    return lora.requires_grad_(False)


CONTROLLED = {"edge": (0.7, 0.8, 1.2, 0.8), "pose": (0, 0, 1.0, 0.5), "subject": (0, 0, 1.0, 0.5)}


def prompt_for(kind: str, scene: world.Scene) -> str:
    """Captions that say what to draw and leave where, or how it stands, or how it looks, to the condition."""
    pair = len(scene.things) == 2 and scene.things[0].kind != "doll"  # the base knows pairs by their relation only
    if kind == "edge":
        scene = replace(scene, relation=scene.relation if pair else "", pose="")
    elif kind == "pose":
        scene = replace(scene, pose="")
    return caption_for(kind, scene)


def control(
    kind: str, model, vae, count: int = 32, guidance: float = 3.5, cfg: float = 2.5
) -> dict[str, dict[str, float]]:
    """With the condition, without it, with somebody else's, and with an untrained LoRA; the same seeds and prompts."""
    rng = np.random.default_rng(4)
    scenes = some(count, CONTROLLED[kind], 8)
    maps = np.stack([condition_picture(kind, s, SIDE, rng) for s in scenes])
    truth = [world.canny(world.render(s, SIDE)) for s in scenes]
    captions = [prompt_for(kind, s) for s in scenes]
    flux, size = model.flux, model.flux.size
    strength = torch.full((count,), guidance)
    pooled = model.text(torch.tensor([data.padded_ids(c) for c in captions]))[1]

    def keys(lora, conditions):
        return condition_keys(kind, flux, lora, data.encode(vae, conditions), pooled, strength, (SIDE // 16,) * 2)

    lora = load_lora(kind, size)
    blank = ConditionLora(size.hidden, size.double, size.single, 4, operations=nn).requires_grad_(False)
    blank.init_for_training(torch.Generator().manual_seed(0))
    with torch.no_grad():
        variants = {
            "with": keys(lora, maps),
            "without": None,
            "somebody else's": keys(lora, np.roll(maps, 1, 0)),
            "untrained LoRA": keys(blank, maps),
        }
    found = {}
    for name, extra in variants.items():
        images = draw(model, vae, scenes, captions=captions, guidance=guidance, cfg=cfg, extra=extra)
        line = tally(images, scenes)
        line["silhouette IoU"] = round(
            float(np.mean([silhouette_agreement(i, s) for i, s in zip(images, scenes, strict=True)])), 3
        )
        if kind == "edge":
            pairs = list(zip(images, truth, strict=True))
            line["edge distance, pixels"] = round(float(np.mean([edge_distance(i, e) for i, e in pairs])), 3)
            line["edge F1"] = round(float(np.mean([edge_agreement(i, e, 1) for i, e in pairs])), 3)
        found[name] = line
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--save", action="store_true", help=SAVE)
    options = parser.parse_args()
    count = options.count
    model, vae = load_shipped()
    found = {"psnr_db": autoencoder(vae), "prompts": prompts(model, vae, count)}
    for kind in KINDS:
        if (checkpoints.WEIGHTS / "easycontrol" / f"tiny_{kind}.safetensors").exists():
            found[f"control: {kind}"] = control(kind, model, vae, 128 if kind == "edge" else 32)
    tell("shipped", found, options.save)


if __name__ == "__main__":
    main()
