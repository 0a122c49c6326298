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
    for subgraph in workflow.get("definitions", {}).get("subgraphs", ()):
        yield from subgraph["nodes"]


def models_of(workflow: dict) -> list[dict]:
    """What it says it needs: {"name", "url", "directory"} of each model file."""
    return [model for node in nodes_of(workflow) for model in node.get("properties", {}).get("models", ())]


def is_embedded(stem: str) -> bool:
    """Whether it runs on the model that comes with the pack."""
    present = (WORKFLOWS / f"{stem}.json").exists()
    return present and any(node["type"] == "DiTLoadEmbedded" for node in nodes_of(read(stem)))
