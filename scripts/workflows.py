"""The example workflows: which there are, and what each needs."""

from __future__ import annotations

import json
from collections.abc import Iterator

from .places import DEMO_PROMPTS, ROOT, WORKFLOWS

# A workflow that is listed here and missing fails its tests: an example must not vanish unnoticed.
EXPECTED = (ROOT / "tests" / "reference" / "workflows.txt").read_text(encoding="utf-8").splitlines()


def stems() -> list[str]:
    """Titles of the workflows, the expected and the present ones."""
    return sorted({*EXPECTED, *(path.stem for path in WORKFLOWS.glob("*.json"))})


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
