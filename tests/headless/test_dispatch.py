"""What becomes of jobs whose worker is lost, hangs, runs out of memory, or that fail by themselves.

The workers are stubs that do as a list says. `test_run.py` has the same with real ComfyUIs.
"""

import asyncio
from collections import Counter

import pytest

from dit_toolkit.headless import results
from dit_toolkit.headless.dispatch import AllLost, Dispatch
from dit_toolkit.headless.errors import DiskFull, JobFailed, OutOfMemory, WorkerLost
from dit_toolkit.headless.ledger import Ledger
from dit_toolkit.headless.line import Line
from dit_toolkit.headless.plan import Job, Planned
from dit_toolkit.headless.server import Outcome


class Stub:
    """`plays`: for a key, what its tries end in, one after the other; then it succeeds."""

    again = True

    def __init__(self, name, plays, starts=()):
        self.name, self.plays, self.starts = name, plays, list(starts)
        self.ran, self.started, self.stopped = [], 0, 0
        self._one = asyncio.Lock()

    async def start(self):
        self.started += 1
        if self.starts and (error := self.starts.pop(0)):
            raise error

    async def run(self, job):
        async with self._one:  # as ComfyUI, one at a time
            self.ran.append(job.key)
            await asyncio.sleep(0)
            ends = self.plays.get(job.key)
            if ends and (end := ends.pop(0)):
                raise end
        return Outcome((("x.png", job.key.encode()),), 1.0, 5, 2)

    async def stop(self):
        self.stopped += 1


@pytest.fixture
def ledger(tmp_path):
    made = Ledger(tmp_path)
    yield made
    made.close()


def go(ledger, plays, *, jobs=6, workers=2, tries=3, starts=(), save=None):
    """Run the jobs; returns the stubs, the lines said, and the error that ended it."""
    keys = [f"k{number}" for number in range(jobs)]
    ledger.fill(Planned("", key, key, {}, []) for key in keys)
    said, ended = [], []

    async def run():
        stubs = [Stub(f"w{n}", plays, starts[n] if n < len(starts) else ()) for n in range(workers)]
        line = Line(ledger.open_positions(), workers)
        dispatch = Dispatch(
            ledger,
            line,
            stubs,
            lambda at: Job(at, keys[at], {}, ()),
            save or (lambda *job: results.save(ledger.folder, *job)),
            tries=tries,
            say=said.append,
            ended=ended.append,
            pause=0,
        )
        try:
            await asyncio.wait_for(dispatch.run(), 30)
        except (AllLost, DiskFull) as error:
            return stubs, error
        return stubs, None

    stubs, error = asyncio.run(run())
    assert max(Counter(result.key for result in ended).values(), default=0) <= 1, "a job ended twice"
    return stubs, said, error


def states(ledger):
    return {result.key: (result.state, result.tries) for result in ledger.results()}


def test_all_jobs_are_done_once(ledger):
    stubs, said, error = go(ledger, {})
    assert set(states(ledger).values()) == {("done", 1)}
    assert sorted(stubs[0].ran + stubs[1].ran) == [f"k{n}" for n in range(6)]
    assert (said, error) == ([], None)


def test_a_jobs_own_error_is_recorded_and_not_tried_again(ledger):
    go(ledger, {"k2": [JobFailed("KSampler: the size is odd")]})
    assert states(ledger).pop("k2") == ("failed", 1)
    assert Counter(state for state, _ in states(ledger).values()) == {"done": 5, "failed": 1}
    assert [result.error for result in ledger.results() if result.error] == ["KSampler: the size is odd"]


@pytest.mark.parametrize("lost", [WorkerLost("killed", True), OutOfMemory("too large", True)])
def test_a_lost_job_is_tried_again_elsewhere(ledger, lost):
    stubs, _, _ = go(ledger, {"k1": [lost]})
    assert states(ledger)["k1"] == ("done", 2)
    assert {state for state, _ in states(ledger).values()} == {"done"}
    assert all(stub.ran.count("k1") == 1 for stub in stubs)


def test_a_job_that_kills_every_worker_is_given_up(ledger):
    go(ledger, {"k0": [WorkerLost("killed\nlong log", True) for _ in range(9)]}, tries=2)
    assert states(ledger).pop("k0") == ("failed", 2)
    assert [result.error for result in ledger.results() if result.error] == ["tried 2 times; at last killed"]
    assert Counter(state for state, _ in states(ledger).values()) == {"done": 5, "failed": 1}


def test_a_job_that_waited_at_a_lost_worker_has_not_been_tried(ledger):
    stubs, _, _ = go(ledger, {"k0": [WorkerLost("gone", False), WorkerLost("gone", False)]}, workers=1, jobs=3, tries=1)
    assert set(states(ledger).values()) == {("done", 1)}
    assert stubs[0].started == 3


def test_a_worker_that_does_not_start_is_given_up_and_the_rest_goes_on(ledger):
    stubs, _, error = go(ledger, {}, starts=[[WorkerLost("no memory")] * 9])
    assert error is None
    assert stubs[0].ran == []
    assert {state for state, _ in states(ledger).values()} == {"done"}


def test_without_workers_the_run_ends_and_says_why(ledger):
    _, said, error = go(ledger, {}, workers=1, starts=[[WorkerLost("no memory")] * 9])
    assert isinstance(error, AllLost)
    assert "no memory" in str(error)
    assert "given up after 3 losses" in said[-1]
    assert {state for state, _ in states(ledger).values()} == {"open"}


def test_a_full_disk_ends_the_run_and_loses_nothing(ledger):
    saved = []

    def save(key, *rest):
        if len(saved) == 2:
            raise DiskFull
        saved.append(key)
        return results.save(ledger.folder, key, *rest)

    _, _, error = go(ledger, {}, save=save)
    assert isinstance(error, DiskFull)
    assert {key for key, (state, _) in states(ledger).items() if state == "done"} == set(saved)
    assert len(saved) == 2
