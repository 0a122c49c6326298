"""The pack on a real server: it loads without a word of complaint, and what the page asks for is there."""

import io
import re

import pytest
from PIL import Image

from dit_toolkit.scripts.client import PromptFailed, PromptInterrupted, PromptRefused
from dit_toolkit.scripts.places import PACK, ROOT

pytestmark = pytest.mark.comfy


def blue_square(side: int = 64) -> dict:
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": side, "height": side, "batch_size": 1, "color": 255}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "blue"}},
    }


def test_the_log_of_the_start_holds_no_error(server):
    start = server.log().partition("To see the GUI")[0]
    assert not re.findall(r"^.*(?:\[ERROR\]|Traceback|IMPORT FAILED).*$", start, re.MULTILINE)


@pytest.fixture(scope="module")
def ours(server) -> dict:
    """What the page is told about each node of the pack."""
    found = server.client.object_info()
    return {node: info for node, info in found.items() if info["python_module"].endswith(PACK)}


def test_every_node_of_the_pack_is_registered(ours):
    names = (ROOT / "tests" / "reference" / "public_names.txt").read_text(encoding="utf-8").splitlines()
    assert set(ours) == {name for name in names if name.isalnum()}


def test_the_page_is_told_what_every_node_input_and_output_is(ours):
    silent = [node for node, info in ours.items() if not info["description"]]
    for node, info in ours.items():
        inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        silent += [
            f"{node}.{name}" for name, (_, *options) in inputs.items() if not (options and options[0]["tooltip"])
        ]
        assert len(info["output_tooltips"]) == len(info["output"]), node
        silent += [f"{node}:{place}" for place, tooltip in enumerate(info["output_tooltips"]) if not tooltip]
    assert not silent


def test_help_pages_are_served(server, ours):
    for node in ours:
        assert server.client.get(f"/extensions/{PACK}/docs/{node}.md")


def test_a_prompt_gives_its_picture(server):
    result = server.client.run(blue_square())
    picture = Image.open(io.BytesIO(server.client.fetch(result.images[0])))
    assert picture.size == (64, 64)
    assert picture.getpixel((5, 5)) == (0, 0, 255)


def test_a_refused_prompt_says_which_node_and_why(server):
    with pytest.raises(PromptRefused, match=r"node 1 \(EmptyImage\): Value -8 smaller than min"):
        server.client.run(blue_square(side=-8))


def test_a_failed_prompt_says_which_node_and_why(server):
    (server.base / "models" / "diffusion_models" / "empty.safetensors").touch()
    prompt = {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "empty.safetensors", "weight_dtype": "default"}},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
    }
    with pytest.raises(PromptFailed, match=r"node 1 \(UNETLoader\): ."):
        server.client.run(prompt)


def test_a_number_over_a_link_is_held_to_what_the_widget_allows(server):
    """ComfyUI checks widgets only."""
    prompt = {
        "1": {"class_type": "DiTLoadEmbedded", "inputs": {}},
        "2": {"class_type": "PrimitiveInt", "inputs": {"value": 13}},
        "3": {
            "class_type": "DiTDeltaDiT",
            "inputs": {
                **{"model": ["1", 0], "interval": ["2", 0], "share": 0.75, "boundary": 0.5, "first_full": 1},
                **{"last_full": 0, "order": 0, "start_percent": 0.0, "end_percent": 1.0, "offload": False},
            },
        },
        "4": {"class_type": "PreviewAny", "inputs": {"source": ["3", 0]}},
    }
    said = r"node 3 \(DiTDeltaDiT\): Apply Delta-DiT: 'interval' must be a whole number from 1 to 12, got 13\."
    with pytest.raises(PromptFailed, match=said):
        server.client.run(prompt)
    prompt["2"]["inputs"]["value"] = 12
    server.client.run(prompt)


def test_an_interrupted_prompt_says_so_and_the_next_one_runs(server):
    """More steps than any machine gets through; the interrupt comes with the first."""
    prompt = {
        "1": {"class_type": "DiTLoadEmbedded", "inputs": {}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a red doll"}},
        "3": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 96, "height": 96, "batch_size": 1}},
        "4": {
            "class_type": "KSampler",
            "inputs": {
                **{"model": ["1", 0], "positive": ["2", 0], "negative": ["2", 0], "latent_image": ["3", 0]},
                **{"sampler_name": "euler", "scheduler": "simple"},
                **{"seed": 0, "steps": 10000, "cfg": 1.0, "denoise": 1.0},
            },
        },
        "5": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0], "vae": ["1", 2]}},
        "6": {"class_type": "SaveImage", "inputs": {"images": ["5", 0], "filename_prefix": "never"}},
    }
    prompt_id = server.client.queue(prompt)

    def interrupt(node: str, done: int, steps: int) -> None:
        assert (node, steps) == ("4", 10000)
        server.client.interrupt(prompt_id)

    with pytest.raises(PromptInterrupted, match="node 4"):
        server.client.wait(prompt_id, timeout=120, progress=interrupt)
    assert server.client.run(blue_square(side=128), timeout=60).images
