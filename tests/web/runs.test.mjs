// Whose run an event tells of, and where it is kept.

import assert from "node:assert/strict";
import { test } from "node:test";

import { Runs, originOf, savedNodeAt } from "../../web/lib/runs.js";

const SHOWN = new Set(["Seer"]);
const workflow = (id) => ({ activeState: { id } });
const data = (graph, output = { 5: { class_type: "Seer" }, 6: { class_type: "Other" } }) => ({
  workflow: { id: graph },
  output,
});
const origin = (from) => ({ workflow: from, graph: "g", kinds: new Map([["5", "Seer"]]) });
const told = (runs, prompt, node, word) => runs.told({ prompt_id: prompt, node }, (said) => `${said}${word}`, "");

test("a prompt comes from the workflow whose graph it is, also when the user has gone to another tab since", () => {
  const [first, second] = [workflow("a"), workflow("b")];
  const open = { activeWorkflow: first, openWorkflows: [first, second] };
  assert.equal(originOf(data("a"), open, SHOWN).workflow, first);
  assert.equal(originOf(data("b"), open, SHOWN).workflow, second);
  assert.equal(originOf(data("c"), open, SHOWN).workflow, first, "a graph that nobody knows: of the open tab");
  const twins = { activeWorkflow: second, openWorkflows: [workflow("b"), second] };
  assert.equal(originOf(data("b"), twins, SHOWN).workflow, second, "one template, opened twice");
});

test("a prompt without a node of ours is none of our business", () => {
  const open = { activeWorkflow: workflow("a"), openWorkflows: [] };
  assert.deepEqual([...originOf(data("a"), open, SHOWN).kinds], [["5", "Seer"]]);
  for (const odd of [data("a", { 6: { class_type: "Other" } }), data("a", {}), {}, undefined, null, { output: { 5: null } }])
    assert.equal(originOf(odd, open, SHOWN), null);
});

test("nothing is shown of a prompt that this page has not sent", () => {
  const runs = new Runs();
  told(runs, "theirs", "5", "x");
  assert.deepEqual(runs.shown("theirs"), []);
  assert.deepEqual(runs.shown(), []);
});

test("events and the answer to the prompt may come in any order", () => {
  const from = origin(workflow("g"));
  const late = new Runs();
  told(late, "p", "5", "a");
  told(late, "p", "5", "b");
  late.sent("p", from);
  const early = new Runs();
  early.sent("p", from);
  told(early, "p", "5", "a");
  told(early, "p", "5", "b");
  for (const runs of [late, early]) assert.deepEqual(runs.shown("p"), [{ origin: from, node: "5", state: "ab" }]);
});

test("a node that the prompt did not have, or had as another kind, is not its node", () => {
  const runs = new Runs();
  runs.sent("p", origin(workflow("g")));
  for (const node of ["6", "7", "5:5", undefined]) told(runs, "p", node, "x");
  assert.deepEqual(runs.shown("p"), []);
});

test("runs of two workflows and two nodes do not mix, and the newest comes last", () => {
  const [first, second] = [origin(workflow("g")), origin(workflow("g"))];
  const runs = new Runs();
  runs.sent("1", first);
  runs.sent("2", second);
  runs.sent("3", first);
  told(runs, "1", "5", "a");
  told(runs, "2", "5", "b");
  told(runs, "3", "5", "c");
  told(runs, "1", "5", "d");
  assert.deepEqual(runs.shown().map(({ origin: { workflow: from }, state }) => [from, state]), [
    [first.workflow, "ad"],
    [second.workflow, "b"],
    [first.workflow, "c"],
  ]);
});

test("a long queue is remembered, and what is over is forgotten in the end", () => {
  const runs = new Runs();
  const from = origin(workflow("g"));
  for (let index = 0; index < 500; index++) runs.sent(`${index}`, from);
  for (let index = 0; index < 500; index++) {
    told(runs, `${index}`, "5", index);
    assert.equal(runs.shown(`${index}`)[0].state, `${index}`);
  }
  assert.equal(runs.shown().length, 20);
  assert.equal(runs.shown().at(-1).state, "499");
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
