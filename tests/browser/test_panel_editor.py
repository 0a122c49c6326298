"""The panel editor in the body of Panel Layout, in ComfyUI's real page, on both of its ways to draw nodes."""

from itertools import count

import pytest

pytestmark = [pytest.mark.comfy, pytest.mark.sweep(together=True)]

NUMBERS = count(1)  # ComfyUI does not run again what has run: each queued graph has words of its own

# A Panel Layout whose prompt is shown. It is `globalThis.layout` while the graph is not loaded again.
BUILD = """
const make = (type, pos) => {
    const node = LiteGraph.createNode(type);
    app.graph.add(node);
    node.pos = pos;
    return node;
};
const layout = make("DiTPanelLayout", [120, 60]), show = make("PreviewAny", [700, 60]);
layout.connect(1, show, 0);
for (const [name, value] of Object.entries(a)) {
    const widget = layout.widgets.find(each => each.name === name);
    widget.value = value;
    widget.callback?.(value, app.canvas, layout);
}
globalThis.layout = layout;
"""
FIND = """
globalThis.layout = app.graph.nodes.find(node => node.comfyClass === "DiTPanelLayout");
globalThis.editor = layout.widgets.find(widget => widget.name === "panels_editor").element;
"""
LOOK = """
const each = (selector, tell) => [...editor.querySelectorAll(selector)].map(tell);
const box = element => element.getBoundingClientRect();
const grid = editor.querySelector(".dittoolkit-panels-grid");
const [inner, outer] = [box(grid), box(editor)];
return {
    values: Object.fromEntries(layout.widgets.filter(widget => widget.serialize !== false)
        .map(widget => [widget.name, widget.value])),
    hidden: layout.widgets.filter(widget => widget.hidden).map(widget => widget.name),
    hiddenInNodes2: layout.widgets.filter(widget => widget.options.hidden).map(widget => widget.name),
    disabled: layout.widgets.filter(widget => widget.disabled).map(widget => widget.name),
    tags: each(".dittoolkit-panels-tag", tag => tag.textContent),
    texts: each(".dittoolkit-panels-cell textarea", area => area.value),
    placeholders: each(".dittoolkit-panels-cell textarea", area => area.placeholder),
    editable: each(".dittoolkit-panels-cell textarea", area => !area.readOnly),
    given: each(".dittoolkit-panels-cell button", button => button.getAttribute("aria-pressed") === "true"),
    toggles: each(".dittoolkit-panels-cell button", button => button.textContent),
    caption: editor.querySelector(".dittoolkit-panels-caption").value,
    words: editor.querySelector(".dittoolkit-panels-words").textContent,
    note: editor.querySelector(".dittoolkit-panels-note").textContent,
    label: grid.getAttribute("aria-label"),
    ratio: inner.height ? Math.round(1000 * inner.width / inner.height) / 1000 : null,
    inside: box(editor.lastElementChild).bottom <= outer.bottom + 1 && inner.width <= outer.width + 1
        && box(editor.querySelector(".dittoolkit-panels-words")).bottom <= outer.bottom + 1,
    seen: document.elementsFromPoint(outer.x + outer.width / 2, outer.y + 10)
        .some(element => editor.contains(element)),
    rawSeen: [...document.querySelectorAll("textarea")]
        .filter(area => !editor.contains(area) && area.offsetParent && /panel_prompts/.test(area.placeholder)).length,
};
"""
KEYS = {
    "Tab": ("Tab", 9, ""), "Escape": ("Escape", 27, ""), "Enter": ("Enter", 13, "\r"), " ": ("Space", 32, " "),
    "Delete": ("Delete", 46, ""), "Backspace": ("Backspace", 8, ""),
}  # fmt: skip


@pytest.fixture
def mode(rendering, page):
    """The canvas, empty, at 70 %."""
    page.clear()
    page.forget_errors()
    page.evaluate("app.canvas.ds.scale = 0.7; app.canvas.ds.offset = [0, 60];")
    yield rendering
    page.clear()


def build(page, **values) -> None:
    page.evaluate(BUILD, values)
    page.wait_until(f"(() => {{ {FIND} return editor.isConnected }})()", "the editor is on the page")


def look(page) -> dict:
    page.evaluate("app.canvas.setDirty(true, true); await new Promise(done => setTimeout(done, 200));")
    page.wait_until(f"(() => {{ {FIND} return editor.isConnected }})()", "the editor is on the page")
    return page.evaluate(LOOK)


