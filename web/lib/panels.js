// Panels of one canvas as the node "Panel Layout" has them in its widgets: which there are, what they say, and the
// joint caption, letter by letter as models/control/panel_prompt.py makes it.
//
// Everything is a plain value and every function returns a new one. Nothing here knows the page, so that Node can test
// it. `values` are the widgets' values by name; `linked` holds the names whose values come over a link instead.

export const NODE = "DiTPanelLayout";
export const PROPERTY = "dit_toolkit.panels"; // of a node, in a saved workflow: texts of panels that are no longer there
export const AS_LINES = "dit_toolkit.panels_as_lines"; // the user wants the plain inputs
export const LIMIT = 8; // rows or columns
export const MOST_WORDS = 512; // of a caption, by the authors' instruction

const FROM_LINK = "(from link)";

/** What the published LoRAs were trained with, by file name. Width and height are one panel's, in pixels. */
export const PRESETS = {
  "couple-profile": preset(1, 2, 1024, 1024),
  "film-storyboard": preset(3, 1, 1024, 512, "scene", "[MOVIE-SHOTS]"),
  "font-design": preset(2, 2, 896, 608),
  "home-decoration": preset(2, 2, 672, 864),
  "portrait-illustration": preset(1, 2, 576, 1088),
  "portrait-photography": preset(2, 2, 672, 864, "position", "[FOUR-PANEL]"),
  "ppt-templates": preset(2, 2, 992, 576),
  "sandstorm-visual-effect": preset(2, 1, 1408, 800, "position", "[SANDSTORM-PSA]"),
  "sparklers-visual-effect": preset(2, 1, 960, 544, "position", "[REAL-SPARKLERS-OVERLAYS]"),
  "visual-identity-design": preset(1, 2, 736, 1024),
};

const POSITIONS = {
  "1x2": ["LEFT", "RIGHT"],
  "2x1": ["TOP", "BOTTOM"],
  "2x2": ["TOP-LEFT", "TOP-RIGHT", "BOTTOM-LEFT", "BOTTOM-RIGHT"],
};

// What Python calls white space and line breaks. JavaScript's \s has other letters. A user may paste anything, and it
// is read at every key: no pattern here has more behind a + than its end, or it would begin anew at every blank.
const WHITE = "\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000";
const SPACES = new RegExp(`[${WHITE}]+`, "u");
const IS_WHITE = new RegExp(`^[${WHITE}]`, "u");
const BETWEEN_NUMBERS = new RegExp(`[${WHITE},;]+`, "u");
const LINE_BREAK = /\r\n|[\n-\r\x1c-\x1e\x85\u2028\u2029]/u;
const LINE_BREAKS = /[\n-\r\x1c-\x1e\x85\u2028\u2029]+/gu;
const LETTER_AT_START = /^[\p{L}\p{N}_]/u; // what Python calls \w
const LETTER_AT_END = /[\p{L}\p{N}_]$/u;
const END_OF_COMMENT = /[\n\r\u2028\u2029]/g; // as ComfyUI's page has it

// The marks that end a part of a caption, as in Python.
const STOPS = ".。";
const JOINTS = ",;:，；：、";
const ENDS = "!?！？…";
const QUOTES = "\"'”’»」』";

function preset(rows, columns, width, height, tags = "position", prefix = "") {
  return Object.freeze({ rows, columns, width, height, tags, prefix });
}

/**
 * A prompt as ComfyUI's page sends it: without comments. `random`: it has choices in braces, one of which the page takes
 * when it sends.
 */
