"""In-Context LoRA: sets of related pictures as panels of one canvas, for text to set, image to set and training.

Paper: In-Context LoRA, arXiv:2410.23775. Panels, prompts and canvases are in `models/control/panel_*.py`, folders of
sets in `host/control/in_context_lora.py`, and what training needs of the model in `host/control/training.py`. ComfyUI
loads the LoRAs, samples and trains; the model is never touched.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from comfy.model_management import intermediate_device
from comfy_api.latest import io, ui
from torch import Tensor

from ..host.control import training
from ..host.control.in_context_lora import fingerprint, folders, read_sets
from ..host.progress import decoded, each_of
from ..models.control.panel_layout import LIMIT, PRESETS, TOKEN, Layout, Tags, panel_layout
from ..models.control.panel_pictures import (
    Fit,
    Start,
    compose,
    encode_panels,
    finished,
    given_panels,
    latent_panels,
    split,
    start_panel,
    unknown_mask,
)
from ..models.control.panel_prompt import joint_prompt, panel_texts
from .inputs import UNSET, check, choice, model_input

PanelsType = io.Custom("DIT_PANELS")

Encode = Literal["per panel", "whole canvas"]

LARGEST = 4096  # pixels of a panel's side


def panel_side(name: str, side: str) -> io.Input:
    tooltip = f"{side} of one panel in pixels, a multiple of 16. Read with custom only."
    return io.Int.Input(name, default=512, min=TOKEN, max=LARGEST, step=TOKEN, tooltip=tooltip)


def fit_input() -> io.Input:
    """How a picture of other proportions is brought into a panel."""
    return choice(
        "fit",
        Fit,
        "crop",
        "For pictures of other proportions: crop fills the panel and cuts off the rest, pad keeps all and adds grey "
        "around it, stretch distorts.",
    )


class PanelLayout(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiTPanelLayout",
            display_name="Panel Layout",
            category="DiT Toolkit/latent",
            description=(
                "Lays out 2 to 64 related pictures as panels of one canvas and joins their prompts into one, as "
                "In-Context LoRAs are trained: storyboards, brand designs, before and after, one person in many scenes."
            ),
            search_aliases=[
                "in-context lora", "ic-lora", "consistent character", "character", "storyboard", "panels", "grid",
                "diptych", "character sheet", "comic",
            ],
            inputs=[
                choice("preset", ["custom", *PRESETS], "custom",
                       "Canvas, grid, tags and prefix of a published In-Context LoRA, by its file name. custom "
                       "reads the four numbers below."),
                io.Int.Input("rows", default=1, min=1, max=LIMIT, tooltip="Rows of panels. Read with custom only."),
                io.Int.Input("columns", default=2, min=1, max=LIMIT,
                             tooltip="Columns of panels. Read with custom only."),
                panel_side("panel_width", "Width"),
                panel_side("panel_height", "Height"),
                choice("tags", Tags, "auto",
                       "How the prompt introduces each panel: [LEFT], [SCENE-1] or [IMAGE1]. auto is what the preset "
                       "was trained with; for custom, positions if they have names, scenes for one column."),
                io.String.Input("prefix", default="",
                                tooltip="The beginning of the prompt, such as [MOVIE-SHOTS]. Empty: that of the "
                                "preset, if it has one. It is not repeated if the summary has it as a word of "
                                "its own."),
                io.String.Input("summary", default="", multiline=True, dynamic_prompts=True,
                                tooltip="One sentence on the whole set: what it shows and what "
                                "its panels have in common."),
                io.String.Input("panel_prompts", default="", multiline=True, dynamic_prompts=True,
                                tooltip="One line per panel, row by row. Tags are put in front; write a tag yourself "
                                "to have it elsewhere. Name people in < > and use the same name in every panel."),
                io.String.Input("given", default="",
                                tooltip="Numbers of the panels you have pictures for, like 1, 3. "
                                "Empty: all are generated."),
            ],
            outputs=[
                PanelsType.Output(display_name="panels", tooltip="The layout, for the other panel nodes."),
                io.String.Output(display_name="prompt", tooltip="The joined prompt, for the text encoder."),
                io.Int.Output(display_name="width", tooltip="Width of the canvas, for ModelSamplingFlux and latents."),
                io.Int.Output(display_name="height", tooltip="Height of the canvas."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        preset: str,
        rows: int,
        columns: int,
        panel_width: int,
        panel_height: int,
        tags: Tags,
        prefix: str,
        summary: str,
        panel_prompts: str,
        given: str,
    ) -> io.NodeOutput:
        check(cls, locals())
        layout = panel_layout(preset, rows, columns, panel_width, panel_height, tags, prefix, given)
        prompt = joint_prompt(layout, summary, panel_texts(panel_prompts, layout.count))
        return io.NodeOutput(layout, prompt, layout.width, layout.height, ui=ui.PreviewText(prompt))


class PanelLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiTPanelLatent",
            display_name="Panel Latent",
            category="DiT Toolkit/latent",
            description=(
                "Makes the canvas to sample on. Panels that are given as pictures are encoded and kept; the sampler "
                "fills in the others, looking at them. Without pictures it is an empty latent of the right size."
            ),
            search_aliases=[
                "in-context lora", "ic-lora", "inpaint panel", "image to set", "compose panels", "diptych canvas",
            ],
            inputs=[
                PanelsType.Input("panels", optional=True,
                                 tooltip="From Panel Layout, which says what panels are given."),
                io.Vae.Input("vae", tooltip="The model's VAE, which encodes the pictures."),
                io.Autogrow.Input(
                    "images",
                    optional=True,
                    template=io.Autogrow.TemplateNames(
                        io.Image.Input(
                            "image",
                            optional=True,
                            tooltip="A picture for a given panel, of any size. A batch counts as several pictures.",
                        ),
                        names=[f"image_{number}" for number in range(1, LIMIT * LIMIT + 1)],
                        min=0,
                    ),
                    tooltip="The pictures, in the order of the given panels: image_1 is for the first of them.",
                ),
                fit_input(),
                choice("encode", Encode, "per panel",
                       "per panel: each is encoded by itself, so that no colour reaches over a border. whole canvas: "
                       "in one go, as a finished picture would be."),
                choice("start", Start, "neutral",
                       "The start of the other panels, for a sampler with denoise below 1. At denoise 1 it has no "
                       "effect on flow models such as FLUX, and a slight one on others. neutral is grey."),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="How many canvases to sample at once."),
            ],
            outputs=[
                io.Latent.Output(tooltip="The canvas, with a mask that keeps the given panels. For any sampler."),
                io.Image.Output(display_name="canvas",
                                tooltip="What was encoded: given panels in their places, the rest grey."),
                io.Mask.Output(display_name="mask",
                               tooltip="1 on the panels to be generated, at the canvas's size. With 'canvas' into "
                               "InpaintModelConditioning for models that are made to inpaint, such as FLUX.1-Fill."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        vae: Any,
        fit: Fit,
        encode: Encode,
        start: Start,
        batch_size: int,
        panels: Any = None,
        images: io.Autogrow.Type | None = None,
    ) -> io.NodeOutput:
        check(cls, locals())
        given = given_panels(panels, pictures(images), fit)
        fill = start_panel(panels, given, start)
        canvas = compose(panels, given, fill)
        ratio = checked_ratio(panels, vae)
        mask = unknown_mask(panels).to(canvas)
        if not given:
            size = (panels.height // ratio, panels.width // ratio)
            zeros = torch.zeros(batch_size, vae.latent_channels, *size, device=intermediate_device())
            return io.NodeOutput({"samples": zeros, "downscale_ratio_spacial": ratio}, canvas, mask[0])
        per_panel = encode == "per panel"
        latent = encode_panels(panels, given, fill, vae.encode, each_of) if per_panel else vae.encode(canvas)
        samples = latent.repeat(batch_size, *[1] * (latent.ndim - 1))
        return io.NodeOutput({"samples": samples, "noise_mask": mask}, canvas, mask[0])


class SplitPanels(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiTPanelSplit",
            display_name="Split Panels",
            category="DiT Toolkit/image",
            description=(
                "Cuts a sampled canvas back into its panels, exact to the pixel, as a batch of pictures. Works on an "
                "upscaled canvas too, or decodes the panels one by one so that no colour bleeds over a border."
            ),
            search_aliases=["in-context lora", "ic-lora", "cut panels", "grid to images", "uncombine", "crop"],
            inputs=[
                io.Image.Input("image", optional=True,
                               tooltip="The decoded canvas, or several. May have been upscaled."),
                PanelsType.Input("panels", optional=True, tooltip="The layout that it was sampled with."),
                io.Int.Input("inset", default=0, min=0, max=256,
                             tooltip="Pixels to cut off all four sides of each panel, where the neighbour's colours "
                             "bleed over the border. 0 keeps everything."),
                io.Image.Input("canvas", optional=True,
                               tooltip="From Panel Latent. Given panels are then taken from "
                               "here, untouched by the VAE."),
                io.Latent.Input("latent", optional=True,
                                tooltip="The sampled canvas, instead of 'image': each panel is decoded by itself, "
                                "without its neighbours. Of a video, each frame counts as a canvas. Needs 'vae'."),
                io.Vae.Input("vae", optional=True, tooltip="Decodes 'latent'. Not read for 'image'."),
            ],
            outputs=[io.Image.Output(tooltip="The panels, row by row; of several canvases one after the other.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        inset: int,
        panels: Any = None,
        image: Tensor | None = None,
        canvas: Tensor | None = None,
        latent: Any = None,
        vae: Any = None,
    ) -> io.NodeOutput:
        check(cls, locals())
        if (image is None) == (latent is None):
            raise ValueError("Split Panels needs either 'image', or 'latent' and 'vae'. Connect one of the two.")
        if image is not None:
            return io.NodeOutput(split(panels, image, inset, canvas))
        if vae is None:
            raise ValueError("Split Panels needs 'vae' to decode 'latent'. Connect it, or use 'image' instead.")
        made = decoded(vae, latent_panels(panels, latent["samples"]))
        if made.ndim == 5:  # an autoencoder for video: the frames come one after the other, as VAE Decode gives them
            made = made.unflatten(0, (-1, panels.count)).transpose(1, 2).flatten(0, 2)
        return io.NodeOutput(finished(panels, made, inset, canvas))


class PanelSets(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiTPanelSets",
            display_name="Panel Sets From Folder",
            category="DiT Toolkit/training",
            description=(
                "Puts a folder of picture sets together for training an In-Context LoRA: one canvas and one caption "
                "per set, for Make Training Dataset and Train LoRA. 20 to 100 sets are enough."
            ),
            search_aliases=[
                "in-context lora", "ic-lora", "dataset", "train your own lora", "training sets", "captions",
            ],
            inputs=[
                choice("folder", folders(), UNSET,
                       "A folder in ComfyUI's input folder. Each folder in it is a set: one picture per panel in the "
                       "order of their names, and caption.txt, or one .txt per picture. The example ships with the "
                       "pack: 20 sets for 1 x 2 panels of 96 x 96."),
                PanelsType.Input("panels", optional=True,
                                 tooltip="From Panel Layout: sizes, tags and prefix. Its prompts are not read here."),
                fit_input(),
            ],
            outputs=[
                io.Image.Output(display_name="images", is_output_list=True, tooltip="One canvas per set."),
                io.String.Output(display_name="texts", is_output_list=True, tooltip="One caption per canvas."),
            ],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, folder: str, **others: Any) -> str:
        return fingerprint(folder)

    @classmethod
    def execute(cls, folder: str, fit: Fit, panels: Any = None) -> io.NodeOutput:
        check(cls, locals(), files=("folder",))
        sets = read_sets(folder, panels, fit)
        return io.NodeOutput([found.canvas for found in sets], [found.caption for found in sets])


class PrepareTraining(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiTPrepareTraining",
            display_name=training.NODE,
            category="DiT Toolkit/training",
            description=(
                "Goes between the model and Train LoRA, so that a FLUX.1 model learns from correct gradients, and "
                "each picture of a batch from its own caption. Sampled pictures do not change."
            ),
            search_aliases=[
                "in-context lora",
                "ic-lora",
                "train lora",
                "training",
                "gradient checkpointing",
                "batch size",
            ],
            inputs=[model_input("A FLUX.1 model, to be trained by ComfyUI's Train LoRA.")],
            outputs=[
                io.Model.Output(tooltip="The model for Train LoRA. Sampling it gives the same pictures as before.")
            ],
        )

    @classmethod
    def execute(cls, model: io.Model.Type) -> io.NodeOutput:
        return io.NodeOutput(training.attach(model))


def pictures(images: dict[str, Tensor | None] | None) -> list[Tensor]:
    """Every picture `[1, H, W, C]`, in the order of the inputs' numbers; a batch gives several."""
    connected = [(int(name.rpartition("_")[2]), image) for name, image in (images or {}).items() if image is not None]
    return [picture[None] for _, image in sorted(connected, key=lambda pair: pair[0]) for picture in image]


def checked_ratio(panels: Layout, vae: Any) -> int:
    """Pixels of one latent pixel. Panels must end on latent pixels, or the VAE would cut them."""
    ratio = vae.spacial_compression_encode()
    if panels.panel_width % ratio or panels.panel_height % ratio:
        raise ValueError(
            f"this VAE makes one latent pixel of {ratio} x {ratio}, and panels of {panels.panel_width} x "
            f"{panels.panel_height} do not end on one. Choose multiples of {ratio} in Panel Layout."
        )
    return ratio


NODES = [PanelLayout, PanelLatent, SplitPanels, PanelSets, PrepareTraining]
