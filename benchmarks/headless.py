"""What `headless/` costs over direct queueing, what a second worker brings, where the driver becomes the limit.

    python -m benchmarks.headless               200 jobs of the embedded default, in each way: half an hour on two cores
                                                (12 steps a job, so that 1,600 of them fit into it)
    python -m benchmarks.headless --jobs 40      fewer
    python -m benchmarks.headless --only conversion  workflows of strangers, against the page's conversion
    python -m benchmarks.headless --only table   a million rows: the driver's time and memory before the first job
    python -m benchmarks.headless --only scale   the simulation: Ray's own scheduler, a stub in the place of ComfyUI

Every ComfyUI has one thread. Direct queueing and the command take turns on one server. The rate is that between the
first file and the last, so the start of workers is not in it. Where other programs use the cores, rates say little: the
processor time of the driver and of the server for the same jobs is written beside them.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import datetime
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata, resources
from pathlib import Path

import psutil

from dit_toolkit.headless import results, workflow
from dit_toolkit.headless.dispatch import Dispatch
from dit_toolkit.headless.errors import Refused
from dit_toolkit.headless.ledger import Ledger
from dit_toolkit.headless.line import Line
from dit_toolkit.headless.on_ray import connect
from dit_toolkit.headless.plan import Job, Planned
from dit_toolkit.headless.server import Outcome
from dit_toolkit.scripts import places, workflows
from dit_toolkit.scripts.browser import Browser
from dit_toolkit.scripts.server import Server

RESULTS = places.ROOT / "benchmarks" / "results"
STEM = "CPU 01 canny edges to picture"
STEPS = 12
WORKERS = (1, 10, 100, 300, 1000)
SPAN = 20.0  # seconds that a simulation is to take
ACTORS = 2  # processes that play workers: 1,000 of them do not fit on one machine
APART = 10  # workers that are played once more with a process for each, as on a cluster
MOST = 4_000  # rows of a simulation
PICTURE = 20_000  # bytes, as the embedded default's pictures are
MILLION = 1_000_000
TEMPLATES = "comfyui_workflow_templates_json"
TRIED = 60  # templates


def prompts(jobs: int) -> list[dict]:
    made = []
    for seed in range(jobs):
        prompt = workflows.read_prompt(STEM)
        sampler = next(node for node in prompt.values() if node["class_type"] == "KSampler")
        sampler["inputs"] |= {"seed": seed, "steps": STEPS}
        made.append(prompt)
    return made


def directly(server: Server, jobs: int, first: int) -> dict:
    """All prompts into the queue at once, then wait: as good as it gets on one server."""
    process = psutil.Process(server._process.pid)
    before, start = process.cpu_times(), time.monotonic()
    ids = []
    for number, prompt in enumerate(prompts(jobs)):
        next(n for n in prompt.values() if n["class_type"] == "KSampler")["inputs"]["seed"] = first + number
        ids.append(server.client.queue(prompt))
    ended = []
    for each in ids:
        server.client.wait(each)
        ended.append(time.monotonic())
    after = process.cpu_times()
    rate = 60 * (jobs - 1) / (ended[-1] - ended[0])
    cpu = after.user + after.system - before.user - before.system
    return {"jobs_per_minute": rate, "seconds": ended[-1] - start, "server_cpu_per_job": cpu / jobs}


def by_command(folder: Path, jobs: int, first: int, *options: str, server: Server | None = None) -> dict:
    """The same through the command."""
    table, out, flow = folder / "jobs.csv", Path(tempfile.mkdtemp(dir=folder)), folder / "flow.json"
    table.write_text("seed\n" + "".join(f"{first + number}\n" for number in range(jobs)))
    flow.write_text(json.dumps(prompts(1)[0]))
    where = ("--server", server.url) if server else ()
    arguments = () if server else ("--", "--cpu", "--base-directory", str(folder / "base"), "--disable-api-nodes")
    command = [sys.executable, str(places.ROOT / "headless"), "run", str(flow), "--table", str(table)]
    command += ["--out", str(out), "--set", "KSampler.seed={seed}", *where, *options, *arguments]
    process = psutil.Process(server._process.pid) if server else None
    before = process.cpu_times() if process else None
    own = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "COMFYUI_PATH": str(places.comfyui()), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = sorted(path.stat().st_mtime for path in (out / "files").iterdir())
    found = {"jobs_per_minute": 60 * (jobs - 1) / (ended[-1] - ended[0])}
    if process and before:
        after = process.cpu_times()
        found["server_cpu_per_job"] = (after.user + after.system - before.user - before.system) / jobs
        found["driver_cpu"] = spent.ru_utime + spent.ru_stime - own.ru_utime - own.ru_stime
    ledger = Ledger(out)
    ledger.fill(Planned("", f"{n + 1:06d}", "", {}, []) for n in range(jobs))
    found["job_seconds"] = [row[0] for row in ledger._data.execute("select seconds from results")]
    ledger.close()
    return found


def against_direct(jobs: int, rounds: int) -> dict:
    """Turn by turn on one server; and the command with workers of its own, with and without Ray."""
    os.environ["OMP_NUM_THREADS"] = "1"
    found: dict[str, list] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Server(places.prepare_base(folder / "base"), cpu=True, quiet=True) as server:
            directly(server, 2, 10**6)
            for number in range(rounds):
                first = 1000 * number
                found.setdefault("directly", []).append(directly(server, jobs, first))
                say("directly", found["directly"][-1])
                found.setdefault("one server", []).append(by_command(folder, jobs, first + 500, server=server))
                say("one server", found["one server"][-1])
        for name, options in (
            ("1 worker", ("--workers", "1")),
            ("2 workers", ("--workers", "2")),
            ("1 worker, Ray", ("--workers", "1", "--ray", "local")),
            ("2 workers, Ray", ("--workers", "2", "--ray", "local")),
        ):
            found[name] = [by_command(folder, jobs, 0, "--threads", "1", *options)]
            say(name, found[name][0])
    return found


def say(name: str, row: dict) -> None:
    shown = {key: round(value, 3) for key, value in row.items() if isinstance(value, float)}
    print(f"{name:16} {shown}", flush=True)


# where the driver becomes the limit


class Played:
    """Workers in one process of Ray's: each job is a pause as long as a recorded one, and a picture's bytes."""

    def __init__(self, seconds: list[float]):
        self.seconds = seconds

    async def run(self, position: int, prompt: dict) -> bytes:
        await asyncio.sleep(self.seconds[position % len(self.seconds)])
        return os.urandom(PICTURE)


class Stub:
    """A worker of the driver's, played elsewhere. As ComfyUI, it does one job at a time."""

    again = True

    def __init__(self, name: str, actor):
        self.name, self.actor, self._one = name, actor, asyncio.Lock()

    async def start(self) -> None: ...
    async def stop(self) -> None: ...
    async def known(self) -> dict:
        return {}

    async def run(self, job: Job) -> Outcome:
        async with self._one:
            data = await self.actor.run.remote(job.position, job.prompt)
        return Outcome((("x.png", data),), 1.0, len(job.prompt), 0)


