"""Rows -> jobs: each with a key that names its files, a digest that tells whether it has changed, a place in line."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import tables
from .bindings import Binding, File, Files, apply, bind, check_column, loader_ids
from .errors import Refused
from .workflow import Prompt, essence

KEYS = ("key", "id")  # columns that name jobs, unless --key says which
LONGEST = 120  # bytes of a key: file systems take 255, and names get endings
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10))}
LEVELS = 8  # bindings that the order looks at


@dataclass(frozen=True)
class Job:
    """One row, ready to be sent. All in it is plain, so that Ray can carry it."""

    position: int  # in the table, from 0
    key: str
    prompt: Prompt
    files: tuple[File, ...]
    graph: dict | None = None  # in UI format, for what the pictures carry


@dataclass(frozen=True)
class Planned:
    """What the ledger keeps of a row before it has run."""

    place: str  # in the table, for sentences
    key: str
    digest: str
    row: tables.Row
    values: list[Any]


class Plan:
    """A workflow, its bindings and a table. Rows are read one at a time: there may be a million."""

    def __init__(
        self,
        prompt: Prompt,
        known: dict,
        settings: Sequence[str],
        table: Path,
        *,
        name: str = "Results",
        key: str | None = None,
        files: Path | None = None,
        above: int = 0,
    ):
        self.prompt, self.known, self.table = prompt, known, table
        self.title = f"{name}: {table.stem}"
        self.columns = columns_of(table)
        self.bindings: list[Binding] = bind(settings, prompt, known, self.columns)
        if key is not None:
            check_column(key, self.columns)
        self.key = key or next((name for name in KEYS if name in self.columns), None)
        self.files = Files(files or (table if table.is_dir() else table.parent))
        self.loaders = loader_ids(prompt, self.bindings, above)
        self.savers = savers(prompt, known)
        fixed = json.dumps([essence(prompt), [[b.node, b.input, b.kind] for b in self.bindings]], sort_keys=True)
        self.seal = hashlib.sha256(fixed.encode()).digest()
        self.below = [descendants(prompt, binding.node) for binding in self.bindings]

    def rows(self) -> Iterator[Planned]:
        """Every row, checked."""
        needed = {column for binding in self.bindings for column in binding.template.columns} | ({self.key} - {None})
        for number, (place, row) in enumerate(tables.rows_of(self.table), 1):
            for column in needed - row.keys():
                raise Refused(f"{place}: there is no column '{column}'.")
            key = checked_key(row[self.key], place) if self.key else f"{number:06d}"
            values = [binding.value(row, self.files, place) for binding in self.bindings]
            yield Planned(place, key, self.digest(values), row, values)

    def marked(self, marks: Sequence[array]) -> Iterator[Planned]:
        """Every row, with its marks put into these columns."""
        for planned in self.rows():
            for column, number in zip(marks, self.ranked(), strict=False):
                column.append(_mark(planned.values[number]))
            yield planned

    def digest(self, values: Sequence[Any]) -> str:
        text = json.dumps([each.name if isinstance(each, File) else each for each in values], sort_keys=True)
        return hashlib.sha256(self.seal + text.encode()).hexdigest()

    def job(self, position: int, key: str, values: Sequence[Any]) -> Job:
        prompt, files = apply(self.prompt, self.bindings, values, self.loaders)
        bound = {(binding.node, binding.input) for binding in self.bindings}
        for node_id in self.savers:  # else two equal rows would be one result in ComfyUI's cache
            if (node_id, "filename_prefix") not in bound:
                prompt[node_id]["inputs"]["filename_prefix"] = key
        return Job(position, key, prompt, tuple(files))

    # order

    def ranked(self) -> list[int]:
        """The bindings, first those that make most nodes run again when they change."""
        return sorted(range(len(self.bindings)), key=lambda number: -len(self.below[number]))[:LEVELS]

    def runs(self, marks: Sequence[Sequence[int]], order: Iterable[int]) -> int:
        """How many nodes ComfyUI runs for jobs in this order on one worker: it keeps what did not change."""
        levels = [(column, self.below[number]) for column, number in zip(marks, self.ranked(), strict=False)]
        sizes: dict[tuple[bool, ...], int] = {}
        total, before = 0, None
        for now in order:
            if before is None:
                total += len(self.prompt) + len(self.loaders)
            else:
                changed = tuple(column[now] != column[before] for column, _ in levels)
                if changed not in sizes:
                    again = [below for (_, below), change in zip(levels, changed, strict=True) if change]
                    sizes[changed] = len(set(self.savers).union(*again))
                total += sizes[changed]
            before = now
        return total


def columns_of(table: Path) -> list[str]:
    """Those of the first row. Other rows that lack one are found when they are read."""
    with contextlib.closing(tables.rows_of(table)) as rows:
        return list(next(rows)[1])


def checked_key(value: Any, place: str) -> str:
    """A key that is a file name wherever it is copied to. It is refused, not mended: two keys might become one."""
    key = "" if value is None else str(value).strip()
    if not key:
        raise Refused(f"{place}: the key is empty.")
    if bad := next((each for each in key if each in '/\\:*?"<>|' or unicodedata.category(each)[0] == "C"), None):
        raise Refused(
            f"{place}: the key {key[:60]!r} holds {bad!r}, and files are named by it. Use letters, digits, - and _."
        )
    if key.startswith((".", "-", "~")) or key.endswith("."):
        raise Refused(
            f"{place}: the key '{key[:60]}' begins with '.', '-' or '~' or ends with '.', and files are named by it."
        )
    if key.partition(".")[0].lower() in RESERVED:
        raise Refused(f"{place}: the key '{key}' is a name that Windows keeps for devices.")
    if re.search(r"__\d+$", key):
        raise Refused(f"{place}: the key '{key}' ends like the second file of a job. Use one underscore.")
    if len(key.encode()) > LONGEST:
        raise Refused(f"{place}: the key '{key[:40]}...' is longer than {LONGEST} bytes, and files are named by it.")
    return key


def savers(prompt: Prompt, known: dict) -> list[str]:
    """Nodes that write files, under a name of their own."""
    return [
        node_id
        for node_id, node in prompt.items()
        if known[node["class_type"]].get("output_node") and isinstance(node["inputs"].get("filename_prefix"), str)
    ]


def descendants(prompt: Prompt, start: str) -> set[str]:
    """A node and all that is made from what it gives."""
    found, rest = {start}, [start]
    while rest:
        current = rest.pop()
        for node_id, node in prompt.items():
            if node_id not in found and any(
                isinstance(each, list) and each[:1] == [current] for each in node["inputs"].values()
            ):
                found.add(node_id)
                rest.append(node_id)
    return found


def _mark(value: Any) -> int:
    text = value.name if isinstance(value, File) else json.dumps(value)
    return (
        int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
    )  # fits into sqlite and arrays


def in_order(marks: Sequence[Sequence[int]], rows: int) -> array:
    """Positions, so that rows with equal first marks follow one another, among these those with equal second ones, ...

    `marks`: a column of numbers for each level. Groups stand in the order in which the table begins them, and so do the
    rows of each.
    """

    def grouped(positions: Iterable[int], level: int) -> Iterator[int]:
        if level == len(marks):
            yield from positions
            return
        groups: dict[int, list[int]] = {}
        for position in positions:
            groups.setdefault(marks[level][position], []).append(position)
        for group in groups.values():
            yield from grouped(group, level + 1) if len(group) > 1 else group

    return array("L", grouped(range(rows), 0))
