"""Every text of every node has its entry in four languages, and none is left over. The files come from one table."""

import asyncio
import json
import re

import pytest

pytestmark = pytest.mark.comfy

from dit_toolkit.nodes import DiTToolkit  # noqa: E402
from dit_toolkit.scripts import locales  # noqa: E402

SCHEMAS = [node.GET_SCHEMA() for node in asyncio.run(DiTToolkit().get_node_list())]
FILES = locales.files(SCHEMAS)
ROWS = list(locales.table().values())


def test_every_text_has_a_row_and_no_row_is_left_over():
    said = set(locales.texts(locales.definitions(SCHEMAS)))
    assert said == {row["en"] for row in ROWS}
    assert all(set(row) == set(locales.LANGUAGES) for row in ROWS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_file_is_the_one_that_the_command_writes(path):
    assert path.read_text(encoding="utf-8") == FILES[path], "python -m scripts.locales writes it anew"


def test_no_other_file_is_there():
    assert {path for path in locales.FOLDER.rglob("*") if path.is_file()} == {*FILES, locales.TABLE}


@pytest.mark.parametrize("language", ["zh", "ja", "ko"])
def test_a_translation_says_the_numbers_and_names_of_the_english_text(language):
    for row in ROWS:
        for part in (r"\d+(?:\.\d+)?", r"(?<!\w)'([\w .,-]+)'(?!\w)"):
            missing = [found for found in re.findall(part, row["en"]) if found not in row[language]]
            assert not missing, (row["en"], missing)


@pytest.mark.parametrize("language", ["zh", "ja", "ko"])
def test_a_translation_is_one(language):
    for row in ROWS:
        assert not row[language].isascii(), row["en"]


def test_no_text_has_characters_that_the_page_would_read_as_its_own():
    """The page puts values into braces, links at @, and chooses a plural at |."""
    for row in ROWS:
        for text in row.values():
            assert not set("{}@|") & set(text), text


def test_keys_have_no_dots():
    """The page reads a dot as a step into the entry. It turns those of ids into underscores; ours have none."""
    for schema in SCHEMAS:
        assert "." not in schema.node_id
        assert not [entry.id for entry in schema.inputs if "." in entry.id]


def test_every_part_of_the_category_has_its_word():
    for language in locales.LANGUAGES:
        categories = json.loads((locales.FOLDER / language / "main.json").read_text(encoding="utf-8"))
        assert categories["nodeCategories"]["DiT Toolkit"] == "DiT Toolkit"
