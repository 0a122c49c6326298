// The panels of "Panel Layout" as a grid in the node: each with its tag, its prompt and whether it is given.
//
// All that is typed goes into the node's own widgets, which stay what is saved, sent and undone. Two of them, the lines
// of prompts and the numbers of given panels, are hidden behind the grid; without this file they are simply there.

import { app } from "../../scripts/app.js";
import {
  AS_LINES,
  LIMIT,
  NODE,
  PROPERTY,
  asSent,
  customValues,
  drawnSize,
  formatGiven,
  formatTexts,
  moved,
  noteText,
  oneLine,
  packSpare,
  panels,
  plural,
  refilled,
  sizeText,
  unpackSpare,
  withMore,
  wordsText,
} from "./lib/panels.js";
import { addElement, after, fit } from "./lib/place.js";

const WIDGETS = [
  ...["preset", "rows", "columns", "panel_width", "panel_height"],
  ...["tags", "prefix", "summary", "panel_prompts", "given"],
];
const OF_CUSTOM = ["rows", "columns", "panel_width", "panel_height"]; // a preset has its own
const BEHIND = ["panel_prompts", "given"]; // the grid

// Pixels, the same for the styles and for the classic canvas, which wants to know a widget's height beforehand.
const CELL = { cellWidth: 108, cellHeight: 66, most: 400 };
const [GAP, TOOLS, CAPTION, WORDS, NOTE, MARGIN] = [5, 22, 85, 15, 30, 10];
const NODE_WIDTH = 430;
const MORE_IN_NODES_2 = 56; // its rows are higher

const THROUGH = new Set(["Enter", "s", "S"]); // with Ctrl or Cmd: ComfyUI's Run and Save are wanted while typing

const STYLE = `<style>
.dittoolkit-panels {
  --ink: var(--input-text, #ddd);
  --ground: var(--comfy-input-bg, #fff);
  --line: color-mix(in srgb, var(--ink) 32%, transparent);
  --accent: #1b63ad; --on-accent: #fff;
  display: flex; flex-direction: column; gap: var(--gap); box-sizing: border-box; min-height: 0; overflow: hidden;
  cursor: default; color: var(--ink); font: 11px/15px Inter, system-ui, sans-serif;
}
.dark-theme .dittoolkit-panels { --ground: var(--comfy-input-bg, #222); --accent: #5aa9f2; --on-accent: #0b1420; }
.lg-node .dittoolkit-panels { --ground: var(--component-node-widget-background, var(--comfy-input-bg)); }
.dittoolkit-panels > * { flex: none; box-sizing: border-box; }
.dittoolkit-panels [hidden] { display: none; }
.dittoolkit-panels button {
  padding: 0 7px; border: 1px solid var(--line); border-radius: 4px; background: var(--ground); color: inherit;
  font: inherit; cursor: pointer; white-space: nowrap;
}
.dittoolkit-panels button:hover:not(:disabled) { border-color: var(--ink); }
.dittoolkit-panels button:disabled { opacity: 0.45; cursor: default; }
.dittoolkit-panels button[aria-pressed="true"] {
  background: var(--accent); border-color: var(--accent); color: var(--on-accent); font-weight: 600;
}
.dittoolkit-panels button:focus-visible { outline: 2px solid var(--accent); outline-offset: -1px; }
.dittoolkit-panels textarea:focus-visible { outline: 2px solid var(--accent); outline-offset: -1px; }
.dittoolkit-panels-tools { display: flex; gap: 4px; height: var(--tools); align-items: stretch; overflow: hidden; }
.dittoolkit-panels-size {
  flex: 1; min-width: 0; align-self: center; text-align: right; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; opacity: 0.8;
}
.dittoolkit-panels-scroll { overflow: auto hidden; scrollbar-width: thin; }
.dittoolkit-panels-grid { display: grid; margin: 0 auto; box-sizing: border-box; background: var(--line); gap: 2px; }
.dittoolkit-panels-cell {
  display: flex; flex-direction: column; min-width: 0; min-height: 0; background: var(--ground);
}
.dittoolkit-panels-cell.given {
  background: repeating-linear-gradient(135deg,
    color-mix(in srgb, var(--accent) 20%, var(--ground)) 0 6px,
    color-mix(in srgb, var(--accent) 9%, var(--ground)) 6px 12px);
}
.dittoolkit-panels-head { display: flex; gap: 4px; align-items: center; padding: 3px 3px 0 6px; }
.dittoolkit-panels-tag {
  flex: 1; min-width: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; font-weight: 600;
}
.dittoolkit-panels .dittoolkit-panels-head button { padding: 0 5px; font-size: 10px; line-height: 15px; }
.dittoolkit-panels textarea {
  display: block; width: 100%; box-sizing: border-box; margin: 0; padding: 2px 6px 4px; border: 0; border-radius: 0;
  background: transparent; color: inherit; font: inherit; resize: none; scrollbar-width: thin;
}
.dittoolkit-panels-cell textarea { flex: 1; min-height: 0; }
.dittoolkit-panels textarea::placeholder { color: inherit; opacity: 0.65; }
.dittoolkit-panels textarea:focus { outline: 2px solid var(--accent); outline-offset: -2px; }
.dittoolkit-panels .dittoolkit-panels-caption {
  height: var(--caption); padding: 4px 6px; border: 1px dashed var(--line); border-radius: 4px;
}
.dittoolkit-panels-words {
  height: var(--words); overflow: hidden; white-space: nowrap; text-overflow: ellipsis; opacity: 0.8;
}
.dittoolkit-panels-note { height: var(--note); overflow: hidden; font-weight: 600; }
</style>`;

