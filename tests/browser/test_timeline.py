"""The step timeline on the nodes that forecast, in ComfyUI's real page, on both of its ways to draw nodes."""

from itertools import count

import pytest

pytestmark = [pytest.mark.comfy, pytest.mark.sweep(together=True)]

SCHEDULE = "1110010001001001"
STEPS = len(SCHEDULE)
MARKS = SCHEDULE.replace("1", "#").replace("0", ".")
NUMBERS = count(1)  # ComfyUI does not run again what has run: each graph has a seed and an unread interval of its own

# A picture of the embedded model, with a schedule of what is forecast. The node in question is `globalThis.seer`.
BUILD = """
const make = (type, pos, values = {}) => {
    const node = LiteGraph.createNode(type);
    app.graph.add(node);
    node.pos = pos;
    for (const [name, value] of Object.entries(values)) node.widgets.find(each => each.name === name).value = value;
    return node;
};
const load = make("DiTLoadEmbedded", [100, 100]);
const seer = make("DiTTaylorSeer", [540, 100], { schedule: b, last_full: 0, interval: 3 });
const text = make("CLIPTextEncode", [100, 260], { text: "a blue star, on a grey ground" });
const latent = make("EmptyLatentImage", [100, 520], { width: 96, height: 96 });
const sampler = make("KSampler", [850, 100], {
    seed: c, control_after_generate: "fixed", steps: a, cfg: 1, sampler_name: "euler", scheduler: "simple",
});
const decode = make("VAEDecode", [1160, 100]), preview = make("PreviewImage", [1160, 200]);
load.connect(0, seer, 0);
load.connect(1, text, 0);
seer.connect(0, sampler, 0);
text.connect(0, sampler, 1);
text.connect(0, sampler, 2);
latent.connect(0, sampler, 3);
sampler.connect(0, decode, 0);
load.connect(2, decode, 1);
decode.connect(0, preview, 0);
globalThis.seer = seer;
"""
# What the strip of `seer` shows, as the page has laid it out.
LOOK = """
const widget = seer.widgets.find(widget => widget.name === "evaluations");
const bars = [...widget.element.querySelectorAll(".dittoolkit-timeline-bar")];
const box = widget.element.getBoundingClientRect();
return {
    label: widget.element.getAttribute("aria-label"),
    role: widget.element.getAttribute("role"),
    words: widget.element.innerText.split(/\\s+/).join(" ").trim(),
    marks: bars.map(bar => bar.classList.contains("computed") ? "#" : bar.classList.contains("forecast") ? "." : "_")
        .join(""),
    heights: bars.map(bar => bar.getBoundingClientRect().height),
    titles: bars.map(bar => bar.parentElement.title),
    colors: bars.map(bar => getComputedStyle(bar).backgroundImage + getComputedStyle(bar).backgroundColor),
    width: box.width,
    height: box.height,
    seen: document.elementsFromPoint(box.x + box.width / 2, box.y + box.height / 2)
        .some(element => widget.element.contains(element)),
};
"""
# Run is pressed, and the page gets `a` as the prompt's number from a server that does not run it. The events `b` are
# faster than the answer. With `c` another extension sends what is on the canvas, without pressing Run.
QUEUE = """
const { fetchApi } = app.api;
app.api.fetchApi = async function (route, options) {
    if (route !== "/prompt") return fetchApi.call(this, route, options);
    (globalThis.prompts ??= {})[a] = JSON.parse(options.body);
    if (b) await tell(b);
    return new Response(JSON.stringify({ prompt_id: a, number: 1, node_errors: {} }));
};
try {
    if (c) await app.api.queuePrompt(0, await app.graphToPrompt());
    else await app.queuePrompt(0);
} finally {
    app.api.fetchApi = fetchApi;
}
"""
FIND = "globalThis.seer = app.graph.nodes.find(node => node.comfyClass === 'DiTTaylorSeer')"
KEPT = "return seer.properties['dit_toolkit.timeline'] ?? null"  # in the workflow, when it is saved
NEW_TAB = "await app.extensionManager.command.execute('Comfy.NewBlankWorkflow')"
CAPTURE = "window.dispatchEvent(new MouseEvent('mouseup'))"  # ComfyUI looks for changes
# Events as the server sends them: with what it was told when their prompt was queued.
TELL = """
globalThis.tell = async events => {
    for (const [kind, each] of events) {
        const sent = globalThis.prompts?.[each.prompt_id];
        const { id, extra } = sent?.extra_data.extra_pnginfo.workflow ?? {};
        const sender = {
            workflow: id ?? null,
            tab: extra?.["dit_toolkit.tab"] ?? null,
            kind: sent?.prompt[each.node]?.class_type ?? null,
        };
        app.api.dispatchEvent(new CustomEvent(`dit_toolkit.${kind}`, { detail: { ...sender, ...each } }));
    }
    await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
};
"""


