"""Every example workflow as the page shows it, in both renderings: readable, nothing overlaps, notes say what works."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import pytest

from dit_toolkit.scripts import workflows

pytestmark = pytest.mark.comfy

STEMS = workflows.stems()
WINDOW = (1600, 1000)
# Widgets are drawn with 12 px, titles and notes with more, so this keeps them at 8 px.
SCALE = 0.66
# Room for the pack's badge above a node, or for the footer that Nodes 2.0 puts below one whose model is missing.
GAP = 30
AFTER_A_RUN = (
    "CPU 07 speed up canny control", "CPU 12 try on clothes", "CPU 14 pose to video", "CPU 15 pose, subject, speed up",
)  # fmt: skip


@dataclass(frozen=True)
class Told:
    """Something that a note tells its reader to do, to the `index`-th node of a kind, in the order of their ids."""

    stem: str
    act: str  # set, bypass, unmute, or own: put Load Image in the place of Example Picture
    kind: str
    widget: str = ""
    value: str | float = ""
    index: int = 0
    called: str = ""  # the node's name in the note, where it is in question


def told(stem: str, *things: tuple) -> list[Told]:
    return [Told(stem, *thing) for thing in things]


STRENGTH = ("set", "DiTEasyControlApply", "strength")
PANELS = ("set", "DiTPanelLayout", "panel_prompts", "a doll waving\na doll, arms up")
TWO = (("bypass", "DiTEasyControlApply"), ("bypass", "DiTEasyControlApply", "", "", 1))
TOLD = [
    *told("CPU 01 canny edges to picture", (*STRENGTH, 0)),
    *told("CPU 02 canny edges of a photo", ("set", "Canny", "high_threshold", 0.9)),
    *told("CPU 03 canny, subject reference", *TWO),
    *told("CPU 04 speed up, same picture", ("set", "DiTTaylorSeer", "interval", 5)),
    *told("CPU 05 speed up, gate decides", *(("set", "DiTCGTaylor", "threshold", value) for value in (0.13, 0))),
    *told("CPU 06 speed up, autotune", ("set", "DiTAccelerateAutotune", "floor", 20)),
    *told("CPU 07 speed up canny control", *(("set", "DiTAccelerate", "quality", each) for each in ("fast", "off"))),
    *told("CPU 08 speed up, methods compared", ("set", "DiTDeltaDiT", "interval", 1)),
    *told("CPU 09 consistent character", PANELS),
    *told("CPU 10 consistent character, given", PANELS),
    *told("CPU 11 subject in a new scene", ("set", "DiTFreeCus", "key_scale", 0.8)),
    *told("CPU 12 try on clothes", ("set", "DiTTryOnApply", "garment_strength", 0)),
    *told("CPU 13 upscale a small picture", ("set", "DiTApplyDiT4SR", "strength", 0.5)),
    *told("CPU 14 pose to video", ("set", "DiTDynamiCtrlConditioning", "pose_strength", 0)),
    *told("CPU 15 pose, subject, speed up",
          *(("bypass", kind) for kind in ("DiTEasyControlApply", "DiTFreeCus", "DiTAccelerate"))),
    *told("CPU 16 train a character LoRA",
          ("set", "TrainLoraNode", "steps", 40), ("bypass", "LoraLoaderModelOnly", "", "", 0, "Load LoRA")),
    *told("CogVideoX 01 pose to video", ("set", "DiTDynamiCtrlConditioning", "pose_strength", 0)),
    *told("FLUX.1 01 canny edges to picture", (*STRENGTH, 0.7)),
    *told("FLUX.1 02 canny, subject reference", *TWO),
    *told("FLUX.1 03 pose to picture", (*STRENGTH, 0.7)),
    *told("FLUX.1 04 depth to picture", (*STRENGTH, 0.7)),
    *told("FLUX.1 05 style, Ghibli", (*STRENGTH, 0.8)),
    *told("FLUX.1 06 speed up", ("bypass", "DiTTaylorSeer")),
    *told("FLUX.1 07 speed up, gate decides", ("bypass", "DiTCGTaylor")),
    *told("FLUX.1 08 speed up canny control", ("set", "DiTAccelerate", "quality", "off")),
    *told("FLUX.1 09 speed up large pictures", ("set", "KSampler", "denoise", 0.5, 1)),
    *told("FLUX.1 10 consistent character", PANELS),
    *told("FLUX.1 11 subject in a new scene", ("set", "DiTFreeCus", "key_scale", 1.0)),
    *told("FLUX.1 12 try on clothes", ("own", "DiTExamplePicture", "", "", 0, "Load Image")),
    *told("SD3.5 01 upscale a photo",
          ("set", "DiTDiT4SRSampling", "cfg", 5), ("unmute", "DiTExtractDiT4SR")),
]  # fmt: skip

OPEN = """
await app.loadGraphData(a, true, true, null, { openSource: "template" });
const wait = () => new Promise(done => requestAnimationFrame(() => setTimeout(done, 60)));
const there = node => document.querySelector(`[data-node-id="${node.id}"]`);
const late = () => LiteGraph.vueNodesMode && !app.graph.nodes.every(there);
for (let turn = 0; turn < 3 || (turn < 60 && late()); turn++) await wait();
"""
LOOK = """
const { scale, offset } = app.canvas.ds;
const vue = LiteGraph.vueNodesMode;
const element = node => document.querySelector(`[data-node-id="${node.id}"]`);
const box = node => {  // in the units of the graph
    if (!vue) return [...node.boundingRect];
    const { x, y, width, height } = element(node).getBoundingClientRect();
    return [x / scale - offset[0], y / scale - offset[1], width / scale, height / scale];
};
const seen = {
    scale, vue,
    nodes: app.graph.nodes.map(node => ({ name: `${node.id} ${node.title}`, box: box(node) })),
    groups: app.graph.groups.map(group => ({ name: group.title, box: [...group.pos, ...group.size] })),
};
return seen;
"""

# Pictures of two steps are as large as those of twenty.
FEWER_STEPS = """
const all = graph => graph.nodes.flatMap(node => node.subgraph ? all(node.subgraph) : [node]);
for (const node of all(app.graph))
    for (const widget of node.widgets ?? [])
        if (widget.name === "steps" || (node.title === "Steps" && widget.name === "value")) widget.value = 2;
