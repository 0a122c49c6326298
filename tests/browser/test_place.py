"""Elements in the bodies of our nodes, in ComfyUI's real page: where they are, and what undo makes of them."""

import pytest

pytestmark = pytest.mark.comfy

ELEMENTS = {"DiTPanelLayout": "panels_editor", "DiTTaylorSeer": "evaluations"}

# A node of kind `a` with an element `b`, drawn, as `globalThis.node`. `c` is done with it.
BUILD = """
const node = globalThis.node = LiteGraph.createNode(a);
app.canvas.emitBeforeChange();
app.graph.add(node);
node.pos = [60, 40];
app.canvas.emitAfterChange();
globalThis.element = node.widgets.find(widget => widget.name === b).element;
globalThis.drawn = async () => {
    for (let times = 0; times < 3; times++) {
        app.canvas.setDirty(true, true);
        await new Promise(requestAnimationFrame);
        await new Promise(requestAnimationFrame);
    }
};
await drawn();
await eval(`(async () => { ${c} })()`);
await drawn();
"""
# Where the element is, from the corner of its node, on a canvas at 100 %.
PLACE = """
await drawn();
const [box, canvas] = [element, app.canvas.canvas].map(each => each.getBoundingClientRect());
const corner = node.pos.map((at, axis) => at + app.canvas.ds.offset[axis]);
return { left: box.left - canvas.left - corner[0], top: box.top - canvas.top - corner[1], width: box.width };
"""
# How the node that is copied came to be as it is.
SOURCES = {
    "as it is": "",
    "wide": "node.setSize([700, 200])",
    "with a link that is not copied": """
        const number = LiteGraph.createNode("PrimitiveInt");
        app.graph.add(number);
        number.connect(0, node, node.inputs.findIndex(input => ["rows", "interval"].includes(input.name)));
    """,
    "as lines": "[...element.querySelectorAll('button')].find(each => each.textContent === 'as lines')?.click()",
}
HISTORY = "app.extensionManager.workflow.activeWorkflow.changeTracker"
CLICK = "await drawn(); window.dispatchEvent(new MouseEvent('mouseup'));"  # ComfyUI looks for changes


@pytest.fixture(params=ELEMENTS)
def kind(request, page):
    """On the classic canvas, empty, at 100 %."""
    page.clear()
    page.forget_errors()
    page.evaluate("app.canvas.ds.scale = 1; app.canvas.ds.offset = [0, 60];")
    yield request.param
    page.evaluate("await app.extensionManager.setting.set('Comfy.RightSidePanel.IsOpen', false)")
    page.clear()


def build(page, kind: str, change: str = "") -> None:
    page.evaluate(BUILD, kind, ELEMENTS[kind], change)


def test_the_side_panel_leaves_the_element_where_it_is(page, kind, tmp_path):
    build(page, kind)
    before = page.evaluate(PLACE)
    assert before["width"] == pytest.approx(page.evaluate("return node.size[0]") - 20, abs=1)
    page.evaluate("await app.extensionManager.setting.set('Comfy.RightSidePanel.IsOpen', true)")
    page.evaluate("app.canvas.selectItems([node])")
    listed = "[...document.querySelectorAll('.widget-item')].map(each => each.innerText)"
    page.wait_until(f"{listed}.length", "the side panel lists the inputs")
    page.settle()
    page.screenshot(tmp_path / f"{kind}.png")
    assert page.evaluate(PLACE) == pytest.approx(before)
    assert not [text for text in page.evaluate(f"return {listed}") if ELEMENTS[kind] in text]
    assert page.errors() == []


def test_the_element_is_as_wide_as_its_node_whoever_writes_a_width(page, kind):
    build(page, kind)
    before = page.evaluate(PLACE)
    page.evaluate("node.widgets.find(widget => widget.name === a).width = 264", ELEMENTS[kind])
    assert page.evaluate(PLACE) == pytest.approx(before)
    page.evaluate("node.setSize([node.size[0] + 100, node.size[1]])")
    assert page.evaluate(PLACE)["width"] == pytest.approx(before["width"] + 100)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.sweep
def test_the_first_undo_takes_a_pasted_node_away(page, kind, source):
    build(page, kind, SOURCES[source])
    page.evaluate(CLICK)
    count, steps = page.evaluate(f"return [app.graph.nodes.length, {HISTORY}.undoQueue.length]")
    page.evaluate("app.canvas.selectItems([node]); app.canvas.copyToClipboard(); app.canvas.pasteFromClipboard();")
    page.evaluate(CLICK)
    assert page.evaluate(f"return [app.graph.nodes.length, {HISTORY}.undoQueue.length]") == [count + 1, steps + 1]

    page.evaluate("await app.extensionManager.command.execute('Comfy.Undo')")
    assert page.evaluate("return app.graph.nodes.length") == count
    if "link" not in source:  # ComfyUI itself takes the order of linked nodes for a change
        page.evaluate(CLICK)
    page.evaluate("await app.extensionManager.command.execute('Comfy.Redo')")
    assert page.evaluate("return app.graph.nodes.length") == count + 1, "looking at it was taken for a change"


def test_a_node_that_is_added_is_one_step(page, kind):
    steps = page.evaluate(f"return {HISTORY}.undoQueue.length")
    build(page, kind)
    page.evaluate(CLICK)
    assert page.evaluate(f"return {HISTORY}.undoQueue.length") == steps + 1
