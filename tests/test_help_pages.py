"""The tables of the help pages say what the schemas say: type, default and range of every input."""

import asyncio
import re

import pytest

pytestmark = pytest.mark.comfy

from comfy_api.latest import io  # noqa: E402

from dit_toolkit.host.accelerate.accelerate import EMBEDDED, OTHERS, PRESETS, QUALITIES, Setting  # noqa: E402
from dit_toolkit.nodes import DiTToolkit  # noqa: E402
from dit_toolkit.scripts.places import ROOT  # noqa: E402

SCHEMAS = [node.GET_SCHEMA() for node in asyncio.run(DiTToolkit().get_node_list())]
every_node = pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.node_id)

EVERY_SEED = (0, 0xFFFFFFFFFFFFFFFF)
MANY = 8  # choices; longer lists are not written out

# Cells that say more to people than a number would, and what they stand for.
WORDS = {
    ("DiTAccelerateAutotune", "seed"): EVERY_SEED,  # no range is given
    ("DiTFreeCus", "noise_seed"): EVERY_SEED,
    ("DiTImageDifference", "min_pixels"): (1, 1_000_000),  # "1 and more"
    ("DiTReTtention", "min_tokens"): (0, 1 << 20),  # "0 and up"
    ("DiTCogVideoXLora", "strength"): (-10, 10),  # "-10 to 10"
    ("DiTTryOnPrepare", "width"): (16, 8192),  # "multiples of 16"
    ("DiTTryOnPrepare", "height"): (16, 8192),
}
CHOICES = {"Newton over steps, sigma or log sigma": "Newton, steps, Newton, sigma, Newton, log sigma"}
FOLDERS = {"file", "folder", "picture"}  # their choices are files
FIRST = {"first file", "the first", "the example"}  # of choices out of a folder: they begin with the first of them


def table(node: str) -> dict[str, dict[str, str]]:
    """The rows of a page's table of inputs, by the input's name: each cell by the name of its column."""
    text = (ROOT / "web" / "docs" / f"{node}.md").read_text(encoding="utf-8")
    section = text.partition("\n## Inputs\n")[2].partition("\n## ")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.+\|$", section, re.M)]
    rows = [dict(zip(lines[0], line, strict=False)) for line in lines[2:]]
    return {name: row for row in rows for name, row in several(row)}


def several(row: dict[str, str]) -> list[tuple[str, dict[str, str]]]:
    """A row for two inputs, "width, height", as two."""
    names = row["name"].split(", ")
    defaults = row.get("default", "").split(", ") if len(names) > 1 else [row.get("default", "")]
    return [(name, {**row, "default": default}) for name, default in zip(names, defaults, strict=True)]


def type_of(entry: io.Input) -> set[str]:
    """What stands in the column "type"."""
    match entry:
        case io.Combo.Input():
            return {"list", "choice"}
        case io.Autogrow.Input():
            return {entry.template.input.get_io_type()}
    return {{"*": "any"}.get(entry.get_io_type(), entry.get_io_type())}


def default_of(entry: io.Input) -> set[str]:
    match entry:
        case io.Combo.Input():
            return {entry.default} if entry.default else FIRST
        case io.Boolean.Input():
            return {str(entry.default).lower()}
        case io.Int.Input() | io.Float.Input():
            return {f"{entry.default:.10g}"}
        case io.String.Input():
            lines = "\n" in (entry.default or "")  # no cell holds them
            return {"the example"} if lines else {entry.default or "", entry.default or "empty"}
    return {""}


@every_node
def test_the_table_of_inputs_has_their_types_and_defaults(schema):
    rows = table(schema.node_id)
    assert list(rows) == [entry.display_name or entry.id for entry in schema.inputs]
    for entry, row in zip(schema.inputs, rows.values(), strict=True):
        assert row["type"].removesuffix(", optional") in type_of(entry), entry.id
        if entry.get_io_type() in {"INT", "FLOAT", "BOOLEAN", "STRING", "COMBO"}:
            assert row["default"] in default_of(entry), entry.id


@every_node
def test_the_table_of_inputs_has_their_ranges(schema):
    rows = table(schema.node_id)
    for entry in schema.inputs:
        row = rows[entry.display_name or entry.id]
        if "range" not in row:
            continue
        if isinstance(entry, io.Int.Input | io.Float.Input):
            said = re.match(r"([\d.]+) to ([\d.]+)(?:, by (\d+))?(?: pixels)?$", row["range"])
            words = WORDS.get((schema.node_id, entry.id))
            assert (said is None) == (words is not None), (entry.id, row["range"])
            low, high = words or map(float, said.groups()[:2])
            assert (entry.min, entry.max) == (low, high), entry.id
            if said and said[3]:
                assert entry.step == int(said[3]), entry.id
        elif isinstance(entry, io.Combo.Input) and len(entry.options) <= MANY and entry.id not in FOLDERS:
            cell = row["range"]
            for short, long in CHOICES.items():
                cell = cell.replace(short, long)
            assert cell.replace(";", ",") == ", ".join(entry.options), entry.id


@every_node
def test_the_page_says_which_inputs_are_advanced(schema):
    text = (ROOT / "web" / "docs" / f"{schema.node_id}.md").read_text(encoding="utf-8")
    names, said = [entry.id for entry in schema.inputs], set()
    for first in re.findall(r"^From `(\w+)` on, inputs are advanced", text, re.M):
        said.update(names[names.index(first) :])
    for some in re.findall(r"^(`\w+`(?: and `\w+`)*) are advanced", text, re.M):
        said.update(re.findall(r"\w+", some.replace(" and ", " ")))
    said.update(name for name, row in table(schema.node_id).items() if row["meaning"].endswith("Advanced."))
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
    text = (ROOT / "web" / "docs" / "DiTAccelerate.md").read_text(encoding="utf-8")
    section = text.partition("\n## What it picks\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.+\|$", section, re.M)]
    assert {name for name, *_ in rows[2:]} == set(FAMILIES)
    for name, *cells, _ in rows[2:]:
        said = [cell.partition(",")[0] for cell in cells]
        assert said == [words(setting) for setting in FAMILIES[name]], name
        for cell, setting in zip(cells, FAMILIES[name], strict=True):
            for number, has in (("first_full", setting.first_full), ("order", setting.order)):
                if number in cell:
                    assert f"{number} {has}" in cell, (name, cell)


REFERENCE = ROOT / "tests" / "reference" / "presets.txt"


def test_presets_are_in_full_those_of_the_reference():
    """Numbers that the page leaves out, too. Whoever changes one changes it there as well, with its source."""
    lines = []
    tables = {**PRESETS, "others": OTHERS, "embedded": EMBEDDED}
    for name, table_of in tables.items():
        for quality, setting in zip(QUALITIES, table_of, strict=True):
            end = "to the end" if setting.to_end else "as published"
            lines.append(f"{name}, {quality}: {setting.words}, last_full {setting.last_full}, {end}. {setting.source}")
    assert REFERENCE.read_text(encoding="utf-8").splitlines() == lines
