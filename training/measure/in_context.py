"""Measure the In-Context LoRA of the embedded default: `python -m training.measure.in_context`.

Prints the table of the model card: held-out wordings, ComfyUI's Load LoRA and sampler. The judge is `training.score`.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import data, world
from ..comfyui import comfyui
from ..embedded import load_shipped
from ..in_context import NAME, SIDE, Set, layout
from ..score import OUTFIT, agreement, ground_of, pose_of, read_doll
from . import SAVE, tell
from .shipped import pictures

STEPS, CFG = 20, 2.5  # of the sampler, as in the example workflows
JUDGED = 200  # sets on which the reader of dolls is tried

Pictures = np.ndarray  # uint8 RGB `[N, H, W, 3]`


class Drawer:
    """Draws with ComfyUI's Load LoRA and KSampler on the embedded models. `strength` 0 is without the LoRA."""

    def __init__(self, strength: float = 1.0, name: str = Path(NAME).name):
        host = comfyui()
        self.clip, self.vae = host.embedded.load_clip(), host.embedded.load_vae()
        base = host.embedded.load_model()
        (self.model,) = host.nodes.LoraLoaderModelOnly().load_lora_model_only(base, name, strength)

    def words(self, texts: Sequence[str]) -> list:
        """CONDITIONING with a row per text."""
        rows = [self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))[0] for text in texts]
        pooled = torch.cat([about["pooled_output"] for _, about in rows])
        return [[torch.cat([context for context, _ in rows]), {"pooled_output": pooled}]]

    @torch.inference_mode()
    def draw(self, texts: Sequence[str], seed: int, latent: dict[str, Tensor]) -> Pictures:
        (drawn,) = (
            comfyui()
            .nodes.KSampler()
            .sample(self.model, seed, STEPS, CFG, "euler", "simple", self.words(texts), self.words([""]), latent)
        )
        return (self.vae.decode(drawn["samples"]) * 255).round().byte().numpy()

    def single(self, texts: Sequence[str], seed: int) -> Pictures:
        """Pictures of 96 x 96."""
        return self.draw(texts, seed, {"samples": torch.zeros(len(texts), 16, SIDE // 8, SIDE // 8)})

    @torch.inference_mode()
    def panels(self, texts: Sequence[str], seed: int, left: Pictures | None = None) -> tuple[Pictures, Pictures]:
        """Left and right panels, by our nodes. `left`: pictures that are given."""
        host = comfyui()
        plan = layout("" if left is None else "1")
        how = dict(panels=plan, vae=self.vae, fit="crop", encode="per panel", start="neutral")
        if left is None:
            latent = host.PanelLatent.execute(**how, batch_size=len(texts)).result[0]
        else:
            shown = [{"image_1": torch.from_numpy(one)[None] / 255} for one in left]
            latents = [host.PanelLatent.execute(**how, batch_size=1, images=one).result[0] for one in shown]
            latent = {**latents[0], "samples": torch.cat([one["samples"] for one in latents])}
        canvas = torch.from_numpy(self.draw(texts, seed, latent)).float()
        split = host.SplitPanels.execute(panels=plan, inset=0, image=canvas).result[0].byte().numpy()
        return split[0::2], split[1::2]


def tally(left: Pictures, right: Pictures, sets: Sequence[Set]) -> dict[str, float]:
    """Shares of cases in which the dolls of the two panels agree, by part and in the whole outfit; and, over both
    panels, the shares of dolls that can be read, and of poses and grounds that are as the caption says."""
    agreed, asked = Counter(), Counter()

    def count(**facts: bool) -> None:
        for name, fact in facts.items():
            agreed[name] += fact
            asked[name] += 1

    for a, b, scenes in zip(left, right, sets, strict=True):
        dolls = read_doll(a), read_doll(b)
        common = agreement(*dolls)
        count(outfit=all(common[part] for part in OUTFIT), **common)
        for image, doll, scene in zip((a, b), dolls, scenes, strict=True):
            count(dolls=doll is not None, pose=doll is not None and pose_of(doll.arms) == scene.pose,
                  ground=ground_of(image) == scene.ground)  # fmt: skip
    return {name: round(agreed[name] / asked[name], 3) for name in asked}


def cases(count: int, seed: int = 5) -> list[Set]:
    return list(islice(world.sets(seed, test=True), count))


def alone(scene: world.Scene) -> str:
    """The caption of one panel by itself, silent on what the doll wears."""
    pose = "waving" if scene.pose == "waving" else f"arms {scene.pose}"
    return f"a doll, {pose}, on a {scene.ground} ground"


def chance(left: Pictures, right: Pictures, sets: Sequence[Set]) -> dict[str, float]:
    """The right panels beside the left panels of other cases."""
    return tally(np.roll(left, 1, 0), right, sets)


def judge(sets: Sequence[Set]) -> dict[str, dict[str, float]]:
    """What the reader of dolls says of the world's own pictures: the best that it could say of drawn ones."""
    _, vae = load_shipped()
    panels = [np.stack([world.render(scenes[k], SIDE).image for scenes in sets]) for k in range(2)]
    coded = [pictures(vae, data.encode(vae, shown)) for shown in panels]
    return {"world's own pictures": tally(*panels, sets), "after the autoencoder": tally(*coded, sets)}


def measure(count: int = 32, seed: int = 1, drawn: int = 5) -> dict[str, dict[str, float]]:
    """What the model card says of the LoRA: the same held-out prompts and seeds with and without it.

    Args:
        seed: of the noise. drawn: of the sets.
    """
    sets = cases(count, drawn)
    silent = [world.set_caption(scenes, named=False) for scenes in sets]
    named = [world.set_caption(scenes, named=True) for scenes in sets]
    given = np.stack([world.render(first, SIDE).image for first, _ in sets])
    found = judge(cases(JUDGED, drawn))
    for name, drawer in (("with", Drawer()), ("without", Drawer(0.0))):
        for kind, texts, shown in (("silent", silent, None), ("named", named, None), ("given", silent, given)):
            panels = drawer.panels(texts, seed, shown)
            found[f"{name}, {kind}"] = tally(*panels, sets)
            if name == "with":
                found[f"{name}, {kind}, left panel of another case"] = chance(*panels, sets)
    apart = Drawer(0.0)
    pair = [apart.single([alone(scenes[k]) for scenes in sets], seed + k) for k in range(2)]
    found["two separate pictures"] = tally(*pair, sets)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1, help="of the noise")
    parser.add_argument("--drawn", type=int, default=5, help="seed of the cases")
    parser.add_argument("--save", action="store_true", help=SAVE)
    options = parser.parse_args()
    tell("in_context", measure(options.count, options.seed, options.drawn), options.save)


if __name__ == "__main__":
    main()
