"""What is done stays done; what has changed, failed or vanished is done again; nothing is counted twice."""

import pytest

from dit_toolkit.headless import results
from dit_toolkit.headless.bindings import File
from dit_toolkit.headless.errors import DiskFull, Refused
from dit_toolkit.headless.ledger import Ledger, Result
from dit_toolkit.headless.plan import Planned
from dit_toolkit.headless.server import Outcome


def rows(*keys, digest="d"):
    return [
        Planned(f"row {n}", key, f"{digest}{key}", {"seed": n}, [n, File("/a.png", "a.png")])
        for n, key in enumerate(keys)
    ]


def finish(ledger, position, key, state="done", data=b"picture"):
    files = (
        results.save(ledger.folder, key, Outcome((("x.png", data),), 1.0, 3, 1), ledger.files_of(key))
        if state == "done"
        else ()
    )
    ledger.write(position, Result(key, {}, state, files, 1.0, "w", 1, 3, 1, None if state == "done" else "why"))


@pytest.fixture
def ledger(tmp_path):
    made = Ledger(tmp_path)
    yield made
    made.close()


def reopened(ledger, planned):
    ledger.close()
    again = Ledger(ledger.folder)
    again.fill(planned)
    return again


def test_a_second_start_goes_on_where_the_first_ended(ledger):
    ledger.fill(rows("a", "b", "c"))
    finish(ledger, 0, "a")
    finish(ledger, 1, "b", "failed")
    ledger = reopened(ledger, rows("a", "b", "c"))
    assert list(ledger.open_positions()) == [1, 2]
    assert ledger.counts() == {"done": 1, "failed": 1, "open": 1}
    assert ledger.planned(2) == ("c", [2, File("/a.png", "a.png")])
    assert list(ledger.open_positions(again=True)) == [0, 1, 2]


def test_a_changed_row_and_a_lost_file_are_done_again(ledger):
    ledger.fill(rows("a", "b"))
    finish(ledger, 0, "a")
    finish(ledger, 1, "b")
    changed = [rows("a", "b", digest="other")[0], rows("a", "b")[1]]
    ledger = reopened(ledger, changed)
    assert list(ledger.open_positions()) == [0]
    (ledger.folder / "files" / "b.png").write_bytes(b"half")
    assert list(ledger.open_positions()) == [0, 1]


def test_a_row_that_moves_keeps_its_result(ledger):
    ledger.fill(rows("a", "b"))
    finish(ledger, 0, "a")
    ledger = reopened(ledger, rows("new", "b", "a"))
    assert list(ledger.open_positions()) == [0, 1]
    assert [(each.key, each.state) for each in ledger.results()] == [("new", "open"), ("b", "open"), ("a", "done")]
    ledger = reopened(ledger, rows("new"))
    assert ledger.gone() == 1


def test_two_rows_may_not_have_one_key(ledger):
    with pytest.raises(Refused, match="row 1: the key 'É' is that of row 0 too"):
        ledger.fill(rows("e\u0301", "É"))
    assert ledger.fill(rows("a")) == 1


def test_two_runs_do_not_share_a_folder(ledger):
    with pytest.raises(Refused, match="Another run"):
        Ledger(ledger.folder)


def test_a_file_that_is_no_ledger_is_left_alone(tmp_path):
    (tmp_path / ".jobs.sqlite").write_text("something else entirely, not a database at all")
    with pytest.raises(Refused, match="cannot hold results"):
        Ledger(tmp_path)


def test_a_full_disk_is_told_from_other_errors(ledger):
    ledger.fill(rows("a"))
    ledger._data.execute("pragma max_page_count = 1")  # sqlite's own way of being full
    with pytest.raises(DiskFull):
        ledger.write(0, Result("a", {}, "failed", error="x" * 100_000))


def test_a_million_rows_are_planned(tmp_path):
    """A tenth of them in the time of a test; memory stays that of the rows' positions, for they are on disk."""
    ledger = Ledger(tmp_path)
    assert ledger.fill(Planned("", f"{n:06d}", "d", {"n": n}, [n]) for n in range(20_000)) == 20_000
    assert len(ledger.open_positions()) == 20_000
    ledger.close()