@pytest.fixture
def mode(rendering, page):
    """The canvas, empty, at 100 %."""
    page.clear()
    page.forget_errors()
    page.evaluate("app.canvas.ds.scale = 1; app.canvas.ds.offset = [0, 60];")
    page.evaluate(TELL)
    yield rendering
    page.clear()


def build(page) -> None:
    page.evaluate(BUILD, STEPS, SCHEDULE, next(NUMBERS))


def look(page) -> dict:
    page.evaluate("app.canvas.setDirty(true, true); await new Promise(done => setTimeout(done, 300));")
    return page.evaluate(LOOK)


def switch(page, way: str) -> None:
    """To the "Next" or "Previous" tab, and find its node."""
    page.evaluate("await app.extensionManager.command.execute(a)", f"Workspace.{way}OpenedWorkflow")
    page.evaluate(FIND)


def shows(page, marks: str) -> bool:
    """Wait until the strip does."""
    strip = "seer.widgets.find(widget => widget.name === 'evaluations').element"
    bars = f"{strip}.querySelectorAll('.dittoolkit-timeline-bar')"
    mark = "bar => bar.classList.contains('computed') ? '#' : bar.classList.contains('forecast') ? '.' : '_'"
    return page.wait_until(f"[...{bars}].map({mark}).join('') === '{marks}'", f"the strip shows {marks}")


def start(run=1, planned=4, node=None) -> tuple:
    return "run_start", {"node": node or "", "run": run, "planned": planned, "method": "Confidence-Gated Taylor"}


def evaluation(index, computed, run=1, error=None, node=None) -> tuple:
    return "evaluation", {
        "node": node or "", "run": run, "index": index, "sigma": 1 - index / 10, "computed": computed, "error": error,
        "threshold": None if error is None else 0.08, "reason": "gate", "seconds": 0.2, "speedup": 1.5,
    }  # fmt: skip


def end(run=1, node=None, **values) -> tuple:
    summary = "4 evaluations, 2 computed, 2 forecast, 1.50 x faster"
    return "run_end", {
        "node": node or "", "run": run, "summary": summary, "computed": 2, "forecast": 2, "speedup": 1.5,
        "interrupted": False, **values,
    }  # fmt: skip


def sent(page, events=None, by_another=False) -> str:
    """The number of a prompt that the page has sent, of what is on the canvas."""
    prompt = f"prompt {next(NUMBERS)}"
    page.evaluate(QUEUE, prompt, events and named(page, events, prompt), by_another)
    return prompt


def named(page, events, prompt, node=None) -> list:
    own = node or page.evaluate("return String(seer.id)")
    return [[kind, {**detail, "prompt_id": prompt, "node": detail["node"] or own}] for kind, detail in events]


def send(page, *events, node=None, prompt=None) -> None:
    """As the server sends them; to `seer` where no other node is named, of a prompt of its own where none is named."""
    page.evaluate("await tell(a)", named(page, events, prompt or sent(page), node))


