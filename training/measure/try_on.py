"""Measure the try-on LoRAs of the embedded default: `python -m training.measure.try_on`.

Prints the table of the model card, from held-out scenes and without ComfyUI. The judge is `training.score`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from .. import checkpoints, data, world
from ..embedded import Base, load_shipped
from ..fittings import SIDE, Fitting, user_fitting
from ..score import agreement, pose_of, read_doll, score, silhouette_agreement
from ..try_on import LEVELS
from ..try_on_8_steps import FAST, with_fast
from ..try_on_model import PROMPT, draw, levels_of, load_try_on, new_branches, velocity_of
from . import SAVE, tell


def worn(image: np.ndarray, scene: world.Scene) -> dict[str, bool]:
    """What of the scene's doll a picture shows, RGB uint8 `[S, S, 3]`: `garment` is the shirt's colour and pattern."""
    doll, seen = scene.things[0], read_doll(image)
    same = agreement(seen, doll)
    found = {"garment": same["shirt"] and same["pattern"], "colour": same["shirt"], "pattern": same["pattern"]}
    found["pose"] = seen is not None and pose_of(seen.arms) == pose_of(doll.arms)
    found |= {"hair": same["hair"], "trousers or skirt": same["bottom"] and same["garment"], "skin": same["skin"]}
    return found


def likeness(image: np.ndarray, wanted: np.ndarray, where: np.ndarray) -> float:
    """PSNR in dB of `[S, S, 3]` uint8 pictures over the pixels `where`, `[S, S]` bool."""
    away = (image.astype(np.float64) - wanted)[where]
    return float(10 * np.log10(255**2 / max(np.square(away).mean(), 1e-9)))


def tally(images: np.ndarray, scenes: list[world.Scene], fittings: list[Fitting]) -> dict[str, float]:
    """Shares of pictures that are right, and means."""
    lines: list[dict[str, float]] = []
    for image, scene, fitting in zip(images, scenes, fittings, strict=True):
        whole = score(image, scene)
        line = {**worn(image, scene), "ground and things": whole.ground and whole.objects}
        line["silhouette IoU"] = silhouette_agreement(image, scene)
        hidden = fitting.mask > 0
        line["outside the mask, dB"] = likeness(image, fitting.person, ~hidden)
        line["under the mask, dB"] = likeness(image, fitting.shown, hidden)
        lines.append(line)
    return {name: round(float(np.mean([line[name] for line in lines])), 3) for name in lines[0]}


def held_out(count: int, seed: int = 8) -> tuple[list[world.Scene], list[Fitting]]:
    stream, rng = world.scenes(seed, LEVELS, test=True), np.random.default_rng(seed)
    scenes = [next(stream) for _ in range(count)]
    return scenes, [user_fitting(scene, rng) for scene in scenes]


def pictures(vae, latents: Tensor) -> np.ndarray:
    """Live latents -> uint8 RGB `[N, H, W, 3]`."""
    with torch.no_grad():
        shown = vae.decode_live(latents)
    return ((shown.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(1, -1).numpy()


def wear(
    model: Base, vae, loras: nn.ModuleDict | None, persons: np.ndarray, garments: np.ndarray, seed: int = 1,
    steps: int = 20, cfg: float = 2.5,
) -> np.ndarray:  # fmt: skip
    """Pictures of the persons in the garments, `[N, H, W, 3]` uint8 each. `loras` None: from the words alone."""
    person, garment = data.encode(vae, persons), data.encode(vae, garments)
    ids = torch.tensor([data.padded_ids(PROMPT)]).expand(len(persons), -1)
    noise = torch.randn(person.shape, generator=torch.Generator().manual_seed(seed))
    velocity = velocity_of(model, loras, ids, person, garment, cfg)
    return pictures(vae, draw(velocity, noise, levels_of(steps)))


def measure(count: int = 32) -> dict[str, dict[str, float]]:
    """All figures of the model card, on held-out scenes with the same seeds."""
    model, vae = load_shipped()
    size = model.flux.size
    loras = load_try_on(size)
    scenes, fittings = held_out(count)
    persons, garments = (np.stack([getattr(f, name) for f in fittings]) for name in ("person", "garment"))
    swapped = np.roll(garments, 1, 0)
    as_swapped = [
        replace(s, things=(replace(s.things[0], colour=o.things[0].colour, pattern=o.things[0].pattern), *s.things[1:]))
        for s, o in zip(scenes, scenes[-1:] + scenes[:-1], strict=True)
    ]

    whole = np.ones((SIDE, SIDE), bool)
    teacher = wear(model, vae, loras, persons, garments, steps=24)  # as `journeys` draws

    def line(loras, garments=garments, judged=scenes, **options) -> dict[str, float]:
        images = wear(model, vae, loras, persons, garments, **options)
        like = [likeness(image, other, whole) for image, other in zip(images, teacher, strict=True)]
        return {**tally(images, judged, fittings), "to 24 steps, dB": round(float(np.mean(like)), 3)}

    shown = np.stack([fitting.shown for fitting in fittings])
    found = {
        "world's own pictures": tally(shown, scenes, fittings),
        "after the autoencoder": tally(pictures(vae, data.encode(vae, shown)), scenes, fittings),
        "20 steps": line(loras),
        "20 steps, cfg 1": line(loras, cfg=1.0),
        "without": line(None),
        "somebody else's garment": line(loras, swapped),
        "the same, judged by that garment": line(loras, swapped, as_swapped),
        "untrained LoRA": line(new_branches(size, 4, 0).requires_grad_(False)),
        "8 steps": line(loras, steps=8),
        **{f"{steps} steps, cfg 1": line(loras, steps=steps, cfg=1.0) for steps in (8, 4, 2)},
    }
    if (checkpoints.WEIGHTS / FAST).exists():
        model = with_fast(model)
        found["8 steps, cfg 1, 8-step LoRA"] = line(loras, steps=8, cfg=1.0)
        found["4 steps, cfg 1, 8-step LoRA"] = line(loras, steps=4, cfg=1.0)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--save", action="store_true", help=SAVE)
    options = parser.parse_args()
    tell("try_on", measure(options.count), options.save)


if __name__ == "__main__":
    main()
