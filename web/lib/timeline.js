// What one sampler run looked like, evaluation by evaluation: the state behind the strip on the nodes that forecast.
//
// States are plain frozen objects; every function returns a new one. Nothing here knows the page, so that Node can test
// it. A share is a gate's error over its threshold: below 1 it forecasts, from 1 on it computes.

export const SHOWN_ON = new Set(["DiTTaylorSeer", "DiTCGTaylor", "DiTDeltaDiT", "DiTAccelerate", "DiTAccelerateAutotune"]);
export const PROPERTY = "dit_toolkit.timeline"; // of a node, in a saved workflow
const VERSION = 1; // of what is kept there; workflows from before it had a number have none
export const THRESHOLD_HEIGHT = 0.72; // where a share of 1 is drawn; what is computed fills the strip

const MOST_CELLS = 1000; // more are counted and not drawn; a saved workflow may say anything
const LEAST_HEIGHT = 0.18;
const HEIGHT_WITHOUT_SHARE = 0.4;
const BLOCK = 10; // a run of unknown length grows by so many cells at a time

const NOTHING = Object.freeze({
  method: "",
  run: null,
  planned: null,
  evaluations: Object.freeze([]),
  speedup: null,
  summary: "",
  interrupted: false,
  totals: null, // {computed, forecast} as the server counted them, who has seen all of the run
  phase: "none", // none, running, ended
});

export const nothing = () => NOTHING;

export function started({ run, planned, method }) {
  const known = { run: run ?? null, planned: whole(planned), method: text(method) };
  return Object.freeze({ ...NOTHING, ...known, phase: "running" });
}

/** An evaluation of a run whose start was not seen, as after a reload of the page, begins a state of its own. */
export function evaluated(state, detail) {
  const before = state.phase === "running" && state.run === (detail.run ?? null) ? state : started(detail);
  const evaluation = Object.freeze({
    index: whole(detail.index) ?? before.evaluations.length,
    computed: detail.computed === true,
    share: shareOf(detail.error, detail.threshold),
    sigma: number(detail.sigma),
    reason: text(detail.reason),
    seconds: number(detail.seconds),
  });
  return Object.freeze({
    ...before,
    evaluations: Object.freeze([...before.evaluations, evaluation]),
    speedup: number(detail.speedup),
  });
}

export function ended(state, detail) {
  const before = state.run === (detail.run ?? null) ? state : started(detail);
  return Object.freeze({
    ...before,
    speedup: number(detail.speedup),
    summary: text(detail.summary),
    interrupted: detail.interrupted === true,
    totals: totalsOf(detail),
    phase: "ended",
  });
}

/**
 * One entry per cell of the strip: what it is ("computed", "forecast" or "ahead"), how high, how near to the threshold
 * (0..1, null without a gate), whether the gate refused, and what a pointer is told.
 */
export function cells(state) {
  const made = state.evaluations.slice(0, MOST_CELLS).map((evaluation) => ({
    kind: evaluation.computed ? "computed" : "forecast",
    height: evaluation.computed ? 1 : forecastHeight(evaluation.share),
    share: evaluation.share === null ? null : Math.min(evaluation.share, 1),
    refused: evaluation.computed && evaluation.share !== null && evaluation.share >= 1,
    title: describe(evaluation),
  }));
  const ahead = { kind: "ahead", height: LEAST_HEIGHT, share: null, refused: false, title: "" };
  return made.concat(Array(Math.max(0, columns(state) - made.length)).fill(ahead));
}

/** How many cells: those planned while that is enough, then a few more at a time, in the end what there was. */
export function columns(state) {
  const count = Math.min(state.evaluations.length, MOST_CELLS);
  const planned = Math.min(state.planned ?? 0, MOST_CELLS);
  if (state.phase === "none") return 0;
  if (state.phase === "ended" && !state.interrupted) return count;
  if (count <= planned) return planned;
  return state.phase === "running" ? Math.ceil(count / BLOCK) * BLOCK : count;
}

export const hasGate = (state) => state.evaluations.some(({ share }) => share !== null);

export function counts(state) {
  if (state.totals) return state.totals;
  const computed = state.evaluations.filter((evaluation) => evaluation.computed).length;
  return { computed, forecast: state.evaluations.length - computed };
}

/** "2.6 x faster", or nothing while nobody knows. */
export function speedupText({ speedup }) {
  if (speedup === null || speedup <= 0) return "";
  return speedup < 0.95 ? `${speedup.toFixed(2)} x as fast` : `${speedup.toFixed(1)} x faster`;
}

