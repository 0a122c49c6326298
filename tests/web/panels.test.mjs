// The logic of the panel editor: what the widgets of Panel Layout mean, and how texts follow the grid.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import {
  PRESETS,
  asSent,
  customValues,
  drawnSize,
  formatGiven,
  formatTexts,
  gridOf,
  moved,
  noteText,
  oneLine,
  packSpare,
  panels,
  parseGiven,
  parseTexts,
  refilled,
  sizeText,
  tagsOf,
  unpackSpare,
  withMore,
  words,
  wordsText,
} from "../../web/lib/panels.js";

const CASES = JSON.parse(readFileSync(new URL("../reference/panel_captions.json", import.meta.url), "utf8"));
const VALUES = {
  ...{ preset: "custom", rows: 2, columns: 2, panel_width: 512, panel_height: 512, tags: "auto" },
  ...{ prefix: "", summary: "", panel_prompts: "a\nb\nc\nd", given: "" },
};
const grid = (rows, columns) => ({ rows, columns, width: 512, height: 512 });
const cells = (texts, given = []) => texts.map((text, index) => ({ text, given: given.includes(index + 1) }));
const texts = (list) => list.map(({ text }) => text);
const given = (list) => list.flatMap((cell, index) => (cell.given ? [index + 1] : []));

for (const { name, values, expected } of CASES) {
  test(`as the server has it: ${name}`, () => {
    const state = panels(values);
    if (expected === null) return assert.notEqual(state.problem, "");
    assert.equal(state.problem, "");
    assert.equal(state.caption, expected.prompt);
    assert.deepEqual(given(state.cells), expected.given);
    assert.deepEqual(state.cells.map(({ tag }) => `[${tag}]`), expected.tags);
    const { rows, columns, width, height } = state.grid;
    const { panel_width, panel_height } = expected;
    assert.deepEqual([rows, columns, width, height], [expected.rows, expected.columns, panel_width, panel_height]);
  });
}

test("the cases have all presets and no others", () => {
  const named = CASES.map(({ values }) => values.preset).filter((name) => name !== "custom");
  assert.deepEqual([...new Set(named)].sort(), Object.keys(PRESETS).sort());
});

test("lines and numbers that are written are read again", () => {
  for (const list of [["a", "b", "c"], ["", "b", ""], ["", "", ""], ["a, b; c", "", "[LEFT] 猫 🐈"]])
    assert.deepEqual(parseTexts(formatTexts(list), 3), { texts: list, more: [], problem: "" });
  for (const list of [[], [1], [3, 1, 2]])
    assert.deepEqual([...parseGiven(formatGiven(list), 4).given], [...list].sort());
  assert.equal(formatGiven([12, 3]), "3, 12");
});

test("line breaks inside a text become spaces, so that a panel stays one line", () => {
  assert.equal(oneLine("a\nb\r\n\r\nc\u2028d"), "a b c d");
  assert.deepEqual(parseTexts(formatTexts(["a\nb", "c\x85d"]), 2).texts, ["a b", "c d"]);
});

test("what cannot be drawn is said, and what can is drawn", () => {
  const many = panels({ ...VALUES, panel_prompts: "a\nb\nc\nd\ne\nf" });
  assert.match(many.problem, /6 lines for 4 panels/);
  assert.deepEqual([texts(many.cells), many.more], [["a", "b", "c", "d"], ["e", "f"]]);

  const positions = panels({ ...VALUES, rows: 3, tags: "position" });
  assert.match(positions.problem, /scene or image/);
  assert.deepEqual([positions.caption, positions.cells[4].tag], [null, "5"]);

  const wrong = panels({ ...VALUES, given: "2, 5, left" });
  assert.match(wrong.problem, /"5".*1 to 4/);
  assert.deepEqual(given(wrong.cells), [2]);

  assert.match(panels({ ...VALUES, preset: "toString" }).problem, /no preset "toString"/);
  assert.match(panels({ ...VALUES, tags: "toString" }).problem, /no tags "toString"/);
});