def test_a_run_is_followed_and_stays_with_the_workflow(page, server, mode, tmp_path):
    build(page)
    before = look(page)
    assert (before["role"], before["marks"]) == ("img", "")
    assert "no run yet" in before["label"]
    assert before["seen"]
    prompt = page.prompt()
    page.evaluate("""
        globalThis.labels = [];
        const { element } = seer.widgets.find(widget => widget.name === "evaluations");
        new MutationObserver(() => labels.push(element.getAttribute("aria-label")))
            .observe(element, { attributes: true, attributeFilter: ["aria-label"] });
        globalThis.ends = [];
        app.api.addEventListener("dit_toolkit.run_end", ({ detail }) => ends.push(detail), { once: true });
    """)
    server.client.wait(page.queue())
    page.wait_until("labels.at(-1)?.includes('faster') && !labels.at(-1).includes(' of ')", "the run has ended")

    (event,) = page.evaluate("return ends")
    assert event["tab"], "the server does not bring the mark of the tab back"
    assert (event["workflow"], event["kind"]) == (page.graph()["id"], "DiTTaylorSeer")
    shown = look(page)
    page.screenshot(tmp_path / f"{mode}.png")
    assert shown["marks"] == MARKS
    assert shown["label"].startswith(f"TaylorSeer: {STEPS} evaluations, 7 computed, 9 forecast, ")
    assert shown["words"].startswith("7 computed 9 forecast")
    assert shown["titles"][3].startswith("Evaluation 4: forecast")
    high = [height for height, mark in zip(shown["heights"], MARKS, strict=True) if mark == "#"]
    low = [height for height, mark in zip(shown["heights"], MARKS, strict=True) if mark == "."]
    assert min(high) > 20
    assert 4 < max(low) < 0.7 * min(high)
    assert any(f" of {STEPS}" in label for label in page.evaluate("return labels")), "nothing was shown meanwhile"

    assert page.prompt() == prompt
    (inputs,) = (node["inputs"] for node in prompt.values() if node["class_type"] == "DiTTaylorSeer")
    assert "evaluations" not in inputs
    saved = page.graph()
    (node,) = (node for node in saved["nodes"] if node["type"] == "DiTTaylorSeer")
    assert len(node["widgets_values"]) == len(inputs) - 1  # without 'model': values are saved by position
    page.clear()
    page.load_workflow(saved)
    page.evaluate("globalThis.seer = app.graph.nodes.find(node => node.comfyClass === 'DiTTaylorSeer')")
    restored = look(page)
    assert all(restored[key] == shown[key] for key in ("label", "marks", "words"))
    assert page.prompt() == prompt
    assert page.errors() == []


def test_undo_leaves_the_strip_on_the_page(page, mode):
    """Undo makes the nodes anew, and each new one must be the one that is seen."""
    build(page)
    send(page, start(), evaluation(0, True), evaluation(1, False), end())
    shown = look(page)
    page.evaluate("app.canvas.emitBeforeChange(); app.canvas.emitAfterChange();")
    page.evaluate("app.canvas.emitBeforeChange(); seer.title = 'Renamed'; app.canvas.emitAfterChange();")
    page.evaluate("await app.extensionManager.command.execute('Comfy.Undo')")
    page.evaluate("globalThis.seer = app.graph.nodes.find(node => node.comfyClass === 'DiTTaylorSeer')")
    page.wait_until("seer.title !== 'Renamed'", "the change is undone")
    after = look(page)
    assert after["seen"]
    assert all(after[key] == shown[key] for key in ("label", "marks", "words"))
    send(page, start(2), evaluation(0, True, 2), end(2))
    assert look(page)["seen"]
    assert page.errors() == []


def test_a_gate_shows_how_near_it_was(page, mode, tmp_path):
    build(page)
    send(
        page,
        start(planned=6),
        evaluation(0, True),
        evaluation(1, False, error=0.008),
        evaluation(2, False, error=0.07),
        evaluation(3, True, error=0.09),
    )
    shown = look(page)
    page.screenshot(tmp_path / f"{mode}.png")
    assert shown["marks"] == "#..#__"
    heights, colors = shown["heights"], shown["colors"]
    assert heights[0] == heights[3] > heights[2] > heights[1] > heights[4]
    assert colors[1] != colors[2]
    assert colors[0] != colors[3], "the evaluation that the gate refused looks like one of the schedule"
    assert "threshold" in shown["titles"][2]
    assert shown["label"] == "Confidence-Gated Taylor: evaluation 4 of 6, 2 computed, 2 forecast, 1.5 x faster"
    assert page.errors() == []


def test_the_next_run_clears_the_strip_and_an_interrupted_one_says_so(page, mode):
    build(page)
    send(page, start(), evaluation(0, True), evaluation(1, False), end())
    assert look(page)["marks"] == "#."
    prompt = sent(page)
    send(page, start(run=2), evaluation(0, True, run=2), prompt=prompt)
    assert look(page)["marks"] == "#___"
    send(page, end(run=2, interrupted=True, computed=1, forecast=0), prompt=prompt)
    shown = look(page)
    assert shown["marks"] == "#___"
    assert "interrupted" in shown["words"]


