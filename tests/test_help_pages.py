"""Help pages are read in a panel 282 pixels wide, and say what the schemas say: default and range of every input."""

import asyncio
import re

import pytest
from PIL import Image

pytestmark = pytest.mark.comfy

from comfy_api.latest import io  # noqa: E402

from dit_toolkit.host.accelerate.accelerate import EMBEDDED, OTHERS, PRESETS, QUALITIES, Setting  # noqa: E402
from dit_toolkit.nodes import DiTToolkit  # noqa: E402
from dit_toolkit.scripts.pictures.table import makers  # noqa: E402
from dit_toolkit.scripts.places import ROOT  # noqa: E402

SCHEMAS = [node.GET_SCHEMA() for node in asyncio.run(DiTToolkit().get_node_list())]
every_node = pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.node_id)

MANY = 8  # choices; longer lists are not written out
FOLDERS = {"file", "folder", "picture"}  # their choices are files
PANEL = 282  # pixels: the width of the page's help panel
NOTHING = "## When nothing seems to happen"


def page(node: str) -> str:
    return (ROOT / "web" / "docs" / f"{node}.md").read_text(encoding="utf-8")


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a page as rows of cells."""
    found = re.findall(r"(?:^\|.+\|\n)+", text, re.M)
    return [[[cell.strip() for cell in row.strip("|").split("|")] for row in each.splitlines()] for each in found]


def meanings(node: str, title: str) -> dict[str, str]:
    """The rows of the table under `title`: what stands behind each name."""
    section = page(node).partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    head, _, *rows = tables(section + "\n")[0]
    assert head == ["name", "meaning"]
    return dict(rows)


def facts(entry: io.Input) -> str:
    """Default and range as the page has them, behind the meaning."""
    match entry:
        case io.Combo.Input() if entry.id in FOLDERS:
            return f"Default {entry.default}." if entry.default and entry.default.startswith("none") else ""
        case io.Combo.Input() if len(entry.options) > MANY:
            return f"Default {entry.default}."
        case io.Combo.Input():
            others = ", ".join(option for option in entry.options if option != entry.default)
            return f"Default {entry.default}; or {others}."
        case io.Boolean.Input():
            return f"Default {'on' if entry.default else 'off'}."
        case io.Int.Input() if entry.max == 0xFFFFFFFFFFFFFFFF:  # any seed
            return f"Default {entry.default}."
        case io.Int.Input() | io.Float.Input():
            by = f", by {entry.step}" if isinstance(entry, io.Int.Input) and (entry.step or 1) > 1 else ""
            return f"Default {entry.default:.10g}, {entry.min:.10g} to {entry.max:.10g}{by}."
        case io.String.Input() if "\n" in (entry.default or ""):  # no cell holds them
            return "Default: an example."
        case io.String.Input():
            return f"Default {entry.default or 'empty'}."
    return ""


@every_node
def test_all_tables_have_two_columns(schema):
    """The panel is narrow. More columns push the one with the meaning out of it."""
    for rows in tables(page(schema.node_id)):
        assert {len(row) for row in rows} == {2}, rows[0]


@every_node
def test_the_table_of_inputs_says_default_and_range(schema):
    rows = meanings(schema.node_id, "Inputs")
    assert list(rows) == [entry.display_name or entry.id for entry in schema.inputs]
    for entry, meaning in zip(schema.inputs, rows.values(), strict=True):
        assert meaning.removesuffix(" Advanced.").endswith(facts(entry)), entry.id
        assert len(meaning.partition("Default")[0]) > 5, entry.id


@every_node
def test_the_table_of_outputs_names_them_all(schema):
    rows = meanings(schema.node_id, "Outputs")
    kinds = [each.display_name or each.io_type for each in schema.outputs]
    assert [name.lower() for name in rows] == [kind.lower() for kind in kinds]


@every_node
def test_the_page_helps_when_nothing_seems_to_happen(schema):
    _, title, below = page(schema.node_id).partition(f"\n{NOTHING}\n\n")
    assert title
    assert below.startswith("- ")


@every_node
def test_pictures_can_be_read_in_the_panel(schema):
    """Made for it, at twice its width for dense screens, by `make pictures`, with their captions as text."""
    text = page(schema.node_id)
    shown = re.findall(r"!\[[^\]]+\]\((\w+)\.jpg\)\n\n\*.+\*\n", text)
    assert len(shown) == text.count("![") == 1
    assert f"web/docs/{shown[0]}.jpg" in makers()
    with Image.open(ROOT / "web" / "docs" / f"{shown[0]}.jpg") as picture:
        assert picture.width == 2 * PANEL


@every_node
def test_the_page_says_which_inputs_are_advanced(schema):
    text = page(schema.node_id)
    names, said = [entry.id for entry in schema.inputs], set()
    for first in re.findall(r"^From `(\w+)` on, inputs are advanced", text, re.M):
        said.update(names[names.index(first) :])
    for some in re.findall(r"^(`\w+`(?: and `\w+`)*) are advanced", text, re.M):
        said.update(re.findall(r"\w+", some.replace(" and ", " ")))
    said.update(name for name, text in meanings(schema.node_id, "Inputs").items() if text.endswith("Advanced."))
    assert {entry.id for entry in schema.inputs if entry.advanced} == said


# Presets


FAMILIES = {  # as the page and as the table of presets call them
    "FLUX.1-dev and fine-tunes": PRESETS["FLUX.1"],
    "FLUX.1-schnell": PRESETS["FLUX.1 schnell"],
    "Wan": PRESETS["Wan"],
    "HunyuanVideo": PRESETS["HunyuanVideo"],
    "Qwen-Image": PRESETS["QwenImage"],
    "SD3, SD3.5": PRESETS["SD3"],
    "HiDream": PRESETS["HiDream"],
    "all others": OTHERS,
    "the embedded model": EMBEDDED,
}


def words(setting: Setting) -> str:
    """A preset as the page has it."""
    return {
        "none": "nothing",
        "Delta-DiT": f"Delta-DiT {setting.amount:g}",
        "Confidence-Gated Taylor": f"gate {setting.amount:g}",
        "TaylorSeer": f"every {setting.amount:g}",
    }[setting.method]


def test_presets_are_those_of_the_page():
    section = page("DiTAccelerate").partition("\n## What it picks\n")[2].partition("\n## ")[0]
    _, _, *rows = tables(section + "\n")[0]
    assert {name for name, _ in rows} == set(FAMILIES)
    for name, cell in rows:
        said = dict(line.split(": ", 1) for line in cell.split("<br>")[: len(QUALITIES)])
        assert list(said) == list(QUALITIES)
        for text, setting in zip(said.values(), FAMILIES[name], strict=True):
            assert text.partition(",")[0] == words(setting), name
            for number, has in (("first_full", setting.first_full), ("order", setting.order)):
                if number in text:
                    assert f"{number} {has}" in text, (name, text)


REFERENCE = ROOT / "tests" / "reference" / "presets.txt"


def test_presets_are_in_full_those_of_the_reference():
    """Numbers that the page leaves out, too. Whoever changes one changes it there as well, with its source."""
    lines = []
    tables = {**PRESETS, "others": OTHERS, "embedded": EMBEDDED}
    for name, table_of in tables.items():
        for quality, setting in zip(QUALITIES, table_of, strict=True):
            spacing = "by noise and step" if setting.spread else "as published"
            numbers = f"{setting.words}, last_full {setting.last_full}, {spacing}"
            lines.append(f"{name}, {quality}: {numbers}. {setting.source}")
    assert REFERENCE.read_text(encoding="utf-8").splitlines() == lines
