"""The example workflows in ComfyUI's real page, used as a person uses them."""

import io
import json
from pathlib import Path
from urllib.parse import quote

import pytest
from PIL import Image

from dit_toolkit.scripts import workflows
from dit_toolkit.scripts.client import Result
from dit_toolkit.scripts.places import PACK
from dit_toolkit.tests.workflows.results import WORN, check_pictures, check_videos, worn

pytestmark = pytest.mark.comfy

STEMS = workflows.stems()
# The others have nodes that one of the rest runs too.
SHOWN_ELSEWHERE = ("CPU 02", "CPU 03", "CPU 04", "CPU 05", "CPU 07", "CPU 10")
RUNS = [
    pytest.param(stem, marks=[pytest.mark.long] if stem.startswith(SHOWN_ELSEWHERE) else [])
    for stem in STEMS
    if workflows.is_embedded(stem)
]
# Training takes as many seconds as it has steps; what comes of it is looked at when its picture is made.
TRAIN_LITTLE = """
for (const node of app.graph.nodes.filter(node => node.type === "TrainLoraNode"))
    node.widgets.find(widget => widget.name === "steps").value = 3;
"""


@pytest.fixture(autouse=True)
def empty_canvas(page):
    page.clear()
    page.forget_errors()


def test_a_picture_of_core_nodes_made_from_the_page_brings_its_graph_back(page, server, tmp_path):
    """Says whether the harness works, when one of ours below does not."""
    page.evaluate("""
        const [empty, save] = ["EmptyImage", "SaveImage"].map(type => LiteGraph.createNode(type));
        for (const node of [empty, save]) app.graph.add(node);
        save.pos = [400, 0];
        empty.connect(0, save, 0);
    """)
    check_round_trip(page, server, tmp_path)


@pytest.mark.parametrize("stem", RUNS)
def test_the_workflow_runs_from_the_page_and_its_picture_brings_it_back(stem, page, server, tmp_path):
    page.load_workflow(workflows.read(stem))
    page.evaluate(TRAIN_LITTLE)
    result = check_round_trip(page, server, tmp_path)
    assert page.errors() == []
    assert result.images
    check_pictures(server, result)
    check_videos(server, result)
    if stem in WORN:
        assert worn(server, result) == WORN[stem]


def test_the_template_browser_lists_our_workflows_in_order_with_their_pictures(page, server):
    templates = page.templates(PACK)
    titles = sorted((*STEMS, *workflows.APPS))
    assert [template.title for template in templates] == titles
    for stem in titles:
        thumbnail = Image.open(io.BytesIO(server.client.get(f"/api/workflow_templates/{PACK}/{quote(stem)}.jpg")))
        assert thumbnail.format in ("JPEG", "WEBP")

    page.open_template(STEMS[0])
    assert page.graph()["nodes"]
    assert page.missing_nodes() == []


def check_plays(page, video) -> None:
    """The node that saved a clip shows it. Where this browser has the codec (Chromium has none for H.264), it plays."""
    name = f"new URL(each.src).searchParams.get('filename') === {json.dumps(video.filename)}"
    shown = f"[...document.querySelectorAll('video')].find((each) => {name})"
    page.wait_until(f"{shown} !== undefined", "the node shows the clip that it saved")
    codec = 'video/mp4; codecs="avc1.42E01E"'
    if page.evaluate("return document.createElement('video').canPlayType(a) !== ''", codec):
        page.evaluate(f"const clip = {shown}; clip.muted = true; await clip.play();")


def check_round_trip(page, server, folder: Path) -> Result:
    """Queue what is on the canvas, drop the picture on an empty one, and find the same graph."""
    before, count = page.prompt(), len(page.graph()["nodes"])  # a subgraph is one of them
    result = page.run(server.client)
    saved = [file for file in result.images + result.videos if file.type == "output"]
    assert saved, "no node saved a picture or a clip"
    if result.videos:
        check_plays(page, result.videos[0])

    picture = folder / f"result{Path(saved[0].filename).suffix}"
    picture.write_bytes(server.client.fetch(saved[0]))
    page.clear()
    assert page.prompt() == {}

    page.load_file(picture)
    page.wait_until(f"app.graph.nodes.length >= {count}", "the dropped picture opened its workflow")
    assert page.prompt() == before
    return result
