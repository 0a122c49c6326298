"""DynamiCtrl: a person in a picture makes the movements of a pose video, with CogVideoX image-to-video.

Paper: DynamiCtrl, arXiv:2503.21246. The method is in `models/animate/dynamictrl.py`, its hooks in
`host/animate/dynamictrl.py`. The text encoder, the VAE and the sampler are ComfyUI's own.
"""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io, ui

from ..host.animate import cogvideox_lora, dynamictrl_files
from ..host.animate.cogvideox_sampling import SamplerName, sampling
from ..host.animate.dynamictrl_files import Dtype
from ..host.animate.dynamictrl_inputs import Asked, Crop, prepared
from ..host.animate.dynamictrl_settings import NODE
from ..host.part_of_run import PartOfRun
from .inputs import UNSET, check, choice, model_input, part_of_run

logger = logging.getLogger(__name__)


class LoadDynamiCtrl(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiTLoadDynamiCtrl",
            display_name="Load DynamiCtrl",
            category="DiT Toolkit/loaders",
            description=(
                "Loads DynamiCtrl: CogVideoX image-to-video that follows a pose video. From one file, or from the "
                "published folder with its index."
            ),
            search_aliases=["dynamictrl", "cogvideox", "human animation", "character animation", "pose to video model"],
            inputs=[
                choice("file", dynamictrl_files.names(), UNSET,
                       "A file or an index in models/diffusion_models or models/dynamictrl, or one that ships with "
                       "the pack."),
                choice("dtype", Dtype, "default",
                       "default: as in the file. fp8: half the memory, for the large matrices alone; norms and "
                       "embeddings stay as they are. fast: multiplies in fp8 too, on cards that can. float16 gives "
                       "black videos.", advanced=True),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="CogVideoX with the pose norms. Samplers run it as it "
                                "was trained."),
                io.String.Output(display_name="report", tooltip="One line: what the file holds."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, file: str, dtype: Dtype) -> io.NodeOutput:
        check(cls, locals(), files=("file",))
        loaded = dynamictrl_files.load(file, dtype)
        logger.info("%s", loaded.report)
        return io.NodeOutput(*loaded)


class DynamiCtrlConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiTDynamiCtrlConditioning",
            display_name=NODE,
            category="DiT Toolkit/conditioning",
            description=(
                "Gives the prompts a picture of a person, and the movements that the person makes. Also holds the "
                "background still, where a mask says so."
            ),
            search_aliases=["dynamictrl", "cogvideox", "image to video", "pose to video", "human animation", "i2v"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="The prompt: the person's look and the background, in one "
                                      "paragraph."),
                io.Conditioning.Input("negative", tooltip="Empty as published."),
                io.Vae.Input("vae", tooltip="CogVideoX's VAE."),
                io.Image.Input("reference", tooltip="The picture: what the first frame shows."),
                io.Image.Input("pose", optional=True,
                               tooltip="The drawn poses, one picture for each frame, from DynamiCtrl Pose Video. "
                               "Unconnected: CogVideoX moves the picture as it likes."),
                io.Mask.Input("background_mask", optional=True,
                              tooltip="Where the person may move: one mask, or one for each frame. Outside of it the "
                              "background of the picture is held. Unconnected: all of the picture moves."),
                io.Int.Input("width", default=768, min=16, max=4096, step=16, tooltip="Of the video, in pixels."),
                io.Int.Input("height", default=1360, min=16, max=4096, step=16,
                             tooltip="Of the video, in pixels. Trained at 768 x 1360."),
                io.Int.Input("length", default=37, min=5, max=1021, step=8,
                             tooltip="Frames: 5, 13, 21, 29, 37, ... Others are rounded. 16 make a second; trained at "
                             "37."),
                choice("crop", Crop, "center",
                       "For pictures of another shape. center: cut off what is too much. stretch: press them into "
                       "shape, as the authors do."),
                io.Float.Input("pose_strength", default=1.0, min=0.0, max=4.0, step=0.05,
                               tooltip="How strongly the poses act. 1 is as published, 0 turns them off."),
                *part_of_run(
                    "Where in the run the poses begin to act. 0 is the start.",
                    "Where in the run they stop. 1 is the end.",
                    advanced=True,
                ),
                io.Float.Input("ref_latent_scale", default=1.0, min=0.01, max=10.0, step=0.0001, advanced=True,
                               tooltip="Factor on the picture's latent, as the VAE gives it. 1 as in the authors' "
                               "pipeline. 0.7 as in their training script; 1.4286 as in diffusers."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="For the sampler."),
                io.Conditioning.Output(display_name="negative", tooltip="For the sampler."),
                io.Latent.Output(display_name="latent", tooltip="Of the right size. With a mask, it holds the still "
                                 "picture, and where the sampler leaves it alone."),
                io.String.Output(display_name="report", tooltip="One line: size, frames, and what was rounded, held or "
                                 "cut."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        positive: Any,
        negative: Any,
        vae: Any,
        reference: Any,
        width: int,
        height: int,
        length: int,
        crop: Crop,
        pose_strength: float,
        start_percent: float,
        end_percent: float,
        ref_latent_scale: float,
        pose: Any = None,
        background_mask: Any = None,
    ) -> io.NodeOutput:
        check(cls, locals())
        part = PartOfRun(start_percent, end_percent)
        asked = Asked(int(width), int(height), int(length), crop, float(ref_latent_scale))
        found = prepared(positive, negative, vae, reference, pose, background_mask, asked, pose_strength, part)
        log = logger.warning if found.noteworthy else logger.info
        log("%s: %s", NODE, found.report)
        outputs = found.positive, found.negative, found.latent, found.report
        return io.NodeOutput(*outputs, ui=ui.PreviewText(found.report))


class CogVideoXSampling(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiTCogVideoXSampling",
            display_name="CogVideoX Sampling Preset",
            category="DiT Toolkit/sampling",
            description=(
                "Sets the sampling that CogVideoX was trained for: v-prediction with zero terminal SNR, and the steps "
                "of its own schedulers. For SamplerCustom. Without it, ComfyUI's samplers make noise of CogVideoX."
            ),
            search_aliases=["cogvideox", "sampler", "schedule", "v prediction", "zsnr", "trailing", "dynamictrl"],
            inputs=[
                model_input("A CogVideoX model, or DynamiCtrl."),
                choice("sampler", SamplerName, "DPM", "DPM: as the authors. DDIM: without noise on the way."),
                io.Int.Input("steps", default=25, min=1, max=200, tooltip="25 as published; 50 is slower and finer."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model, sampled as it was trained."),
                io.Sampler.Output(display_name="sampler", tooltip="For SamplerCustom."),
                io.Sigmas.Output(display_name="sigmas", tooltip="The schedule, for SamplerCustom."),
                io.String.Output(display_name="sampler_name", tooltip="What to choose in KSampler instead."),
                io.String.Output(display_name="scheduler", tooltip="What to choose in KSampler instead."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: io.Model.Type, sampler: SamplerName, steps: int) -> io.NodeOutput:
        check(cls, locals())
        return io.NodeOutput(*sampling(model, sampler, int(steps)))


class CogVideoXLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiTCogVideoXLora",
            display_name=cogvideox_lora.NODE,
            category="DiT Toolkit/loaders",
            description=(
                "Loads a LoRA for CogVideoX as diffusers and other trainers save it. ComfyUI's own LoRA loader does "
                "not know their names, and leaves all of it out."
            ),
            search_aliases=["cogvideox", "lora", "diffusers", "dynamictrl", "finetrainers"],
            inputs=[
                model_input("A CogVideoX model, or DynamiCtrl."),
                choice("file", cogvideox_lora.names(), UNSET, "A file in models/loras."),
                io.Float.Input("strength", default=1.0, min=-10.0, max=10.0, step=0.05,
                               tooltip="1 as trained, 0 turns the LoRA off."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the LoRA."),
                io.String.Output(display_name="report", tooltip="One line: how many weights it changed."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: io.Model.Type, file: str, strength: float) -> io.NodeOutput:
        check(cls, locals(), files=("file",))
        patched, report = cogvideox_lora.load(model, file, float(strength))
        logger.info("%s", report)
        return io.NodeOutput(patched, report)


NODES = [LoadDynamiCtrl, DynamiCtrlConditioning, CogVideoXSampling, CogVideoXLora]