/** The strip in words, for those who hear it. */
export function label(state) {
  if (state.phase === "none") return "Step timeline: no run yet";
  const { computed, forecast } = counts(state);
  const name = state.method || "Step timeline";
  if (state.phase === "ended" && state.summary) return `${name}: ${state.summary}`;
  const length = state.planned ? ` of ${state.planned}` : "";
  const parts = [`evaluation ${computed + forecast}${length}`, `${computed} computed`, `${forecast} forecast`];
  return `${name}: ${[...parts, speedupText(state)].filter(Boolean).join(", ")}`;
}

/** What is kept in a saved workflow: one mark per evaluation, and the shares where a gate gave some. */
export function pack(state) {
  const drawn = state.evaluations.slice(0, MOST_CELLS);
  const packed = {
    version: VERSION,
    method: state.method,
    summary: state.summary,
    speedup: state.speedup,
    interrupted: state.interrupted,
    planned: state.planned,
    ...counts(state),
    marks: drawn.map(({ computed }) => (computed ? "#" : ".")).join(""),
  };
  if (hasGate(state)) packed.shares = drawn.map(({ share }) => (share === null ? null : round(share)));
  return packed;
}

/** The state that `pack` made; nothing where something else is in its place, or what a newer version of the pack made. */
export function unpack(packed) {
  if (!packed || typeof packed !== "object" || !/^[#.]+$/.test(text(packed.marks))) return NOTHING;
  if ((packed.version ?? VERSION) !== VERSION) return NOTHING;
  const shares = Array.isArray(packed.shares) ? packed.shares : [];
  const evaluations = [...packed.marks.slice(0, MOST_CELLS)].map((mark, index) =>
    Object.freeze({
      index,
      computed: mark === "#",
      share: atLeast0(shares[index]),
      sigma: null,
      reason: "",
      seconds: null,
    }),
  );
  return Object.freeze({
    ...NOTHING,
    method: text(packed.method),
    summary: text(packed.summary),
    speedup: number(packed.speedup),
    interrupted: packed.interrupted === true,
    planned: whole(packed.planned),
    totals: totalsOf(packed),
    evaluations: Object.freeze(evaluations),
    phase: "ended",
  });
}

/**
 * The node that an execution id names: "12" in the graph itself, "7:12" is node 12 in the subgraph of node 7.
 * Null when it is gone.
 */
export function nodeAt(rootGraph, executionId) {
  const path = String(executionId ?? "").split(":");
  let graph = rootGraph;
  for (const id of path.slice(0, -1)) graph = find(graph, id)?.subgraph;
  return find(graph, path.at(-1));
}

function find(graph, id) {
  if (!graph || !/^-?\d+$/.test(id)) return null;
  return graph.getNodeById(Number(id)) ?? graph.getNodeById(id) ?? null;
}

function forecastHeight(share) {
  if (share === null) return HEIGHT_WITHOUT_SHARE;
  return LEAST_HEIGHT + (THRESHOLD_HEIGHT - LEAST_HEIGHT) * Math.min(share, 1);
}

function describe({ index, computed, share, sigma, reason, seconds }) {
  const what = computed ? "computed" : "forecast";
  const parts = [`Evaluation ${index + 1}: ${what}${reason ? ` (${reason})` : ""}`];
  if (share !== null) parts.push(`gate error ${Math.round(100 * share)} % of the threshold`);
  if (sigma !== null) parts.push(`sigma ${sigma.toPrecision(3)}`);
  if (seconds !== null) parts.push(seconds < 1 ? `${Math.round(1000 * seconds)} ms` : `${seconds.toFixed(2)} s`);
  return parts.join("\n");
}

function shareOf(error, threshold) {
  const [e, t] = [number(error), number(threshold)];
  if (e === null || t === null || t < 0) return null;
  return t === 0 ? 1 : Math.max(0, e / t);
}

function totalsOf({ computed, forecast }) {
  const totals = { computed: whole(computed), forecast: whole(forecast) };
  return Object.values(totals).includes(null) ? null : Object.freeze(totals);
}

const number = (value) => (typeof value === "number" && Number.isFinite(value) ? value : null);
const atLeast0 = (value) => (number(value) === null ? null : Math.max(0, value));
const whole = (value) => (Number.isInteger(value) && value >= 0 ? value : null);
const text = (value) => (typeof value === "string" ? value : "");
const round = (value) => Math.round(100 * value) / 100;
