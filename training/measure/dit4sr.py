"""Measure the second base and its DiT4SR patch: `python -m training.measure.dit4sr [--count 32]`.

Prints tables of the model card. Held-out scenes, drawn at 256 x 256, and crops of held-out photographs of that size are
worn and made four times smaller (`training.degrade`). The very nodes bring them back, in tiles of 128 pixels.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from .. import data, photographs, world
from ..comfyui import comfyui
from ..degrade import FACTOR, degraded, enlarged
from ..score import edge_distance
from . import SAVE, shipped, tell

SIDE = 256  # pixels of a picture
PATCH = "tiny_dit4sr.safetensors"
STEPS, CFG = 20, 1.0
TOGETHER = 8  # pictures in a run
TILES = {"min_side": 16, "tile": 16, "overlap": 6, "tile_batch": 4}  # of 128 pixels, as trained


@dataclass(frozen=True)
class Case:
    """A picture, its worn copy a quarter of the size, and what to say of it."""

    picture: np.ndarray
    small: np.ndarray
    text: str


def scenes(count: int, seed: int = 21) -> list[Case]:
    rng, made = np.random.default_rng(seed), []
    for scene in shipped.some(count, data.LEVELS, seed):
        picture = world.render(scene, SIDE).image
        made.append(Case(picture, degraded(picture, rng), world.caption(scene)))
    return made


def photos(count: int, seed: int = 22) -> list[Case]:
    """Crops of the held-out photographs in turn."""
    rng, made = np.random.default_rng(seed), []
    held = photographs.photographs(held_out=True)
    for k in range(count):
        photo = held[k % len(held)]
        top, left = (int(rng.integers(n - SIDE + 1)) for n in photo.shape[:2])
        picture = photo[top : top + SIDE, left : left + SIDE]
        made.append(Case(picture, degraded(picture, rng), ""))
    return made


class Upscaler:
    """Apply DiT4SR and ComfyUI's sampler on the embedded SD3.5 model."""

    def __init__(self, steps: int = STEPS, cfg: float = CFG):
        host = comfyui()
        from dit_toolkit.nodes.dit4sr import ApplyDiT4SR, DiT4SRSampling, LoadDiT4SR

        self.apply, self.sampling = ApplyDiT4SR, DiT4SRSampling
        self.model, self.clip, self.vae = (
            load("SD3.5") for load in (host.embedded.load_model, host.embedded.load_clip, host.embedded.load_vae)
        )
        self.patch = LoadDiT4SR.execute(PATCH, "auto").result[0]
        self.steps, self.cfg = steps, cfg

    def words(self, texts: Sequence[str]) -> list:
        """CONDITIONING with a row per text."""
        rows = [self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))[0] for text in texts]
        pooled = torch.cat([about["pooled_output"] for _, about in rows])
        return [[torch.cat([context for context, _ in rows]), {"pooled_output": pooled}]]

    def pictures(self, latent: torch.Tensor) -> list[np.ndarray]:
        return list((self.vae.decode(latent) * 255).round().byte().numpy())

    @torch.inference_mode()
    def __call__(self, smalls: Sequence[np.ndarray], texts: Sequence[str], seed: int = 1, **settings) -> list:
        """Worn pictures of one size, uint8 `[h, w, 3]`, made larger, each from noise of its own."""
        from comfy_extras.nodes_custom_sampler import SamplerCustom

        found: list[np.ndarray] = []
        for start in range(0, len(smalls), TOGETHER):
            some = slice(start, start + TOGETHER)
            image = torch.from_numpy(np.stack(smalls[some])) / 255
            given = {"upscale_by": float(FACTOR), "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0,
                     "cross_stream_scale": 1.0, **TILES, **settings}  # fmt: skip
            model, latent, *_ = self.apply.execute(
                model=self.model, dit4sr=self.patch, vae=self.vae, image=image, **given
            ).result
            model, sampler, sigmas, cfg = self.sampling.execute(model, self.steps, self.cfg, 3.0).result
            positive, negative = self.words(texts[some]), self.words([""])
            drawn = SamplerCustom.execute(
                model, True, seed + start, cfg, positive, negative, sampler, sigmas, latent
            ).result[0]
            found += self.pictures(drawn["samples"])
        return found


def compared(shown: list[np.ndarray], cases: list[Case]) -> dict[str, float]:
    """Means over pictures: PSNR in dB, SSIM, and the distance of edges in pixels (`score.edge_distance`)."""
    rows = []
    for image, case in zip(shown, cases, strict=True):
        grey = cv2.cvtColor(cv2.GaussianBlur(case.picture, (3, 3), 0), cv2.COLOR_RGB2GRAY)
        edges = np.repeat(cv2.Canny(grey, 60, 140)[..., None], 3, 2)
        rows.append((
            peak_signal_noise_ratio(case.picture, image),
            structural_similarity(case.picture, image, channel_axis=-1),
            edge_distance(image, edges),
        ))  # fmt: skip
    names = ("PSNR, dB", "SSIM", "edge distance, px")
    return {name: round(float(value), 3) for name, value in zip(names, np.mean(rows, 0), strict=True)}


def restored(cases: list[Case], upscaler: Upscaler) -> dict[str, dict[str, float]]:
    """Plain interpolation, the patch, and the patch that is shown somebody else's small picture."""
    smalls, texts = [case.small for case in cases], [case.text for case in cases]
    with torch.inference_mode():
        whole = torch.from_numpy(np.stack([case.picture for case in cases])) / 255
        coded = upscaler.pictures(upscaler.vae.encode(whole))
    return {
        "autoencoder": compared(coded, cases),
        "bicubic": compared([enlarged(small, SIDE, SIDE) for small in smalls], cases),
        "Lanczos": compared([enlarged(small, SIDE, SIDE, cv2.INTER_LANCZOS4) for small in smalls], cases),
        "DiT4SR": compared(upscaler(smalls, texts), cases),
        "somebody else's": compared(upscaler(smalls[1:] + smalls[:1], texts), cases),
    }


@torch.inference_mode()
def drawn(upscaler: Upscaler, count: int, cfg: float, side: int = 128) -> dict[str, float]:
    """Held-out prompts through ComfyUI's KSampler, without the patch; what `shipped.tally` finds."""
    wanted = shipped.some(count, data.LEVELS)
    words, nothing = upscaler.words([world.caption(scene) for scene in wanted]), upscaler.words([""])
    empty = {"samples": torch.zeros(count, 16, side // 8, side // 8)}
    (latent,) = comfyui().nodes.KSampler().sample(
        upscaler.model, 1, STEPS, cfg, "euler", "simple", words, nothing, empty
    )  # fmt: skip
    return shipped.tally(np.stack(upscaler.pictures(latent["samples"])), wanted)


def measure(count: int = 32, prompts: int = 96) -> dict[str, dict]:
    upscaler = Upscaler()
    return {
        "prompts": {f"cfg {cfg}": drawn(upscaler, prompts, cfg) for cfg in (1.0, 2.5)},
        "scenes": restored(scenes(count), upscaler),
        "photographs": restored(photos(count), upscaler),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--save", action="store_true", help=SAVE)
    options = parser.parse_args()
    tell("dit4sr", measure(options.count, options.prompts), options.save)


if __name__ == "__main__":
    main()
