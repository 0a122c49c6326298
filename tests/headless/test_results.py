"""What a run leaves behind: whole files, a table, a gallery that shows hostile words as words."""

import errno
import io
import json
import os
import re

import pytest
from PIL import Image

from dit_toolkit.headless import results
from dit_toolkit.headless.errors import DiskFull
from dit_toolkit.headless.ledger import Ledger, Result
from dit_toolkit.headless.plan import Planned
from dit_toolkit.headless.server import Outcome


def outcome(*files):
    return Outcome(tuple(files), 1.0, 3, 1)


def picture(side):
    opened = io.BytesIO()
    Image.new("RGB", (side, side // 2)).save(opened, "PNG")
    return opened.getvalue()


def names(folder):
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and "jobs" not in path.name
    )


def test_files_are_named_by_the_key(tmp_path):
    made = results.save(
        tmp_path, "doll", outcome(("x_00001_.png", b"12"), ("../../y.webm", b"345"), ("z.p/hp", b"6")), []
    )
    assert made == (("files/doll.png", 2), ("files/doll__2.webm", 3), ("files/doll__3.bin", 1))
    assert names(tmp_path) == [name for name, _ in made]


def test_what_an_earlier_run_left_goes(tmp_path):
    before = results.save(tmp_path, "doll", outcome(("x.png", picture(800)), ("y.png", picture(800))), [])
    assert len(names(tmp_path)) == 4
    results.save(tmp_path, "doll", outcome(("x.png", b"new")), [name for name, _ in before])
    assert names(tmp_path) == ["files/doll.png"]


def test_a_large_picture_gets_a_thumbnail_and_a_small_one_is_its_own(tmp_path):
    results.save(tmp_path, "large", outcome(("x.png", picture(1000))), [])
    results.save(tmp_path, "small", outcome(("x.png", picture(96))), [])
    assert names(tmp_path) == ["files/large.png", "files/small.png", "thumbnails/large.png.webp"]
    assert Image.open(tmp_path / "thumbnails" / "large.png.webp").size == (results.SIDE, results.SIDE // 2)


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_a_disk_that_fills_leaves_no_half_of_a_file(tmp_path, monkeypatch, where):
    results.save(tmp_path, "doll", outcome(("x.png", b"before")), [])

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where != "write":
        monkeypatch.setattr(os, where, full)
    write = full if where == "write" else lambda opened: opened.write(b"after")
    with pytest.raises(DiskFull):
        results.write_whole(tmp_path / "files" / "doll.png", write, sync=True)
    monkeypatch.undo()
    assert names(tmp_path) == ["files/doll.png"]
    assert (tmp_path / "files" / "doll.png").read_bytes() == b"before"


def test_halves_of_files_that_a_killed_run_left_go(tmp_path):
    results.save(tmp_path, "doll", outcome(("x.png", picture(800))), [])
    before = names(tmp_path)
    for place in (tmp_path, tmp_path / "files", tmp_path / "thumbnails"):
        (place / ".123.part").write_bytes(b"half")
    results.tidy(tmp_path)
    assert names(tmp_path) == before


HOSTILE = {"prompt": "</script><img src=x onerror=alert(1)>&amp;", "sum": "=1+1", "{{data}}": "{{title}}"}


@pytest.fixture
def ledger(tmp_path):
    made = Ledger(tmp_path)
    made.fill([Planned("", "a", "1", HOSTILE, []), Planned("", "b", "2", {**HOSTILE, "sum": 2}, [])])
    made.write(0, Result("a", {}, "done", results.save(tmp_path, "a", outcome(("x.png", b"1")), []), 1.5, "w", 1, 3, 1))
    yield made
    made.close()


def test_the_table_has_a_row_a_job(tmp_path, ledger):
    from pyarrow import parquet

    assert results.write_table(tmp_path, ledger) == "results.parquet"
    first, second = parquet.read_table(tmp_path / "results.parquet").to_pylist()
    assert (first["key"], first["state"], first["files"], first["seconds"], first["input.sum"]) == (
        "a",
        "done",
        ["files/a.png"],
        1.5,
        "=1+1",
    )
    assert (second["key"], second["state"], second["files"], second["seconds"], second["input.sum"]) == (
        "b",
        "open",
        [],
        None,
        "2",
    )


def test_a_spreadsheet_runs_nothing_of_the_table(tmp_path, ledger):
    assert results._write_csv(tmp_path, ledger) == "results.csv"
    text = (tmp_path / "results.csv").read_text(encoding="utf-8-sig")
    assert "'=1+1" in text
    assert not re.search(r"(^|,)[=+@-]", text, re.MULTILINE)


def test_the_gallery_shows_words_as_words(tmp_path, ledger):
    results.write_gallery(tmp_path, ledger, "<b>title</b>{{data}}", 2)
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    data = text.partition('id="data">')[2].partition("</script>")[0]
    assert [card["row"]["prompt"] for card in json.loads(data)] == [HOSTILE["prompt"]] * 2
    assert "<img src=x" not in text
    assert "<b>title" not in text
    assert not re.findall(r"https?://", text)
    assert len(re.findall("<script", text)) == 2


def test_many_rows_make_several_pages(tmp_path, ledger, monkeypatch):
    monkeypatch.setattr(results, "PAGE", 1)
    results.write_gallery(tmp_path, ledger, "title", 2)
    assert '<b>1</b> <a href="index-2.html">2</a>' in (tmp_path / "index.html").read_text()
    monkeypatch.setattr(results, "PAGE", 5)
    results.write_gallery(tmp_path, ledger, "title", 2)
    assert not (tmp_path / "index-2.html").exists()