"""
SHOWING = """() => {
    const kinds = ["DiTEasyControlApply", "DiTFreeCus", "DiTTryOnPrepare", "DiTPosePreview", "PreviewImage",
        "SaveImage"];
    const shown = node => LiteGraph.vueNodesMode
        ? document.querySelectorAll(`[data-node-id="${node.id}"] img`).length
        : node.imgs?.length;
    const ours = app.graph.nodes.filter(node => kinds.includes(node.type));
    return ours.length > 0 && ours.every(shown);
}"""

# Does what the note tells, one thing after the other, and takes each back.
DO = """
const all = graph => graph.nodes.flatMap(node => node.subgraph ? all(node.subgraph) : [node]);
const read = async () => (await app.graphToPrompt()).output;
const count = (prompt, kind) => Object.values(prompt).filter(each => each.class_type === kind).length;
const before = await read();
const done = [];
for (const { act, kind, widget, value, index } of b) {
    const node = all(app.graph).filter(node => node.type === kind).sort((one, other) => one.id - other.id)[index];
    if (!node) throw new Error(`no ${kind} number ${index}`);
    const entry = node.widgets?.find(each => each.name === widget);
    const { mode } = node, old = entry?.value;
    if (act === "set") {
        if (!entry) throw new Error(`${kind} has no widget ${widget}`);
        entry.value = value;
        entry.callback?.(value, app.canvas, node);
    } else if (act === "own") {  // not taken back: the last thing that a note tells
        const load = LiteGraph.createNode("LoadImage");
        app.graph.add(load);
        for (const id of [...node.outputs[0].links]) {
            const link = app.graph.links.get(id);
            load.connect(0, app.graph.getNodeById(link.target_id), link.target_slot);
        }
        app.graph.remove(node);
    } else node.mode = act === "bypass" ? 4 : 0;
    const after = await read();
    const links = Object.values(after).flatMap(each => Object.values(each.inputs).filter(Array.isArray));
    done.push({
        title: node.title, before: count(before, kind), after: count(after, kind),
        size: [before, after].map(prompt => Object.keys(prompt).length),
        values: Object.values(after).filter(each => each.class_type === kind).map(each => each.inputs[widget]),
        loose: links.filter(([id]) => !(id in after)).length,
        loaded: links.filter(([id]) => after[id]?.class_type === "LoadImage").length,
    });
    node.mode = mode;
    if (entry) entry.value = old;
}
return { prompt: before, done };
"""


@pytest.fixture(scope="module")
def rendered(rendering, page):
    """The page in a window of a size that many have."""
    width, height = WINDOW
    page.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
    page.forget_errors()
    yield page
    page.call("Emulation.clearDeviceMetricsOverride")


@pytest.fixture(scope="module")
def opened(rendered, prompts):
    """What is seen of a workflow that opens, and what came of the things that its note tells. Each is opened once."""
    kept = {}

    def look(stem: str) -> dict:
        if stem not in kept:
            things = [vars(thing) for thing in TOLD if thing.stem == stem]
            seen = rendered.evaluate(OPEN + LOOK, workflows.read(stem))
            complaints = rendered.complaints()
            kept[stem] = {"seen": seen, "complaints": complaints, **rendered.evaluate(DO, None, things)}
            prompts[stem] = kept[stem]["prompt"]
        return kept[stem]

    return look


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.sweep
def test_it_opens_readable_and_in_order(stem, opened):
    assert opened(stem)["complaints"] == []
    seen = opened(stem)["seen"]
    assert seen["scale"] >= SCALE
    in_order(seen)


@pytest.mark.parametrize("stem", AFTER_A_RUN)
@pytest.mark.sweep
def test_it_is_in_order_after_a_run(stem, rendered, server):
    """Nodes that show a picture after a run have room for that."""
    rendered.evaluate(OPEN + FEWER_STEPS, workflows.read(stem))
    server.client.free()  # a node whose result is kept from another workflow shows nothing
    rendered.run(server.client)
    rendered.settle()
    rendered.wait_until(f"({SHOWING})()", "pictures are on the nodes")
    rendered.settle()
    in_order(rendered.evaluate(LOOK))


def in_order(seen: dict) -> None:
    nodes = [(node["name"], grown(node["box"], below=GAP)) for node in seen["nodes"]]
    touching = [(one[0], other[0]) for one, other in combinations(nodes, 2) if overlap(one[1], other[1])]
    assert not touching
    groups = [(group["name"], group["box"]) for group in seen["groups"]]
    assert not [(one[0], other[0]) for one, other in combinations(groups, 2) if overlap(one[1], other[1])]
    for node in seen["nodes"]:
        homes = [box for _, box in groups if overlap(box, node["box"])]
        assert len(homes) <= 1, node["name"]
        assert all(holds(box, node["box"]) for box in homes), f"{node['name']} sticks out of its group"
    assert sum(any(overlap(box, node["box"]) for _, box in groups) for node in seen["nodes"]) == len(seen["nodes"]) - 1


def grown(box: list[float], below: float) -> list[float]:
    left, top, width, height = box
    return [left, top, width, height + below]


def overlap(one: list[float], other: list[float]) -> bool:
    return all(one[i] < other[i] + other[i + 2] and other[i] < one[i] + one[i + 2] for i in (0, 1))


def holds(outer: list[float], inner: list[float]) -> bool:
    """A pixel over the edge is the border that is drawn around a node."""
    return all(outer[i] <= inner[i] + 1 and inner[i] + inner[i + 2] <= outer[i] + outer[i + 2] + 1 for i in (0, 1))


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.sweep
def test_what_a_note_tells_to_do_works(stem, opened):
    things = [thing for thing in TOLD if thing.stem == stem]
    for thing, done in zip(things, opened(stem)["done"], strict=True):
        assert done["loose"] == 0, "a link leads to nothing"
        if thing.act == "set":
            assert thing.value in done["values"]
            assert done["size"][0] == done["size"][1]
        elif thing.act == "own":
            assert done["after"] == done["before"] - 1
            assert done["loaded"] > 0
        else:
            assert done["after"] == done["before"] + (1 if thing.act == "unmute" else -1)
        note = note_of(stem)
        assert (thing.widget or thing.called or done["title"]) in note or "line in Panel Layout" in note


def test_notes_tell_nothing_that_nobody_has_tried():
    """Every note says one thing to try, and all that it names to set, bypass or unmute is tried above."""
    assert {thing.stem for thing in TOLD} == set(STEMS)
    for stem in STEMS:
        note, acts = note_of(stem), {thing.act for thing in TOLD if thing.stem == stem}
        assert "Try:" in note
        assert ("bypass" in note) == ("bypass" in acts)
        assert ("unmute" in note) == ("unmute" in acts)
        assert ("Try: set" in note) <= ("set" in acts)


def note_of(stem: str) -> str:
    return next(node["widgets_values"][0] for node in workflows.read(stem)["nodes"] if node["type"] == "MarkdownNote")
