"""Tables as people and programs write them, and as nobody should."""

import json

import pytest

from dit_toolkit.headless import tables
from dit_toolkit.headless.errors import Refused
from dit_toolkit.headless.tables import rows_of


def table(tmp_path, text, name="jobs.csv", encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return path


def read(path):
    return [row for _, row in rows_of(path)]


@pytest.mark.parametrize(
    "text",
    [
        "prompt,seed\na doll,7\n",
        "prompt;seed\na doll;7\n",
        "prompt\tseed\r\na doll\t7\r\n",
        "\ufeffprompt, seed\n\na doll,7",
    ],
)
def test_a_csv_is_read_as_spreadsheets_write_it(tmp_path, text):
    assert read(table(tmp_path, text)) == [{"prompt": "a doll", "seed": "7"}]


def test_a_cell_may_hold_commas_quotes_and_lines(tmp_path):
    assert read(table(tmp_path, 'prompt\n"a ""doll"", waving\non two lines"\n')) == [
        {"prompt": 'a "doll", waving\non two lines'}
    ]


def test_a_formula_is_a_text(tmp_path):
    assert read(table(tmp_path, "prompt\n=HYPERLINK(1)\n@SUM(A1)\n")) == [
        {"prompt": "=HYPERLINK(1)"},
        {"prompt": "@SUM(A1)"},
    ]


def test_json_lines_keep_their_types(tmp_path):
    rows = [{"prompt": "ein Püppchen", "seed": 7, "cfg": 2.5, "on": True, "none": None}]
    assert read(table(tmp_path, "\n".join(map(json.dumps, rows)) + "\n\n", "jobs.jsonl")) == rows


def test_parquet_keeps_its_types(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [{"prompt": "a doll", "seed": 7, "cfg": 2.5}, {"prompt": None, "seed": 8, "cfg": 3.0}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "jobs.parquet")
    assert read(tmp_path / "jobs.parquet") == rows


def test_a_folder_is_its_files_by_name(tmp_path):
    for name, seed in (("b.csv", 2), ("a.csv", 1), ("c.txt", 3)):
        table(tmp_path, f"seed\n{seed}\n", name)
    assert [(place, row["seed"]) for place, row in rows_of(tmp_path)] == [("a.csv, row 1", "1"), ("b.csv, row 1", "2")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompt\na\0b\n", "NUL"),
        ("prompt\n" + "x" * (tables.CELL + 1) + "\n", "1,000,000 characters"),
        ("prompt,seed\na doll\n", "1 cells, 2 columns"),
        ("prompt,prompt\na,b\n", "two columns are named 'prompt'"),
        ("prompt,\na,b\n", "column 2 has no name"),
        ("prompt\n", "no rows"),
        ("", "no rows"),
        ("prompt\ncafé\n".encode("latin-1"), "UTF-8"),
    ],
)
def test_a_csv_that_cannot_be_meant_is_refused(tmp_path, text, words):
    with pytest.raises(Refused, match=words):
        read(table(tmp_path, text))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"seed": NaN}', "no number"),
        ('{"seed": [1]}', "holds a list"),
        ('{"prompt": {"a": 1}}', "holds a dict"),
        ('{"prompt": "a\\u0000b"}', "NUL"),
        ('{"prompt": "\\ud800"}', "half a character"),
        ('{"prompt": ', "line 1: this is no JSON"),
        ('["a"]', "one object"),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_a_json_line_that_cannot_be_meant_is_refused(tmp_path, line, words):
    with pytest.raises(Refused, match=words):
        read(table(tmp_path, line, "jobs.jsonl"))


def test_a_cell_of_a_hundred_megabytes_is_refused(tmp_path):
    for name, text in (
        ("jobs.csv", "prompt\n" + "x" * 100_000_000),
        ("jobs.jsonl", '{"prompt": "' + "x" * 100_000_000),
    ):
        with pytest.raises(Refused, match="characters"):
            read(table(tmp_path, text, name))


@pytest.mark.parametrize("name", ["jobs.xlsx", "jobs"])
def test_another_kind_of_file_is_refused(tmp_path, name):
    with pytest.raises(Refused, match="CSV"):
        read(table(tmp_path, "a\n1\n", name))


def test_a_damaged_parquet_is_refused(tmp_path):
    with pytest.raises(Refused, match="no Parquet"):
        read(table(tmp_path, b"PAR1 and no more", "jobs.parquet"))


def test_a_table_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(Refused, match="There is no table"):
        read(tmp_path / "none.csv")
    with pytest.raises(Refused, match="holds no table"):
        read(tmp_path)
