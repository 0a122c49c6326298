// A strip on the nodes that forecast: one cell for each evaluation of the sampler, high where it was computed.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { addElement, after, fit } from "./lib/place.js";
import { MARK, Runs, Tabs, savedNodeAt } from "./lib/runs.js";
import {
  PROPERTY,
  SHOWN_ON,
  THRESHOLD_HEIGHT,
  cells,
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
} from "./lib/timeline.js";

const HEIGHT = 66; // pixels: the strip, and a line of words under it
const NEXT = { run_start: (_, detail) => started(detail), evaluation: evaluated, run_end: ended };

// Blue and orange are told apart by every kind of colour blindness, and height and hatching say the same without them.
const STYLE = `<style>
.dittoolkit-timeline {
  --ink: var(--input-text, #ddd);
  --computed: #2272c3; --near: #1f8a7f; --far: #c65a00;
  --track: color-mix(in srgb, var(--ink) 9%, transparent);
  display: flex; flex-direction: column; gap: 4px; box-sizing: border-box; height: 100%;
  min-height: 54px; max-height: 78px;
  padding: 0 1px 2px; overflow: hidden; cursor: default;
  color: var(--ink); font: 11px/14px Inter, system-ui, sans-serif;
}
.dark-theme .dittoolkit-timeline {
  --computed: #5aa9f2; --near: #5cc7ba; --far: #f08a2c;
  --track: var(--comfy-input-bg, #222);
}
.dittoolkit-timeline-strip {
  position: relative; display: flex; align-items: flex-end; flex: 1 1 auto; min-height: 24px; padding: 2px;
  box-sizing: border-box; border-radius: 4px; background: var(--track);
}
.dittoolkit-timeline-strip.gated::before {
  content: ""; position: absolute; inset: auto 2px calc(2px + (100% - 4px) * var(--threshold)) 2px;
  border-top: 1px dashed color-mix(in srgb, var(--ink) 45%, transparent);
}
.dittoolkit-timeline-cell { flex: 1 1 0; min-width: 0; height: 100%; display: flex; align-items: flex-end; }
.dittoolkit-timeline-strip.roomy .dittoolkit-timeline-cell { padding-inline: 1px; }
.dittoolkit-timeline-bar { width: 100%; box-sizing: border-box; border-radius: 1px; }
.dittoolkit-timeline-bar.computed { background: var(--computed); }
.dittoolkit-timeline-bar.refused {
  background: linear-gradient(var(--far) 3px, transparent 3px 5px, var(--computed) 5px);
}
.dittoolkit-timeline-bar.forecast, .dittoolkit-timeline-key.forecast::before {
  --tone: color-mix(in oklab, var(--far) calc(var(--share, 0) * 100%), var(--near));
  --between: color-mix(in srgb, var(--tone) 35%, transparent);
  background: repeating-linear-gradient(135deg, var(--tone) 0 2px, var(--between) 2px 4px);
  box-shadow: inset 0 0 0 1px var(--tone);
}
.dittoolkit-timeline-bar.ahead { background: color-mix(in srgb, var(--ink) 18%, transparent); }
.dittoolkit-timeline-words { display: flex; gap: 10px; flex: none; overflow: hidden; white-space: nowrap; }
.dittoolkit-timeline-key::before {
  content: ""; display: inline-block; width: 9px; height: 9px; margin-right: 4px; vertical-align: -1px;
  border-radius: 1px;
}
.dittoolkit-timeline-key.computed::before { background: var(--computed); }
.dittoolkit-timeline-outcome { margin-left: auto; font-weight: 600; }
.dittoolkit-timeline-quiet { opacity: 0.7; }
</style>`;

const views = new WeakMap(); // node -> View

class View {
  constructor(node) {
    this.node = node;
    this.state = nothing();
    this.waiting = false;
    this.strip = make("div", "dittoolkit-timeline-strip");
    this.words = make("div", "dittoolkit-timeline-words");
    this.element = make("div", "dittoolkit-timeline");
    this.element.setAttribute("role", "img");
    this.element.style.setProperty("--threshold", THRESHOLD_HEIGHT);
    this.element.append(this.strip, this.words);
    for (const kind of ["wheel", "pointerdown"]) this.element.addEventListener(kind, passOn, { passive: false });
    const widget = addElement(node, "evaluations", this.element, STYLE, () => HEIGHT);
    after(widget, "beforeQueued", mark);
    fit(node);
    this.draw();
  }

  show(state) {
    this.state = state;
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      this.draw();
    });
  }

  draw() {
    const { state } = this;
    const shown = cells(state);
    this.strip.classList.toggle("gated", hasGate(state));
    this.strip.classList.toggle("roomy", shown.length <= 60);
    this.strip.replaceChildren(...shown.map(cellElement));
    this.words.replaceChildren(...wordsFor(state));
    this.element.setAttribute("aria-label", label(state));
  }
}