export function asSent(prompt) {
  const said = withoutComments(text(prompt));
  if (/(?:^|[^\\])\{/.test(said)) return { text: said, random: true };
  return { text: said.replace(/\\([{}|])/g, "$1"), random: false };
}

/** Without what stands between slash-star and star-slash, and from two slashes to the end of the line. */
function withoutComments(said) {
  const kept = [];
  let from = 0; // what is before it is kept or dropped
  let closes = true; // a star-slash is still to come
  for (let at = said.indexOf("/"); at >= 0; at = said.indexOf("/", Math.max(at + 1, from))) {
    let end = -1;
    if (said[at + 1] === "/") {
      END_OF_COMMENT.lastIndex = at;
      end = END_OF_COMMENT.exec(said)?.index ?? said.length;
    } else if (said[at + 1] === "*" && closes) {
      end = said.indexOf("*/", at + 2) + 2;
      closes = end >= 2;
    }
    if (end < 2) continue;
    kept.push(said.slice(from, at));
    from = end;
  }
  return kept.concat(said.slice(from)).join("");
}

/**
 * What the editor shows for these widgets. `sent`: the same values as the server will have them.
 *
 * @returns `grid`: rows, columns, width and height of a panel in pixels; null while only the run knows, because a link
 * brings it. `cells`: number from 1, tag, text and given, in reading order. `more`: lines without a panel. `caption`: null while only the run knows.
 * `problem`: what the server will refuse, "" for nothing.
 */
export function panels(values, linked = new Set(), sent = values) {
  const chosen = PRESETS[own(PRESETS, values.preset)];
  const shape = chosen ? ["preset"] : ["preset", "rows", "columns"];
  if (shape.some((name) => linked.has(name))) {
    return { grid: null, cells: [], more: [], caption: null, words: 0, partial: true, problem: "" };
  }
  const grid = gridOf(values);
  const count = grid.rows * grid.columns;
  const { texts, more } = parseTexts(linked.has("panel_prompts") ? "" : values.panel_prompts, count);
  const { texts: ofServer, problem: ofTexts } = parseTexts(linked.has("panel_prompts") ? "" : sent.panel_prompts, count);
  const { given, problem: ofGiven } = parseGiven(linked.has("given") ? "" : values.given, count);
  const { style, tags, problem: ofTags } = linked.has("tags") ? { tags: null } : tagsOf(values, grid);
  const ofGrid = chosen || values.preset === "custom" ? "" : `There is no preset "${values.preset}".`;

  const partial = ["prefix", "summary", "panel_prompts"].filter((name) => linked.has(name));
  const say = (name, text) => (linked.has(name) ? FROM_LINK : text);
  const caption =
    tags &&
    joinedCaption({
      tags,
      joint: style === "scene" ? ", " : "; ",
      prefix: say("prefix", strip(oneLine(values.prefix)) || chosen?.prefix || ""),
      summary: say("summary", text(sent.summary)),
      texts: ofServer.map((each) => say("panel_prompts", each)),
    });
  return {
    grid,
    cells: texts.map((each, index) => ({
      number: index + 1,
      tag: tags ? tags[index].slice(1, -1) : String(index + 1),
      text: each,
      given: given.has(index + 1),
    })),
    more,
    caption: caption ?? null,
    words: words(caption ?? ""),
    partial: partial.length > 0 || !tags,
    problem: [ofGrid, ofTags, ofTexts, ofGiven].filter(Boolean).join(" "),
  };
}

/** Rows, columns and the size of a panel; numbers that no widget would let in are brought in between. */
export function gridOf(values) {
  const chosen = PRESETS[own(PRESETS, values.preset)];
  if (chosen) return { rows: chosen.rows, columns: chosen.columns, width: chosen.width, height: chosen.height };
  return {
    rows: whole(values.rows, 1, LIMIT),
    columns: whole(values.columns, 1, LIMIT),
    width: whole(values.panel_width, 16, 16384),
    height: whole(values.panel_height, 16, 16384),
  };
}

/** The style of the tags, once "auto" is resolved, and the tag of each panel with its brackets. */
export function tagsOf(values, { rows, columns }) {
  const positions = POSITIONS[own(POSITIONS, `${rows}x${columns}`)];
  const automatic = PRESETS[own(PRESETS, values.preset)]?.tags ?? "auto";
  const asked = values.tags === "auto" ? automatic : values.tags;
  const style = asked === "auto" ? (positions ? "position" : columns === 1 ? "scene" : "image") : asked;
  const numbers = Array.from({ length: rows * columns }, (_, index) => index + 1);
  if (style === "scene") return { style, tags: numbers.map((number) => `[SCENE-${number}]`), problem: "" };
  if (style === "image") return { style, tags: numbers.map((number) => `[IMAGE${number}]`), problem: "" };
  if (style === "position" && positions) return { style, tags: positions.map((name) => `[${name}]`), problem: "" };
  const problem =
    style === "position"
      ? `There are no names for positions in ${rows} x ${columns} panels: set tags to scene or image.`
      : `There are no tags "${style}".`;
  return { style, tags: null, problem };
}

/** One text per panel, out of one line per panel: lines may be empty, and missing at the end. `more`: those too many. */
export function parseTexts(lines, count) {
  const kept = rstrip(text(lines));
  const all = kept ? kept.split(LINE_BREAK).map(strip) : [];
  const texts = Array.from({ length: count }, (_, index) => all[index] ?? "");
  const problem = all.length > count ? `There are ${all.length} lines for ${count} panels.` : "";
  return { texts, more: all.slice(count), problem };
}

/** The lines of `parseTexts`. Line breaks inside a text become spaces. */
export const formatTexts = (texts) => rstrip(texts.map(oneLine).join("\n"));

export const oneLine = (value) => text(value).replace(LINE_BREAKS, " ");

/** The panel numbers in a text like "1, 3". */
export function parseGiven(numbers, count) {
  const given = new Set();
  let problem = "";
  for (const word of strip(text(numbers)).split(BETWEEN_NUMBERS).filter(Boolean)) {
    const number = /^\d+$/.test(word) ? Number(word) : 0;
    if (number >= 1 && number <= count) given.add(number);
    else problem ||= `"${word.length > 20 ? `${word.slice(0, 20)}...` : word}" in given is no panel from 1 to ${count}.`;
  }
  return { given, problem };
}

export const formatGiven = (numbers) => [...numbers].sort((a, b) => a - b).join(", ");

/** One flowing sentence: prefix, a sentence on the whole set, each panel introduced by its tag. */
export function joinedCaption({ tags, joint, prefix, summary, texts }) {
  const about = squeeze(summary);
  const parts = withoutEnd(about, ` ${STOPS}`) ? [about] : [];
  tags.forEach((tag, index) => {
    const said = squeeze(texts[index]);
    parts.push(said.includes(tag) ? said : rstrip(`${tag} ${said}`));
  });
  const last = withoutEnd(parts.pop(), ` ${JOINTS}`);
  const before = parts.map((part) => {
    const said = withoutEnd(part, ` ${STOPS}`);
    return said + (endsWith(said, JOINTS + ENDS) ? " " : joint);
  });
  let sentence = before.join("") + last;
  if (!endsWith(withoutEnd(sentence, QUOTES), STOPS + ENDS)) sentence += ".";
  return prefix && !hasWord(about, prefix) ? `${prefix} ${sentence}` : sentence;
}

/** Whether it stands there by itself: "sks" does in "a sks dog", but not in "tasks". */
function hasWord(said, word) {
  for (let at = said.indexOf(word); at >= 0; at = said.indexOf(word, at + 1)) {
    const end = at + word.length;
    if (!LETTER_AT_END.test(said.slice(Math.max(at - 2, 0), at)) && !LETTER_AT_START.test(said.slice(end, end + 2)))
      return true;
  }
  return false;
}

export const words = (caption) => caption.split(SPACES).filter(Boolean).length;

/**
 * The same cells in another grid: each stays in its row and column. What falls off is kept as `spare`, by
 * "row,column" from 0, and comes back when its place does.
 */
export function moved(cells, spare, from, to) {
  const kept = { ...spare };
  cells.forEach(({ text: said }, index) => {
    const [row, column] = [Math.floor(index / from.columns), index % from.columns];
    const key = `${row},${column}`;
    if (row < to.rows && column < to.columns) return;
    if (strip(said)) kept[key] = said;
    else delete kept[key];
  });
  const made = places(to).map(([row, column]) => {
    const key = `${row},${column}`;
    if (row < from.rows && column < from.columns) return plain(cells[row * from.columns + column]);
    const cell = { text: kept[key] ?? "", given: false };
    delete kept[key];
    return cell;
  });
  return { cells: made, spare: kept };
}

/** The same cells in another preset's grid: first stays first. `spare` goes on counting where the grid ends. */
export function refilled(cells, spare, to) {
  const count = to.rows * to.columns;
  const byPlace = (a, b) => a[0] - b[0] || a[1] - b[1];
  const waiting = Object.entries(spare).map(([key, said]) => [...key.split(",").map(Number), said]).sort(byPlace);
  const all = cells.map(plain).concat(waiting.map(([, , said]) => ({ text: said, given: false })));
  const kept = withMore({}, all.slice(count).map(({ text: said }) => said), to);
  const made = Array.from({ length: count }, (_, index) => all[index] ?? { text: "", given: false });
  return { cells: made, spare: kept };
}

/** `spare`, and the lines that had no panel, where the grid would go on. */
export function withMore(spare, more, { rows, columns }) {
  const added = more.map((said, index) => [`${rows + Math.floor(index / columns)},${index % columns}`, said]);
  return { ...spare, ...Object.fromEntries(added.filter(([, said]) => strip(said))) };
}

const VERSION = 1; // of the spare texts in a saved workflow; those from before it had a number have none

/** The spare texts as they are kept in a saved workflow; undefined when there are none. */
export const packSpare = (spare) => (Object.keys(spare).length ? { version: VERSION, ...spare } : undefined);

/** The spare texts in a saved workflow, which may say anything; none where a newer version of the pack wrote them. */
export function unpackSpare(packed) {
  if (!packed || typeof packed !== "object" || Array.isArray(packed)) return {};
  if ((packed.version ?? VERSION) !== VERSION) return {};
  const sound = ([key, said]) => /^\d{1,2},\d{1,2}$/.test(key) && typeof said === "string" && strip(said);
  return Object.fromEntries(Object.entries(packed).filter(sound));
}

/**
 * The widgets that change when the user asks for a grid of `rows` x `columns` here: a preset becomes the same panels
 * by hand, with its prefix.
 */
export function customValues(values, rows, columns) {
  const grid = gridOf(values);
  const made = { rows, columns };
  const chosen = PRESETS[own(PRESETS, values.preset)];
  if (chosen || values.preset !== "custom") {
    Object.assign(made, { preset: "custom", panel_width: grid.width, panel_height: grid.height });
    if (chosen?.prefix && !strip(text(values.prefix))) made.prefix = chosen.prefix;
  }
  if (!tagsOf({ ...values, ...made }, { rows, columns }).tags) made.tags = "auto";
  return made;
}

/** How large the grid is drawn, in pixels: in the canvas's proportions where its cells stay large enough to be used. */
export function drawnSize({ rows, columns, width, height }, available, { cellWidth, cellHeight, most }) {
  const ratio = (columns * width) / (rows * height);
  const wide = Math.max(Math.min(available, most * ratio), columns * cellWidth);
  return { width: wide, height: Math.max(Math.min(wide / ratio, most), rows * cellHeight) };
}

export const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

/** "1024 × 1536 px", of the canvas. */
export function sizeText(grid, linked = new Set()) {
  if (!grid) return "";
  if (linked.has("panel_width") || linked.has("panel_height")) return "size from link";
  return `${grid.columns * grid.width} × ${grid.rows * grid.height} px`;
}

/** The line under the caption. `random`: it has choices that the page has yet to make. */
export function wordsText({ caption, words: count, partial }, random = false) {
  if (caption === null) return "";
  const parts = [plural(count, "word")];
  if (count > MOST_WORDS) parts.push(`above ${MOST_WORDS}: the end may not be read`);
  if (partial) parts.push("more comes from links");
  if (random) parts.push("choices in { } are made when it is sent");
  return parts.join(" · ");
}

export function noteText({ grid, problem }) {
  return grid ? problem : "The grid comes from a link. Write one line per panel into panel_prompts.";
}

const places = ({ rows, columns }) =>
  Array.from({ length: rows * columns }, (_, index) => [Math.floor(index / columns), index % columns]);
const plain = ({ text: said, given }) => ({ text: said, given });
const text = (value) => (typeof value === "string" ? value : "");
const rstrip = (value) => value.slice(0, endOf(value, (letter) => IS_WHITE.test(letter)));
const withoutEnd = (value, marks) => value.slice(0, endOf(value, (letter) => marks.includes(letter)));
const endsWith = (value, marks) => value !== "" && marks.includes(value.at(-1));
const squeeze = (value) => value.split(SPACES).filter(Boolean).join(" ");
const own = (table, key) => (Object.hasOwn(table, key) ? key : "");

function strip(value) {
  let start = 0;
  while (start < value.length && IS_WHITE.test(value[start])) start++;
  return rstrip(value.slice(start));
}

/** Where the letters at the end begin that `isDropped`. */
function endOf(value, isDropped) {
  let end = value.length;
  while (end > 0 && isDropped(value[end - 1])) end--;
  return end;
}

function whole(value, least, most) {
  const number = Math.round(Number(value));
  return Number.isFinite(number) ? Math.min(Math.max(number, least), most) : least;
}
