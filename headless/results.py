"""What a run leaves in its folder: files/, results.parquet (or results.csv), and index.html to look at them.

Everything is written under another name and moved into place, so that a name that is there is whole.
"""

from __future__ import annotations

import csv
import html
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from .errors import DiskFull, is_full
from .ledger import Ledger, Result
from .server import Outcome

FILES, THUMBNAILS = "files", "thumbnails"
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".avif", ".bmp"}
VIDEOS = {".mp4", ".webm", ".mov", ".m4v"}
SIDE = 384  # pixels: smaller pictures are their own thumbnails
PAGE = 5000  # rows on one page of the gallery
LARGEST = 2**63
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would run


def write_whole(path: Path, write: Callable[[IO[bytes]], Any], sync: bool = False) -> int:
    """Write a file under another name, then give it its own; returns its size. Raises DiskFull."""
    part = path.with_name(f".{threading.get_ident()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as opened:
            write(opened)
            opened.flush()
            if sync:
                os.fsync(opened.fileno())
            size = opened.tell()
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        if is_full(error):
            raise DiskFull from None
        raise
    return size


def tidy(folder: Path) -> None:
    """Halves of files that a killed run left, go. Nobody else writes here: the ledger is locked."""
    for place in (folder, folder / FILES, folder / THUMBNAILS):
        for part in place.glob(".*.part"):
            part.unlink(missing_ok=True)


def save(folder: Path, key: str, outcome: Outcome, earlier: Iterable[str]) -> tuple[tuple[str, int], ...]:
    """A job's files under its key; returns names and sizes. What it left `earlier`, under other names, goes."""
    names = []
    for number, (name, data) in enumerate(outcome.files, 1):
        ending = Path(name).suffix.lower()
        ending = ending if re.fullmatch(r"\.[a-z0-9]{1,8}", ending) else ".bin"
        file = f"{FILES}/{key}{ending}" if number == 1 else f"{FILES}/{key}__{number}{ending}"
        names.append((file, write_whole(folder / file, lambda opened, data=data: opened.write(data), sync=True)))
        _thumbnail(folder, file, data)
    for name in set(earlier) - {name for name, _ in names}:
        (folder / name).unlink(missing_ok=True)
        thumbnail_of(folder, name).unlink(missing_ok=True)
    return tuple(names)


def thumbnail_of(folder: Path, name: str) -> Path:
    return folder / THUMBNAILS / f"{Path(name).name}.webp"


def _thumbnail(folder: Path, name: str, data: bytes) -> None:
    """A small picture of a large one, where Pillow is there, as in every ComfyUI's Python."""
    target = thumbnail_of(folder, name)
    target.unlink(missing_ok=True)
    if Path(name).suffix not in PICTURES:
        return
    try:
        from PIL import Image

        picture = Image.open(BytesIO(data))
        if max(picture.size) <= SIDE or getattr(picture, "is_animated", False):
            return
        picture.thumbnail((SIDE, SIDE))
        small = BytesIO()
        picture.convert("RGBA" if picture.has_transparency_data else "RGB").save(small, "WEBP", quality=80)
    except (ImportError, OSError, ValueError, AttributeError):  # the gallery shows the picture itself
        return
    write_whole(target, lambda opened: opened.write(small.getvalue()))


# results.parquet


def write_table(folder: Path, ledger: Ledger) -> str:
    """One row a job, with its inputs; returns the file's name."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return _write_csv(folder, ledger)
    columns = _columns(ledger.results())
    kinds = {"int": pyarrow.int64(), "float": pyarrow.float64(), "bool": pyarrow.bool_(), "str": pyarrow.string()}
    schema = pyarrow.schema(
        [
            ("key", pyarrow.string()),
            ("state", pyarrow.string()),
            ("files", pyarrow.list_(pyarrow.string())),
            ("seconds", pyarrow.float64()),
            ("worker", pyarrow.string()),
            ("tries", pyarrow.int64()),
            ("nodes", pyarrow.int64()),
            ("reused", pyarrow.int64()),
            ("error", pyarrow.string()),
            *((f"input.{name}", kinds[kind]) for name, kind in columns.items()),
        ]
    )

    def write(opened: IO[bytes]) -> None:
        with parquet.ParquetWriter(opened, schema) as writer:
            for batch in _batches((_entry(result, columns) for result in ledger.results()), 1000):
                writer.write_table(pyarrow.Table.from_pylist(batch, schema))

    write_whole(folder / "results.parquet", write)
    (folder / "results.csv").unlink(missing_ok=True)
    return "results.parquet"


def _write_csv(folder: Path, ledger: Ledger) -> str:
    columns = _columns(ledger.results())

    def write(opened: IO[bytes]) -> None:
        import io

        text = io.TextIOWrapper(opened, encoding="utf-8-sig", newline="")
        writer = csv.writer(text)
        for number, result in enumerate(ledger.results()):
            entry = _entry(result, columns)
            if not number:
                writer.writerow(map(_harmless, entry))
            writer.writerow([_harmless(" ".join(each) if isinstance(each, list) else each) for each in entry.values()])
        text.flush()
        text.detach()

    write_whole(folder / "results.csv", write)
    return "results.csv"


def _harmless(value: Any) -> Any:
    """A text that a spreadsheet shows and does not run."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def _columns(results: Iterable[Result]) -> dict[str, str]:
    """The table's columns, and the type that holds all that is in each."""
    found: dict[str, set[str]] = {}
    for result in results:
        for name, value in result.row.items():
            kinds = found.setdefault(name, set())
            if value is not None:
                too_large = type(value) is int and not -LARGEST <= value < LARGEST
                kinds.add("str" if too_large else type(value).__name__)
    return {
        name: next(iter(kinds)) if len(kinds) == 1 else "float" if kinds == {"int", "float"} else "str"
        for name, kinds in found.items()
    }


def _entry(result: Result, columns: dict[str, str]) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "key": result.key,
        "state": result.state,
        "files": [name for name, _ in result.files],
        "seconds": result.seconds,
        "worker": result.worker,
        "tries": result.tries,
        "nodes": result.nodes,
        "reused": result.reused,
        "error": result.error,
    }
    for name, kind in columns.items():
        value = result.row.get(name)
        entry[f"input.{name}"] = value if value is None or kind != "str" else str(value)
    return entry


