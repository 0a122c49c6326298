"""The example workflows for large models: accepted by ComfyUI, run as far as the models at hand allow.

Those of the embedded model run in `tests/browser/test_frontend.py`, from the page.
"""

import copy

import pytest

from dit_toolkit.models.control.panel_layout import PRESETS
from dit_toolkit.nodes.pose_video import EXAMPLE
from dit_toolkit.scripts import workflows
from dit_toolkit.scripts.client import Prompt, PromptFailed
from dit_toolkit.scripts.demo import ROWS
from dit_toolkit.tests.workflows.results import check_pictures

pytestmark = pytest.mark.comfy

LARGE = [stem for stem in workflows.stems() if not workflows.is_embedded(stem)]
LOADERS = {"UNETLoader", "CLIPLoader", "DualCLIPLoader", "VAELoader", "LoraLoaderModelOnly", "DiTEasyControlLoader",
           "LoadBackgroundRemovalModel", "CheckpointLoaderSimple", "DiTLoadDiT4SR", "DiTLoadDynamiCtrl",
           "LoadDA3Model"}  # fmt: skip
DEPTH = {"LoadDA3Model", "DA3Inference", "DA3Render"}
SEGMENTERS = {"LoadBackgroundRemovalModel", "RemoveBackground"}

# The outputs of DiTLoadEmbedded, by the outputs of loaders that they stand in for.
EMBEDDED = {
    "UNETLoader": (0,), "DualCLIPLoader": (1,), "T5TokenizerOptions": (1,), "VAELoader": (2,),
    "CheckpointLoaderSimple": (0, 1, 2), "DiTLoadDynamiCtrl": (0,), "CLIPLoader": (1,),
}  # fmt: skip
WHOLE = {  # each loads all there is of its base
    "CogVideoX": {"DiTLoadDynamiCtrl", "CLIPLoader", "VAELoader"},
    "FLUX.1": {"UNETLoader", "DualCLIPLoader", "VAELoader"},
    "SD3.5": {"CheckpointLoaderSimple"},
}
TINY_FILES = {
    "canny.safetensors": "tiny_edge.safetensors",
    "depth.safetensors": "tiny_edge.safetensors",
    "Ghibli.safetensors": "tiny_edge.safetensors",
    "pose.safetensors": "tiny_pose.safetensors",
    "subject.safetensors": "tiny_subject.safetensors",
    "couple-profile.safetensors": "dit_toolkit_demo_in_context.safetensors",
    "dit4sr_q.safetensors": "tiny_dit4sr.safetensors",
}
TINY_NUMBERS = {
    "condition_size": 96, "width": 96, "height": 96, "panel_width": 96, "panel_height": 96, "steps": 4,
}  # fmt: skip
TINY_TILES = {"min_side": 16, "tile": 16, "overlap": 6}


@pytest.fixture(scope="module")
def prompt_of(prompts, request):
    """Converts a workflow to API format: the page does it, being the only faithful converter."""

    def convert(stem: str) -> dict:
        if stem not in prompts:
            page = request.getfixturevalue("page")
            page.load_workflow(workflows.read(stem))
            prompts[stem] = page.prompt()
        return prompts[stem]

    return convert


@pytest.mark.parametrize("stem", LARGE)
def test_the_workflow_runs_as_far_as_the_models_at_hand_allow(stem, prompt_of, server):
    """The server has an empty file for every model, so only a loader may fail."""
    with pytest.raises(PromptFailed) as failed:
        server.client.run(prompt_of(stem))
    assert failed.value.class_type in LOADERS, failed.value


@pytest.mark.parametrize("stem", LARGE)
def test_what_comes_after_the_loaders_runs(stem, prompt_of, server):
    """The same graph on the embedded model: links, values, conditions and sampler, to the saved picture."""
    prompt = on_the_embedded_model(prompt_of(stem))
    result = server.client.run(prompt)
    assert any(saved.type == "output" for saved in result.images + result.videos)
    check_pictures(server, result)


def on_the_embedded_model(prompt: Prompt) -> Prompt:
    """A prompt for a large model with the embedded one of its base and its files in the place of the loaders' ones.

    All at its size. Masks that a segmenter finds, joints and depth that a detector finds are those of examples.
    """
    replaced = {
        (node_id, slot): ["embedded", output]
        for node_id, node in prompt.items()
        for slot, output in enumerate(EMBEDDED.get(node["class_type"], ()))
    }
    loaders = {prompt[node_id]["class_type"] for node_id, _ in replaced}
    base = next(base for base, whole in WHOLE.items() if whole <= loaders)
    for node_id, node in prompt.items():
        if node["class_type"] == "RemoveBackground":
            replaced[node_id, 0] = ["mask", 0]
        if node["class_type"] == "DA3Render":
            replaced[node_id, 0] = ["outline", 0]
        if node["class_type"] == "SDPoseKeypointExtractor":
            replaced[node_id, 0] = ["pose", 0]
    gone = EMBEDDED.keys() | SEGMENTERS | DEPTH | {"SDPoseKeypointExtractor"}
    tiny = {node_id: copy.deepcopy(node) for node_id, node in prompt.items() if node["class_type"] not in gone}
    for node in tiny.values():
        inputs = node["inputs"]
        if node["class_type"] == "DiTApplyDiT4SR":
            inputs.update(TINY_TILES)
        if node["class_type"] == "DiTPanelLayout" and (preset := PRESETS.get(inputs["preset"])):
            inputs.update(preset="custom", rows=preset.rows, columns=preset.columns)
        if node["class_type"] == "DiTClear":
            inputs["file"] = "none (mask only)"  # there are no such weights for a model of this size
        for name, value in inputs.items():
            if isinstance(value, list):
                inputs[name] = replaced.get((value[0], value[1]), value)
            elif name in TINY_NUMBERS:
                inputs[name] = TINY_NUMBERS[name]
            elif name in ("file", "lora_name"):
                inputs[name] = TINY_FILES.get(value, value)
    tiny["embedded"] = {"class_type": "DiTLoadEmbedded", "inputs": {"base": base}}
    pose = {"text": EXAMPLE, "length": 1, "easing": "linear", "reach": 0, "width": 96, "height": 96}
    tiny["pose"] = {"class_type": "DiTPoseKeyframes", "inputs": pose}
    tiny["outline"] = {"class_type": "DiTExamplePicture", "inputs": {"picture": "drawn_doll.png"}}
    tiny["mask picture"] = {"class_type": "DiTExamplePicture", "inputs": {"picture": "mask_person_shirt.png"}}
    tiny["mask"] = {"class_type": "ImageToMask", "inputs": {"image": ["mask picture", 0], "channel": "red"}}
    return tiny


@pytest.mark.parametrize("stem", sorted({row.workflow for row in ROWS}))
def test_the_demo_runs_the_workflow_that_users_see(stem, prompt_of):
    assert workflows.read_prompt(stem) == prompt_of(stem), "renew it: python -m scripts.demo --convert"
