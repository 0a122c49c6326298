"""EasyControl: steer FLUX.1 with condition images, several at once, at little more than the plain model's cost.

Paper: EasyControl, arXiv:2503.07027. The method is in `models/control/easycontrol.py`, its hooks
are in `host/control/conditions.py`.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

from comfy_api.latest import io, ui
from torch import Tensor

from ..host import progress
from ..host.control.conditions_settings import PATCH, Cache, check_numbers
from ..host.control.easycontrol import Padding, attach, prepare_image
from ..host.control.easycontrol_files import FOLDER, load
from ..host.part_of_run import PartOfRun
from ..models.control.easycontrol_keys import Kind
from .inputs import (
    ANY_FLUX1,
    check,
    choice,
    kv_cache,
    model_input,
    part_of_run,
    share,
    strength,
    weights_file,
    whole_tokens,
)

logger = logging.getLogger(__name__)

EasyControlType = io.Custom("DIT_EASYCONTROL")

AskedKind = Literal["auto", Kind]


class LoadEasyControl(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiTEasyControlLoader",
            display_name="Load EasyControl LoRA",
            category="DiT Toolkit/loaders",
            description=(
                "Loads a LoRA of the EasyControl kind, such as canny, depth, pose, seg, inpainting, subject or Ghibli. "
                "It acts on condition images only; ordinary LoRA loaders cannot use it."
            ),
            search_aliases=[
                "easycontrol",
                "control lora",
                "condition lora",
                "canny lora",
                "depth lora",
                "pose lora",
                "subject lora",
                "ghibli lora",
            ],
            inputs=[weights_file(FOLDER)],
            outputs=[
                EasyControlType.Output(display_name="easycontrol", tooltip="The LoRA, for Apply EasyControl."),
                io.String.Output(display_name="report", tooltip="One line: what the file holds and is for."),
            ],
        )

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        check(cls, locals(), files=("file",))
        loaded = load(file)
        logger.info("EasyControl %s", loaded.report)
        return io.NodeOutput(loaded, loaded.report)


class ApplyEasyControl(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiTEasyControlApply",
            display_name="Apply EasyControl",
            category="DiT Toolkit/model/patch",
            description=(
                "Lets a FLUX.1 model follow a condition image: edges, depth, pose, a subject, a photo to restyle. "
                "Chain the node for several conditions; their order does not matter."
            ),
            search_aliases=[
                "easycontrol", "controlnet", "ipadapter", "ip adapter", "style", "style transfer", "ghibli",
                "reference", "canny", "edges", "depth", "pose", "openpose control", "scribble", "lineart",
                "inpainting", "subject", "ominicontrol",
            ],
            inputs=[
                model_input(ANY_FLUX1),
                EasyControlType.Input("easycontrol", optional=True,
                                      tooltip="The LoRA that was trained for this kind of condition."),
                io.Image.Input("image", optional=True,
                               tooltip="The condition image. One for all pictures, or as many as "
                               "the batch has. Needs 'vae'."),
                io.Vae.Input("vae", optional=True, tooltip="The model's VAE, which encodes 'image'."),
                io.Latent.Input("latent", optional=True,
                                tooltip="An encoded condition, used as it is. Instead of 'image', not with it."),
                choice("kind", AskedKind, "auto",
                       "spatial: the image lies over the picture (edges, depth, pose, inpainting, style). subject: it "
                       "shows something to put into the picture. auto: as the file or its name says."),
                strength("strength", "Factor on the LoRA, 1 as published. 0 turns the condition off."),
                *part_of_run(
                    "Where in the run the condition begins to act. 0 is the start.",
                    "Where in the run it stops acting. 1 is the end.",
                ),
                io.Int.Input("condition_size", default=512, min=PATCH, max=2048, step=PATCH, advanced=True,
                             tooltip="'image' is resized to this many pixels a side; published LoRAs are trained at "
                             "512. Smaller is faster and needs less memory. Not read for 'latent'."),
                choice("pad_color", Padding, "grey", advanced=True,
                       tooltip="The colour around a subject image that is not square. Not read for spatial "
                       "conditions."),
                io.Int.Input("slot", default=0, min=0, max=15, advanced=True,
                             tooltip="Which LoRA of a file that holds several. 0 is the first; "
                             "nearly all files have one."),
                share("influence", 1.0, advanced=True,
                      tooltip="How much attention the condition gets: fades it out without a jump. 1 is as trained "
                      "and fastest, 0 turns it off."),
                kv_cache("the condition's"),
            ],
            outputs=[io.Model.Output(tooltip="The model, following the condition.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        kind: AskedKind,
        strength: float,
        start_percent: float,
        end_percent: float,
        condition_size: int,
        pad_color: Padding,
        slot: int,
        influence: float,
        kv_cache: Cache,
        easycontrol: Any = None,
        image: Any = None,
        vae: Any = None,
        latent: Any = None,
    ) -> io.NodeOutput:
        check(cls, locals())
        check_numbers(strength, influence)
        part = PartOfRun(start_percent, end_percent)
        check_condition(image, vae, latent, condition_size)
        if strength == 0 or influence == 0:
            return io.NodeOutput(model)
        found = easycontrol.kind(kind)
        seen = None if image is None else prepare_image(image, found, condition_size, pad_color)
        patched = attach(
            model,
            easycontrol,
            slot,
            encoded(seen, vae, latent),
            kind=found,
            strength=strength,
            part=part,
            influence=influence,
            cache=kv_cache,
        )
        return io.NodeOutput(patched) if seen is None else io.NodeOutput(patched, ui=ui.PreviewImage(seen, cls=cls))


def check_condition(image: Any, vae: Any, latent: Any, size: int) -> None:
    """Exactly one of image (with a VAE) and latent, and a size of whole tokens."""
    if image is None and latent is None:
        raise ValueError("Apply EasyControl needs a condition: connect 'image' and 'vae', or 'latent'.")
    if image is not None and latent is not None:
        raise ValueError("Apply EasyControl takes an 'image' or a 'latent', not both. Disconnect one of them.")
    if image is not None and vae is None:
        raise ValueError("Apply EasyControl needs a VAE to encode 'image'. Connect 'vae', or use 'latent' instead.")
    whole_tokens(PATCH, condition_size=size)


def encoded(image: Tensor | None, vae: Any, latent: Any) -> Tensor:
    """The condition as a latent, `[N, C, h, w]`. `image`: prepared for the model."""
    if image is None:
        return latent["samples"]
    (made,) = progress.encoded(vae, image)
    return made


NODES = [LoadEasyControl, ApplyEasyControl]