def press(page, key: str, modifiers: int = 0) -> None:
    letter = (f"Key{key.upper()}", ord(key.upper()), key) if len(key) == 1 and key.isalpha() else ("", 0, key)
    code, number, text = KEYS.get(key, letter)
    keys = {"key": key, "code": code, "windowsVirtualKeyCode": number, "modifiers": modifiers}
    page.call("Input.dispatchKeyEvent", type="keyDown", **({"text": text} if text and not modifiers else {}), **keys)
    page.call("Input.dispatchKeyEvent", type="keyUp", **keys)


def write(page, text: str) -> None:
    for letter in text:
        press(page, letter)


def focused(page) -> str:
    """What a screen reader would say has the focus."""
    return page.evaluate("const e = document.activeElement; return e.getAttribute('aria-label') ?? e.textContent")


def start_at(page, label: str) -> None:
    page.evaluate("editor.querySelector(`[aria-label='${a}']`).focus()", label)


def set_widget(page, name: str, value) -> None:
    """As a hand does: the value, then the widget's callback."""
    page.evaluate(
        "const w = layout.widgets.find(each => each.name === a); w.value = b; w.callback?.(b, app.canvas, layout)",
        name,
        value,
    )


def shown_by_server(server, prompt_id: str) -> str:
    (shown,) = {text for output in server.client.wait(prompt_id).outputs.values() for text in output["text"]}
    return shown


def test_two_panels_are_written_with_the_keyboard_alone(page, server, mode, tmp_path):
    build(page)
    assert look(page)["seen"]
    start_at(page, "Remove the last column")
    order = []
    for _ in range(7):
        press(page, "Tab")
        order.append(focused(page))
    assert order == [
        "Add a column",
        "as lines",
        "Panel 1, LEFT, is given as a picture",
        "Prompt of panel 1, LEFT",
        "Panel 2, RIGHT, is given as a picture",
        "Prompt of panel 2, RIGHT",
        "Joined caption, as it will be sent",
    ]
    start_at(page, "Panel 1, LEFT, is given as a picture")
    press(page, "Tab")
    word = f"fox{next(NUMBERS)}"
    write(page, f"a red {word}. q w n r")
    press(page, "Enter")
    write(page, "on ice")
    press(page, "Backspace")
    press(page, "Delete")
    press(page, "Tab")
    outline = page.evaluate(
        "const s = getComputedStyle(document.activeElement); return s.outlineStyle + s.outlineWidth"
    )
    assert outline == "solid2px", "the focus is not to be seen"
    press(page, " ")
    press(page, "Delete")
    press(page, "Tab")
    write(page, "a white cat.")
    press(page, "Escape")
    assert page.evaluate("return document.activeElement === document.body"), "Escape did not leave the box"

    shown = look(page)
    page.screenshot(tmp_path / f"{mode}.png")
    assert shown["values"]["panel_prompts"] == f"a red {word}. q w n r on ic\na white cat."
    assert shown["values"]["given"] == "2"
    assert shown["given"] == [False, True]
    assert shown["caption"] == f"[LEFT] a red {word}. q w n r on ic; [RIGHT] a white cat."
    assert shown["words"] == "14 words"
    assert (shown["label"], shown["hidden"]) == ("1 row, 2 columns", ["panel_prompts", "given"])
    assert shown["hiddenInNodes2"] == shown["hidden"]
    assert shown["rawSeen"] == 0
    assert shown["ratio"] == pytest.approx(2, rel=0.01)
    assert shown["inside"]
    assert page.evaluate("return app.graph.nodes.length") == 2, "a key deleted or added a node"
    assert page.evaluate("return app.extensionManager.sidebarTab.activeSidebarTabId ?? ''") == ""

    assert shown_by_server(server, page.queue()) == shown["caption"]
    check_round_trip(page, shown)
    assert page.errors() == []


def check_round_trip(page, shown: dict) -> None:
    """Saved and opened again it is the same, in the page and in the prompt."""
    prompt, saved = page.prompt(), page.graph()
    (inputs,) = (node["inputs"] for node in prompt.values() if node["class_type"] == "DiTPanelLayout")
    assert inputs == shown["values"]
    (node,) = (node for node in saved["nodes"] if node["type"] == "DiTPanelLayout")
    assert node["widgets_values"] == list(shown["values"].values())
    page.clear()
    page.load_workflow(saved)
    assert look(page) == shown
    assert page.prompt() == prompt