test("a workflow that was edited by hand may say anything", () => {
  const odd = [null, undefined, 7, {}, [], "x", Number.NaN, -3, 1e9];
  for (const value of odd)
    for (const name of Object.keys(VALUES)) {
      const { grid: found, cells: shown } = panels({ ...VALUES, [name]: value });
      assert.ok(found.rows >= 1 && found.rows <= 8 && found.columns >= 1 && found.columns <= 8);
      assert.equal(shown.length, found.rows * found.columns);
      assert.ok(drawnSize(found, 400, { cellWidth: 90, cellHeight: 60, most: 460 }).height > 0);
    }
  for (const value of [...odd, { "0,0": 3, a: "b", "1,1": "  " }]) assert.deepEqual(unpackSpare(value), {});
  assert.deepEqual(unpackSpare({ "2,0": "kept" }), { "2,0": "kept" });
});

test("spare texts are kept with a version, and those of a newer one are left alone", () => {
  assert.deepEqual(packSpare({ "2,0": "kept" }), { version: 1, "2,0": "kept" });
  assert.equal(packSpare({}), undefined);
  assert.deepEqual(unpackSpare(packSpare({ "2,0": "kept" })), { "2,0": "kept" });
  for (const version of [2, 0, "1", null, {}])
    assert.deepEqual(unpackSpare({ version, "2,0": "kept" }), version === null ? { "2,0": "kept" } : {});
});

test("what comes over a link is not guessed", () => {
  const linked = (...names) => panels({ ...VALUES, summary: "old", given: "1" }, new Set(names));
  assert.equal(linked("rows").grid, null);
  assert.equal(linked("preset").grid, null);
  assert.equal(linked("rows").caption, null);
  const preset = { ...VALUES, preset: "font-design" };
  assert.equal(panels(preset, new Set(["rows"])).grid.rows, 2, "a preset does not read rows");

  assert.equal(linked("summary").caption, "(from link); [TOP-LEFT] a; [TOP-RIGHT] b; [BOTTOM-LEFT] c; [BOTTOM-RIGHT] d.");
  assert.equal(linked("summary").partial, true);
  assert.equal(linked().partial, false);
  assert.deepEqual(texts(linked("panel_prompts").cells), ["", "", "", ""]);
  assert.deepEqual(given(linked("given").cells), []);
  assert.deepEqual([linked("tags").caption, linked("tags").problem], [null, ""]);
});

test("comments are not sent, and choices are made by the page when it sends", () => {
  assert.deepEqual(asSent("a // note\nb /* x\n y */c"), { text: "a \nb c", random: false });
  assert.deepEqual(asSent("a {red|blue} hat"), { text: "a {red|blue} hat", random: true });
  assert.deepEqual(asSent("a \\{red\\|blue\\} hat"), { text: "a {red|blue} hat", random: false });
  assert.deepEqual(asSent(null), { text: "", random: false });
  const sent = { ...VALUES, panel_prompts: asSent("a// x\nb\nc\nd").text };
  const state = panels({ ...VALUES, panel_prompts: "a// x\nb\nc\nd" }, new Set(), sent);
  assert.equal(state.cells[0].text, "a// x");
  assert.match(state.caption, /^\[TOP-LEFT\] a; /);
});

test("words are counted as a reader counts them", () => {
  assert.equal(words(""), 0);
  assert.equal(words("  [LEFT] a\u00a0white  cat. "), 4);
});

test("the line under the caption warns where the end may not be read", () => {
  const said = (count) => wordsText(panels({ ...VALUES, summary: Array(count).fill("word").join(" ") }));
  assert.equal(said(504), "512 words");
  assert.match(said(505), /^513 words · above 512/);
  assert.equal(wordsText(panels({ ...VALUES, rows: 1, columns: 1, panel_prompts: "" })), "1 word");
  assert.equal(wordsText(panels(VALUES, new Set(["rows"]))), "");
  assert.match(wordsText(panels(VALUES, new Set(["summary"]))), /links/);
  assert.match(wordsText(panels(VALUES), true), /choices/);
});

test("sizes and notes say what a link leaves open", () => {
  assert.equal(sizeText(panels({ ...VALUES, preset: "film-storyboard" }).grid), "1024 × 1536 px");
  assert.equal(sizeText(panels(VALUES).grid, new Set(["panel_width"])), "size from link");
  assert.equal(sizeText(null), "");
  assert.equal(noteText(panels(VALUES)), "");
  assert.match(noteText(panels(VALUES, new Set(["columns"]))), /from a link/);
});

