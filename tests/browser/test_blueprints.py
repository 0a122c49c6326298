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

# For each of the others: values for its widgets, and in the prompt the node and input that each one ends in.
VALUES = {
    "Canny to Image (FLUX.1 EasyControl)": {
        "text": ("a red fox", "CLIPTextEncode", "text"), "strength": (0.6, "DiTEasyControlApply", "strength"),
        "high_threshold": (0.9, "Canny", "high_threshold"), "width": (768, "EmptySD3LatentImage", "width"),
        "seed": (77, "KSampler", "seed"),
    },
    "Subject to Image (FLUX.1 EasyControl)": {
        "text": ("A SKS on a boat", "CLIPTextEncode", "text"), "strength": (0.6, "DiTEasyControlApply", "strength"),
        "height": (768, "EmptySD3LatentImage", "height"), "seed": (77, "KSampler", "seed"),
    },
    "Try On Clothes (FLUX.1 Fill)": {
        "panel_prompts": ("a coat\nthe coat, worn", "DiTPanelLayout", "panel_prompts"),
        "dilation": (5, "DiTTryOnPrepare", "dilation"), "feather": (3, "DiTTryOnComposite", "feather"),
        "seed": (77, "KSampler", "seed"),
    },
    "Consistent Character Panels (FLUX.1)": {
        "preset": ("portrait-photography", "DiTPanelLayout", "preset"),
        "summary": ("a set", "DiTPanelLayout", "summary"),
        "panel_prompts": ("a\nb", "DiTPanelLayout", "panel_prompts"), "seed": (77, "KSampler", "seed"),
    },
    "Text to Image, Faster (FLUX.1)": {
        "text": ("a red fox", "CLIPTextEncode", "text"), "interval": (4, "DiTTaylorSeer", "interval"),
        "width": (768, "EmptySD3LatentImage", "width"), "seed": (77, "KSampler", "seed"),
    },
}  # fmt: skip

# Every picture and mask that the blueprint asks for from a file, and every picture that it gives into one.
AROUND = """
await app.loadGraphData(a);
const [node] = app.graph.nodes;
const make = type => { const made = LiteGraph.createNode(type); app.graph.add(made); return made; };
node.inputs.forEach((input, slot) => {
    if (!input.widget) make("LoadImage").connect(input.type === "MASK" ? 1 : 0, node, slot);
});
node.outputs.forEach((output, slot) => node.connect(slot, make("SaveImage"), 0));
for (const [name, value] of Object.entries(b)) {
    const widget = node.widgets.find(widget => widget.name === name);
    if (!widget) throw new Error(`no widget ${name}, but ${node.widgets.map(widget => widget.name)}`);
    widget.value = value;
    widget.callback?.(value);
}
return (await app.graphToPrompt()).output;
"""

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
    assert sorted((RESTORE, *VALUES)) == BLUEPRINTS


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


@pytest.mark.parametrize("stem", VALUES)
def test_its_widgets_mean_in_the_api_what_they_say(stem, page):
    wanted = VALUES[stem]
    prompt = page.evaluate(AROUND, read(stem), {name: value for name, (value, _, _) in wanted.items()})
    for name, (value, kind, field) in wanted.items():
        found = [node["inputs"][field] for node in prompt.values() if node["class_type"] == kind]
        assert found == [value], name
    links = [value for node in prompt.values() for value in node["inputs"].values() if isinstance(value, list)]
    assert all(source in prompt for source, _ in links)
    asked = [entry["name"] for entry in read(stem)["nodes"][0]["inputs"] if not entry.get("widget")]
    loaded = {node_id for node_id, node in prompt.items() if node["class_type"] == "LoadImage"}
    assert len(loaded) == len(asked) == len(loaded & {source for source, _ in links})


@pytest.mark.parametrize("stem", VALUES)
def test_comfyui_accepts_it_as_far_as_its_models(stem, page, server):
    """ComfyUI's own validation finds no fault, and a loader fails, as the files are empty."""
    with pytest.raises(PromptFailed) as failed:
        server.client.run(page.evaluate(AROUND, read(stem), {}))
    assert failed.value.class_type in ("UNETLoader", "DualCLIPLoader", "VAELoader", "LoraLoaderModelOnly",
                                       "DiTEasyControlLoader", "DiTTryOnPrepare")  # fmt: skip


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
