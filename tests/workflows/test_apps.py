"""Apps are workflows that open as a form: the same graph, five fields, and the picture after Run."""

from __future__ import annotations

import pytest

from dit_toolkit.scripts import workflows
from dit_toolkit.scripts.places import PACK, WORKFLOWS

NAMES = sorted(workflows.APPS)
every_app = pytest.mark.parametrize("name", NAMES)


def test_the_apps_are_those_that_are_listed():
    assert sorted(path.name.removesuffix(".json") for path in WORKFLOWS.glob("*.app.json")) == NAMES


@every_app
def test_a_name_is_that_of_its_workflow(name):
    assert name == f"{workflows.APPS[name].workflow}.app"
    assert workflows.APPS[name].workflow in workflows.stems()


@every_app
def test_the_file_is_made_from_its_workflow(name):
    assert workflows.read(name) == workflows.APPS[name].made(), "renew it: python -m scripts.workflows"
    pictures = [(WORKFLOWS / f"{each}.jpg").read_bytes() for each in (name, workflows.APPS[name].workflow)]
    assert pictures[0] == pictures[1], "renew it: python -m scripts.workflows"


@every_app
def test_the_graph_is_that_of_its_workflow(name):
    """All but the form, the names of its fields, and how a node shows its texts."""
    app, workflow = workflows.read(name), workflows.read(workflows.APPS[name].workflow)
    assert app["id"] != workflow["id"]
    for whole in (app, workflow):
        del whole["id"], whole["extra"]
        for node in whole["nodes"]:
            node["properties"].pop(workflows.AS_LINES, None)
            for entry in node.get("inputs", ()):
                entry.pop("label", None)
    assert app == workflow


@every_app
def test_it_asks_for_five_things_that_are_free_and_shows_what_is_saved(name):
    workflow = workflows.read(name)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    form = workflow["extra"]["linearData"]
    assert len(form["inputs"]) == 5
    assert len({label for _, _, label in workflows.APPS[name].asks}) == 5
    for node, widget in form["inputs"]:
        entry = next(entry for entry in nodes[node]["inputs"] if entry.get("widget") == {"name": widget})
        assert entry["link"] is None
    assert form["outputs"]
    assert all(nodes[node]["type"] == "SaveImage" for node in form["outputs"])


# In the page

ITEMS = """[...document.querySelectorAll('[data-testid="app-mode-widget-item"]')]"""
FIELDS = f"""{ITEMS}.map(item => [
    item.querySelector('[data-testid="builder-widget-label"]').textContent,
    item.querySelectorAll('textarea, input, [role="combobox"], [data-testid="widget-select-default-trigger"]').length,
])"""
# The last field is the name of the file.
NAMED = f"""
const field = {ITEMS}.at(-1).querySelector('input');
field.focus();
field.value = a;
for (const kind of ['input', 'change', 'blur']) field.dispatchEvent(new Event(kind, {{ bubbles: true }}));
"""
RUN = """[...document.querySelectorAll('[data-testid="linear-run-button"] button')]
    .find(each => each.textContent.trim() === 'Run').click()"""
SHOWN = """[...document.querySelectorAll('[data-testid="linear-center-panel"] img')].some(
    each => each.naturalWidth && new URL(each.src).searchParams.get('filename')?.startsWith('From the form'))"""


@pytest.mark.comfy
@every_app
def test_the_template_opens_as_a_form_and_shows_its_picture(name, page, server):
    app = workflows.APPS[name]
    page.clear()
    page.forget_errors()
    page.browse_templates(PACK)
    page.open_template(name)
    # A Run while the page still opens the workflow would belong to the one before, and no form would show its picture.
    opened = f"app.extensionManager.workflow.activeWorkflow?.path.includes({name!r})"
    page.wait_until(f"{opened} && {FIELDS}.length === {len(app.asks)}", "the form is there")
    page.settle()
    fields = page.evaluate(f"return {FIELDS}")
    assert [label for label, _ in fields] == [label for _, _, label in app.asks]
    assert all(count == 1 for _, count in fields), "a field has nothing to fill in"

    page.evaluate(NAMED, f"From the form, {name}")
    assert page.prompt()[str(app.shows[0])]["inputs"]["filename_prefix"] == f"From the form, {name}"
    # A run that other tests have left nothing to compute for may end before the page knows that it is the form's.
    server.client.free()
    page.evaluate(RUN)
    page.wait_until(SHOWN, "the form shows the picture")
    assert page.errors() == []
