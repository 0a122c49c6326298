// The logic of the step timeline: what it shows for what the server says, and what it keeps in a workflow.

import assert from "node:assert/strict";
import { test } from "node:test";

import {
  THRESHOLD_HEIGHT,
  cells,
  columns,
  counts,
  ended,
  evaluated,
  hasGate,
  label,
  nodeAt,
  nothing,
  pack,
  speedupText,
  started,
  unpack,
} from "../../web/lib/timeline.js";

const start = (values = {}) => started({ node: "12", run: 1, planned: 4, method: "TaylorSeer", ...values });
const evaluation = (index, computed, values = {}) => ({
  ...{ node: "12", run: 1, index, sigma: 1 - index / 10, computed, error: null, threshold: null },
  ...{ reason: computed ? "interval" : "", seconds: 0.5, speedup: 1.5 },
  ...values,
});
const end = (values = {}) => ({
  ...{ node: "12", run: 1, summary: "3 evaluations, 2 computed, 1 forecast, 1.50 x faster" },
  ...{ computed: 2, forecast: 1, speedup: 1.5, interrupted: false },
  ...values,
});
const play = (state, ...details) => details.reduce(evaluated, state);
const kinds = (state) => cells(state).map(({ kind }) => kind[0]).join("");

test("a run fills its planned cells from the left and ends with what there was", () => {
  let state = start();
  assert.equal(kinds(state), "aaaa");
  state = play(state, evaluation(0, true), evaluation(1, false), evaluation(2, true));
  assert.equal(kinds(state), "cfca");
  assert.equal(kinds(ended(state, end())), "cfc");
});

test("nothing is shown before the first run", () => {
  assert.deepEqual(cells(nothing()), []);
  assert.match(label(nothing()), /no run yet/);
  assert.equal(speedupText(nothing()), "");
});

test("an interrupted run keeps the cells that it did not reach", () => {
  const state = ended(play(start(), evaluation(0, true)), end({ interrupted: true, computed: 1, forecast: 0 }));
  assert.equal(kinds(state), "caaa");
});

test("samplers that evaluate more often than planned, or do not plan, get room a few cells at a time", () => {
  const many = (planned, count) =>
    play(start({ planned }), ...Array.from({ length: count }, (_, index) => evaluation(index, true)));
  assert.equal(columns(many(4, 4)), 4);
  assert.equal(columns(many(4, 5)), 10);
  assert.equal(columns(many(null, 11)), 20);
  assert.equal(columns(ended(many(null, 11), end())), 11);
  assert.equal(columns(ended(many(4, 11), end({ interrupted: true }))), 11);
});

test("a forecast is as high as its error is near to the threshold, what was computed is higher still", () => {
  const gated = (error, computed = false) => evaluation(0, computed, { error, threshold: 0.08 });
  const height = (detail) => cells(play(start(), detail))[0].height;
  const heights = [0, 0.02, 0.04, 0.08].map((error) => height(gated(error)));
  assert.deepEqual(heights, [...heights].sort((a, b) => a - b));
  assert.equal(new Set(heights).size, 4);
  assert.equal(heights.at(-1), THRESHOLD_HEIGHT);
  assert.equal(height(gated(0.5)), THRESHOLD_HEIGHT);
  assert.ok(height(evaluation(0, false)) > 0 && height(evaluation(0, false)) < THRESHOLD_HEIGHT);
  assert.equal(height(gated(0.5, true)), 1);
});

test("a gate that refuses is marked, other reasons to compute are not", () => {
  const cell = (detail) => cells(play(start(), detail))[0];
  assert.equal(cell(evaluation(0, true, { error: 0.09, threshold: 0.08 })).refused, true);
  assert.equal(cell(evaluation(0, true, { error: 0.01, threshold: 0.08, reason: "last" })).refused, false);
  assert.equal(cell(evaluation(0, true)).refused, false);
  assert.equal(cell(evaluation(0, false, { error: 0.04, threshold: 0.08 })).share, 0.5);
  assert.equal(cell(evaluation(0, true, { error: 0.04, threshold: 0 })).refused, true);
  assert.equal(hasGate(play(start(), evaluation(0, true))), false);
  assert.equal(hasGate(play(start(), evaluation(0, true, { error: 0.1, threshold: 0.2 }))), true);
});

test("a pointer is told about its evaluation", () => {
  const told = (values) => cells(play(start(), evaluation(6, false, values)))[0].title;
  assert.equal(
    told({ error: 0.04, threshold: 0.08, sigma: 0.625, reason: "gate", seconds: 0.0214 }),
    "Evaluation 7: forecast (gate)\ngate error 50 % of the threshold\nsigma 0.625\n21 ms",
  );
  assert.equal(told({ sigma: 14.6146, reason: "", seconds: 2.5 }), "Evaluation 7: forecast\nsigma 14.6\n2.50 s");
});

test("the words say what the strip shows, while it runs and afterwards", () => {
  const state = play(start(), evaluation(0, true), evaluation(1, false, { speedup: 2.04 }));
  assert.equal(label(state), "TaylorSeer: evaluation 2 of 4, 1 computed, 1 forecast, 2.0 x faster");
  assert.equal(label(ended(state, end())), "TaylorSeer: 3 evaluations, 2 computed, 1 forecast, 1.50 x faster");
  assert.match(label(play(start({ planned: null, method: "" }), evaluation(0, true))), /^Step timeline: evaluation 1, /);
});