class Editor {
  constructor(node) {
    this.node = node;
    this.widgets = Object.fromEntries(WIDGETS.map((name) => [name, node.widgets.find((each) => each.name === name)]));
    this.spare = {};
    this.asLines = false; // the user wants the plain widgets
    this.writing = false;
    this.configuring = false; // widgets are being filled one by one, and some call back
    this.boxes = [];
    this.build();
    this.widget = addElement(node, "panels_editor", this.element, STYLE, () => this.height());
    this.look();
    this.draw();
    for (const widget of Object.values(this.widgets)) after(widget, "callback", () => this.changed());
    const configure = node.configure;
    node.configure = (...args) => {
      this.configuring = true;
      try {
        return configure.apply(node, args);
      } finally {
        this.configuring = false;
      }
    };
    after(node, "onConfigure", () => this.restored());
    after(node, "onConnectionsChange", () => this.changed());
    after(node, "onResize", () => this.arrange());
  }

  build() {
    this.element = make("div", "dittoolkit-panels", { role: "group", "aria-label": "Panels" });
    const lengths = { gap: GAP, tools: TOOLS, caption: CAPTION, words: WORDS, note: NOTE };
    for (const [name, pixels] of Object.entries(lengths)) this.element.style.setProperty(`--${name}`, `${pixels}px`);
    const tool = (text, label, rows, columns) => {
      const button = make("button", "", { type: "button", "aria-label": label, title: label }, text);
      button.addEventListener("click", () => this.resize(rows, columns));
      return Object.assign(button, { rows, columns });
    };
    this.tools = [
      tool("\u2212 row", "Remove the last row", -1, 0),
      tool("+ row", "Add a row", 1, 0),
      tool("\u2212 column", "Remove the last column", 0, -1),
      tool("+ column", "Add a column", 0, 1),
    ];
    this.lines = make("button", "", { type: "button", "aria-pressed": "false" }, "as lines");
    this.lines.title = "Show the plain inputs panel_prompts and given, to paste many lines or to connect a link";
    this.lines.addEventListener("click", () => {
      this.asLines = !this.asLines;
      if (this.asLines) this.node.properties[AS_LINES] = true;
      else delete this.node.properties[AS_LINES];
      this.changed();
    });
    this.size = make("span", "dittoolkit-panels-size");
    const tools = make("div", "dittoolkit-panels-tools", { role: "toolbar", "aria-label": "Grid" });
    tools.append(...this.tools, this.lines, this.size);

    this.grid = make("div", "dittoolkit-panels-grid", { role: "group" });
    this.scroll = make("div", "dittoolkit-panels-scroll");
    this.scroll.append(this.grid);
    this.caption = make("textarea", "dittoolkit-panels-caption", {
      ...{ readonly: "", "aria-label": "Joined caption, as it will be sent", "data-capture-wheel": "true" },
    });
    this.count = make("div", "dittoolkit-panels-words");
    this.note = make("div", "dittoolkit-panels-note", { role: "status" });
    this.element.append(tools, this.scroll, this.caption, this.count, this.note);

    for (const kind of ["keydown", "keyup", "keypress", "copy", "cut", "paste"])
      this.element.addEventListener(kind, keepToItself);
    for (const kind of ["wheel", "pointerdown"]) this.element.addEventListener(kind, passOn, { passive: false });
  }

