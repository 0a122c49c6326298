"""Rows of a table: CSV, JSON Lines or Parquet, a file or a folder of them, read one row at a time.

A table may come from anybody. Cells are only ever data: nothing in them is run or looked up. What no input can hold is
refused with its row and column: NUL characters, cells beyond `CELL` characters, lists and objects.
"""

from __future__ import annotations

import csv
import datetime
import decimal
import json
import math
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from .errors import Refused

CELL = 1_000_000  # characters: longer than any prompt, short enough for a million rows
ROWS = 10_000_000
LINE = 64 * CELL  # characters of a JSON line
KINDS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")

Row = dict[str, Any]  # column -> str, int, float, bool, or None for nothing


def files_of(table: Path) -> list[Path]:
    """The table's files: itself, or what a folder holds, by name."""
    if not table.exists():
        raise Refused(f"There is no table {table}.")
    found = [table] if table.is_file() else sorted(each for each in table.iterdir() if each.suffix.lower() in KINDS)
    if not found:
        raise Refused(f"The folder {table} holds no table: {', '.join(KINDS)}.")
    for file in found:
        if file.suffix.lower() not in KINDS:
            raise Refused(f"{file.name} is no table that can be read: {', '.join(KINDS)}. Save it as CSV, in UTF-8.")
    return found


def rows_of(table: Path) -> Generator[tuple[str, Row], None, None]:
    """Every row with the place it stands at, for sentences: "jobs.csv, row 3". The header is row 0."""
    number = 0
    for file in files_of(table):
        reader = {".parquet": _parquet, ".jsonl": _json_lines, ".ndjson": _json_lines}.get(file.suffix.lower(), _csv)
        before = number
        try:
            for row in reader(file):
                number += 1
                place = f"{file.name}, row {number - before}"
                if number > ROWS:
                    raise Refused(f"The table has more than {ROWS:,} rows. Split it.")
                yield place, {column: _cell(value, place, column) for column, value in row.items()}
        except UnicodeDecodeError:
            place = f"{file.name}, after row {number - before}"
            raise Refused(f"{place}: this is not UTF-8. Save the table as CSV UTF-8.") from None
    if not number:
        raise Refused(f"The table {table.name} has no rows.")


def _cell(value: Any, place: str, column: str) -> Any:
    """A value that can go into a prompt."""
    if isinstance(value, decimal.Decimal):
        value = int(value) if value == value.to_integral_value() else float(value)
    elif isinstance(value, (datetime.date, datetime.time)):
        value = value.isoformat()
    if isinstance(value, str):
        if len(value) > CELL:
            raise Refused(
                f"{place}: the cell in column '{column}' has {len(value):,} characters, the most is {CELL:,}."
            )
        if "\0" in value:
            raise Refused(f"{place}: the cell in column '{column}' holds a NUL character.")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise Refused(f"{place}: the cell in column '{column}' holds half a character. Save the table as UTF-8.")
    elif isinstance(value, float) and not math.isfinite(value):
        raise Refused(f"{place}: the cell in column '{column}' is {value}, which is no number.")
    elif value is not None and not isinstance(value, (bool, int, float)):
        raise Refused(f"{place}: the cell in column '{column}' holds a {type(value).__name__}, not a text or a number.")
    return value


def _csv(file: Path) -> Iterator[Row]:
    csv.field_size_limit(CELL)
    with file.open(encoding="utf-8-sig", newline="") as text:
        first = text.readline(LINE)
        text.seek(0)
        delimiter = "\t" if file.suffix.lower() == ".tsv" else max(",;\t", key=first.count)
        reader = csv.reader(text, delimiter=delimiter)
        columns: list[str] | None = None
        try:
            for cells in reader:
                if columns is None:
                    columns = _columns(cells, file)
                    continue
                if not cells:  # an empty line
                    continue
                if len(cells) != len(columns):
                    raise Refused(
                        f"{file.name}, line {reader.line_num}: {len(cells)} cells, {len(columns)} columns. "
                        "A text with a comma in it wants quotation marks."
                    )
                yield dict(zip(columns, cells, strict=True))
        except csv.Error as error:
            place = f"{file.name}, line {reader.line_num}"
            if "field larger" in str(error):
                raise Refused(f"{place}: a cell has more than {CELL:,} characters.") from None
            if "NUL" in str(error):
                raise Refused(f"{place}: the line holds a NUL character.") from None
            raise Refused(f"{place}: this is no CSV ({error}).") from None


def _columns(cells: list[str], file: Path) -> list[str]:
    names = [cell.strip() for cell in cells]
    if "" in names:
        raise Refused(f"{file.name}: column {names.index('') + 1} has no name.")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise Refused(f"{file.name}: two columns are named '{twice}'.")
    return names


def _json_lines(file: Path) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig") as text:
        number = 0
        while line := text.readline(LINE):
            number += 1
            if len(line) >= LINE:
                raise Refused(f"{file.name}, line {number}: the line has more than {LINE:,} characters.")
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise Refused(f"{file.name}, line {number}: this is no JSON ({error}).") from None
            if not isinstance(row, dict):
                raise Refused(f'{file.name}, line {number}: a line is one object, as in {{"prompt": "a doll"}}.')
            yield row


def _parquet(file: Path) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise Refused(f"{file.name}: Parquet needs pyarrow. Install it: pip install pyarrow") from None
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(1000):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise Refused(f"{file.name}: this is no Parquet that can be read ({error}).") from None
