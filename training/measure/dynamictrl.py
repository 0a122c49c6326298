"""Measure DynamiCtrl on the small video model: `python -m training.measure.dynamictrl [--count 16]`.

Prints a table of the model card. Held-out dolls move as no clip of the training moved. The very nodes bring the first
frame of each clip to life: by its own poses, by none, and by somebody else's. Every fourth frame is judged by
`training.score`: how far hands and feet are from where they should be, and whether the doll is still the one of the
picture.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .. import world
from ..comfyui import comfyui
from ..dynamictrl import FRAMES
from ..score import OUTFIT, agreement, pose_error, pose_in, read_doll
from . import SAVE, shipped, tell

SIDE, FPS = 96, 8
STEPS, CFG = 12, 1.0
EVERY = 4  # frames between those that are judged
ALONE = (0.0, 0.0, 1.0)  # dolls alone: how often each difficulty of the world comes


@dataclass(frozen=True)
class Case:
    """A clip as it should be: a scene a frame."""

    frames: tuple[world.Scene, ...]

    @property
    def picture(self) -> np.ndarray:
        return world.render(self.frames[0], SIDE).image

    @property
    def text(self) -> str:
        return world.caption(self.frames[0])

    @property
    def poses(self) -> list[dict]:
        """POSE_KEYPOINT, as ComfyUI's extractor gives it."""
        points = [world.openpose(frame.things[0]) * (SIDE, SIDE, 1) for frame in self.frames]
        people = [[{"pose_keypoints_2d": each.flatten().tolist()}] for each in points]
        return [{"canvas_width": SIDE, "canvas_height": SIDE, "people": each} for each in people]


def cases(count: int, seed: int = 31, levels: Sequence[float] = ALONE) -> list[Case]:
    rng = np.random.default_rng(seed)
    return [Case(tuple(world.moving(scene, FRAMES, rng))) for scene in shipped.some(count, levels, seed)]


class Animation:
    """The nodes of DynamiCtrl, and ComfyUI's sampler, on the embedded video model."""

    def __init__(self, steps: int = STEPS, cfg: float = CFG):
        host = comfyui()
        from dit_toolkit.nodes.dynamictrl import CogVideoXSampling, DynamiCtrlConditioning
        from dit_toolkit.nodes.embedded import LoadEmbedded
        from dit_toolkit.nodes.pose_video import PoseVideo

        self.pose_video, self.conditioning, self.sampling = PoseVideo, DynamiCtrlConditioning, CogVideoXSampling
        self.model, self.clip, self.vae = LoadEmbedded.execute("CogVideoX").result
        self.steps, self.cfg, self.host = steps, cfg, host

    def drawn(self, poses: list[dict]) -> torch.Tensor:
        """Poses as pictures, where they are: the small world's dolls are all of one build."""
        return self.pose_video.execute(
            poses=poses, width=SIDE, height=SIDE, length=0, alignment="none", style="bold", transition_frames=0,
            person="largest", frame_rate=0.0, stride=1, smoothing=0.0, body=1.0, hands=1.0, face=1.0,
            prepend_reference=False, crop="center", mask_margin=0.06,
        ).result[0]  # fmt: skip

    @torch.inference_mode()
    def conditions(
        self, picture: np.ndarray, poses: list[dict] | None, text: str, strength: float = 1.0
    ) -> tuple[list, list, dict]:
        """Positive, negative and the empty latent of a clip as long as its poses."""
        prompt, nothing = (self.host.nodes.CLIPTextEncode().encode(self.clip, said)[0] for said in (text, ""))
        return self.conditioning.execute(
            positive=prompt, negative=nothing, vae=self.vae, reference=torch.from_numpy(picture)[None] / 255,
            width=SIDE, height=SIDE, length=FRAMES if poses is None else len(poses), crop="center",
            pose_strength=strength, start_percent=0.0, end_percent=1.0, ref_latent_scale=1.0,
            pose=None if poses is None else self.drawn(poses),
        ).result[:3]  # fmt: skip

    @torch.inference_mode()
    def frames(self, latent: torch.Tensor) -> np.ndarray:
        """uint8 `[F, H, W, 3]`."""
        return (self.vae.decode(latent).flatten(0, -4) * 255).round().byte().numpy()

    @torch.inference_mode()
    def __call__(
        self, picture: np.ndarray, poses: list[dict] | None, text: str, seed: int = 1, strength: float = 1.0
    ) -> np.ndarray:
        """A clip, uint8 `[F, H, W, 3]`."""
        from comfy_extras.nodes_custom_sampler import SamplerCustom

        positive, negative, latent = self.conditions(picture, poses, text, strength)
        model, sampler, sigmas, *_ = self.sampling.execute(self.model, "DDIM", self.steps).result
        made = SamplerCustom.execute(model, True, seed, self.cfg, positive, negative, sampler, sigmas, latent).result[0]
        return self.frames(made["samples"])


def judged(clip: np.ndarray, case: Case, every: int = EVERY) -> dict[str, float]:
    """Means over every so many frames after the first."""
    first = case.frames[0]
    rows = []
    for k in range(every, len(clip), every):
        seen = agreement(read_doll(clip[k]), first.things[0])
        rows.append((pose_error(pose_in(clip[k], first), case.frames[k].things[0]), all(seen[part] for part in OUTFIT)))
    return dict(zip(("pose error", "same doll"), map(float, np.mean(rows, 0)), strict=True))


def measure(count: int = 16, animation: Animation | None = None, sheet: Path | None = None) -> dict[str, dict]:
    animation, found = animation or Animation(), cases(count)
    truth = [np.stack([world.render(frame, SIDE).image for frame in case.frames]) for case in found]
    coded = [animated_by_itself(animation, clip) for clip in truth]
    clips = {
        "the clips themselves": truth,
        "autoencoder": coded,
        "DynamiCtrl": [animation(case.picture, case.poses, case.text, k) for k, case in enumerate(found)],
        "without poses": [animation(case.picture, None, case.text, k) for k, case in enumerate(found)],
        "somebody else's": [
            animation(case.picture, other.poses, case.text, k)
            for k, (case, other) in enumerate(zip(found, found[1:] + found[:1], strict=True))
        ],
    }
    if sheet is not None:
        save(sheet, clips, count)
    table = {name: [judged(clip, case) for clip, case in zip(made, found, strict=True)] for name, made in clips.items()}
    return {
        name: {part: round(float(np.mean([row[part] for row in rows])), 3) for part in rows[0]}
        for name, rows in table.items()
    }


@torch.inference_mode()
def animated_by_itself(animation: Animation, clip: np.ndarray) -> np.ndarray:
    """A clip through the autoencoder alone."""
    return animation.frames(animation.vae.encode(torch.from_numpy(clip) / 255))


def save(path: Path, clips: dict[str, list[np.ndarray]], count: int) -> None:
    """Every fourth frame: a row for each way, and a block for each clip."""
    import cv2

    rows = [np.concatenate(list(clips[name][k][::EVERY]), 1) for k in range(min(count, 6)) for name in clips]
    cv2.imwrite(str(path), np.concatenate(rows)[..., ::-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--sheet", type=Path, help="write frames of the first clips here, as one picture")
    parser.add_argument("--save", action="store_true", help=SAVE)
    options = parser.parse_args()
    tell("dynamictrl", measure(options.count, sheet=options.sheet), options.save)


if __name__ == "__main__":
    main()
