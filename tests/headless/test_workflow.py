"""Workflow files: three kinds, damaged ones, and graphs that cannot be converted."""

import io
import json

import pytest
from PIL import Image, PngImagePlugin

from dit_toolkit.headless import workflow
from dit_toolkit.headless.errors import Refused
from dit_toolkit.headless.graph import Graph
from dit_toolkit.headless.plan import Plan
from dit_toolkit.tests.headless.world import KNOWN, PROMPT, prompt

GRAPH = {
    "nodes": [
        {"id": 1, "type": "Loader", "mode": 0, "inputs": [], "pos": [0, 0], "widgets_values": ["a.safetensors"],
         "outputs": [{"name": "MODEL", "type": "MODEL", "links": [1]}]},
        {"id": 2, "type": "Sampler", "mode": 0, "pos": [9, 0], "widgets_values": [1, "randomize", 4, "euler", False],
         "inputs": [{"name": "model", "type": "MODEL", "link": 1}],
         "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [2]}]},
        {"id": 3, "type": "Control", "mode": 0, "pos": [18, 0], "widgets_values": [1.0],
         "inputs": [{"name": "image", "type": "IMAGE", "link": 2}], "outputs": []},
        {"id": 4, "type": "MarkdownNote", "mode": 0, "widgets_values": ["words"]},
    ],
    "links": [[1, 1, 0, 2, 0, "MODEL"], [2, 2, 0, 3, 0, "IMAGE"]],
}  # fmt: skip


def write(tmp_path, content, name="flow.json"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def picture(**texts):
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_text(name, text, zip=name == "prompt")
    opened = io.BytesIO()
    Image.new("RGB", (4, 4)).save(opened, "PNG", pnginfo=info)
    return opened.getvalue()


def graph(**changes):
    """The graph with other values for its sampler."""
    made = json.loads(json.dumps(GRAPH))
    made["nodes"][1] |= changes
    return made


def test_a_file_is_told_by_what_it_holds(tmp_path):
    assert workflow.read(write(tmp_path, PROMPT)) == workflow.Workflow("flow", PROMPT, None)
    assert workflow.read(write(tmp_path, GRAPH)) == workflow.Workflow("flow", None, GRAPH)
    both = picture(prompt=json.dumps(PROMPT), workflow=json.dumps(GRAPH), other="x")
    assert workflow.read(write(tmp_path, both, "flow.png")) == workflow.Workflow("flow", PROMPT, GRAPH)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"not json", "is no JSON"),
        ({"a": 1}, "is no workflow"),
        ([], "is no workflow"),
        (picture(), "holds no workflow"),
        (picture(prompt="not json"), "is no JSON"),
        (picture(prompt="[]"), "not in API format"),
        (picture(prompt=json.dumps(PROMPT))[:80], "damaged|holds no workflow"),
    ],
)
def test_a_file_that_holds_none_is_refused(tmp_path, content, words):
    with pytest.raises(Refused, match=words):
        workflow.read(write(tmp_path, content))


def test_a_graph_becomes_a_prompt():
    made = workflow.converted(workflow.Workflow("", None, GRAPH), KNOWN)
    assert {node_id: node["class_type"] for node_id, node in made.items()} == {
        "1": "Loader",
        "2": "Sampler",
        "3": "Control",
    }
    assert made["2"]["inputs"] == {"seed": 1, "steps": 4, "sampler": "euler", "tiled": False, "model": ["1", 0]}
    assert made["2"]["_meta"]["title"] == "KSampler"


@pytest.mark.parametrize(
    ("flow", "words"),
    [
        (workflow.Workflow("", None, graph(type="Unknown")), r"does not know the node 'Unknown' \(number 2\)"),
        (workflow.Workflow("", {"9": {"class_type": "Unknown", "inputs": {}}}, None), "'Unknown' .number 9"),
        (workflow.Workflow("", None, graph(inputs=7)), "id=2 type=Sampler"),
        (
            workflow.Workflow("", None, {**GRAPH, "nodes": [{**each, "mode": 2} for each in GRAPH["nodes"]]}),
            "Nothing in this",
        ),
    ],
)
def test_a_node_that_cannot_be_converted_is_named(flow, words):
    with pytest.raises(Refused, match=words):
        workflow.converted(flow, KNOWN)


def test_custom_combo_has_the_place_of_its_choice_and_its_options():
    """The page fills them in. Without them its second output would be 0 whatever was chosen."""
    slot = {"name": "choice", "type": "COMBO", "widget": {"name": "choice"}}
    node = {"id": 2, "type": "CustomCombo", "inputs": [slot], "outputs": [], "mode": 0,
            "widgets_values": ["b", 1, "a", "b", ""]}  # fmt: skip
    known = {"CustomCombo": {"input": {"required": {"choice": ["COMBO", {"options": []}]}}, "display_name": "Combo"}}
    made = workflow.converted(workflow.Workflow("", None, {"nodes": [node], "links": []}), known)
    wanted = {"choice": "b", "index": 1, "option1": "a", "option2": "b", "option3": ""}
    assert made["2"]["inputs"] == wanted
    inside = {"nodes": [{"id": 7, "type": "S"}], "definitions": {"subgraphs": [{"id": "S", "nodes": [node]}]}}
    assert workflow.node_of(inside, "7:2") is node
    assert workflow.node_of(inside, "7:3") is None


# what pictures carry


def planned(tmp_path, settings, flow, text="seed,image\n5,a.png\n"):
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "jobs.csv").write_text(text)
    plan = Plan(workflow.converted(flow, KNOWN), KNOWN, settings, tmp_path / "jobs.csv",
                above=workflow.highest_id(flow.graph))  # fmt: skip
    (row,) = plan.rows()
    return plan, row


def test_a_graph_gets_the_values_of_its_row(tmp_path):
    flow = workflow.Workflow("", None, GRAPH)
    plan, row = planned(tmp_path, ["KSampler.seed={seed}", "Apply Control.image={image}"], flow)
    made = Graph.of(flow, plan)
    assert made.why_not == ""
    job = made.job(0, row.key, row.values)
    assert workflow.essence(workflow.as_the_page(job.graph, KNOWN)) == workflow.essence(job.prompt)
    assert job.graph["nodes"][1]["widgets_values"][0] == job.prompt["2"]["inputs"]["seed"] == 5
    assert job.graph["nodes"][1]["outputs"][0]["links"] == []
    loader = job.graph["nodes"][-1]
    assert (loader["type"], loader["id"]) == ("LoadImage", 5)
    assert loader["widgets_values"][0] == job.prompt["5"]["inputs"]["image"] == f"headless/{row.values[1].name}"
    assert workflow.read(write(tmp_path, GRAPH)).graph == GRAPH


def test_a_graph_that_could_be_wrong_is_left_out(tmp_path):
    """A second value that is the same: which of the two it is cannot be told, if changing one changes both or none."""
    flow = workflow.Workflow("", prompt(), GRAPH)
    plan, row = planned(tmp_path, ["KSampler.seed={seed}"], flow)
    made = Graph.of(flow, plan)
    assert "not the same" in made.why_not
    assert made.job(0, row.key, row.values).graph is None