test("a speed-up is said only when it is known, and a slow-down is not called faster", () => {
  const said = (speedup) => speedupText(play(start(), evaluation(0, true, { speedup })));
  assert.deepEqual([2.61, 1, 0.8, null, 0, Number.NaN, "2"].map(said), [
    "2.6 x faster",
    "1.0 x faster",
    "0.80 x as fast",
    "",
    "",
    "",
    "",
  ]);
});

test("a new run clears the strip, also when its start was missed", () => {
  const before = ended(play(start(), evaluation(0, true)), end());
  assert.equal(kinds(start({ run: 2 })), "aaaa");
  const late = evaluated(before, evaluation(5, false, { run: 2 }));
  assert.equal(late.evaluations.length, 1);
  assert.equal(late.run, 2);
  assert.equal(evaluated(before, evaluation(0, true)).evaluations.length, 1, "the same number runs again");
});

test("who opens the page late still learns the totals", () => {
  const state = ended(evaluated(nothing(), evaluation(9, true)), end({ computed: 4, forecast: 6 }));
  assert.deepEqual(counts(state), { computed: 4, forecast: 6 });
  const missedAll = ended(nothing(), end());
  assert.deepEqual(counts(missedAll), { computed: 2, forecast: 1 });
  assert.equal(kinds(missedAll), "");
});

test("states are not changed, only followed by others", () => {
  const state = start();
  const after = evaluated(state, evaluation(0, true));
  assert.equal(state.evaluations.length, 0);
  assert.throws(() => after.evaluations.push(1), TypeError);
  assert.throws(() => Object.assign(after, { run: 7 }), TypeError);
});

test("a saved workflow brings strip and words back", () => {
  const gate = { error: 0.05, threshold: 0.08 };
  const made = play(start(), evaluation(0, true), evaluation(1, false, gate), evaluation(2, true, { ...gate, error: 0.1 }));
  const state = ended(made, end());
  const back = unpack(JSON.parse(JSON.stringify(pack(state))));
  assert.equal(label(back), label(state));
  assert.equal(speedupText(back), speedupText(state));
  assert.deepEqual(counts(back), counts(state));
  assert.equal(kinds(back), kinds(state));
  for (const [place, cell] of cells(back).entries()) {
    const original = cells(state)[place];
    assert.ok(Math.abs(cell.height - original.height) < 0.01);
    assert.equal(cell.refused, original.refused);
  }
  const interrupted = ended(made, end({ interrupted: true }));
  assert.equal(kinds(unpack(pack(interrupted))), "cfca");
});

test("what is kept is small, and has no list without a gate", () => {
  const details = Array.from({ length: 50 }, (_, index) => evaluation(index, index % 3 === 0));
  const packed = pack(ended(play(start(), ...details), end()));
  assert.equal(packed.marks, "#..".repeat(17).slice(0, 50));
  assert.equal("shares" in packed, false);
  assert.ok(JSON.stringify(packed).length < 300);
});

test("what is kept has a version: none is read as the first, a newer one is left alone", () => {
  const packed = pack(ended(play(start(), evaluation(0, true), evaluation(1, false)), end()));
  assert.equal(packed.version, 1);
  const { version, ...old } = packed;
  assert.deepEqual(unpack(old), unpack(packed));
  assert.equal(kinds(unpack(old)), "cf");
  for (const other of [2, 1e9, 0, "1", {}]) assert.equal(unpack({ ...packed, version: other }), nothing());
});

test("whatever a workflow holds in that place, the strip takes no harm", () => {
  for (const bad of [null, undefined, 7, "###", [], {}, { marks: "" }, { marks: "<b>" }, { marks: 5 }])
    assert.equal(unpack(bad), nothing());
  const odd = unpack({ marks: "#.#", shares: ["x", -4, 1e999], speedup: "fast", method: {}, computed: -1, planned: 1e9 });
  assert.equal(kinds(odd), "cfc");
  assert.equal(speedupText(odd), "");
  assert.deepEqual(counts(odd), { computed: 2, forecast: 1 });
  assert.ok(cells(odd).every(({ height }) => height >= 0 && height <= 1));
  assert.ok(cells(unpack({ marks: "#".repeat(1e5), planned: 1e9, interrupted: true })).length <= 1000);
});

test("an execution id leads to its node, through subgraphs too, and to nothing when the node is gone", () => {
  const graph = (nodes) => ({ getNodeById: (id) => nodes[id] ?? null });
  const inner = { name: "inner" };
  const deep = { subgraph: graph({ 3: inner }) };
  const root = graph({ 12: { name: "outer" }, 7: { subgraph: graph({ 12: inner, 5: deep }) } });
  assert.equal(nodeAt(root, "12").name, "outer");
  assert.equal(nodeAt(root, 12).name, "outer");
  assert.equal(nodeAt(root, "7:12"), inner);
  assert.equal(nodeAt(root, "7:5:3"), inner);
  for (const gone of ["13", "7:13", "8:12", "12:12", "7:", "", "x", null, undefined, "7:12:1", "__proto__"])
    assert.equal(nodeAt(root, gone), null);
  assert.equal(nodeAt(null, "12"), null);
});