def test_text_follows_the_grid_and_comes_back(page, server, mode):
    build(page, rows=2, panel_prompts=f"a{next(NUMBERS)}\nb\nc\nd", given="1, 4")
    first = look(page)
    assert first["tags"] == ["TOP-LEFT", "TOP-RIGHT", "BOTTOM-LEFT", "BOTTOM-RIGHT"]
    assert first["disabled"] == []
    a, b, c, d = first["texts"]

    set_widget(page, "preset", "film-storyboard")
    film = look(page)
    assert film["tags"] == ["SCENE-1", "SCENE-2", "SCENE-3"]
    assert (film["texts"], film["values"]["given"]) == ([a, b, c], "1")
    assert film["values"]["panel_prompts"] == f"{a}\nb\nc"
    assert film["caption"] == f"[MOVIE-SHOTS] [SCENE-1] {a}, [SCENE-2] b, [SCENE-3] c."
    assert film["ratio"] == pytest.approx(1024 / 1536, rel=0.01)
    assert film["disabled"] == ["rows", "columns", "panel_width", "panel_height"]
    assert film["inside"]
    assert shown_by_server(server, page.queue()) == film["caption"]

    start_at(page, "Add a row")
    press(page, " ")
    longer = look(page)
    assert longer["values"] == {
        **film["values"],
        **{"preset": "custom", "rows": 4, "columns": 1, "panel_width": 1024, "panel_height": 512},
        **{"prefix": "[MOVIE-SHOTS]", "panel_prompts": f"{a}\nb\nc\nd"},
    }
    assert longer["caption"] == f"[MOVIE-SHOTS] [SCENE-1] {a}, [SCENE-2] b, [SCENE-3] c, [SCENE-4] d."

    start_at(page, "Add a column")
    press(page, "Enter")
    wide = look(page)
    assert wide["texts"] == [a, "", b, "", c, "", d, ""]
    assert wide["given"] == [True] + [False] * 7
    assert focused(page) == "Add a column"
    set_widget(page, "columns", 1)
    assert look(page)["texts"] == [a, b, c, d]
    check_round_trip(page, look(page))
    assert page.errors() == []


def test_texts_without_a_place_come_back_after_opening_and_pasting(page, mode):
    kept = "return layout.properties['dit_toolkit.panels'] ?? null"
    build(page, rows=2, panel_prompts="a\nb\nc\nd")
    set_widget(page, "preset", "film-storyboard")
    look(page)
    spare = page.evaluate(kept)
    assert list(spare.values()) == [1, "d"]  # behind the version
    saved = page.graph()
    page.clear()
    page.load_workflow(saved)
    look(page)
    assert page.evaluate(kept) == spare

    page.evaluate("""
        app.canvas.selectItems([layout]);
        app.canvas.copyToClipboard();
        app.graph.remove(layout);
        app.canvas.pasteFromClipboard();
    """)
    look(page)
    assert page.evaluate(kept) == spare
    set_widget(page, "preset", "font-design")
    assert look(page)["texts"] == ["a", "b", "c", "d"]
    assert page.evaluate(kept) is None
    assert page.errors() == []


def test_what_a_program_set_without_a_word_is_read_before_anything_is_written(page, mode):
    def quietly(**values):
        page.evaluate("for (const w of layout.widgets) if (w.name in a) w.value = a[w.name]", values)

    def fresh(**values):
        page.clear()
        build(page, rows=2, panel_prompts="a\nb\nc\nd")
        look(page)
        quietly(**values)

    # Drawn before: 2 x 2. Now 1 x 3, to which the first row belongs.
    fresh(rows=1, columns=3)
    page.evaluate("globalThis.area = editor.querySelectorAll('textarea')[1]; area.focus(); area.select()")
    write(page, "x")
    shown = look(page)
    assert (shown["texts"], shown["values"]["panel_prompts"], shown["note"]) == (["a", "x", ""], "a\nx", "")
    assert focused(page) == "Prompt of panel 2, IMAGE2"
    write(page, "y")
    assert look(page)["texts"] == ["a", "xy", ""]

    fresh(rows=1, columns=3)
    page.evaluate("editor.querySelectorAll('.dittoolkit-panels-cell button')[1].click()")
    shown = look(page)
    assert (shown["texts"], shown["values"]["given"]) == (["a", "b", ""], "2")

    fresh(rows=3, columns=1)
    start_at(page, "Add a row")
    press(page, " ")
    shown = look(page)
    assert (shown["texts"], shown["values"]["rows"], shown["values"]["columns"]) == (["a", "c", "", ""], 4, 1)

    fresh(rows=1, columns=3, panel_prompts="p\nq\nr", given="3")
    page.evaluate("editor.querySelectorAll('.dittoolkit-panels-cell button')[0].click()")
    shown = look(page)
    assert (shown["texts"], shown["values"]["given"]) == (["p", "q", "r"], "1, 3")
    assert page.errors() == []


