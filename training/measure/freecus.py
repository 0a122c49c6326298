"""Measure FreeCus on the embedded default: `python -m training.measure.freecus [--all]`.

Prints tables of the model card. The very node code on ComfyUI's sampler. Held-out scenes with a doll; the subject is
the same doll on plain ground, arms hanging, with its exact mask, and the prompt names neither its colours nor its
garments. The judge is `training.score`. `--all` adds other scales, shifts and layers to the main rows.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .. import world
from ..comfyui import comfyui
from ..easycontrol import caption_for, condition_picture
from ..score import agreement, read_doll
from . import SAVE, shipped, tell
from .in_context import CFG, SIDE, STEPS

GREY = 127  # around the subject
MASK = 0.03  # farther from that grey than this, 0 to 1, is the subject
BOTH = {"prompts": "positive and negative"}

Settings = dict[str, Any]

MAIN: dict[str, Settings | None] = {"prompt alone": None, "positive prompt only": {}, "both prompts": BOTH}


@dataclass(frozen=True)
class Table:
    """`levels`: how often each difficulty of the world comes. `others`: rows beside the main ones."""

    levels: tuple[float, ...]
    seed: int
    others: dict[str, Settings]


TABLES = {
    "one doll": Table((0, 0, 1.0, 0), 11, {"positive only, key scale 1.0": {"key_scale": 1.0}}),
    "a doll, sometimes with an object beside it": Table((0, 0, 1.0, 0.5), 8, {
        **{f"both prompts, key scale {scale}": {**BOTH, "key_scale": scale} for scale in (1.3, 1.6)},
        **{f"both prompts, shift {mode}": {**BOTH, "shift_mode": mode} for mode in ("normal", "twice")},
        **{f"positive only, layers {layers}": {"layers": layers} for layers in ("0-1", "0-3", "0-4, 7", "4-7")},
    }),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A held-out scene, and the subject that is to be carried into it."""

    scene: world.Scene
    reference: np.ndarray  # uint8 RGB `[96, 96, 3]`

    @property
    def text(self) -> str:
        return caption_for("subject", self.scene)


def cases(levels: tuple[float, ...], seed: int, count: int) -> list[Case]:
    rng = np.random.default_rng(4)
    scenes = shipped.some(count, levels, seed)
    return [Case(scene, condition_picture("subject", scene, SIDE, rng)) for scene in scenes]


@torch.inference_mode()
def draw(chosen: list[Case], settings: Settings | None, seed: int = 1) -> np.ndarray:
    """uint8 RGB `[N, 96, 96, 3]`, each from noise of its own. `settings` of the node; None is without it."""
    host = comfyui()
    from dit_toolkit.host.control import freecus

    model, clip, vae = host.embedded.load_model(), host.embedded.load_clip(), host.embedded.load_vae()
    (nothing,) = host.nodes.CLIPTextEncode().encode(clip, "")
    shown = []
    for number, case in enumerate(chosen):
        freed = model
        if settings is not None:
            image = torch.from_numpy(case.reference)[None] / 255
            mask = ((image - GREY / 255).abs().amax(-1) > MASK).float()
            freed = freecus.attach(model, image, mask, vae, **{"layers": "all", **settings})
        (words,) = host.nodes.CLIPTextEncode().encode(clip, case.text)
        empty = {"samples": torch.zeros(1, 16, SIDE // 8, SIDE // 8)}
        (drawn,) = host.nodes.KSampler().sample(
            freed, seed + number, STEPS, CFG, "euler", "simple", words, nothing, empty
        )
        shown.append((vae.decode(drawn["samples"])[0] * 255).round().byte().numpy())
    return np.stack(shown)


def tally(images: np.ndarray, chosen: list[Case]) -> dict[str, float]:
    """What `shipped.tally` finds, and the shares of dolls that can be read and of those with the right colour."""
    found = shipped.tally(images, [case.scene for case in chosen])
    dolls = [read_doll(image) for image in images]
    same = [agreement(doll, case.scene.things[0]) for doll, case in zip(dolls, chosen, strict=True)]
    found["doll"] = round(float(np.mean([doll is not None for doll in dolls])), 3)
    return found | {part: round(float(np.mean([one[part] for one in same])), 3) for part in ("shirt", "bottom", "hair")}


def measure(count: int = 32, everything: bool = False) -> dict[str, dict[str, dict[str, float]]]:
    """The tables, row by row."""
    found = {}
    for title, table in TABLES.items():
        chosen = cases(table.levels, table.seed, count)
        rows = {**MAIN, **table.others} if everything else MAIN
        found[title] = {name: tally(draw(chosen, settings), chosen) for name, settings in rows.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--all", action="store_true", help="other scales, shifts and layers too")
    parser.add_argument("--save", action="store_true", help=SAVE)
    options = parser.parse_args()
    tell("freecus", measure(options.count, options.all), options.save)


if __name__ == "__main__":
    main()