def simulate(ray, workers: int, seconds: list[float], processes: int = ACTORS) -> dict:
    mean = statistics.fmean(seconds)
    rows = max(20, min(MOST, int(workers * SPAN / mean)))
    prompt = prompts(1)[0]
    actors = [ray.remote(num_cpus=0.1, max_concurrency=4096)(Played).remote(seconds) for _ in range(processes)]
    ray.get([actor.run.remote(0, {}) for actor in actors])  # they are up
    with tempfile.TemporaryDirectory() as name:
        ledger = Ledger(Path(name))
        ledger.fill(Planned("", f"{n:07d}", "", {"seed": n}, [n]) for n in range(rows))

        async def run() -> tuple[float, float]:
            stubs = [Stub(f"w{n}", actors[n % processes]) for n in range(workers)]
            line = Line(ledger.open_positions(), workers)

            def make(position: int) -> Job:
                key, _ = ledger.planned(position)
                return Job(position, key, prompt, ())

            start, cpu = time.monotonic(), time.process_time()
            await Dispatch(ledger, line, stubs, make, lambda *job: results.save(Path(name), *job), tries=1, say=print,
                           ended=lambda _: None).run()  # fmt: skip
            return time.monotonic() - start, time.process_time() - cpu

        spent, cpu = asyncio.run(run())
        ledger.close()
    for actor in actors:
        ray.kill(actor)
    return {
        "workers": workers,
        "processes": processes,
        "rows": rows,
        "rows_per_second": rows / spent,
        "ideal": workers / mean,
        "driver_cpu_per_row": cpu / rows,
    }


PLAN = """
import json, resource, sys, time
from array import array
from pathlib import Path
from dit_toolkit.headless.ledger import Ledger
from dit_toolkit.headless.plan import Plan, in_order
prompt, known = (json.loads(Path(each).read_text()) for each in sys.argv[1:3])
table, out = map(Path, sys.argv[3:])
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
plan = Plan(prompt, known, ["#6.text={prompt}", "KSampler.seed={seed}"], table)
ledger, marks = Ledger(out), [array("q") for _ in plan.ranked()]
rows = ledger.fill(plan.marked(marks))
order = in_order(marks, len(ledger.open_positions()))
print(json.dumps({"rows": rows, "seconds": time.monotonic() - start, "cpu": time.process_time(),
                  "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "before_mb": before / 1024}))
"""