def test_escape_ends_the_choice_of_a_character_and_not_the_typing(page, mode):
    build(page, panel_prompts="one\ntwo")
    start_at(page, "Prompt of panel 1, LEFT")
    escape = """
        const area = document.activeElement;
        area.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", bubbles: true, isComposing: a }));
        return document.activeElement === area;
    """
    assert page.evaluate(escape, True)
    assert not page.evaluate(escape, False)


def test_undo_takes_back_what_was_done_in_the_editor(page, mode):
    build(page, panel_prompts="one\ntwo")
    page.evaluate("app.canvas.emitBeforeChange(); app.canvas.emitAfterChange();")
    start_at(page, "Panel 1, LEFT, is given as a picture")
    press(page, " ")
    press(page, "Tab")
    write(page, "!")
    press(page, "Tab")
    start_at(page, "Add a row")
    press(page, " ")
    done = look(page)
    assert (done["values"]["rows"], done["values"]["given"]) == (2, "1")
    assert done["values"]["panel_prompts"] in ("one!\ntwo", "!one\ntwo")
    for rows, prompts, given in (
        (1, done["values"]["panel_prompts"], "1"),
        (1, "one\ntwo", "1"),
        (1, "one\ntwo", ""),
    ):
        page.evaluate("await app.extensionManager.command.execute('Comfy.Undo')")
        shown = look(page)
        assert [shown["values"][name] for name in ("rows", "panel_prompts", "given")] == [rows, prompts, given]
        assert shown["texts"][0] == prompts.split("\n")[0]
        assert shown["given"][0] is bool(given)


def test_a_workflow_that_was_edited_by_hand_shows_as_it_is(page, mode):
    build(page, panel_prompts="one\ntwo")
    saved = page.graph()
    (node,) = (node for node in saved["nodes"] if node["type"] == "DiTPanelLayout")
    node["widgets_values"] = ["custom", 2, 1, 256, 64, "image", "[P]", "All in all", "x\ny\nz", "2; 9"]
    page.clear()
    page.load_workflow(saved)
    shown = look(page)
    assert list(shown["values"].values()) == node["widgets_values"], "opening a workflow changed it"
    assert (shown["tags"], shown["texts"], shown["given"]) == (["IMAGE1", "IMAGE2"], ["x", "y"], [False, True])
    assert "3 lines for 2 panels" in shown["note"]
    assert '"9"' in shown["note"]
    assert shown["inside"]
    assert shown["caption"] == "[P] All in all; [IMAGE1] x; [IMAGE2] y."
    start_at(page, "Prompt of panel 1, IMAGE1")
    write(page, "!")
    assert look(page)["values"]["panel_prompts"] in ("x!\ny\nz", "!x\ny\nz"), "the third line is gone"
    set_widget(page, "rows", 3)
    assert look(page)["texts"][2] == "z"


def test_what_comes_over_a_link_is_said_and_not_edited(page, server, mode):
    build(page, panel_prompts="one\ntwo", given="2")
    page.evaluate("""
        globalThis.link = (type, value, name) => {
            const node = LiteGraph.createNode(type);
            app.graph.add(node);
            node.pos = [120, 900];
            node.widgets[0].value = value;
            node.connect(0, layout, layout.inputs.findIndex(input => input.name === name));
        };
        globalThis.unlink = name => layout.disconnectInput(layout.inputs.findIndex(input => input.name === name));
    """)
    words = f"three{next(NUMBERS)}"
    page.evaluate("link('PrimitiveStringMultiline', a, 'panel_prompts')", f"{words}\nfour")
    linked = look(page)
    assert (linked["texts"], linked["editable"]) == (["", ""], [False, False])
    assert linked["placeholders"] == ["from link", "from link"]
    assert linked["given"] == [False, True], "what is not linked stays"
    assert linked["caption"] == "[LEFT] (from link); [RIGHT] (from link)."
    assert "more comes from links" in linked["words"]
    assert linked["hidden"] == linked["hiddenInNodes2"] == ["given"], "the link's end is out of sight"
    start_at(page, "Prompt of panel 1, LEFT")
    write(page, "no")
    assert look(page)["values"]["panel_prompts"] == "one\ntwo"
    assert shown_by_server(server, page.queue()) == f"[LEFT] {words}; [RIGHT] four."

    page.load_workflow(page.graph())
    assert look(page) == linked
    page.evaluate("unlink('panel_prompts'); link('PrimitiveString', '1', 'given')")
    given = look(page)
    assert (given["texts"], given["toggles"]) == (["one", "two"], ["from link"] * 2)
    page.evaluate("unlink('given'); link('PrimitiveInt', 2, 'rows')")
    rows = look(page)
    assert "grid comes from a link" in rows["note"]
    assert (rows["hidden"], rows["caption"], rows["ratio"]) == ([], "", None)
    page.evaluate("unlink('rows')")
    again = look(page)
    assert (again["texts"], again["given"], again["note"]) == (["one", "two"], [False, True], "")
    assert again["hidden"] == ["panel_prompts", "given"]
    assert page.errors() == []