test("a cell stays in its row and column, and what falls off comes back with its place", () => {
  const wider = moved(cells(["a", "b", "c", "d"], [1, 4]), {}, grid(2, 2), grid(2, 3));
  assert.deepEqual(texts(wider.cells), ["a", "b", "", "c", "d", ""]);
  assert.deepEqual(given(wider.cells), [1, 5]);

  const less = moved(cells(["a", "b", "c", "d"], [1, 4]), {}, grid(2, 2), grid(2, 1));
  assert.deepEqual([texts(less.cells), given(less.cells)], [["a", "c"], [1]]);
  assert.deepEqual(less.spare, { "0,1": "b", "1,1": "d" });
  const again = moved(less.cells, less.spare, grid(2, 1), grid(2, 2));
  assert.deepEqual([texts(again.cells), again.spare], [["a", "b", "c", "d"], {}]);
  assert.deepEqual(given(again.cells), [1]);

  const emptied = moved(cells(["a", ""]), { "0,1": "old" }, grid(1, 2), grid(1, 1));
  assert.deepEqual(emptied.spare, {}, "a cell that was emptied stays empty");
});

test("another preset keeps the order, and the texts that it has no place for", () => {
  const four = ["a", "b", "c", "d"];
  const three = refilled(cells(four, [2, 4]), {}, PRESETS["film-storyboard"]);
  assert.deepEqual([texts(three.cells), given(three.cells)], [["a", "b", "c"], [2]]);
  const two = refilled(three.cells, three.spare, PRESETS["couple-profile"]);
  assert.deepEqual(texts(two.cells), ["a", "b"]);
  const back = refilled(two.cells, two.spare, PRESETS["font-design"]);
  assert.deepEqual([texts(back.cells), back.spare], [four, {}]);
});

test("no text is ever lost, whatever the grids", () => {
  const all = Array.from({ length: 64 }, (_, index) => `text ${index}`);
  const said = ({ cells: list, spare }) => [...texts(list), ...Object.values(spare)].filter(Boolean).sort();
  let state = { cells: cells(all), spare: {} };
  let from = grid(8, 8);
  const steps = [[8, 3], [2, 3], [2, 8], [1, 1], [5, 5], [3, 1], [1, 8], [8, 8]];
  steps.forEach(([rows, columns], index) => {
    const to = grid(rows, columns);
    state = index % 2 ? refilled(state.cells, state.spare, to) : moved(state.cells, state.spare, from, to);
    assert.equal(state.cells.length, rows * columns);
    assert.deepEqual(said(state), [...all].sort(), `${rows} x ${columns}`);
    from = to;
  });
});

test("lines too many wait for rows to come", () => {
  const spare = withMore({}, ["e", "", "g"], grid(2, 2));
  assert.deepEqual(spare, { "2,0": "e", "3,0": "g" });
  const { cells: list } = moved(cells(["a", "b", "c", "d"]), spare, grid(2, 2), grid(3, 2));
  assert.deepEqual(texts(list), ["a", "b", "c", "d", "e", ""]);
});

test("a row more makes a preset one's own: the same panels, the same prefix", () => {
  const film = { ...VALUES, preset: "film-storyboard" };
  const values = customValues(film, 4, 1);
  assert.deepEqual(values, {
    ...{ rows: 4, columns: 1, preset: "custom", panel_width: 1024, panel_height: 512, prefix: "[MOVIE-SHOTS]" },
  });
  const after = { ...film, ...values };
  assert.deepEqual(tagsOf(after, gridOf(after)).tags.at(-1), "[SCENE-4]");
  assert.equal(customValues({ ...film, prefix: "[NOIR]" }, 4, 1).prefix, undefined);
  assert.deepEqual(customValues(VALUES, 3, 2), { rows: 3, columns: 2 });
  assert.equal(customValues({ ...VALUES, tags: "position" }, 3, 2).tags, "auto", "positions have no names there");
});

test("the grid is drawn in the canvas's proportions while its cells can be used", () => {
  const limits = { cellWidth: 90, cellHeight: 60, most: 460 };
  const size = (name, available = 400) => {
    const { rows, columns, width, height } = PRESETS[name];
    return drawnSize({ rows, columns, width, height }, available, limits);
  };
  for (const [name, { rows, columns, width, height }] of Object.entries(PRESETS)) {
    const drawn = size(name);
    const exact = drawn.width / drawn.height / ((columns * width) / (rows * height));
    assert.ok(Math.abs(exact - 1) < 1e-9, name);
    assert.ok(drawn.width <= 400 && drawn.height <= 460 + 1e-9, name);
  }
  assert.deepEqual(size("couple-profile"), { width: 400, height: 200 });
  const many = drawnSize(grid(8, 8), 400, limits);
  assert.deepEqual(many, { width: 720, height: 480 }, "wider than the node: it scrolls");
});

