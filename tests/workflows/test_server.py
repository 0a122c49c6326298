"""The pack on a real server: it loads without a word of complaint, and what the page asks for is there."""

import io
import re
import time

import pytest
from PIL import Image

from dit_toolkit.scripts.client import PromptFailed, PromptInterrupted, PromptRefused
from dit_toolkit.scripts.places import PACK

pytestmark = pytest.mark.comfy


def blue_square(side: int = 64) -> dict:
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": side, "height": side, "batch_size": 1, "color": 255}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "blue"}},
    }


def test_the_log_of_the_start_holds_no_error(server):
    start = server.log().partition("To see the GUI")[0]
    assert not re.findall(r"^.*(?:\[ERROR\]|Traceback|IMPORT FAILED).*$", start, re.MULTILINE)


def test_every_node_of_the_pack_is_registered(server):
    ours = [node for node, info in server.client.object_info().items() if info["python_module"].endswith(PACK)]
    assert {"DiTEasyControlLoader", "DiTEasyControlApply", "DiTLoadEmbedded"} <= set(ours)
    assert all(node.startswith("DiT") for node in ours)


def test_help_pages_are_served(server):
    for node, info in server.client.object_info().items():
        if info["python_module"].endswith(PACK):
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


def test_an_interrupted_prompt_says_so_and_the_next_one_runs(server):
    prompt = blue_square(side=1024)
    blurs = [str(number) for number in range(10, 60)]
    for before, blur in zip(["1", *blurs], blurs, strict=False):
        inputs = {"image": [before, 0], "blur_radius": 31, "sigma": 9.0}
        prompt[blur] = {"class_type": "ImageBlur", "inputs": inputs}
    prompt["2"]["inputs"]["images"] = [blurs[-1], 0]

    prompt_id = server.client.queue(prompt)
    while not server.client.get_json("/queue")["queue_running"]:
        time.sleep(0.01)
    server.client.interrupt(prompt_id)
    with pytest.raises(PromptInterrupted):
        server.client.wait(prompt_id, timeout=60)
    assert server.client.run(blue_square(side=128)).images
