"""DiT4SR: restore and enlarge a photo with Stable Diffusion 3.5 Medium.

Paper: DiT4SR, arXiv:2503.23580. The method is in `models/restore/dit4sr.py`, its windows in
`models/restore/dit4sr_tiles.py`, its hooks in `host/restore/dit4sr.py`. Captions, VAE tiles and the colour fix are
ComfyUI's own nodes.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from comfy.model_management import intermediate_device
from comfy_api.latest import io

from ..host import progress
from ..host.part_of_run import PartOfRun
from ..host.restore.dit4sr import attach, enlarged, plan
from ..host.restore.dit4sr_extract import Precision, extract, target_of
from ..host.restore.dit4sr_files import load, names
from ..host.restore.dit4sr_sampling import CFG, SHIFT, STEPS, sampling
from ..host.restore.dit4sr_settings import NODE, DiT4SR, check_numbers, check_tiles
from ..models.restore.dit4sr import CROSS_STREAM_SCALE
from ..models.restore.dit4sr_keys import Asked
from ..models.restore.dit4sr_prompt import Preset, prompts
from .inputs import UNSET, check, choice, model_input, part_of_run, share

logger = logging.getLogger(__name__)

DiT4SRType = io.Custom("DIT_DIT4SR")

MEDIUM = "Stable Diffusion 3.5 Medium, in any precision ComfyUI loads."


def file_input(tooltip: str) -> io.Input:
    return choice("file", names(), UNSET, tooltip)


class LoadDiT4SR(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiTLoadDiT4SR",
            display_name="Load DiT4SR Patch",
            category="DiT Toolkit/loaders",
            description=(
                "Loads what DiT4SR adds to Stable Diffusion 3.5 Medium: from a patch, or from the published "
                "transformer, whole or in several files. Of a transformer only the added weights are read."
            ),
            search_aliases=["dit4sr", "super resolution patch", "restore patch", "model patch"],
            inputs=[
                file_input("A file in models/dit4sr, models/model_patches or models/diffusion_models."),
                choice("variant", Asked, "auto",
                       "v1: dit4sr_q and dit4sr_f. r1: dit4sr_r1. auto: as the file says. The wrong one is plainly "
                       "visible.", advanced=True),
            ],
            outputs=[
                DiT4SRType.Output(display_name="dit4sr", tooltip="The patch, for Apply DiT4SR."),
                io.String.Output(display_name="report", tooltip="One line: what the file holds."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, file: str, variant: Asked) -> io.NodeOutput:
        check(cls, locals(), files=("file",))
        loaded = load(file, variant)
        logger.info("DiT4SR %s", loaded.report)
        return io.NodeOutput(loaded, loaded.report)


class ApplyDiT4SR(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiTApplyDiT4SR",
            display_name=NODE,
            category="DiT Toolkit/model/patch",
            description=(
                "Restores a small, blurred or noisy photo at several times its size: Stable Diffusion 3.5 Medium draws "
                "it anew and looks at the photo in every layer. Large pictures are made in tiles, in one sampler."
            ),
            search_aliases=[
                "dit4sr", "upscale", "upscaler", "super resolution", "restore", "enhance", "supir",
                "image restoration", "deblur", "denoise photo", "tile",
            ],
            inputs=[
                model_input(MEDIUM),
                DiT4SRType.Input("dit4sr", optional=True, tooltip="From Load DiT4SR Patch."),
                io.Vae.Input("vae", tooltip="The model's VAE, which encodes 'image'."),
                io.Image.Input("image", tooltip="The photo, or several of one size. Grey or RGB."),
                io.Float.Input("upscale_by", default=4.0, min=1.0, max=8.0, step=0.1,
                               tooltip="Size of the result, as a multiple of the photo's. Trained for 4."),
                share("strength", 1.0,
                      "How much of the photo reaches the picture. 1 is as published, less gives the model more "
                      "freedom. 0 turns the node off."),
                *part_of_run(
                    "Where in the run the model begins to look at the photo. 0 is the start.",
                    "Where in the run it stops. 1 is the end.",
                    advanced=True,
                ),
                io.Float.Input("cross_stream_scale", default=CROSS_STREAM_SCALE, min=0.0, max=4.0, step=0.05,
                               advanced=True, tooltip="Factor on the fine detail that goes straight from the photo "
                               "into the picture. 1.2 as published, 1 as trained."),
                io.Int.Input("min_side", default=512, min=16, max=2048, step=16, advanced=True,
                             tooltip="A photo whose shorter side would come out below this, in pixels, is made larger "
                             "for the model. Trained at 512."),
                io.Int.Input("tile", default=64, min=0, max=512, step=2, advanced=True,
                             tooltip="Side of a tile, in latent pixels of 8. 64 is 512 pixels, as trained. 0 makes the "
                             "picture in one piece."),
                io.Int.Input("overlap", default=24, min=0, max=256, step=2, advanced=True,
                             tooltip="How far neighbouring tiles overlap, in latent pixels of 8. More hides seams "
                             "better and is slower."),
                io.Int.Input("tile_batch", default=1, min=1, max=64, advanced=True,
                             tooltip="Tiles that are computed at a time. More needs more memory. The picture is the "
                             "same, up to rounding."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model, restoring this photo."),
                io.Latent.Output(display_name="latent", tooltip="Empty, of the right size. For the sampler."),
                io.Image.Output(display_name="reference", tooltip="The photo, enlarged without the model. For a colour "
                                "fix behind VAE Decode, and to compare."),
                io.Int.Output(display_name="width", tooltip="Width that was asked for, in pixels. The model's own is "
                              "a multiple of 16."),
                io.Int.Output(display_name="height", tooltip="Height that was asked for, in pixels."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        vae: Any,
        image: Any,
        upscale_by: float,
        strength: float,
        start_percent: float,
        end_percent: float,
        cross_stream_scale: float,
        min_side: int,
        tile: int,
        overlap: int,
        tile_batch: int,
        dit4sr: Any = None,
    ) -> io.NodeOutput:
        check(cls, locals())
        check_numbers(strength, cross_stream_scale)
        check_tiles(tile, overlap)
        part = PartOfRun(start_percent, end_percent)
        if image.shape[-1] == 4:
            raise ValueError(
                f"{NODE}: 'image' has an alpha channel, and a photo has none. Put Split Image with Alpha before it, "
                "and enlarge the mask by itself."
            )
        sizes = plan(image.shape[1], image.shape[2], upscale_by, min_side)
        reference = enlarged(image, sizes.sampled).to(intermediate_device())
        (latent,) = progress.encoded(vae, reference)
        settings = DiT4SR(
            None,
            dit4sr.name,
            latent,
            strength=strength,
            cross_stream_scale=cross_stream_scale,
            part=part,
            tile=tile,
            overlap=overlap,
            tile_batch=tile_batch,
        )
        patched = attach(model, dit4sr.patcher, dit4sr.made_for, settings)
        empty = {"samples": torch.zeros(settings.latent.shape, device=intermediate_device())}
        height, width = sizes.final
        return io.NodeOutput(patched, empty, reference, width, height)


class ExtractDiT4SR(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiTExtractDiT4SR",
            display_name="Extract DiT4SR Patch",
            category="DiT Toolkit/loaders",
            description=(
                "Makes a patch of 0.5 to 0.7 GB from the published transformer of 5 to 11 GB, which is not needed any "
                "more then. The patch goes into output/dit4sr, where Load DiT4SR Patch finds it."
            ),
            search_aliases=["dit4sr", "extract", "save patch", "smaller file"],
            is_output_node=True,
            inputs=[
                file_input("The published transformer: one file, or the index of several."),
                io.Model.Input("model", optional=True,
                               tooltip="Stable Diffusion 3.5 Medium, straight from its loader. Connected, the node "
                               "first compares it with the base weights in the file."),
                choice("precision", Precision, "float16", "Of the patch. float16 is what the authors run."),
                io.String.Input("name", default="dit4sr", tooltip="What to call the patch. A number is put behind it."),
            ],
            outputs=[io.String.Output(display_name="report", tooltip="One line: the file that was written, and what "
                                      "it holds.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, file: str, precision: Precision, name: str, model: Any = None) -> io.NodeOutput:
        check(cls, locals(), files=("file",))
        report = extract(file, target_of(name), precision, model)
        logger.info("DiT4SR %s", report)
        return io.NodeOutput(report)


class DiT4SRPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiTDiT4SRPrompt",
            display_name="DiT4SR Prompt",
            category="DiT Toolkit/conditioning",
            description=(
                "Makes the two prompts of DiT4SR from a caption of the photo: what is in it, the words its authors put "
                "behind that, and what must not be in it."
            ),
            search_aliases=["dit4sr", "prompt for upscaling", "caption of the photo", "negative prompt"],
            inputs=[
                io.String.Input("caption", default="", multiline=True, dynamic_prompts=True,
                                tooltip="What the photo shows, in a few sentences: your own words, or those of a "
                                "language model that sees it. What is wrong here is drawn."),
                choice("preset", Preset, "published",
                       "Words behind the caption, and the negative prompt. published: of the authors' program. demo: "
                       "fewer words. none: the caption alone."),
                io.Boolean.Input("filter", default=True,
                                 tooltip="Leave out sentences that tell of the photo as a photo: blur, focus, depth. "
                                 "Language models write such, and they would be drawn."),
            ],
            outputs=[
                io.String.Output(display_name="positive", tooltip="For a CLIP Text Encode."),
                io.String.Output(display_name="negative", tooltip="For another one."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, caption: str, preset: Preset, filter: bool) -> io.NodeOutput:
        check(cls, locals())
        return io.NodeOutput(*prompts(caption, preset, bool(filter)))


class DiT4SRSampling(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiTDiT4SRSampling",
            display_name="DiT4SR Sampling",
            category="DiT Toolkit/sampling",
            description=(
                "Sets the sampling of DiT4SR's authors: euler, schedule normal, shift 3, 40 steps, cfg 8. For "
                "SamplerCustom. Other schedules have other noise levels."
            ),
            search_aliases=["dit4sr", "sampler settings", "schedule and shift", "sampling for upscaling"],
            inputs=[
                model_input("From Apply DiT4SR."),
                io.Int.Input("steps", default=STEPS, min=1, max=200,
                             tooltip="40 as published. The authors' demo takes 20, in half the time."),
                io.Float.Input("cfg", default=CFG, min=1.0, max=30.0, step=0.1,
                               tooltip="Guidance. 8 as published, 7 in the authors' demo. 4 to 6 stay nearer to the "
                               "photo."),
                io.Float.Input("shift", default=SHIFT, min=0.1, max=20.0, step=0.1, advanced=True,
                               tooltip="Of the schedule. 3 as published."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model at this shift."),
                io.Sampler.Output(display_name="sampler", tooltip="euler, for SamplerCustom."),
                io.Sigmas.Output(display_name="sigmas", tooltip="The schedule, for SamplerCustom."),
                io.Float.Output(display_name="cfg", tooltip="For SamplerCustom."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: io.Model.Type, steps: int, cfg: float, shift: float) -> io.NodeOutput:
        check(cls, locals())
        return io.NodeOutput(*sampling(model, steps, shift), float(cfg))


NODES = [LoadDiT4SR, ApplyDiT4SR, DiT4SRPrompt, DiT4SRSampling, ExtractDiT4SR]
