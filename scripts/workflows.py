"""The example workflows: which there are, what each needs, and which are apps too.

`python -m scripts.workflows` writes the apps anew, after a change of their workflows or of what they ask for.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from .places import DEMO_PROMPTS, ROOT, WORKFLOWS

# A workflow that is listed here and missing fails its tests: an example must not vanish unnoticed.
EXPECTED = (ROOT / "tests" / "reference" / "workflows.txt").read_text(encoding="utf-8").splitlines()


@dataclass(frozen=True)
class App:
    """A workflow as a form: what it asks for, in the order in which it is filled in, and what it shows."""

    workflow: str
    asks: tuple[tuple[int, str, str], ...]  # node, widget, and the name of the field
    shows: tuple[int, ...]  # nodes that save pictures
    properties: tuple[tuple[int, str, bool], ...] = ()  # of nodes

    def made(self) -> dict:
        """What its file holds: the graph of the workflow, and the form."""
        workflow = read(self.workflow)
        nodes = {node["id"]: node for node in workflow["nodes"]}
        for node, widget, name in self.asks:
            entry = next(entry for entry in nodes[node]["inputs"] if entry.get("widget", {}).get("name") == widget)
            entry["label"] = name
        for node, key, value in self.properties:
            nodes[node]["properties"][key] = value
        # The page keeps values by the id of the graph: both may be open at once.
        workflow["id"] = str(uuid.uuid5(uuid.UUID(workflow["id"]), "app"))
        inputs = [[node, widget] for node, widget, _ in self.asks]
        workflow["extra"] |= {"linearMode": True, "linearData": {"inputs": inputs, "outputs": list(self.shows)}}
        return workflow


# The page opens a template as a form if its name ends in ".app".
AS_LINES = "dit_toolkit.panels_as_lines"  # see web/lib/panels.js: a form shows no widget that is hidden behind the grid
APPS = {
    "CPU 09 consistent character.app": App(
        "CPU 09 consistent character",
        asks=(
            (3, "panel_prompts", "Scenes, one line each"),
            (2, "strength_model", "LoRA strength"),
            (7, "value", "Seed"),
            (6, "batch_size", "Pictures"),
            (10, "filename_prefix", "File name"),
        ),
        shows=(10,),
        properties=((3, AS_LINES, True),),
    ),
    "CPU 12 try on clothes.app": App(
        "CPU 12 try on clothes",
        asks=(
            (7, "picture", "First garment"),
            (8, "picture", "Second garment"),
            (13, "garment_strength", "Garment strength"),
            (23, "seed", "Seed"),
            (20, "filename_prefix", "File name"),
        ),
        shows=(20,),
    ),
}


def stems() -> list[str]:
    """Titles of the workflows, the expected and the present ones. Apps are not among them."""
    present = (path.stem for path in WORKFLOWS.glob("*.json"))
    return sorted({*EXPECTED, *(stem for stem in present if not stem.endswith(".app"))})


def write_apps() -> None:
    """Their files and their thumbnails."""
    for name, app in APPS.items():
        text = json.dumps(app.made(), indent=1, ensure_ascii=False) + "\n"
        (WORKFLOWS / f"{name}.json").write_text(text, encoding="utf-8")
        copy_thumbnail(name)


def copy_thumbnail(name: str) -> None:
    """An app's is that of its workflow."""
    shutil.copyfile(WORKFLOWS / f"{APPS[name].workflow}.jpg", WORKFLOWS / f"{name}.jpg")


def read(stem: str) -> dict:
    """A workflow in UI format, as the page saves it."""
    return json.loads((WORKFLOWS / f"{stem}.json").read_text(encoding="utf-8"))


def read_prompt(stem: str) -> dict:
    """The same in API format, as the demo sends it. `python -m scripts.demo --convert` makes these."""
    return json.loads((DEMO_PROMPTS / f"{stem}.json").read_text(encoding="utf-8"))


def nodes_of(workflow: dict) -> Iterator[dict]:
    """Its nodes, those inside subgraphs too."""
    yield from workflow["nodes"]
    for subgraph in subgraphs_of(workflow):
        yield from subgraph["nodes"]


def subgraphs_of(workflow: dict) -> list[dict]:
    """The definitions of its subgraphs."""
    return workflow.get("definitions", {}).get("subgraphs", [])


def flat(workflow: dict) -> tuple[dict[str, dict], dict[tuple[str, str], tuple[str, int]]]:
    """Its nodes by id ("3:7" is node 7 in subgraph 3), and by node and input the output that feeds it.

    Subgraphs are dissolved. Widget inputs that a subgraph brings out have no source.
    """
    nodes: dict[str, dict] = {}
    sources: dict[tuple[str, str], tuple[str, int]] = {}
    defined = {subgraph["id"]: subgraph for subgraph in subgraphs_of(workflow)}
    top = {link[0]: (link[1], link[2]) for link in workflow["links"]}
    outer = {node["id"]: node for node in workflow["nodes"]}

    def output(node_id: int, slot: int) -> tuple[str, int] | None:
        subgraph = defined.get(outer[node_id]["type"])
        if subgraph is None:
            return str(node_id), slot
        links = {link["id"]: link for link in subgraph["links"]}
        ends = [links[link] for link in subgraph["outputs"][slot]["linkIds"]]
        inner = ends[0]
        return f"{node_id}:{inner['origin_id']}", inner["origin_slot"]

    for node in outer.values():
        fed = {entry["name"]: top[entry["link"]] for entry in node.get("inputs", ()) if entry.get("link") is not None}
        subgraph = defined.get(node["type"])
        if subgraph is None:
            nodes[str(node["id"])] = node
            sources |= {(str(node["id"]), name): output(*source) for name, source in fed.items()}
            continue
        for inner in subgraph["nodes"]:
            nodes[f"{node['id']}:{inner['id']}"] = inner
        inside = {inner["id"]: inner for inner in subgraph["nodes"]}
        for link in subgraph["links"]:
            if link["target_id"] not in inside:
                continue
            name = inside[link["target_id"]]["inputs"][link["target_slot"]]["name"]
            target = f"{node['id']}:{link['target_id']}", name
            if link["origin_id"] in inside:
                sources[target] = f"{node['id']}:{link['origin_id']}", link["origin_slot"]
            elif (entry := subgraph["inputs"][link["origin_slot"]]["name"]) in fed:
                sources[target] = output(*fed[entry])
    return nodes, sources


def models_of(workflow: dict) -> list[dict]:
    """What it says it needs: {"name", "url", "directory"} of each model file."""
    return [model for node in nodes_of(workflow) for model in node.get("properties", {}).get("models", ())]


def is_embedded(stem: str) -> bool:
    """Whether it runs on the model that comes with the pack."""
    present = (WORKFLOWS / f"{stem}.json").exists()
    return present and any(node["type"] == "DiTLoadEmbedded" for node in nodes_of(read(stem)))


if __name__ == "__main__":
    write_apps()