def plan_a_million(rows: int) -> dict:
    """Time and memory of the driver until the first job of a million can be sent."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "prompt.json").write_text(json.dumps(prompts(1)[0]))
        base = places.prepare_base(folder / "base")
        with Server(base, cpu=True, quiet=True) as server:
            (folder / "known.json").write_text(json.dumps(server.client.object_info()))
        with (folder / "jobs.csv").open("w", newline="") as table:
            writer = csv.writer(table)
            writer.writerow(("prompt", "seed"))
            writer.writerows((f"a doll with a {n % 1000} on her shirt, on a pale ground", n) for n in range(rows))
        files = [str(folder / each) for each in ("prompt.json", "known.json", "jobs.csv", "out")]
        code = "import benchmarks\n" + PLAN  # gives the repository its name
        done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, cwd=places.ROOT)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return json.loads(done.stdout.splitlines()[-1])


def scale(seconds: list[float]) -> dict:
    found: dict = {}
    ray = connect("local")
    try:
        found["workers"] = []
        for workers in WORKERS:
            found["workers"].append(simulate(ray, workers, seconds))
            say(f"{workers} workers", found["workers"][-1])
        found["apart"] = simulate(ray, APART, seconds, APART)
        say(f"{APART} workers apart", found["apart"])
        found["no pause"] = simulate(ray, 100, [0.001])
        say("no pause", found["no pause"])
    finally:
        ray.shutdown()
    return found


# whether strangers' workflows are converted as the page does it


def conversion(number: int) -> dict:
    """ComfyUI's own templates whose nodes are all known: as many as asked for, drawn with a seed."""
    folder = Path(str(resources.files(TEMPLATES) / "templates"))
    every = sorted(path for path in folder.glob("*.json") if workflow.is_graph(json.loads(path.read_text("utf-8"))))
    random.Random(0).shuffle(every)
    found: dict = {"equal": 0, "refused": {}, "different": {}}
    with tempfile.TemporaryDirectory() as name, Server(places.prepare_base(Path(name)), cpu=True, quiet=True) as server:
        known = server.client.object_info()
        with Browser() as browser:
            page = browser.open(server.url)
            for path in every:
                flow = workflow.read(path)
                if any(kind not in known and kind not in workflow.VIRTUAL for kind, _ in workflow.types_of(flow.graph)):
                    continue
                if found["equal"] + len(found["refused"]) + len(found["different"]) == number:
                    break
                page.load_workflow(flow.graph)
                by_page = page.prompt()
                if not by_page:  # notes alone
                    continue
                try:
                    ours = workflow.converted(flow, known)
                except Refused as refused:
                    found["refused"][path.stem] = str(refused)
                    continue
                if differing := differences(workflow.essence(ours), workflow.essence(by_page)):
                    found["different"][path.stem] = differing
                else:
                    found["equal"] += 1
    return found | {"tried": number, "templates": metadata.version(TEMPLATES.replace("_", "-"))}


def differences(ours: dict, by_page: dict) -> list[str]:
    """The inputs that differ, by their nodes' types."""
    found = {f"{node[0]} is missing" for node_id, node in by_page.items() if node_id not in ours}
    found |= {f"{node[0]} is too many" for node_id, node in ours.items() if node_id not in by_page}
    for node_id in ours.keys() & by_page.keys():
        kind, inputs = ours[node_id]
        others = by_page[node_id][1]
        found |= {f"{kind}.{name}" for name in inputs.keys() | others.keys() if inputs.get(name) != others.get(name)}
    return sorted(found)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.headless")
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=MILLION, help="of the table whose memory is measured")
    parser.add_argument("--only", choices=("direct", "scale", "table", "conversion"))
    options = parser.parse_args(arguments)
    path = RESULTS / f"headless-{datetime.date.today()}-cpu.json"
    report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    report |= {"machine": {"processor": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}}
    if options.only in (None, "conversion"):
        report["conversion"] = conversion(TRIED)
        print(json.dumps(report["conversion"], indent=1))
    if options.only in (None, "direct"):
        found = against_direct(options.jobs, options.rounds)
        report["job_seconds"] = [round(each, 3) for each in found["2 workers"][0]["job_seconds"]]
        for rows in found.values():
            for row in rows:
                row.pop("job_seconds", None)
        report |= {"jobs": options.jobs, "steps": STEPS, "rounds": options.rounds, "ways": found}
    if options.only in (None, "scale"):
        report.setdefault("scale", {}).update(scale(report.get("job_seconds") or [2.0]))
    if options.only in (None, "table"):
        report.setdefault("scale", {})["million"] = plan_a_million(options.rows)
        say("plan", report["scale"]["million"])
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(path.relative_to(places.ROOT))


if __name__ == "__main__":
    main(sys.argv[1:])
