// Whose run an event tells of, and where it is kept.

import assert from "node:assert/strict";
import { test } from "node:test";

import { Runs, Tabs, savedNodeAt } from "../../web/lib/runs.js";

const workflow = (id) => ({ activeState: { id } });
const open = (...openWorkflows) => ({ activeWorkflow: openWorkflows[0], openWorkflows });
const event = (tab, graph, kind = "Seer") => ({ tab, workflow: graph, kind });
const origin = (from) => ({ workflow: from, graph: "g", kind: "Seer" });
const told = (runs, prompt, node, word, from) =>
  runs.told({ prompt_id: prompt, node }, from, (said) => `${said}${word}`, "");

test("a prompt is of the tab that queued it, whichever tab is looked at since", () => {
  const [first, second] = [workflow("a"), workflow("b")];
  const tabs = new Tabs();
  const [one, two] = [tabs.mark("a", open(first, second)), tabs.mark("b", open(second, first))];
  assert.deepEqual(tabs.originOf(event(one, "a"), open(second, first)), { workflow: first, graph: "a", kind: "Seer" });
  assert.equal(tabs.originOf(event(two, "b"), open(first, second)).workflow, second);
  assert.equal(tabs.mark("a", open(first, second)), one, "a tab keeps its mark");
});

test("two tabs of one template have graphs of the same number, and marks of their own", () => {
  const twins = [workflow("a"), workflow("a")];
  const tabs = new Tabs();
  const marks = [tabs.mark("a", open(...twins)), tabs.mark("a", open(...twins.toReversed()))];
  for (const here of [open(...twins), open(...twins.toReversed())])
    marks.forEach((mark, index) => assert.equal(tabs.originOf(event(mark, "a"), here).workflow, twins[index]));
});

test("while a tab is opened, the graph on the canvas says which one it is", () => {
  const [first, second] = [workflow("a"), workflow("b")];
  const tabs = new Tabs();
  const whose = (graph) => tabs.originOf(event(tabs.mark(graph, open(first, second)), graph), open(first, second)).workflow;
  assert.equal(whose("b"), second);
  assert.equal(whose("c"), first, "a graph that nobody knows yet: of the open tab");
  assert.equal(tabs.mark("a", {}), null);
});

test("a prompt without a mark is of the only tab with its graph", () => {
  const [first, second] = [workflow("a"), workflow("b")];
  const tabs = new Tabs();
  assert.equal(tabs.originOf(event(null, "b"), open(first, second)).workflow, second);
  assert.equal(tabs.originOf(event(null, "c"), open(first, second)), null);
  assert.equal(tabs.originOf(event(null, "b"), open(second, workflow("b"))), null, "which of two, nobody knows");
});

test("nothing is shown of a prompt that is not of this page", () => {
  const tabs = new Tabs();
  const here = open(workflow("a"));
  const earlier = new Tabs().mark("a", here);
  assert.equal(tabs.originOf(event(earlier, "a"), here), null, "of the page before it was opened again");
  const mark = tabs.mark("a", here);
  assert.notEqual(mark, earlier);
  for (const odd of [event(mark, null), event(mark, "a", null), event(null, null), {}])
    assert.equal(tabs.originOf(odd, here), null);
  const runs = new Runs();
  assert.equal(told(runs, "theirs", "5", "x", null), null);
  assert.deepEqual(runs.all(), []);
});

test("a tab that queues again and again keeps its mark, however many others there are", () => {
  const tabs = new Tabs();
  const mine = open(workflow("a"));
  const mark = tabs.mark("a", mine);
  for (let index = 0; index < 300; index++) {
    tabs.mark("b", open(workflow("b")));
    if (index % 50 === 0) tabs.mark("a", mine);
  }
  assert.equal(tabs.originOf(event(mark, "a"), mine)?.workflow, mine.activeWorkflow);
});

test("a run stays where it began", () => {
  const runs = new Runs();
  const [first, second] = [origin(workflow("g")), origin(workflow("g"))];
  told(runs, "p", "5", "a", first);
  told(runs, "p", "5", "b", second);
  assert.equal(told(runs, "p", "5", "c", null).state, "abc");
  assert.equal(runs.all().length, 1);
  assert.equal(runs.all()[0].origin, first);
});

test("runs of two workflows and two nodes do not mix, and the newest comes last", () => {
  const [first, second] = [origin(workflow("g")), origin(workflow("g"))];
  const runs = new Runs();
  told(runs, "1", "5", "a", first);
  told(runs, "2", "5", "b", second);
  told(runs, "3", "5", "c", first);
  told(runs, "1", "5", "d", first);
  told(runs, "1", "6", "e", first);
  assert.deepEqual(runs.all().map(({ origin: { workflow: from }, node, state }) => [from, node, state]), [
    [first.workflow, "5", "ad"],
    [first.workflow, "6", "e"],
    [second.workflow, "5", "b"],
    [first.workflow, "5", "c"],
  ]);
});

test("what is over is forgotten in the end", () => {
  const runs = new Runs();
  for (let index = 0; index < 500; index++) told(runs, `${index}`, "5", index, origin(workflow("g")));
  assert.equal(runs.all().length, 20);
  assert.equal(runs.all().at(-1).state, "499");
});

test("a saved graph has its nodes where the execution id says, through subgraphs too", () => {
  const saved = {
    nodes: [{ id: 12, name: "outer" }, { id: 7, type: "sub" }],
    definitions: {
      subgraphs: [
        { id: "sub", nodes: [{ id: 12, name: "inner" }, { id: 5, type: "deep" }] },
        { id: "deep", nodes: [{ id: "3", name: "deepest" }] },
      ],
    },
  };
  const name = (id) => savedNodeAt(saved, id)?.name ?? null;
  assert.deepEqual(["12", 12, "7:12", "7:5:3"].map(name), ["outer", "outer", "inner", "deepest"]);
  for (const gone of ["13", "7:13", "8:12", "12:12", "", undefined, "7:12:1"]) assert.equal(name(gone), null);
  for (const odd of [null, undefined, {}, { nodes: [{ id: 7, type: "sub" }] }]) assert.equal(savedNodeAt(odd, "7:12"), null);
});