def test_events_of_other_nodes_change_nothing(page, mode):
    build(page)
    other = page.evaluate("return String(app.graph.nodes.find(node => node.comfyClass === 'KSampler').id)")
    for node in ("999", "999:1", other, f"{other}:1"):
        send(page, start(node=node), evaluation(0, True, node=node), end(node=node))
    assert look(page)["marks"] == ""
    page.evaluate("app.graph.remove(seer)")
    send(page, start(), evaluation(0, True), end())
    assert page.errors() == []


def test_a_prompt_that_the_page_has_not_sent_is_not_shown(page, mode):
    """Another window's, or a program's, whose node has the same number."""
    build(page)
    send(page, start(), evaluation(0, True), end(), prompt="of somebody else")
    assert look(page)["marks"] == ""
    assert page.evaluate(KEPT) is None


def test_a_run_is_shown_and_kept_in_the_tab_that_it_is_of(page, mode):
    """Two tabs with the same nodes: one is queued, and then the other one is looked at."""
    page.evaluate(NEW_TAB)
    build(page)
    page.evaluate("globalThis.first = app.extensionManager.workflow.activeWorkflow")
    page.evaluate(NEW_TAB)
    build(page)
    prompt = sent(page)
    send(page, start(), evaluation(0, True), prompt=prompt)
    assert shows(page, "#___")

    switch(page, "Previous")
    assert page.evaluate("return app.extensionManager.workflow.activeWorkflow === first")
    send(page, evaluation(1, False), prompt=prompt)
    assert look(page)["marks"] == ""
    switch(page, "Next")
    assert shows(page, "#.__"), "the run that goes on is not shown"
    send(page, evaluation(2, False), prompt=prompt)
    assert shows(page, "#.._")

    switch(page, "Previous")
    send(page, evaluation(3, True), end(), prompt=prompt)
    assert look(page)["marks"] == ""
    assert page.evaluate(KEPT) is None
    assert page.evaluate(f"app.graph.change(); {CAPTURE}; return JSON.stringify(first.activeState)").count("marks") == 0
    switch(page, "Next")
    assert shows(page, "#..#")
    assert page.evaluate(KEPT)["marks"] == "#..#"
    assert page.errors() == []


def test_two_tabs_of_one_template_are_two(page, mode):
    """The page gives both graphs the id that is in the file, and all nodes have the same numbers."""
    build(page)
    saved = page.graph()
    prompts = []
    for _ in range(2):
        page.evaluate(NEW_TAB)
        page.evaluate("await app.loadGraphData(a, true, true, 'one template')", saved)
        page.evaluate(FIND)
        prompts.append(sent(page))
    ids = page.evaluate("return app.extensionManager.workflow.openWorkflows.map(each => each.activeState?.id)")
    assert ids[-1] == saved["id"]
    assert ids.count(saved["id"]) >= 2, "the page tells them apart: there is an easier way than marks"

    send(page, start(), evaluation(0, True), end(), prompt=prompts[0])
    send(page, start(), evaluation(0, True), evaluation(1, False), end(), prompt=prompts[1])
    assert shows(page, "#.")
    unmarked = sent(page, by_another=True)
    send(page, start(), evaluation(0, True), evaluation(1, True), end(), prompt=unmarked)
    assert look(page)["marks"] == "#.", "nobody knows which of the two it is of"
    switch(page, "Previous")  # the empty one in between
    page.evaluate("await app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')")
    page.evaluate(FIND)
    assert shows(page, "#")
    assert page.evaluate(KEPT)["marks"] == "#"
    assert page.errors() == []


def test_a_prompt_that_another_extension_sends_is_shown(page, mode):
    page.evaluate(NEW_TAB)
    build(page)
    send(page, start(), evaluation(0, True), end(), prompt=sent(page, by_another=True))
    assert shows(page, "#")
    assert page.evaluate(KEPT)["marks"] == "#"


def test_the_mark_of_a_tab_is_in_nothing_but_the_prompt(page, mode):
    """It would be an edit, and a picture that is opened would bring that of another tab along."""
    page.evaluate(NEW_TAB)
    build(page)
    page.prompt()  # numbers the nodes in the order in which they run, which is an edit
    page.evaluate(CAPTURE)
    steps = "return app.extensionManager.workflow.activeWorkflow.changeTracker.undoQueue.length"
    before = page.evaluate(steps)
    prompt = sent(page)
    graph = page.evaluate("return prompts[a].extra_data.extra_pnginfo.workflow", prompt)
    assert graph["extra"]["dit_toolkit.tab"]
    page.evaluate(CAPTURE)
    assert page.evaluate(steps) == before
    assert "dit_toolkit.tab" not in page.graph()["extra"]
    page.load_workflow(graph)
    assert "dit_toolkit.tab" not in page.graph()["extra"]