// What a user may paste, again and again: letters that some rule looks for, and those that begin or end a comment.
const HOSTILE = [" ", "\u2028", "\n", "\r\n", ".", "  .", ",", '"', "[", "[LEFT]", "/*", "//", "*/", "{", "\\", "猫", " x", "1 "];

/** Runs `work` and tells the patterns it searched with, and how often it looked. */
function watched(work) {
  const { exec } = RegExp.prototype;
  const patterns = new Set();
  let looks = 0;
  RegExp.prototype.exec = function (...args) {
    patterns.add(this.source);
    looks++;
    return exec.apply(this, args);
  };
  try {
    work();
  } finally {
    RegExp.prototype.exec = exec;
  }
  return { patterns, looks };
}

/** Whether a search reads each letter a fixed number of times: nothing that could fail stands behind a repetition. */
function readsOnce(pattern) {
  const plain = pattern.replace(/\\./gu, "e").replace(/\[[^\]]*\]/gu, "c");
  return /^\^[ce][+*]\$$/u.test(plain) || !/(?:[+*]|\{\d+,\})./su.test(plain);
}

/** All that a key in the editor sets off, with `letters` repeated in every widget. */
function key(letters, count) {
  const said = `a${letters.repeat(count)}b`;
  const values = { ...VALUES, prefix: said, summary: `${said} ${said}`, panel_prompts: said, given: said };
  const sent = { ...values, summary: asSent(values.summary).text, panel_prompts: asSent(said).text };
  const state = panels(values, new Set(), sent);
  formatTexts([...state.cells.map(({ text }) => text), oneLine(said)]);
}

test("patterns that would begin anew at every blank are known as such", () => {
  for (const slow of ["[ .]+$", "\\s+$", "\\/\\*[^]*?\\*\\/", "(?:a+)+b", "x{2,}y", "^a+b+$"]) assert.equal(readsOnce(slow), false, slow);
  for (const fast of ["[ .]+", "^\\d+$", "(?:^|[^\\\\])\\{", "[+*]$", "^\\d{1,2},\\d{1,2}$"]) assert.equal(readsOnce(fast), true, fast);
});

for (const letters of HOSTILE)
  test(`a key costs as much as there is text, however often it says ${JSON.stringify(letters)}`, () => {
    const [once, twice] = [500, 1000].map((count) => watched(() => key(letters, count)));
    for (const pattern of twice.patterns) assert.ok(readsOnce(pattern), pattern);
    assert.ok(once.looks > 500, "the count is of something");
    assert.ok(twice.looks <= 2 * once.looks, `${once.looks} looks, and ${twice.looks} for twice the text`);
  });

/** Texts of a few letters each, the same at every run. */
function* randomTexts(letters, count) {
  let seed = 1;
  const next = (below) => (seed = (seed * 48271) % 2147483647) % below;
  for (let made = 0; made < count; made++)
    yield Array.from({ length: next(12) }, () => letters[next(letters.length)]).join("");
}

test("comments are those that ComfyUI's page takes out", () => {
  const letters = ["/", "*", "/*", "*/", "//", "\n", "\r", "\u2028", "\v", "\x85", "a", " "];
  for (const said of randomTexts(letters, 20000))
    assert.equal(asSent(said).text, said.replace(/\/\*[\s\S]*?\*\/|\/\/.*/g, ""), JSON.stringify(said));
});

test("a prefix counts where it stands by itself, also among letters of two units", () => {
  const letters = ["a", "aa", "_", "1", " ", "[", "é", "猫", "\u{1d49c}", "\u{1f408}", "."];
  const letter = "[\\p{L}\\p{N}_]";
  let found = 0;
  for (const said of randomTexts(letters, 2000))
    for (const prefix of ["a", "aa", "[", "\u{1d49c}"]) {
      const about = panels({ ...VALUES, summary: said, prefix: "" }).caption;
      const expected = new RegExp(`(?<!${letter})${prefix.replace("[", "\\[")}(?!${letter})`, "u").test(said);
      found += expected;
      const { caption } = panels({ ...VALUES, summary: said, prefix });
      assert.equal(caption, expected ? about : `${prefix} ${about}`, JSON.stringify([said, prefix]));
    }
  assert.ok(found > 500);
});