function cellElement({ kind, height, share, refused, title }) {
  const cell = make("div", "dittoolkit-timeline-cell");
  const bar = make("div", `dittoolkit-timeline-bar ${kind}${refused ? " refused" : ""}`);
  bar.style.height = `${100 * height}%`;
  if (share !== null) bar.style.setProperty("--share", share);
  if (title) cell.title = title;
  cell.append(bar);
  return cell;
}

function wordsFor(state) {
  if (state.phase === "none") return [make("span", "dittoolkit-timeline-quiet", "no run yet")];
  const { computed, forecast } = counts(state);
  const words = [
    make("span", "dittoolkit-timeline-key computed", `${computed} computed`),
    make("span", "dittoolkit-timeline-key forecast", `${forecast} forecast`),
  ];
  const outcome = state.interrupted ? "interrupted" : speedupText(state);
  return outcome ? [...words, make("span", "dittoolkit-timeline-outcome", outcome)] : words;
}

function make(tag, className, text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

/** On the classic canvas an element lies over it: zooming and panning there should work as beside it. */
function passOn(event) {
  if (LiteGraph.vueNodesMode || (event.type === "pointerdown" && event.button !== 1)) return;
  event.preventDefault();
  event.stopPropagation();
  app.canvas.canvas.dispatchEvent(new event.constructor(event.type, event));
}

// Which run is whose

const tabs = new Tabs();
const runs = new Runs();
let loading = false; // the graph on the canvas is one workflow's, and the page still says another

/**
 * Let the prompt that is queued now carry the mark of its tab. The page writes the graph down before it does anything
 * else; then the mark goes, as it would else be an edit.
 */
function mark() {
  const { id, extra } = graph();
  extra[MARK] = tabs.mark(id, workflows());
  queueMicrotask(() => delete extra[MARK]);
}

function follow(kind) {
  api.addEventListener(`dit_toolkit.${kind}`, ({ detail }) => {
    if (!detail?.prompt_id || !SHOWN_ON.has(detail.kind)) return;
    // None is found for a prompt of another window or of a program.
    const run = runs.told(detail, tabs.originOf(detail, workflows()), (state) => NEXT[kind](state, detail), nothing());
    if (run) receive(run);
  });
}

function receive(run) {
  if (run.state.phase === "ended") keep(run);
  show(run);
}

/** Draw a run on its node, if that is on the canvas. */
function show({ origin, node: id, state }) {
  const isOpen = workflows().activeWorkflow === origin.workflow && graph()?.id === origin.graph;
  const node = isOpen && !loading ? nodeAt(graph(), id) : null;
  if (!node || node.comfyClass !== origin.kind) return; // of another tab, deleted or replaced meanwhile
  if (state.phase === "ended") node.properties[PROPERTY] = pack(state);
  views.get(node)?.show(state);
}

/**
 * Keep a run that is over with its workflow, whose tab may not be the open one. A run is no edit: it goes into every
 * state that undo may bring back, so it is no step of its own, and does not count as a change to save.
 */
function keep({ origin, node: id, state }) {
  const tracker = origin.workflow?.changeTracker; // none once the tab is closed
  const { initialState, activeState, undoQueue = [], redoQueue = [] } = tracker ?? {};
  for (const saved of [initialState, activeState, ...undoQueue, ...redoQueue]) {
    const node = saved?.id === origin.graph ? savedNodeAt(saved, id) : null;
    if (node?.type === origin.kind) node.properties = { ...node.properties, [PROPERTY]: pack(state) };
  }
}

const graph = () => app.rootGraph ?? app.graph;
const workflows = () => app.extensionManager?.workflow ?? {};

app.registerExtension({
  name: "dittoolkit.step_cache",
  init() {
    for (const kind of Object.keys(NEXT)) follow(kind); // the page calls an event that nobody waits for an error
  },
  beforeConfigureGraph(saved) {
    loading = true;
    delete saved?.extra?.[MARK]; // a graph out of a picture has that of its prompt
  },
  /** A tab is opened, perhaps during its run. The page says which one as soon as all extensions are done. */
  afterConfigureGraph() {
    setTimeout(() => {
      loading = false;
      runs.all().forEach(show);
    });
  },
  nodeCreated(node) {
    if (!SHOWN_ON.has(node.comfyClass)) return;
    const view = new View(node);
    views.set(node, view);
    after(node, "onConfigure", () => {
      view.show(unpack(node.properties?.[PROPERTY]));
      fit(node);
    });
  },
});