def test_events_may_be_faster_than_the_answer_to_the_prompt(page, mode):
    build(page)
    sent(page, [start(), evaluation(0, True), end()])
    assert shows(page, "#")
    assert page.evaluate(KEPT)["marks"] == "#"


def test_a_run_is_no_edit(page, mode):
    """It is in every state that undo knows: no step of its own, not taken back, and nothing that wants saving."""
    build(page)
    page.prompt()  # numbers the nodes in the order in which they run, which is an edit
    page.evaluate("app.canvas.emitBeforeChange(); app.canvas.emitAfterChange();")
    page.evaluate("app.canvas.emitBeforeChange(); seer.title = 'Renamed'; app.canvas.emitAfterChange();")
    page.evaluate("app.extensionManager.workflow.activeWorkflow.changeTracker.reset()")  # as saving does
    send(page, start(), evaluation(0, True), evaluation(1, False), end())
    kept = page.evaluate(KEPT)
    assert kept["marks"] == "#."
    states = page.evaluate("""
        const { initialState, activeState, undoQueue } = app.extensionManager.workflow.activeWorkflow.changeTracker;
        return [initialState, activeState, ...undoQueue]
            .map(state => state.nodes.find(node => node.type === "DiTTaylorSeer"))
            .filter(Boolean)
            .map(node => node.properties["dit_toolkit.timeline"] ?? null);
    """)
    assert states == [kept] * 3  # saved, now, and before it was renamed

    page.evaluate("await app.extensionManager.command.execute('Comfy.Undo')")
    page.evaluate(FIND)
    assert page.evaluate("return seer.title") != "Renamed"
    assert shows(page, "#.")
    assert page.evaluate(KEPT) == kept


def test_a_run_of_the_graph_that_was_there_before_is_not_shown_in_the_next(page, mode):
    """An emptied workflow counts its nodes from 1 again."""
    page.evaluate(NEW_TAB)
    build(page)
    number, prompt = page.evaluate("return seer.id"), sent(page)
    page.evaluate("""
        await app.extensionManager.setting.set("Comfy.ConfirmClear", false);
        await app.extensionManager.command.execute("Comfy.ClearWorkflow");
    """)
    build(page)
    assert page.evaluate("return seer.id") == number
    send(page, start(), evaluation(0, True), end(), prompt=prompt)
    assert look(page)["marks"] == ""
    assert page.errors() == []


def test_the_wheel_zooms_over_the_strip_as_beside_it(page, mode):
    build(page)
    look(page)
    box = "seer.widgets.find(widget => widget.name === 'evaluations').element.getBoundingClientRect()"
    over = page.evaluate(f"const box = {box}; return [box.x + box.width / 2, box.y + box.height / 2]")
    look(page)
    scales = []
    for x, y in (over, (1300, 650)):
        page.evaluate("app.canvas.ds.scale = 1; app.canvas.ds.offset = [0, 60];")
        look(page)
        page.call("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=-120)
        look(page)
        scales.append(page.evaluate("return app.canvas.ds.scale"))
    assert scales[0] > 1
    assert scales[0] == pytest.approx(scales[1])


def test_a_node_in_a_subgraph_is_found(page, server, mode):
    """Its execution id is that of the subgraph's node, a colon, and its own."""
    build(page)
    page.evaluate("""
        const { node, subgraph } = app.graph.convertToSubgraph(new Set([seer]));
        globalThis.seer = subgraph.nodes.find(each => each.comfyClass === "DiTTaylorSeer");
        globalThis.execution = `${node.id}:${seer.id}`;
    """)
    server.client.wait(page.queue())
    page.wait_until("!!seer.properties['dit_toolkit.timeline']", "the run was kept with the node")
    element = "seer.widgets.find(widget => widget.name === 'evaluations').element"
    page.wait_until(f"{element}.querySelectorAll('.computed.dittoolkit-timeline-bar').length", "its strip is filled")
    marks = page.evaluate("return seer.properties['dit_toolkit.timeline'].marks")
    assert marks == MARKS
    send(page, start(run=50), evaluation(0, False, run=50), node=page.evaluate("return execution"))
    assert page.evaluate(f"return {element}.querySelectorAll('.forecast.dittoolkit-timeline-bar').length") == 1
    assert page.errors() == []
