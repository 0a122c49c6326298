"""What the user sees: one file per feature, each with the list `NODES` of what it adds."""

from comfy_api.latest import ComfyExtension, io

from ..host.animate import dynamictrl_files
from ..host.model_files import offer_loras
from ..host.templates import sort_templates
from . import (
    accelerate,
    dit4sr,
    dynamictrl,
    easycontrol,
    embedded,
    freecus,
    image_difference,
    in_context_lora,
    pose_video,
    re_ttention,
    sparse_attention,
    step_cache,
    try_on,
)

FEATURES = (
    easycontrol,
    in_context_lora,
    freecus,
    try_on,
    dit4sr,
    pose_video,
    dynamictrl,
    accelerate,
    step_cache,
    re_ttention,
    sparse_attention,
    image_difference,
    embedded,
)

# The embedded CogVideoX is a DynamiCtrl: its file is a whole transformer, as the published ones are.
embedded.MODELS["CogVideoX"] = lambda path: dynamictrl_files.load(path).model


class DiTToolkit(ComfyExtension):
    async def on_load(self) -> None:
        offer_loras()
        sort_templates()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node for feature in FEATURES for node in feature.NODES]
