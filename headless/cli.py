"""The command: `python custom_nodes/dit-toolkit/headless run WORKFLOW --table jobs.csv ...`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import signal
import sys
import tempfile
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import results, tables, workflow
from .bindings import File
from .dispatch import AllLost, Dispatch
from .errors import DiskFull, Refused, WorkerLost
from .graph import Graph
from .ledger import Ledger, Result
from .line import Line
from .plan import Plan, Planned, in_order
from .progress import Progress, span
from .workers import PLACES, Comfy, LocalWorker, ServerWorker, Worker, devices

SHOWN = 3  # jobs of a dry run
FAILURES = 5  # that are named at the end
STOPPED = 130  # exit code after Ctrl-C
EXAMPLE = """
example, in the folder of ComfyUI:
  python custom_nodes/dit-toolkit/headless run "custom_nodes/dit-toolkit/workflows/CPU 01 canny edges to picture.json"
      --table custom_nodes/dit-toolkit/headless/example/jobs.csv --files custom_nodes/dit-toolkit/web/examples
      --workers 2 --set "#6.text={prompt}" --set "KSampler.seed={seed}" --set "Apply EasyControl.image={outline}"

exit codes: 0 all jobs are done, 1 some failed, or nothing could run, 130 stopped by Ctrl-C
"""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="headless", description="One workflow over a table of jobs.")
    run = made.add_subparsers(dest="command", required=True).add_parser(
        "run", help="run a workflow over a table", epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = run.add_argument
    add("workflow", type=Path, help="a file that ComfyUI's page saved, in API format or not, or a PNG with one in it")
    add("--table", type=Path, required=True, help="CSV, JSON Lines or Parquet: a file, or a folder of them")
    add(
        "--set",
        action="append",
        default=[],
        metavar='"NODE.INPUT={COLUMN}"',
        dest="settings",
        help="what each row puts into an input; NODE is a title, or # and a number",
    )
    add("--key", help="the column that names jobs and their files (default: key, id, or the row's number)")
    add("--files", type=Path, help="the folder below which the table's pictures lie (default: the table's own)")
    add("--out", type=Path, help="the folder of the results (default: named after the table)")
    add("--dry-run", action="store_true", help=f"check everything, print the first {SHOWN} jobs, run nothing")
    add("--again", action="store_true", help="do all jobs again, those that are done too")
    where = run.add_argument_group("workers")
    where.add_argument("--workers", type=positive, help="how many (default: one for each device)")
    where.add_argument(
        "--server", action="append", default=[], metavar="URL", help="a ComfyUI that runs already; several may be given"
    )
    where.add_argument(
        "--ray", metavar="ADDRESS", help="on a Ray cluster: its address, auto for this machine's, local for a new one"
    )
    where.add_argument(
        "--comfyui", metavar="FOLDER", help="ComfyUI's folder (default: COMFYUI_PATH, or where this pack lies)"
    )
    where.add_argument("--python", help="the Python that runs ComfyUI (default: COMFYUI_PYTHON, or this one)")
    where.add_argument("--threads", type=positive, help="processor threads of each worker (default: torch's choice)")
    where.add_argument(
        "--tries", type=positive, default=3, help="how often a job is begun whose worker is lost (default: 3)"
    )
    where.add_argument(
        "--patience",
        type=seconds,
        default=600.0,
        help="seconds without a sign of life until a worker counts as hanging (default: 600)",
    )
    add("arguments", nargs="*", metavar="-- COMFYUI ARGUMENTS", help="arguments for ComfyUI, after --")
    return made


def positive(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"'{text}' is no number from 1 on")
    return int(text)


def seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < 1e7:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of seconds")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    own = list(sys.argv[1:] if arguments is None else arguments)
    split = own.index("--") if "--" in own else len(own)
    options = parser().parse_args(own[:split])
    options.arguments = tuple(own[split + 1 :])
    try:
        return asyncio.run(Command(options).run())
    except Refused as refused:
        print(refused, file=sys.stderr)
        return 1
    except DiskFull as full:
        print(f"{str(full).capitalize() or 'A disk'} is full: no ComfyUI can start.", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("Stopped.", file=sys.stderr)
        return STOPPED


class Command:
    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.out: Path = options.out or Path(f"{options.table.stem}_results")
        self.ray: Any = None
        self.stopped = False

    async def run(self) -> int:
        options = self.options
        flow = workflow.read(options.workflow)
        tables.files_of(options.table)
        workers = self._workers()
        self._listen()  # only now: Ray has ways of its own with signals
        begun: dict[str, asyncio.Task] = {}
        try:
            first = workers[:1] if options.dry_run else workers
            begun = {worker.name: asyncio.create_task(worker.start()) for worker in first}
            known = await self._known(workers, begun)
            prompt = workflow.converted(flow, known)
            plan = Plan(
                prompt,
                known,
                options.settings,
                options.table,
                name=flow.name,
                key=options.key,
                files=options.files,
                above=workflow.highest_id(flow.graph),
            )
            graph = Graph.of(flow, plan)
            if options.dry_run:
                return await asyncio.to_thread(self._dry_run, plan)
            return await self._through(plan, graph, workers, begun)
        finally:
            for task in begun.values():
                task.cancel()
            await asyncio.gather(*begun.values(), return_exceptions=True)
            await asyncio.gather(*(worker.stop() for worker in workers), return_exceptions=True)
            if self.ray is not None:
                self.ray.shutdown()

    def _listen(self) -> None:
        """Ctrl-C, and what a system sends before it shuts down, end the run in order."""
        task = asyncio.current_task()

        def stop() -> None:
            self.stopped = True
            if task is not None:
                task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(NotImplementedError):  # Windows: KeyboardInterrupt does it
                asyncio.get_running_loop().add_signal_handler(number, stop)

    def _workers(self) -> list[Worker]:
        options = self.options
        if options.server and options.ray:
            raise Refused("--server and --ray exclude each other.")
        if options.server:
            if options.arguments or options.workers:
                raise Refused("Servers that run already take no --workers and no arguments.")
            return [ServerWorker(url, options.patience) for url in dict.fromkeys(options.server)]
        if options.ray:
            from . import on_ray

            self.ray, made = on_ray.workers(
                options.ray,
                options.workers,
                options.comfyui,
                options.python,
                options.arguments,
                options.patience,
                options.threads,
            )
            return list(made)
        comfy = Comfy.found(options.comfyui, options.python, options.arguments, options.patience)
        found = [] if PLACES & {each.partition("=")[0] for each in options.arguments} else devices()
        number = options.workers or len(found) or 1
        return [
            LocalWorker(f"worker-{each + 1}", comfy, found[each % len(found)] if found else None, options.threads)
            for each in range(number)
        ]

    async def _known(self, workers: Sequence[Worker], begun: dict[str, asyncio.Task]) -> dict:
        """The node list of the first worker that answers. Each is started twice, if need be."""
        last: dict[str, str] = {}
        for worker in (*workers, *workers):
            if worker.name in last or worker.name not in begun:
                begun[worker.name] = asyncio.create_task(worker.start())
            try:
                await asyncio.shield(begun[worker.name])
                return await worker.known()
            except WorkerLost as error:
                last[worker.name] = f"\n{worker.name}: {error}"
        raise Refused(f"No worker could be started.{''.join(last.values())}")

    def _dry_run(self, plan: Plan) -> int:
        for planned in itertools.islice(plan.rows(), SHOWN):
            print(f"job {planned.key}")
            for binding, value in zip(plan.bindings, planned.values, strict=True):
                print(f"  {binding.label} = {self._shown(value)}")
        with tempfile.TemporaryDirectory() as folder, contextlib.closing(Ledger(Path(folder))) as ledger:
            number = ledger.fill(plan.rows())
        print(f"{number} jobs, all in order. Nothing was run.")
        return 0

    @staticmethod
    def _shown(value: Any) -> str:
        if isinstance(value, File):
            return f"file {value.path}"
        return "as in the workflow" if value is None else json.dumps(value, ensure_ascii=False)

    async def _through(
        self, plan: Plan, graph: Graph, workers: Sequence[Worker], begun: dict[str, asyncio.Task]
    ) -> int:
        try:
            ledger = Ledger(self.out)
        except DiskFull:
            raise Refused(f"The disk that holds {self.out} is full. Nothing was run.") from None
        try:
            results.tidy(self.out)
            marks: list[array] = [array("q") for _ in plan.ranked()]
            rows = await asyncio.to_thread(ledger.fill, self._until_stopped(plan.marked(marks)))
            todo = ledger.open_positions(self.options.again)
            progress = Progress(len(todo), rows - len(todo))
            columns = [array("q", (column[position] for position in todo)) for column in marks]
            order = in_order(columns, len(todo))
            self._announce(plan, graph, progress, ledger.gone(), columns, order)
            line = Line(array("L", (todo[at] for at in order)), len(workers))
            return await self._work(plan, graph, ledger, line, workers, begun, progress)
        except DiskFull:
            raise Refused(f"The disk that holds {self.out} is full. Nothing was run.") from None
        finally:
            ledger.close()

    def _until_stopped(self, rows: Iterable[Planned]) -> Iterator[Planned]:
        """There may be a million, and Ctrl-C is to work meanwhile."""
        for row in rows:
            if self.stopped:
                raise Refused("Stopped. Nothing was run.")
            yield row

    def _announce(
        self, plan: Plan, graph: Graph, progress: Progress, gone: int, columns: Sequence[array], order: Sequence[int]
    ) -> None:
        rows = progress.rest + progress.before
        progress.say(f"{rows} jobs, {progress.before} of them done before." if progress.before else f"{rows} jobs.")
        if gone:
            progress.say(f"{gone} earlier results are of rows that the table no longer has. Their files stay.")
        if graph.why_not:
            progress.say(f"The pictures will carry their prompt, not the page's graph: {graph.why_not}")
        if len(order) > 1:
            whole = (len(plan.prompt) + len(plan.loaders)) * len(order)
            ours, own = plan.runs(columns, order), plan.runs(columns, range(len(order)))
            compared = "as in the table's own order" if own == ours else f"{own:,} in the table's own order"
            progress.say(
                f"ComfyUI keeps what a job shares with the last: {ours:,} of {whole:,} node runs are left, {compared}."
            )

    async def _work(
        self,
        plan: Plan,
        graph: Graph,
        ledger: Ledger,
        line: Line,
        workers: Sequence[Worker],
        begun: dict[str, asyncio.Task],
        progress: Progress,
    ) -> int:
        """Run what is left; say how it went."""
        tally = Tally()

        def ended(result: Result) -> None:
            tally.add(result)
            progress.end(result.state == "failed")

        def make(position: int):
            key, values = ledger.planned(position)
            return graph.job(position, key, values)

        start, sentence, code = time.monotonic(), "", 0
        try:
            if len(line):
                await Dispatch(
                    ledger,
                    line,
                    workers,
                    make,
                    lambda *job: results.save(self.out, *job),
                    tries=self.options.tries,
                    say=progress.say,
                    ended=ended,
                    begun=begun,
                ).run()
        except DiskFull as full:
            disk = str(full).capitalize() or f"The disk that holds {self.out}"
            sentence, code = (
                f"{disk} is full. All workers were stopped, what is done is kept: make "
                "room and give the same command again.",
                1,
            )
        except OSError as error:
            sentence, code = f"The results cannot be written: {error}. Nothing that is done is lost.", 1
        except AllLost as lost:
            sentence, code = f"No worker is left. {lost}", 1
        except (asyncio.CancelledError, KeyboardInterrupt):
            sentence, code = "Stopped. The same command goes on from here.", STOPPED
        progress.close()
        spent = time.monotonic() - start
        counts, rows, listed = ledger.counts(), progress.rest + progress.before, "the results"
        try:
            listed = results.write_table(self.out, ledger)
            results.write_gallery(self.out, ledger, plan.title, rows)
            shown = f"Results: {self.out / 'index.html'} and {listed}."
        except DiskFull:
            sentence = sentence or f"The disk that holds {self.out} is full: the pictures are there, their list is not."
            shown, code = "", code or 1
        if sentence:
            print(sentence, file=sys.stderr)
        print(
            f"{counts['done']} of {rows} jobs are done"
            + (f", {counts['failed']} failed" if counts["failed"] else "")
            + (f". {tally.ended} in {span(spent)}" if tally.ended else "")
            + f". {shown}",
            file=sys.stderr,
        )
        if tally.nodes:
            print(f"Of {tally.nodes:,} node runs ComfyUI spared {tally.reused:,}.", file=sys.stderr)
        for key, error in tally.failures[:FAILURES]:
            print(f"  {key}: {error}", file=sys.stderr)
        if len(tally.failures) > FAILURES:
            print(f"  and {len(tally.failures) - FAILURES} more, in {listed}.", file=sys.stderr)
        return code or (1 if counts["failed"] or counts["open"] else 0)


class Tally:
    """What this run has done."""

    def __init__(self) -> None:
        self.ended = self.nodes = self.reused = 0
        self.failures: list[tuple[str, str]] = []

    def add(self, result: Result) -> None:
        self.ended += 1
        self.nodes += result.nodes or 0
        self.reused += result.reused or 0
        if result.error and len(self.failures) < 1000:
            self.failures.append((result.key, result.error))