  // What the widgets say

  values() {
    return Object.fromEntries(WIDGETS.map((name) => [name, this.widgets[name].value]));
  }

  linked() {
    const isLinked = (input) => input.widget && input.link !== null && input.link !== undefined;
    return new Set((this.node.inputs ?? []).filter(isLinked).map((input) => input.widget.name));
  }

  look() {
    const values = this.values();
    const sent = { ...values };
    this.random = false;
    for (const name of WIDGETS.filter((each) => this.widgets[each].dynamicPrompts)) {
      const { text, random } = asSent(values[name]);
      sent[name] = text;
      this.random ||= random;
    }
    this.links = this.linked();
    this.state = panels(values, this.links, sent);
    this.preset = values.preset;
    this.read = BEHIND.map((name) => values[name]);
  }

  /** A widget or a link is another: texts follow the grid, and the picture follows both. */
  changed() {
    if (this.writing || this.configuring) return;
    this.follow();
    this.draw();
  }

  /** Look again. Where the grid is another and the texts are not, bring them along. Returns whether it did. */
  follow() {
    const [before, preset, read] = [this.state, this.preset, this.read];
    this.look();
    const { grid } = this.state;
    if (!grid || !before.grid || (grid.rows === before.grid.rows && grid.columns === before.grid.columns)) return false;
    if (this.read.some((value, index) => value !== read[index])) return false; // written by who knew the new grid
    const byHand = preset === "custom" && this.preset === "custom";
    const spare = withMore(this.spare, before.more, before.grid);
    this.store(byHand ? moved(before.cells, spare, before.grid, grid) : refilled(before.cells, spare, grid));
    return true;
  }

  /** A saved workflow has been put into the widgets. Nothing is written: it shows as it is. */
  restored() {
    this.spare = unpackSpare(this.node.properties?.[PROPERTY]);
    this.asLines = this.node.properties?.[AS_LINES] === true;
    this.look();
    this.draw({ resize: false });
    fit(this.node, MORE_IN_NODES_2);
  }

  // What the user does

  /** One row or column more or less, as one step for undo. */
  resize(rows, columns) {
    this.changed();
    const { grid, cells, more } = this.state;
    if (!grid) return;
    const to = { rows: grid.rows + rows, columns: grid.columns + columns };
    if ([to.rows, to.columns].some((count) => count < 1 || count > LIMIT)) return;
    this.step(() => {
      const values = customValues(this.values(), to.rows, to.columns);
      for (const [name, value] of Object.entries(values)) if (!this.links.has(name)) this.write(name, value);
      this.store(moved(cells, withMore(this.spare, more, grid), grid, to));
    });
  }

  typed(index, box) {
    const clean = oneLine(box.value);
    if (clean !== box.value) {
      const caret = oneLine(box.value.slice(0, box.selectionEnd)).length;
      box.value = clean;
      box.setSelectionRange(caret, caret);
    }
    this.edit(index, { text: clean });
    this.look();
    this.draw();
    if (!box.isConnected) (this.boxes.find(({ box: { value } }) => value === clean) ?? this.boxes[0])?.box.focus();
  }

  toggle(index) {
    this.step(() => this.edit(index, { given: !this.state.cells[index].given }));
  }

  /** Of a cell that is shown. If a program has set widgets since, the cell goes where its row and column went. */
  edit(index, change) {
    const shown = this.state.cells;
    shown[index] = { ...shown[index], ...change };
    if (this.follow()) return;
    const { more } = this.state;
    const cells = this.state.cells.map((cell, each) => (each === index ? { ...cell, ...change } : cell));
    const numbers = cells.filter(({ given }) => given).map(({ number }) => number);
    this.quietly(() => {
      if ("text" in change) this.write("panel_prompts", formatTexts(cells.map(({ text }) => text).concat(more)));
      else this.write("given", formatGiven(numbers));
    });
  }