def _batches(entries: Iterable[Any], size: int) -> Iterator[list]:
    batch = []
    for entry in entries:
        batch.append(entry)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


# index.html


def write_gallery(folder: Path, ledger: Ledger, title: str, rows: int) -> None:
    """Pages that need no server and no network: all that they show lies beside them."""
    head, _, tail = Path(__file__).with_name("gallery.html").read_text(encoding="utf-8").partition("{{data}}")
    pages = [_page_name(number) for number in range(max(1, -(-rows // PAGE)))]
    for page, batch in zip(pages, _batches(ledger.results(), PAGE), strict=False):
        data = json.dumps([_card(folder, result) for result in batch], ensure_ascii=False)
        top = head.replace("{{pages}}", _links(pages, page)).replace("{{title}}", html.escape(title))
        data = data.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")  # nothing in it is markup
        write_whole(folder / page, lambda opened, text=top + data + tail: opened.write(text.encode()))
    for old in folder.glob("index-*.html"):
        if old.name not in pages:
            old.unlink()


def _page_name(number: int) -> str:
    return f"index-{number + 1}.html" if number else "index.html"


def _links(pages: list[str], here: str) -> str:
    if len(pages) == 1:
        return ""
    links = [f"<b>{n}</b>" if page == here else f'<a href="{page}">{n}</a>' for n, page in enumerate(pages, 1)]
    return f"<nav>{' '.join(links)}</nav>"


def _card(folder: Path, result: Result) -> dict:
    files = []
    for name, _ in result.files:
        kind = "picture" if Path(name).suffix in PICTURES else "video" if Path(name).suffix in VIDEOS else "file"
        small = thumbnail_of(folder, name)
        files.append([name, kind, f"{THUMBNAILS}/{small.name}" if small.exists() else name])
    seconds = None if result.seconds is None else round(result.seconds, 1)
    shown = {"seconds": seconds, "tries": result.tries if result.tries > 1 else None}
    return {
        "key": result.key,
        "state": result.state,
        "files": files,
        "row": result.row,
        "error": result.error,
        "run": shown,
    }
