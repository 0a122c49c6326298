"""Every example workflow is accepted by ComfyUI, and runs as far as the models at hand allow."""

import io

import numpy as np
import pytest
from PIL import Image

from dit_toolkit.scripts import workflows
from dit_toolkit.scripts.client import PromptFailed
from dit_toolkit.scripts.demo import ROWS

pytestmark = pytest.mark.comfy

STEMS = workflows.stems()
LOADERS = {"UNETLoader", "CLIPLoader", "DualCLIPLoader", "VAELoader", "LoraLoaderModelOnly", "DiTEasyControlLoader"}


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
        for image in result.images:
            pixels = np.asarray(Image.open(io.BytesIO(server.client.fetch(image))).convert("RGB"))
            assert pixels.std() > 8, f"node {image.node_id} made a picture of one colour"
    else:
        with pytest.raises(PromptFailed) as failed:
            server.client.run(prompt)
        assert failed.value.class_type in LOADERS, failed.value


@pytest.mark.parametrize("stem", sorted({row.workflow for row in ROWS}))
def test_the_demo_runs_the_workflow_that_users_see(stem, prompt_of):
    assert workflows.read_prompt(stem) == prompt_of(stem), "renew it: python -m scripts.demo --convert"