  store({ cells, spare }) {
    this.quietly(() => {
      const numbers = cells.flatMap(({ given }, index) => (given ? [index + 1] : []));
      if (!this.links.has("panel_prompts")) this.write("panel_prompts", formatTexts(cells.map(({ text }) => text)));
      if (!this.links.has("given")) this.write("given", formatGiven(numbers));
    });
    this.spare = spare;
    const packed = packSpare(spare);
    if (packed) this.node.properties[PROPERTY] = packed;
    else delete this.node.properties[PROPERTY];
    this.look();
  }

  step(change) {
    app.canvas.emitBeforeChange();
    this.quietly(change);
    this.look();
    this.draw();
    app.canvas.emitAfterChange();
  }

  quietly(change) {
    const before = this.writing;
    this.writing = true;
    try {
      change();
    } finally {
      this.writing = before;
    }
  }

  /** As if the user had set the widget. */
  write(name, value) {
    const widget = this.widgets[name];
    if (widget.value === value) return;
    widget.value = value;
    widget.callback?.(value, app.canvas, this.node);
  }

  // What the page shows

  draw({ resize = true } = {}) {
    const { grid, cells, caption, problem } = this.state;
    const earlier = this.shownHeight;
    const gridShown = Boolean(grid) && !this.asLines;
    for (const name of OF_CUSTOM) this.widgets[name].disabled = this.preset !== "custom";
    const others = BEHIND.filter((name) => hide(this.widgets[name], gridShown && !this.links.has(name)));
    // Nodes 2.0 looks at the options again when the list of widgets is another.
    if (others.length && LiteGraph.vueNodesMode) this.node.widgets.push(this.node.widgets.pop());

    this.scroll.hidden = !gridShown;
    if (gridShown) this.drawCells(grid, cells);
    for (const button of this.tools)
      button.disabled = !grid || !fits(grid.rows + button.rows) || !fits(grid.columns + button.columns);
    this.lines.setAttribute("aria-pressed", String(!gridShown));
    this.lines.disabled = !grid;
    this.size.textContent = sizeText(grid, this.links);
    this.size.title = this.size.textContent;

    const shown = caption ?? "";
    if (this.caption.value !== shown) this.caption.value = shown;
    this.caption.placeholder = caption === null && !problem ? "Known when it runs: a link brings what it is made of." : "";
    this.count.textContent = wordsText(this.state, this.random);
    this.note.textContent = noteText(this.state);
    this.note.hidden = !this.note.textContent;
    this.arrange();
    if (resize && earlier !== undefined) this.growBy(this.shownHeight - earlier);
    fit(this.node);
    app.canvas?.setDirty(true, true);
  }

  drawCells({ rows, columns }, cells) {
    if (this.boxes.length !== cells.length || this.columns !== columns) {
      this.columns = columns;
      this.boxes = cells.map((_, index) => this.cell(index));
      this.grid.replaceChildren(...this.boxes.map(({ element }) => element));
      this.grid.style.gridTemplate = `repeat(${rows}, minmax(0, 1fr)) / repeat(${columns}, minmax(0, 1fr))`;
      this.grid.setAttribute("aria-label", `${plural(rows, "row")}, ${plural(columns, "column")}`);
    }
    cells.forEach(({ number, tag, text, given }, index) => {
      const { element, tagged, button, box } = this.boxes[index];
      const name = tag === String(number) ? `Panel ${number}` : `Panel ${number}, ${tag}`;
      element.setAttribute("aria-label", `${name}, of ${cells.length}`);
      element.classList.toggle("given", given);
      tagged.textContent = tagged.title = tag;
      box.setAttribute("aria-label", `Prompt of panel ${number}, ${tag}`);
      box.readOnly = this.links.has("panel_prompts");
      box.placeholder = box.readOnly ? "from link" : "what this panel shows";
      if (oneLine(box.value).trim() !== text.trim()) box.value = text; // else the caret would jump
      button.setAttribute("aria-label", `Panel ${number}, ${tag}, is given as a picture`);
      button.setAttribute("aria-pressed", String(given));
      button.disabled = this.links.has("given");
      button.textContent = button.disabled ? "from link" : "given";
    });
  }

