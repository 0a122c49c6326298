"""Try-on: put a garment on a person from two pictures and a mask, with a FLUX.1 model.

Paper: MC-VTON, arXiv:2501.03630. No code and no weights of it are public: these nodes are a reconstruction from the
paper's text and claim none of its quality. The method is in `models/control/mc_vton.py`, its hooks are in
`host/control/conditions.py`, cutting out and pasting back in `models/control/try_on_image.py`.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from comfy_api.latest import io, ui

from ..host import progress
from ..host.control.conditions_settings import PATCH, Cache
from ..host.control.try_on import attach, brought_to
from ..host.control.try_on_files import FOLDER, load
from ..host.part_of_run import PartOfRun
from ..models.control.mc_vton_keys import Position
from ..models.control.try_on_image import Fill, composite, placed_masks, prepare
from .inputs import (
    ANY_FLUX1,
    check,
    choice,
    cut_out_mask,
    kv_cache,
    model_input,
    part_of_run,
    strength,
    warn_of_background,
    weights_file,
    whole_tokens,
)

logger = logging.getLogger(__name__)

CropType = io.Custom("DIT_CROP")
TryOnType = io.Custom("DIT_TRY_ON")

Size = Literal["auto", "fixed"]
CropOf = Literal["around the mask", "whole picture"]
GarmentPosition = Literal["auto", Position]

# Of nodes that are marked as experimental for it. Cutting out and pasting back are not: they serve any model.
RECONSTRUCTION = "A reconstruction after the MC-VTON paper, whose code and weights are not public."


def longer_side(name: str, tooltip: str) -> io.Input:
    """In pixels; 0 leaves a picture as it is."""
    return io.Int.Input(name, default=0, min=0, max=4096, step=PATCH, advanced=True, tooltip=tooltip)


class TryOnPrepare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiTTryOnPrepare",
            display_name="Try-On Prepare",
            category="DiT Toolkit/image",
            description=(
                "Cuts out a person around the garment's mask, hides the garment, and lays new garments on white, all "
                "in one size. Try-On Composite puts the result back at full resolution."
            ),
            search_aliases=["try on", "vton", "garment", "crop and stitch", "agnostic mask", "mask the clothes"],
            inputs=[
                io.Image.Input("person", tooltip="The person who will wear the garment. Several pictures of one size "
                                         "are fine."),
                io.Mask.Input("mask",
                              tooltip="Where the new garment may go: drawn, or from a segmentation node. Generous is "
                              "better: what shows of the old garment decides the shape of the new one."),
                io.Image.Input("garment",
                               tooltip="The garment alone, best laid flat. A batch tries them on one after the other."),
                cut_out_mask("garment_mask",
                             "Where the garment is in its picture, if there is more to see; the rest becomes white."),
                choice("size", Size, "auto",
                       "auto: proportions of the crop, about 'megapixels' large. fixed: 'width' and 'height'."),
                io.Float.Input("megapixels", default=0.8, min=0.001, max=16.0, step=0.05, round=0.001,
                               tooltip="Million pixels of the working picture. The paper's pictures "
                               "have 0.8. Read for 'auto'."),
                io.Int.Input("width", default=768, min=PATCH, max=8192, step=PATCH,
                             tooltip="In pixels. Read for 'fixed'."),
                io.Int.Input("height", default=1024, min=PATCH, max=8192, step=PATCH,
                             tooltip="In pixels. Read for 'fixed'."),
                choice("crop", CropOf, "around the mask",
                       "What the model sees of the person. A crop has more pixels where it matters."),
                io.Int.Input("dilation", default=8, min=0, max=512,
                             tooltip="Pixels by which the mask grows first. Loose garments need more. "
                             "Try-On Composite fades the result in over these pixels at most. 0 leaves the "
                             "mask as it is, with a hard edge."),
                io.Float.Input("margin", default=0.5, min=0.0, max=4.0, step=0.05, advanced=True,
                               tooltip="How much around the mask is cropped with it, as a part of its longer side."),
                choice("fill", Fill, "grey", advanced=True,
                       tooltip="What hides the garment. Use the LoRA's; Load Try-On LoRA reports it."),
            ],
            outputs=[
                io.Image.Output(display_name="person", tooltip="The masked persons at working size."),
                io.Image.Output(display_name="garment", tooltip="The garments on white, of the same size."),
                io.Mask.Output(display_name="mask", tooltip="The grown mask at working size."),
                io.Int.Output(display_name="width", tooltip="Of the working picture, for the empty latent."),
                io.Int.Output(display_name="height", tooltip="Of the working picture, for the empty latent."),
                io.Int.Output(display_name="batch_size", tooltip="Pictures to make, for the empty latent."),
                CropType.Output(display_name="crop", tooltip="What Try-On Composite needs to put results back."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        person: Any,
        mask: Any,
        garment: Any,
        size: Size,
        megapixels: float,
        width: int,
        height: int,
        crop: CropOf,
        dilation: int,
        margin: float,
        fill: Fill,
        garment_mask: Any = None,
    ) -> io.NodeOutput:
        check(cls, locals())
        if size == "fixed":
            whole_tokens(PATCH, width=width, height=height)
        counts = (len(person), len(garment))
        if 1 not in counts and counts[0] != counts[1]:
            raise ValueError(f"Got {counts[0]} persons and {counts[1]} garments. Give one of either, or one for each.")
        warn_of_background("Try-On Prepare", "mask", mask)
        made = prepare(
            person,
            mask,
            garment,
            garment_mask,
            margin=None if crop == "whole picture" else margin,
            size=(height, width) if size == "fixed" else megapixels * 1e6,
            dilation=dilation,
            fill=fill,
            each=progress.each_of,
        )
        if made.garment_masks is not None:
            warn_of_background("Try-On Prepare", "garment_mask", made.garment_masks)
        height, width = made.paste.working
        seen = ui.PreviewImage(torch.cat([made.persons, made.garments]), cls=cls)
        return io.NodeOutput(made.persons, made.garments, made.masks, width, height, max(counts), made.paste, ui=seen)


class LoadTryOn(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiTLoadTryOn",
            display_name="Load Try-On LoRA",
            category="DiT Toolkit/loaders",
            description=(
                "Loads a try-on LoRA with a branch for the person, one for the garment, or both. They act on the "
                f"tokens of these pictures only; ordinary LoRA loaders cannot use them. {RECONSTRUCTION}"
            ),
            search_aliases=["try-on", "vton lora", "mc-vton", "garment lora", "branch lora"],
            inputs=[weights_file(FOLDER)],
            outputs=[
                TryOnType.Output(display_name="try_on", tooltip="The LoRA, for Apply Try-On."),
                io.String.Output(display_name="report",
                                 tooltip="One line: what each branch touches, and how the file was trained."),
            ],
            is_experimental=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        check(cls, locals(), files=("file",))
        loaded = load(file)
        settings = loaded.checkpoint.settings
        words = " ".join(settings.prompt.split())  # in one line, whatever the file holds
        prompt = f", prompt '{words}'" if words else ""
        report = f"{file}: {loaded.checkpoint.summary}; fill {settings.fill}, {settings.steps} steps{prompt}"
        logger.info("Try-On %s", report)
        return io.NodeOutput(loaded, report)


class ApplyTryOn(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiTTryOnApply",
            display_name="Apply Try-On",
            category="DiT Toolkit/model/patch",
            description=(
                "Lets a FLUX.1 model see a masked person and a garment, each with a LoRA of its own, and paint the "
                f"person wearing it. {RECONSTRUCTION}"
            ),
            search_aliases=[
                "try on", "tryon", "vton", "mc-vton", "virtual try-on", "garment", "clothes", "outfit", "dress",
                "change clothes",
            ],
            inputs=[
                model_input(ANY_FLUX1),
                TryOnType.Input("try_on", optional=True,
                                tooltip="A LoRA that was trained for this model, from Load Try-On LoRA."),
                io.Vae.Input("vae", tooltip="The model's VAE, which encodes both pictures."),
                io.Image.Input("person",
                               tooltip="The masked person from Try-On Prepare. One for all pictures, or "
                               "as many as the batch has."),
                io.Image.Input("garment",
                               tooltip="The garment from Try-On Prepare. One for all pictures, or "
                               "as many as the batch has."),
                strength("person_strength", "Factor on the person's LoRA, 1 as trained. 0 takes the person away."),
                strength("garment_strength", "Factor on the garment's LoRA, 1 as trained. 0 takes the garment away."),
                *part_of_run(
                    "Where in the run both begin to act. 0 is the start.",
                    "Where in the run they stop acting. 1 is the end.",
                ),
                choice("garment_position", GarmentPosition, "auto", advanced=True,
                       tooltip="Where the garment lies for the model: right of the picture or below it. "
                       "auto: as the LoRA was trained."),
                longer_side("person_size",
                            "Longer side in pixels at which the person is shown to the model; it still lies "
                            "over the whole picture. Smaller is faster and needs less memory. 0 leaves it as it is."),
                longer_side("garment_size",
                            "Longer side in pixels at which the garment is shown to the model. 0 leaves it as it is."),
                kv_cache("both pictures'"),
            ],
            outputs=[io.Model.Output(tooltip="The model, dressing the person.")],
            is_experimental=True,
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        vae: Any,
        person: Any,
        garment: Any,
        person_strength: float,
        garment_strength: float,
        start_percent: float,
        end_percent: float,
        garment_position: GarmentPosition,
        person_size: int,
        garment_size: int,
        kv_cache: Cache,
        try_on: Any = None,
    ) -> io.NodeOutput:
        check(cls, locals())
        part = PartOfRun(start_percent, end_percent)
        if person_strength != 0:
            whole_tokens(PATCH, person_size=person_size)
        if garment_strength != 0:
            whole_tokens(PATCH, garment_size=garment_size)
        if person_strength == garment_strength == 0:
            return io.NodeOutput(model)
        shown = {}
        if person_strength != 0:
            shown["person"] = brought_to(person, person_size)
        if garment_strength != 0:
            shown["garment"] = brought_to(garment, garment_size)
        latents = dict(zip(shown, progress.encoded(vae, *shown.values()), strict=True))
        patched = attach(
            model,
            try_on,
            latents.get("person"),
            latents.get("garment"),
            position=None if garment_position == "auto" else garment_position,
            person_strength=person_strength,
            garment_strength=garment_strength,
            part=part,
            cache=kv_cache,
        )
        return io.NodeOutput(patched)


class TryOnComposite(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiTTryOnComposite",
            display_name="Try-On Composite",
            category="DiT Toolkit/image",
            description=(
                "Puts results back into the original picture at full resolution. Pixels outside the grown mask of "
                "Try-On Prepare stay the original's, bit for bit."
            ),
            search_aliases=["try-on", "paste back", "stitch", "uncrop", "composite", "blend"],
            inputs=[
                io.Image.Input("result", tooltip="What the sampler made, decoded. Upscaled ones are fine."),
                io.Image.Input("person", tooltip="The original picture, as Try-On Prepare got it."),
                CropType.Input("crop", optional=True, tooltip="From Try-On Prepare."),
                io.Mask.Input("mask", optional=True,
                              tooltip="Narrows what may change, for example to leave a hand untouched: of the "
                              "original's size, or of the working size. Never widens it."),
                io.Int.Input("feather", default=8, min=0, max=512,
                             tooltip="Pixels over which the result fades in, from the border of the grown mask "
                             "inwards; at most the dilation of Try-On Prepare, so that the old garment does not shine "
                             "through. 0 is a hard edge."),
            ],
            outputs=[io.Image.Output(tooltip="The original pictures with the new garments.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, result: Any, person: Any, feather: int, crop: Any = None, mask: Any = None) -> io.NodeOutput:
        check(cls, locals())
        if feather > crop.dilation:
            logger.info(
                "Try-On Composite: feather is %d and the mask grew by %d pixels, so the feather is %d. For a softer "
                "edge, raise 'dilation' in Try-On Prepare.",
                feather,
                crop.dilation,
                crop.dilation,
            )
        masks = None if mask is None else placed_masks(mask, crop)
        return io.NodeOutput(composite(result, person, crop, feather, masks, progress.each_of))


NODES = [TryOnPrepare, LoadTryOn, ApplyTryOn, TryOnComposite]
