"""Jobs to workers until none is left: a lost job is tried again elsewhere, a job's own error is recorded.

Two jobs are on their way to a worker at any time, so that ComfyUI never waits for the next one. Of a lost worker, only
the job that was being run counts it as a try.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

from .errors import DiskFull, JobFailed, OutOfMemory, WorkerLost
from .ledger import Ledger, Result
from .line import Line
from .plan import Job
from .server import Outcome
from .workers import Worker

LANES = 2
STARTS = 3  # times that a worker may fail before it has done a job


class AllLost(Exception):
    """No worker is left. The text says how the last one ended."""


class Dispatch:
    """`make`: a job from its position in the table. `save`: its files into the results folder, in a thread."""

    def __init__(
        self,
        ledger: Ledger,
        line: Line,
        workers: Sequence[Worker],
        make: Callable[[int], Job],
        save: Callable[[str, Outcome, list[str]], tuple],
        *,
        tries: int,
        say: Callable[[str], None],
        ended: Callable[[Result], None],
        begun: dict[str, asyncio.Task] | None = None,
        pause: float = 1.0,
    ):
        self.ledger, self.line, self.workers, self.make, self.save = ledger, line, workers, make, save
        self.tries, self.say, self.ended = tries, say, ended
        self.begun = begun or {}  # workers that are starting already
        self.pause = pause  # seconds before a lost worker starts again, more each time
        self.live: set[str] = {worker.name for worker in workers}
        self._tried: Counter[int] = Counter()
        self._lost_by: dict[int, set[str]] = defaultdict(set)
        self._progress: Counter[str] = Counter()  # jobs that each worker has done since its start
        self._keeping: set[asyncio.Task] = set()
        self._running = 0
        self._changed = asyncio.Event()
        self._last_words = ""

    async def run(self) -> None:
        """Raises DiskFull or AllLost."""
        tasks = {asyncio.create_task(self._serve(worker)) for worker in self.workers}
        try:
            rest = tasks
            while rest and (
                len(self.line) or self._running
            ):  # a worker that is still starting must not hold up the end
                ended, rest = await asyncio.wait(rest, timeout=0.1, return_when=asyncio.FIRST_EXCEPTION)
                for task in ended:
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.gather(*self._keeping, return_exceptions=True)
        if len(self.line):
            raise AllLost(self._last_words)

    async def _serve(self, worker: Worker) -> None:
        """A worker's life: from start to loss, and again."""
        failures = 0
        while len(self.line) or self._running:
            try:
                await (self.begun.pop(worker.name, None) or worker.start())
                lanes = [asyncio.create_task(self._lane(worker)) for _ in range(LANES)]
                try:
                    await asyncio.gather(*lanes)
                    return
                finally:
                    for lane in lanes:
                        lane.cancel()
                    await asyncio.gather(*lanes, return_exceptions=True)
            except WorkerLost as error:
                failures = 1 if self._progress.pop(worker.name, 0) else failures + 1
                self._last_words = f"{worker.name}: {error}"
                with contextlib.suppress(Exception):
                    await worker.stop()
                if failures >= STARTS:
                    self.live.discard(worker.name)
                    self.line.leave(worker.name)
                    self._changed.set()
                    self.say(f"{worker.name} is given up after {failures} losses in a row: {error}")
                    return
                self.say(f"{worker.name} is lost and starts again: {error}")
                await asyncio.sleep(self.pause * failures)

    async def _lane(self, worker: Worker) -> None:
        while (position := await self._take(worker)) is not None:
            try:
                await self._do(worker, position)
            finally:
                self._running -= 1
                self._changed.set()

    async def _take(self, worker: Worker) -> int | None:
        """The next job. While others have some that may come back, wait for them."""
        while True:
            position = self.line.take(worker.name, self.live)
            if position is not None:
                self._running += 1
                return position
            if not self._running and not len(self.line):
                return None
            self._changed.clear()
            await self._changed.wait()

    async def _do(self, worker: Worker, position: int) -> None:
        job = self.make(position)
        tries = self._tried[position] + 1
        try:
            outcome = await worker.run(job)
        except JobFailed as error:
            self._record(
                position, job, Result(job.key, {}, "failed", worker=worker.name, tries=tries, error=str(error))
            )
        except OutOfMemory as error:
            self._try_again(position, job, worker, error)
        except WorkerLost as error:
            if error.started:
                self._try_again(position, job, worker, error)
            else:
                self.line.give_back(position, self._lost_by[position])
            raise
        except (asyncio.CancelledError, DiskFull):
            self.line.give_back(position, self._lost_by[position])
            raise
        else:
            keeping = asyncio.create_task(self._keep(worker, position, job, tries, outcome))
            self._keeping.add(keeping)
            keeping.add_done_callback(self._keeping.discard)
            await asyncio.shield(keeping)

    async def _keep(self, worker: Worker, position: int, job: Job, tries: int, outcome: Outcome) -> None:
        """What has been computed is kept, also when all else is being stopped: `run` waits for it."""
        files = await asyncio.to_thread(self.save, job.key, outcome, self.ledger.files_of(job.key))
        self._progress[worker.name] += 1
        self._record(
            position,
            job,
            Result(
                job.key, {}, "done", files, round(outcome.seconds, 3), worker.name, tries, outcome.nodes, outcome.reused
            ),
        )

    def _try_again(self, position: int, job: Job, worker: Worker, error: WorkerLost) -> None:
        self._tried[position] += 1
        self._lost_by[position].add(worker.name)
        tries = self._tried[position]
        if tries < self.tries:
            self.line.give_back(position, self._lost_by[position])
            self._changed.set()
            return
        times = "once" if tries == 1 else f"{tries} times"
        sentence = f"tried {times}; at last {error.args[0].splitlines()[0]}"
        self._record(position, job, Result(job.key, {}, "failed", worker=worker.name, tries=tries, error=sentence))

    def _record(self, position: int, job: Job, result: Result) -> None:
        self.ledger.write(position, result)
        self._tried.pop(position, None)
        self._lost_by.pop(position, None)
        self.ended(result)
