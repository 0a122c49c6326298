"""FreeCus: carry a subject from one picture into a new one, without training.

Paper: FreeCus, arXiv:2507.15249. The method is in `models/control/freecus.py`, what language models are asked in
`models/control/subject_description.py`, the hooks are in `host/control/freecus.py`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, get_args

from comfy_api.latest import io, ui

from ..host.control.freecus import attach, checked, given
from ..host.control.freecus_settings import NODE, Fit, Prompts
from ..host.part_of_run import PartOfRun
from ..host.preview import show_picture
from ..models.control.freecus import KEY_SCALE, REFERENCE_SHIFT, ShiftMode
from ..models.control.subject_description import (
    Aspect,
    instruction_to_describe,
    instruction_to_keep,
    prompt_with_description,
)
from .inputs import check, choice, cut_out_mask, model_input, part_of_run, seed, warn_of_background

Noise = Literal["same as the picture", "own seed"]
SAME_NOISE, OWN_NOISE = get_args(Noise)


class ApplyFreeCus(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiTFreeCus",
            display_name="Apply FreeCus",
            category="DiT Toolkit/model/patch",
            description=(
                "Carries the subject of one picture into what the prompt asks for. No training and no extra weights; "
                "each step takes about twice as long. Chain the node for several subjects."
            ),
            search_aliases=[
                "freecus", "subject driven", "personalization", "customization", "same subject, new scene", "redux",
                "attention sharing",
            ],
            inputs=[
                model_input("A FLUX.1 model: dev, or a fine-tune or LoRA of it; not Fill, Canny or Depth."),
                io.Vae.Input("vae", tooltip="The model's VAE, which encodes the reference at the picture's size."),
                io.Image.Input("reference", tooltip="One picture of the subject."),
                cut_out_mask("subject",
                             "Where the subject is on the reference. A token of 16 x 16 pixels counts in full if its "
                             "middle is inside; parts too thin for that count by the tokens they lie in. Draw it "
                             "tight. Without a mask, the whole picture is the subject, background included."),
                io.Float.Input("key_scale", default=KEY_SCALE, min=0.5, max=2.0, step=0.01,
                               tooltip="How strongly the subject's tokens draw attention. 1.1 as published; "
                               "lower follows the prompt more, higher the reference. There is no neutral value: "
                               "1 leaves them as they are."),
                *part_of_run(
                    "Where in the run the subject begins to act. 0 is the start.",
                    "Where in the run it stops acting. 1 is the end. Steps outside cost nothing extra.",
                ),
                io.Float.Input("text_key_scale", default=KEY_SCALE, min=0.5, max=2.0, step=0.01, advanced=True,
                               tooltip="The same factor for the tokens of the prompt, so that the subject does not "
                               "drown them out. 1.1 as published, 1 leaves them as they are. With several "
                               "nodes, the largest wins."),
                io.String.Input("layers", default="published", advanced=True,
                                tooltip="Layers in which the picture sees the subject. 'published': the ten vital "
                                "ones of FLUX.1-dev; all layers in a model of another depth. 'all', or numbers such "
                                "as '0-2, 17, 25', double blocks first."),
                choice("shift_mode", ShiftMode, "reversed", advanced=True,
                       tooltip="How much cleaner the reference is than the picture at the same step. 'reversed' as "
                       "published, 'twice' is cleaner, 'half' and 'linear' less so, 'normal' hardly."),
                io.Float.Input("reference_shift", default=REFERENCE_SHIFT, min=0.0, max=4.0, step=0.000001,
                               advanced=True,
                               tooltip="The shift of the reference's schedule that shift_mode reverses. 0.459375 as "
                               "published, at every size."),
                choice("prompts", Prompts, "positive only", advanced=True,
                       tooltip="Which prompts see the subject. Without CFG there is only the positive one, as "
                       "published. 'positive only' follows the reference more closely."),
                choice("noise", Noise, SAME_NOISE, advanced=True,
                       tooltip="Noise on the reference: the starting noise of the picture, as published, or noise "
                       "from noise_seed. A second stage, which starts without noise, takes that of seed 0."),
                seed("noise_seed", advanced=True, tooltip="Seed of the reference's noise. Read with 'own seed' only."),
                choice("fit", Fit, "crop", advanced=True,
                       tooltip="How reference and mask are fitted to the format of the picture. 'crop' keeps the "
                       "middle, 'pad' keeps all of it."),
            ],
            outputs=[io.Model.Output(tooltip="The model, carrying the subject into what it draws.")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        vae: Any,
        reference: io.Image.Type,
        key_scale: float,
        start_percent: float,
        end_percent: float,
        text_key_scale: float,
        layers: str,
        shift_mode: ShiftMode,
        reference_shift: float,
        prompts: Prompts,
        noise: Noise,
        noise_seed: int,
        fit: Fit,
        subject: io.Mask.Type | None = None,
    ) -> io.NodeOutput:
        check(cls, locals())
        if subject is not None:
            warn_of_background(NODE, "subject", subject)
        patched = attach(
            model,
            reference,
            subject,
            vae,
            layers=layers,
            fit=fit,
            key_scale=key_scale,
            text_key_scale=text_key_scale,
            shift_mode=shift_mode,
            reference_shift=reference_shift,
            part=PartOfRun(start_percent, end_percent),
            seed=int(noise_seed) if noise == OWN_NOISE else None,
            prompts=prompts,
            show=partial(show_picture, cls.hidden and cls.hidden.unique_id),
        )
        return io.NodeOutput(patched, ui=ui.PreviewImage(given(reference, checked(reference, subject)), cls=cls))


class SubjectDescription(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiTSubjectDescription",
            display_name="Subject Description",
            category="DiT Toolkit/text",
            description=(
                "Joins a prompt and a description of the subject, and writes what to ask a language model for one. "
                "Words help Apply FreeCus to keep what the picture alone does not carry."
            ),
            search_aliases=["freecus", "caption", "describe", "llm", "vlm", "prompt", "subject"],
            inputs=[
                io.String.Input("subject", default="",
                                tooltip="What the reference shows, in a word or two: 'teapot', 'grey cat'."),
                io.String.Input("prompt", multiline=True, default="",
                                tooltip="The picture you want, with the subject in it."),
                io.String.Input("text", multiline=True, default="",
                                tooltip="A description of the subject: your own, or the answer of a language model."),
                choice("aspect", Aspect, "subject", advanced=True,
                       tooltip="What the instructions ask about: the thing itself, or the "
                       "artistic style it is shown in."),
            ],
            outputs=[
                io.String.Output(display_name="prompt", tooltip="'prompt. text', for the text encoder."),
                io.String.Output(display_name="ask_describe",
                                 tooltip="What to ask a model that sees the reference, such as "
                                 "Generate Text with the image."),
                io.String.Output(display_name="ask_keep",
                                 tooltip="What to ask a model that reads 'text', so that pose, "
                                 "place and other things go."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, subject: str, prompt: str, text: str, aspect: Aspect) -> io.NodeOutput:
        check(cls, locals())
        return io.NodeOutput(
            prompt_with_description(prompt, text),
            instruction_to_describe(subject, aspect),
            instruction_to_keep(subject, text, aspect),
        )


NODES = [ApplyFreeCus, SubjectDescription]
