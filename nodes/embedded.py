"""The embedded default: the tiny models and the pictures that make every example run without a download."""

from __future__ import annotations

from collections.abc import Callable

from comfy_api.latest import io

from ..host import embedded
from .inputs import UNSET, check, choice

# Bases whose file a feature's own loader reads, by its path. The door to the nodes fills this, as features do not know
# each other.
MODELS: dict[embedded.Base, Callable[[str], io.Model.Type]] = {}


class LoadEmbedded(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiTLoadEmbedded",
            display_name="Load Embedded Model",
            category="DiT Toolkit/loaders",
            description=(
                "Loads a tiny model that ships with DiT Toolkit. It draws paper dolls and simple objects in a second "
                "on a CPU: for trying workflows and for tests, not for art."
            ),
            search_aliases=["tiny flux", "toy model", "demo model", "embedded default", "cpu demo"],
            inputs=[
                choice("base", embedded.Base, "FLUX.1",
                       "FLUX.1: draws at 96 x 96. SD3.5: draws at 128 x 128, and its autoencoder has seen photographs, "
                       "for DiT4SR. CogVideoX: brings a doll to life in 21 frames of 96 x 96, and follows poses, for "
                       "DynamiCtrl.", optional=True),
            ],
            outputs=[
                io.Model.Output(tooltip="Tiny transformer, for nodes and samplers of its base model. LoRAs of the "
                                "large one do not fit it."),
                io.Clip.Output(tooltip="Its text encoder. Knows 43 words: colours, shapes, dolls, garments, poses, "
                               "places."),
                io.Vae.Output(tooltip="Its autoencoder, with the 16 latent channels of the base model."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, base: embedded.Base = "FLUX.1") -> io.NodeOutput:
        check(cls, locals())
        base = base or "FLUX.1"  # a link may bring nothing
        return io.NodeOutput(_model(base), embedded.load_clip(base), embedded.load_vae(base))


def _model(base: embedded.Base) -> io.Model.Type:
    make = MODELS.get(base)
    return embedded.load_model(base) if make is None else make(str(embedded.path_of(embedded.FILES[base].model)))


class ExamplePicture(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiTExamplePicture",
            display_name="Example Picture",
            category="DiT Toolkit/image",
            description="A picture that ships with DiT Toolkit, for its examples. Put Load Image here for your own.",
            search_aliases=["example image", "sample picture", "demo image", "test image"],
            inputs=[
                choice("picture", embedded.example_names(), UNSET,
                       "drawn_*: outlines drawn by hand. garment_*: shirts laid flat. mask_*: where a doll or clothes "
                       "are, for Convert Image to Mask. painted_*: dolls. photo_*: photographs. worn_*: small and "
                       "noisy, for DiT4SR."),
            ],
            outputs=[io.Image.Output(tooltip="The picture, [1, H, W, 3].")],
        )  # fmt: skip

    @classmethod
    def execute(cls, picture: str) -> io.NodeOutput:
        check(cls, locals())
        return io.NodeOutput(embedded.load_example(picture))


NODES = [LoadEmbedded, ExamplePicture]
