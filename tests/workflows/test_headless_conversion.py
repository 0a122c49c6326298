"""What `headless/` makes of a file that the page saved is what the page itself makes of it."""

import json

import pytest

from dit_toolkit.headless import workflow
from dit_toolkit.headless.plan import savers
from dit_toolkit.scripts import workflows
from dit_toolkit.scripts.places import BLUEPRINTS, WORKFLOWS

pytestmark = pytest.mark.comfy

FILES = sorted([*WORKFLOWS.glob("*.json"), *BLUEPRINTS.glob("*.json")])


@pytest.fixture(scope="module")
def known(server):
    return server.client.object_info()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_conversion_equals_the_pages(path, page, prompts, known):
    if path.parent != WORKFLOWS or path.stem not in prompts:
        page.load_workflow(json.loads(path.read_text(encoding="utf-8")))
        prompts[path.stem] = page.prompt()
    converted = workflow.converted(workflow.read(path), known)
    by_page = prompts[path.stem]
    assert workflow.essence(converted) == workflow.essence(by_page)
    titles = {node_id: node["_meta"]["title"] for node_id, node in by_page.items()}
    assert {node_id: node["_meta"]["title"] for node_id, node in converted.items()} == titles
    assert bool(savers(converted, known)) == (path.parent == WORKFLOWS)


def test_a_conversion_that_differs_is_found(prompts, known):
    """A value that the page has and the file has not."""
    stem = workflows.stems()[0]
    file = workflow.read(WORKFLOWS / f"{stem}.json")
    sampler = next(node for node in file.graph["nodes"] if node["type"] == "KSampler")
    sampler["widgets_values"][0] += 1
    assert workflow.essence(workflow.converted(file, known)) != workflow.essence(prompts[stem])
