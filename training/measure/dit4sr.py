"""Measure the second base and its DiT4SR patch: `python -m training.measure.dit4sr [--count 32]`.

Prints tables of the model card. Held-out scenes, drawn at 256 x 256, and crops of held-out photographs of that size are
worn and made four times smaller (`training.degrade`). The very nodes bring them back, in tiles of 128 pixels.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from .. import data, photographs, world
from ..comfyui import comfyui
from ..degrade import FACTOR, degraded, enlarged
from ..score import edge_distance
from . import shipped

SIDE = 256  # pixels of a picture
PATCH = "tiny_dit4sr.safetensors"
STEPS, CFG = 20, 1.0
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

    def words(self, text: str) -> list:
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    @torch.inference_mode()
    def __call__(self, small: np.ndarray, text: str, seed: int, **settings) -> np.ndarray:
        """A worn picture `[h, w, 3]` made larger, uint8."""
        from comfy_extras.nodes_custom_sampler import SamplerCustom

        image = torch.from_numpy(small)[None] / 255
        given = {"upscale_by": float(FACTOR), "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0,
                 "cross_stream_scale": 1.0, **TILES, **settings}  # fmt: skip
        model, latent, *_ = self.apply.execute(
            model=self.model, dit4sr=self.patch, vae=self.vae, image=image, **given
        ).result
        model, sampler, sigmas, cfg = self.sampling.execute(model, self.steps, self.cfg, 3.0).result
        drawn = SamplerCustom.execute(
            model, True, seed, cfg, self.words(text), self.words(""), sampler, sigmas, latent
        ).result[0]
        return (self.vae.decode(drawn["samples"])[0] * 255).round().byte().numpy()


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
    others = cases[1:] + cases[:1]
    vae = upscaler.vae
    with torch.inference_mode():
        coded = [
            (vae.decode(vae.encode(torch.from_numpy(case.picture)[None] / 255))[0] * 255).round().byte().numpy()
            for case in cases
        ]
    return {
        "autoencoder": compared(coded, cases),
        "bicubic": compared([enlarged(case.small, SIDE, SIDE) for case in cases], cases),
        "Lanczos": compared([enlarged(case.small, SIDE, SIDE, cv2.INTER_LANCZOS4) for case in cases], cases),
        "DiT4SR": compared([upscaler(case.small, case.text, k) for k, case in enumerate(cases)], cases),
        "somebody else's": compared(
            [upscaler(other.small, case.text, k) for k, (case, other) in enumerate(zip(cases, others, strict=True))],
            cases,
        ),
    }


@torch.inference_mode()
def drawn(upscaler: Upscaler, count: int, cfg: float, side: int = 128) -> dict[str, float]:
    """Held-out prompts through ComfyUI's KSampler, without the patch; what `shipped.tally` finds."""
    wanted, host = shipped.some(count, data.LEVELS), comfyui()
    images = []
    for k, scene in enumerate(wanted):
        words, nothing = upscaler.words(world.caption(scene)), upscaler.words("")
        empty = {"samples": torch.zeros(1, 16, side // 8, side // 8)}
        (latent,) = host.nodes.KSampler().sample(
            upscaler.model, 100 + k, STEPS, cfg, "euler", "simple", words, nothing, empty
        )
        images.append((upscaler.vae.decode(latent["samples"])[0] * 255).round().byte().numpy())
    return shipped.tally(np.stack(images), wanted)


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
    options = parser.parse_args()
    print(json.dumps(measure(options.count, options.prompts), indent=1))


if __name__ == "__main__":
    main()