  cell(index) {
    const element = make("div", "dittoolkit-panels-cell", { role: "group" });
    const head = make("div", "dittoolkit-panels-head");
    const tagged = make("span", "dittoolkit-panels-tag");
    const button = make("button", "", { type: "button" });
    button.title = "This panel is a picture that you give to Panel Latent";
    const box = make("textarea", "", { "data-capture-wheel": "true" });
    box.spellcheck = app.extensionManager.setting.get("Comfy.TextareaWidget.Spellcheck") === true;
    button.addEventListener("click", () => this.toggle(index));
    box.addEventListener("input", () => this.typed(index, box));
    box.addEventListener("change", () => this.step(() => {})); // typing is one step for undo, once it is over
    head.append(tagged, button);
    element.append(head, box);
    return { element, tagged, button, box };
  }

  /** The grid in the canvas's proportions, in the width that the node has. */
  arrange() {
    this.shownHeight = this.height();
    if (!this.state.grid) return;
    const { height, ratio } = this.drawn();
    Object.assign(this.grid.style, {
      width: `min(100%, ${CELL.most * ratio}px)`,
      minWidth: `${this.state.grid.columns * CELL.cellWidth}px`,
      minHeight: `${this.state.grid.rows * CELL.cellHeight}px`,
      maxHeight: `${CELL.most}px`, // where the two contradict, the minimum wins
      aspectRatio: String(ratio),
    });
    this.scroll.style.minHeight = LiteGraph.vueNodesMode ? "" : `${height}px`;
  }

  drawn() {
    const { grid } = this.state;
    const unknown = ["panel_width", "panel_height"].some((name) => this.links.has(name)) && this.preset === "custom";
    const shape = unknown ? { ...grid, width: 1, height: 1 } : grid;
    const ratio = (shape.columns * shape.width) / (shape.rows * shape.height);
    return { ...drawnSize(shape, this.node.size[0] - 2 * MARGIN, CELL), ratio };
  }

  /** Of all of it, in pixels. */
  height() {
    const parts = [TOOLS, CAPTION, WORDS];
    if (!this.scroll.hidden && this.state.grid) parts.push(this.drawn().height);
    if (!this.note.hidden) parts.push(NOTE);
    return Math.ceil(parts.reduce((sum, part) => sum + part + GAP, 2 * MARGIN - GAP));
  }

  growBy(pixels) {
    const [width, height] = this.node.size;
    if (Math.abs(pixels) >= 1 && this.node.graph)
      this.node.setSize([width, Math.max(height + pixels, this.node.computeSize()[1])]);
  }
}

const fits = (count) => count >= 1 && count <= LIMIT;

function make(tag, className, attributes = {}, text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}

/** Whether that is new. */
function hide(widget, hidden) {
  if (Boolean(widget.options.hidden) === hidden) return false;
  widget.hidden = hidden; // on the classic canvas
  widget.options.hidden = hidden; // in Nodes 2.0
  return true;
}

/** Typing here is no shortcut of ComfyUI's: Delete would delete the node, Ctrl+C copy it. */
function keepToItself(event) {
  if (event.type === "keydown" && (event.ctrlKey || event.metaKey) && THROUGH.has(event.key)) return;
  event.stopPropagation();
  const choosing = event.isComposing || event.keyCode === 229; // from an input method; Safari says 229
  if (event.type === "keydown" && event.key === "Escape" && !choosing) event.target.blur();
}

/** On the classic canvas an element lies over it: zooming and panning there should work as beside it. */
function passOn(event) {
  if (LiteGraph.vueNodesMode || (event.type === "pointerdown" && event.button !== 1)) return;
  const box = event.target.closest("textarea");
  const scrolls = box && box === document.activeElement && box.scrollHeight > box.clientHeight;
  if (event.type === "wheel" && scrolls && !event.ctrlKey) return;
  event.preventDefault();
  event.stopPropagation();
  app.canvas.canvas.dispatchEvent(new event.constructor(event.type, event));
}

app.registerExtension({
  name: "dittoolkit.panel_editor",
  nodeCreated(node) {
    if (node.comfyClass !== NODE || !WIDGETS.every((name) => node.widgets.some((each) => each.name === name))) return;
    new Editor(node);
    node.setSize([Math.max(node.size[0], NODE_WIDTH), node.size[1]]);
    fit(node, MORE_IN_NODES_2);
  },
});
