"""What is done and what is not: one SQLite file in the results folder, `.jobs.sqlite`.

Two tables. `results` outlives a run: one entry for each key that has ended, done or failed, with the digest it had.
`rows` is the table of jobs of this run, filled anew at each start. A row is done if its key has a result with its
digest, and the files are all there. A job's entry is written after its files have their names: what is lost between the
two is done again, into the same names.

Only one run at a time can have the file open: SQLite's own lock, which ends with the process.
"""

from __future__ import annotations

import json
import sqlite3
import unicodedata
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .bindings import File
from .errors import DiskFull, Refused, is_full
from .plan import Planned

NAME = ".jobs.sqlite"
SCHEMA = """
create table if not exists results(
    key text primary key, digest text, state text, row text, files text, seconds real, worker text, tries integer,
    nodes integer, reused integer, error text) without rowid;
drop table if exists rows;
create table rows(
    position integer primary key, key text, folded text unique, place text, digest text, row text, vals text);
"""


@dataclass(frozen=True)
class Result:
    """How a job ended. `state`: done, failed, or open for one that has not ended."""

    key: str
    row: dict[str, Any]
    state: str
    files: tuple[tuple[str, int], ...] = ()  # names in the results folder, and bytes
    seconds: float | None = None  # in ComfyUI, without the time in its queue
    worker: str | None = None
    tries: int = 0
    nodes: int | None = None  # of the prompt
    reused: int | None = None  # of these, what ComfyUI still had
    error: str | None = None


class Ledger:
    def __init__(self, folder: Path):
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._data = sqlite3.connect(folder / NAME, isolation_level=None, timeout=0, check_same_thread=False)
            self._data.execute("pragma locking_mode = exclusive")
            self._data.execute("pragma journal_mode = wal")
            self._data.execute("pragma synchronous = normal")
            self._data.executescript(SCHEMA)
        except (sqlite3.Error, OSError) as error:
            if is_full(error):
                raise DiskFull from None
            if "locked" in str(error):
                raise Refused(
                    f"Another run writes into {folder}. Wait for it, or choose another folder with --out."
                ) from None
            raise Refused(f"The folder {folder} cannot hold results: {error}.") from None

    def close(self) -> None:
        self._data.close()

    def fill(self, planned: Iterable[Planned]) -> int:
        """Take the table of this run; returns how many rows it has."""
        position = -1
        self._data.execute("begin")
        try:
            for position, each in enumerate(planned):
                folded = unicodedata.normalize(
                    "NFC", each.key
                ).casefold()  # as the file systems of Windows and Mac see it
                values = [["file", each.path, each.name] if isinstance(each, File) else each for each in each.values]
                entry = (position, each.key, folded, each.place, each.digest, json.dumps(each.row), json.dumps(values))
                try:
                    self._data.execute("insert into rows values (?, ?, ?, ?, ?, ?, ?)", entry)
                except sqlite3.IntegrityError:
                    ((other,),) = self._data.execute("select place from rows where folded = ?", (folded,))
                    raise Refused(
                        f"{each.place}: the key '{each.key}' is that of {other} too. Each row needs its own."
                    ) from None
            self._data.execute("commit")
        except BaseException as error:
            if self._data.in_transaction:
                self._data.execute("rollback")
            if isinstance(error, sqlite3.Error) and is_full(error):
                raise DiskFull from None
            raise
        return position + 1

    def open_positions(self, again: bool = False) -> array:
        """Rows that are to be done: new or changed, failed before, or with a file gone. `again`: all of them."""
        query = """select position, results.files from rows left join results
                   on results.key = rows.key and results.digest = rows.digest and results.state = 'done'
                   order by position"""
        return array(
            "L",
            (
                position
                for position, files in self._data.execute(query)
                if again or files is None or not self._all_there(files)
            ),
        )

    def _all_there(self, files: str) -> bool:
        for name, size in json.loads(files):
            try:
                if (self.folder / name).stat().st_size != size:
                    return False
            except OSError:
                return False
        return True

    def planned(self, position: int) -> tuple[str, list[Any]]:
        """The key of a row, and the values of its bindings."""
        ((key, text),) = self._data.execute("select key, vals from rows where position = ?", (position,))
        values = json.loads(text)
        return key, [File(*each[1:]) if isinstance(each, list) else each for each in values]

    def files_of(self, key: str) -> list[str]:
        """What an earlier run left under this key."""
        found = self._data.execute("select files from results where key = ?", (key,)).fetchone()
        return [name for name, _ in json.loads(found[0])] if found else []

    def write(self, position: int, result: Result) -> None:
        """Record how a job ended."""
        entry = (
            *(json.dumps(result.files), result.state, result.seconds, result.worker, result.tries, result.nodes),
            *(result.reused, result.error, position),
        )
        try:
            self._data.execute(
                "insert or replace into results"
                "(files, state, seconds, worker, tries, nodes, reused, error, key, digest, row) "
                "select ?, ?, ?, ?, ?, ?, ?, ?, key, digest, row from rows where position = ?",
                entry,
            )
        except sqlite3.Error as error:
            if is_full(error):
                raise DiskFull from None
            raise

    def results(self) -> Iterator[Result]:
        """One for each row of the table, in its order."""
        query = """select rows.key, rows.row, results.state, files, seconds, worker, tries, nodes, reused, error
                   from rows
                   left join results on results.key = rows.key and results.digest = rows.digest order by position"""
        for key, row, state, files, *rest in self._data.execute(query):
            if state is None:
                yield Result(key, json.loads(row), "open")
            else:
                yield Result(key, json.loads(row), state, tuple(map(tuple, json.loads(files))), *rest)

    def counts(self) -> dict[str, int]:
        query = """select coalesce(results.state, 'open'), count(*) from rows
                   left join results on results.key = rows.key and results.digest = rows.digest group by 1"""
        return {"done": 0, "failed": 0, "open": 0, **dict(self._data.execute(query))}

    def gone(self) -> int:
        """Results of an earlier table, whose keys this one has not."""
        ((number,),) = self._data.execute("select count(*) from results where key not in (select key from rows)")
        return number
