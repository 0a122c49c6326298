"""The blueprints of the pack in ComfyUI's real page: listed, whole, and of one meaning in page and API."""

from __future__ import annotations

import json

import pytest

from dit_toolkit.scripts.client import PromptFailed
from dit_toolkit.scripts.places import BLUEPRINTS as FOLDER
from dit_toolkit.scripts.places import PACK

pytestmark = pytest.mark.comfy

BLUEPRINTS = sorted(path.stem for path in FOLDER.glob("*.json"))
RESTORE = "Upscale with DiT4SR"

# The blueprint's node between a picture and a file. `a`: the blueprint, `b`: values for its widgets.
BETWEEN = """
await app.loadGraphData(a);
const [node] = app.graph.nodes;
const [load, save] = ["LoadImage", "SaveImage"].map(type => LiteGraph.createNode(type));
for (const each of [load, save]) app.graph.add(each);
load.connect(0, node, node.inputs.findIndex(input => input.name === "image"));
node.connect(0, save, 0);
for (const [name, value] of Object.entries(b)) {
    const widget = node.widgets.find(widget => widget.name === name);
    if (!widget) throw new Error(`no widget ${name}, but ${node.widgets.map(widget => widget.name)}`);
    widget.value = value;
    widget.callback?.(value);
}
return (await app.graphToPrompt()).output;
"""


def read(stem: str) -> dict:
    return json.loads((FOLDER / f"{stem}.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def empty_canvas(page):
    page.clear()
    page.forget_errors()


def test_there_is_one_for_each_task():
    assert RESTORE in BLUEPRINTS


def test_the_page_is_told_of_them(server):
    listed = server.client.get_json("/global_subgraphs")
    ours = {entry["name"]: id for id, entry in listed.items() if entry["info"]["node_pack"] == f"custom_nodes.{PACK}"}
    assert sorted(ours) == BLUEPRINTS
    for stem, id in ours.items():
        assert json.loads(server.client.get_json(f"/global_subgraphs/{id}")["data"]) == read(stem)


@pytest.mark.parametrize("stem", BLUEPRINTS)
def test_it_is_one_node_that_says_what_it_is(stem):
    """As the page's own list asks for: one subgraph, called as its file is."""
    workflow = read(stem)
    (node,) = workflow["nodes"]
    (subgraph,) = workflow["definitions"]["subgraphs"]
    assert node["type"] == subgraph["id"]
    assert node["title"] == subgraph["name"] == stem
    assert len(subgraph["description"]) > 20
    for inner in subgraph["nodes"]:
        properties = inner["properties"]
        assert properties["cnr_id"] == (PACK if inner["type"].startswith("DiT") else "comfy-core")
        for model in properties.get("models", ()):
            assert model["name"] in inner["widgets_values"]
            assert model["url"].startswith("https://huggingface.co/")


@pytest.mark.parametrize("stem", BLUEPRINTS)
def test_the_page_opens_it_without_a_complaint(stem, page):
    page.load_workflow(read(stem))
    assert page.missing_nodes() == []
    assert page.errors() == []


def test_upscaling_means_in_the_api_what_it_says_on_the_node(page, server):
    values = {"upscale_by": 2.5, "caption": "A red fox.", "noise_seed": 77}
    prompt = page.evaluate(BETWEEN, read(RESTORE), values)
    by_type = {node["class_type"]: (id, node["inputs"]) for id, node in prompt.items()}
    assert len(prompt) == 13

    apply_id, apply = by_type["DiTApplyDiT4SR"]
    assert apply["upscale_by"] == 2.5
    assert prompt[apply["image"][0]]["class_type"] == "LoadImage"
    assert (apply["strength"], apply["tile"], apply["overlap"], apply["cross_stream_scale"]) == (1, 64, 24, 1.2)
    sampling_id, sampling = by_type["DiTDiT4SRSampling"]
    assert sampling == {"model": [apply_id, 0], "steps": 40, "cfg": 8, "shift": 3}
    _, sampler = by_type["SamplerCustom"]
    assert sampler["noise_seed"] == 77
    assert sampler["latent_image"] == [apply_id, 1]
    assert [sampler[name] for name in ("model", "sampler", "sigmas", "cfg")] == [[sampling_id, i] for i in range(4)]
    prompt_id, words = by_type["DiTDiT4SRPrompt"]
    assert words == {"caption": "A red fox.", "preset": "published", "filter": True}
    texts = [prompt[sampler[name][0]]["inputs"]["text"] for name in ("positive", "negative")]
    assert texts == [[prompt_id, 0], [prompt_id, 1]]
    _, colours = by_type["SeedVR2PostProcessing"]
    assert colours["color_correction_method"] == "adain"
    assert colours["original_resized_images"] == [apply_id, 2]
    _, scale = by_type["ImageScale"]
    assert (scale["width"], scale["height"], scale["upscale_method"]) == ([apply_id, 3], [apply_id, 4], "bicubic")
    assert prompt[by_type["SaveImage"][1]["images"][0]]["class_type"] == "ImageScale"


def test_comfyui_accepts_it_as_far_as_the_models(page, server):
    """ComfyUI's own validation finds no fault. Checkpoint and patch are there, though empty, so a loader fails."""
    with pytest.raises(PromptFailed) as failed:
        server.client.run(page.evaluate(BETWEEN, read(RESTORE), {}))
    assert failed.value.class_type in ("CheckpointLoaderSimple", "DiTLoadDiT4SR")