def test_the_plain_inputs_are_a_key_away(page, mode):
    build(page, panel_prompts="one\ntwo")
    page.evaluate("[...editor.querySelectorAll('button')].find(each => each.textContent === 'as lines').focus()")
    press(page, " ")
    lines = look(page)
    assert (lines["hidden"], lines["hiddenInNodes2"], lines["ratio"]) == ([], [], None)
    page.wait_until(
        """[...document.querySelectorAll('textarea')].some(
        area => !editor.contains(area) && area.offsetParent && area.value === 'one\\ntwo')""",
        "the lines are shown",
        10,
    )
    set_widget(page, "panel_prompts", "three\nfour\nfive")
    press(page, " ")
    assert look(page)["texts"] == ["three", "four"]
    assert "3 lines for 2 panels" in look(page)["note"]
    assert page.errors() == []


def test_without_the_extension_the_node_has_its_plain_inputs(page, server, mode):
    extension = "app.extensions.find(each => each.name === 'dittoolkit.panel_editor')"
    page.evaluate(f"globalThis.kept = {extension}.nodeCreated; {extension}.nodeCreated = () => {{}};")
    try:
        page.evaluate(BUILD, {"panel_prompts": f"one{next(NUMBERS)}\ntwo", "given": "2"})
        assert page.evaluate("return layout.widgets.filter(each => each.hidden || each.options.hidden).length") == 0
        assert shown_by_server(server, page.queue()).endswith("; [RIGHT] two.")
        assert page.errors() == []
    finally:
        page.evaluate(f"{extension}.nodeCreated = kept")


def test_it_can_be_read_in_light_and_in_dark(page, mode):
    build(page, panel_prompts="one\ntwo", given="2")
    try:
        for palette in ("light", "dark"):
            page.evaluate("await app.extensionManager.setting.set('Comfy.ColorPalette', a)", palette)
            look(page)
            contrasts = page.evaluate("""
                const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
                const luminance = color => {
                    canvas.clearRect(0, 0, 1, 1);
                    canvas.fillStyle = color;
                    canvas.fillRect(0, 0, 1, 1);
                    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(part => part / 255)
                        .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
                    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
                };
                const contrast = (above, below) => {
                    const [dark, light] = [luminance(above), luminance(below)].sort((a, b) => a - b);
                    return (light + 0.05) / (dark + 0.05);
                };
                const [first, second] = editor.querySelectorAll(".dittoolkit-panels-cell");
                const of = (element, name) => getComputedStyle(element)[name];
                const toggle = second.querySelector("button");
                return [
                    contrast(of(first.querySelector("textarea"), "color"), of(first, "backgroundColor")),
                    contrast(of(toggle, "color"), of(toggle, "backgroundColor")),
                ];
            """)
            assert min(contrasts) > 4.5, f"{palette}: {contrasts}"
    finally:
        page.evaluate("await app.extensionManager.setting.set('Comfy.ColorPalette', 'dark')")


def test_the_wheel_zooms_over_the_cells_as_beside_them(page, mode):
    build(page, panel_prompts="one\ntwo")
    look(page)
    x, y = page.evaluate(
        "const b = editor.querySelector('.dittoolkit-panels-cell').getBoundingClientRect(); return [b.x + 40, b.y + 60]"
    )
    scales = []
    for place in ((x, y), (1200, 600)):
        page.evaluate("app.canvas.ds.scale = 0.7; app.canvas.ds.offset = [0, 60];")
        look(page)
        page.call("Input.dispatchMouseEvent", type="mouseWheel", x=place[0], y=place[1], deltaX=0, deltaY=-120)
        look(page)
        scales.append(page.evaluate("return app.canvas.ds.scale"))
    assert scales[0] > 0.7
    assert scales[0] == pytest.approx(scales[1])
