"""Every example workflow is accepted by ComfyUI, and runs as far as the models at hand allow."""

import copy
import io

import numpy as np
import pytest
from PIL import Image

from dit_toolkit.scripts import workflows
from dit_toolkit.scripts.client import Prompt, PromptFailed, Result
from dit_toolkit.scripts.demo import ROWS
from dit_toolkit.scripts.server import Server

pytestmark = pytest.mark.comfy

STEMS = workflows.stems()
LOADERS = {"UNETLoader", "CLIPLoader", "DualCLIPLoader", "VAELoader", "LoraLoaderModelOnly", "DiTEasyControlLoader"}

# The outputs of DiTLoadEmbedded, by the node of FLUX.1-dev that they stand in for.
EMBEDDED = {"UNETLoader": 0, "DualCLIPLoader": 1, "T5TokenizerOptions": 1, "VAELoader": 2}
TINY_FILES = {"canny.safetensors": "tiny_edge.safetensors", "subject.safetensors": "tiny_subject.safetensors"}
TINY_NUMBERS = {"condition_size": 96, "width": 96, "height": 96, "steps": 4}


@pytest.fixture(scope="module")
def prompt_of(page):
    """Converts a workflow to API format: the page does it, being the only faithful converter."""
    converted = {}

    def convert(stem: str) -> dict:
        if stem not in converted:
            page.load_workflow(workflows.read(stem))
            converted[stem] = page.prompt()
        return converted[stem]

    return convert


@pytest.mark.parametrize("stem", STEMS)
def test_the_workflow_runs_as_far_as_the_models_at_hand_allow(stem, prompt_of, server):
    """An embedded one gives a picture. For the others the server has empty model files, so only a loader may fail."""
    prompt = prompt_of(stem)
    if workflows.is_embedded(stem):
        result = server.client.run(prompt, workflows.read(stem))
        assert result.images
        check_pictures(server, result)
    else:
        with pytest.raises(PromptFailed) as failed:
            server.client.run(prompt)
        assert failed.value.class_type in LOADERS, failed.value


@pytest.mark.parametrize("stem", [stem for stem in STEMS if "FLUX.1-dev" in stem])
def test_what_comes_after_the_loaders_of_flux_runs(stem, prompt_of, server):
    """The same graph on the embedded model: links, values, conditions and sampler, to the saved picture."""
    prompt = on_the_embedded_model(prompt_of(stem))
    result = server.client.run(prompt)
    assert any(image.type == "output" for image in result.images)
    check_pictures(server, result)


def on_the_embedded_model(prompt: Prompt) -> Prompt:
    """A FLUX.1-dev prompt with the embedded model and files in the place of the loaders' ones, and at its size."""
    replaced = {node_id: EMBEDDED[kind] for node_id, node in prompt.items() if (kind := node["class_type"]) in EMBEDDED}
    assert {"UNETLoader", "DualCLIPLoader", "VAELoader"} <= {prompt[node_id]["class_type"] for node_id in replaced}
    tiny = {node_id: copy.deepcopy(node) for node_id, node in prompt.items() if node_id not in replaced}
    for node in tiny.values():
        inputs = node["inputs"]
        for name, value in inputs.items():
            if isinstance(value, list) and value[0] in replaced:
                inputs[name] = ["embedded", replaced[value[0]]]
            elif name in TINY_NUMBERS and not isinstance(value, list):
                inputs[name] = TINY_NUMBERS[name]
        if node["class_type"] == "DiTEasyControlLoader":
            inputs["file"] = TINY_FILES[inputs["file"]]
        if node["class_type"] == "DiTClear":
            inputs["file"] = "none (mask only)"  # there are no such weights for a model of this size
    tiny["embedded"] = {"class_type": "DiTLoadEmbedded", "inputs": {}}
    return tiny


def check_pictures(server: Server, result: Result) -> None:
    for image in result.images:
        pixels = np.asarray(Image.open(io.BytesIO(server.client.fetch(image))).convert("RGB"))
        assert pixels.std() > 8, f"node {image.node_id} made a picture of one colour"


@pytest.mark.parametrize("stem", sorted({row.workflow for row in ROWS}))
def test_the_demo_runs_the_workflow_that_users_see(stem, prompt_of):
    assert workflows.read_prompt(stem) == prompt_of(stem), "renew it: python -m scripts.demo --convert"
