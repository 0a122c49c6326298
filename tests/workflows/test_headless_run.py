"""`headless run` on real ComfyUIs: nothing is lost and nothing done twice, whatever is killed in the middle.

Most of it on the server that all tests share. `tests/headless/test_processes.py` plays those that are killed.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from pyarrow import parquet

from dit_toolkit.headless import cli
from dit_toolkit.scripts import places, workflows
from dit_toolkit.scripts.client import PromptInterrupted
from dit_toolkit.scripts.places import DEMO_INPUTS, ROOT, WORKFLOWS

pytestmark = pytest.mark.comfy

STEM = "CPU 01 canny edges to picture"
GOOD = 12
STEPS = 3
CUT = "cut"  # the key of a row whose picture is damaged: it is accepted, and no node can read it
BOUND = ("--set", "KSampler.seed={seed}", "--set", "#6.text={prompt}", "--set", "Apply EasyControl.image={outline}")


class Jobs:
    """A table of small jobs with pictures in it, and the command on it."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("drawn_star.png", "drawn_fish.png"):
            shutil.copy(DEMO_INPUTS / name, folder)
        (folder / "cut.png").write_bytes((folder / "drawn_star.png").read_bytes()[:30])
        prompt = workflows.read_prompt(STEM)
        next(node for node in prompt.values() if node["class_type"] == "KSampler")["inputs"]["steps"] = STEPS
        (folder / "small.json").write_text(json.dumps(prompt))
        rows = [f"k{n:02d},{'drawn_star.png' if n % 3 else 'drawn_fish.png'},a star {n % 2},{n}" for n in range(GOOD)]
        rows.insert(3, f"{CUT},cut.png,a star,1")
        (folder / "jobs.csv").write_text("\n".join(["key,outline,prompt,seed", *rows]) + "\n")

    def words(self, out: Path, *options) -> list[str]:
        """What comes after the name of the command."""
        files = [str(self.folder / "small.json"), "--table", str(self.folder / "jobs.csv"), "--out", str(out)]
        return ["run", *files, *BOUND, *options]

    def command(self, out: Path, *options, arguments=()) -> list[str]:
        command = [sys.executable, str(ROOT / "headless"), *self.words(out, *options)]
        return [*command, "--", *arguments] if arguments else command

    def run(self, out: Path, *options, arguments=()) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(out, *options, arguments=arguments),
            capture_output=True,
            text=True,
            cwd=self.folder,
            env=environment(),
            timeout=300,
        )


def environment() -> dict[str, str]:
    return {**os.environ, "COMFYUI_PATH": str(places.comfyui()), "COMFYUI_PYTHON": str(places.python())}


def local(base: Path) -> tuple[str, ...]:
    """Arguments for a ComfyUI that headless starts."""
    return ("--cpu", "--base-directory", str(places.prepare_base(base)), "--disable-api-nodes")


def pictures(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "files").glob("*"))}


def check_complete(out: Path) -> None:
    """Every row is there once: all done, save the one that no node can read."""
    rows = parquet.read_table(out / "results.parquet").to_pylist()
    assert [row["key"] for row in rows] == [
        *(f"k{n:02d}" for n in range(3)),
        CUT,
        *(f"k{n:02d}" for n in range(3, GOOD)),
    ]
    assert Counter(row["state"] for row in rows) == {"done": GOOD, "failed": 1}
    assert {name for row in rows for name in row["files"]} == {f"files/{name}" for name in pictures(out)}
    (failed,) = [row for row in rows if row["state"] == "failed"]
    assert failed["key"] == CUT
    assert failed["tries"] == 1
    assert failed["error"].startswith("Apply EasyControl.image: ")


def wait_until(true, process=None, seconds=240):
    """`process`: what must live meanwhile."""
    deadline = time.monotonic() + seconds
    while not true():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    listed = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout
    return [int(each) for each in listed.split()]


def alive(pid: int) -> bool:
    """Whether it runs: a child of ours that has ended and that nobody asked after does not."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> Jobs:
    return Jobs(tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def undisturbed(jobs, server) -> Path:
    out = jobs.folder / "undisturbed"
    done = jobs.run(out, "--server", server.url)
    assert done.returncode == 1, done.stderr
    assert f"{CUT}: Apply EasyControl.image: " in done.stderr
    return out


def test_a_table_becomes_pictures_and_a_row_that_fails_stops_nothing(undisturbed):
    check_complete(undisturbed)
    assert len({*pictures(undisturbed).values()}) == GOOD
    assert "<title>small: jobs</title>" in (undisturbed / "index.html").read_text(encoding="utf-8")


def test_a_second_start_does_what_failed_or_changed_and_nothing_else(undisturbed, jobs, server, tmp_path):
    out = shutil.copytree(undisturbed, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (out / "files").iterdir()}
    changed = Jobs(tmp_path)
    table = tmp_path / "jobs.csv"
    table.write_text(table.read_text().replace("a star 1,5\n", "a star 1,500\n"))
    done = changed.run(out, "--server", server.url)
    assert f"{GOOD + 1} jobs, {GOOD - 1} of them done before." in done.stderr
    after = {path: path.stat().st_mtime_ns for path in (out / "files").iterdir()}
    assert {path.name for path, at in after.items() if before[path] != at} == {"k05.png"}
    check_complete(out)


def test_a_killed_driver_loses_nothing(undisturbed, jobs, server, tmp_path):
    out = tmp_path / "out"
    driver = subprocess.Popen(
        jobs.command(out, "--server", server.url), cwd=jobs.folder, env=environment(), stderr=subprocess.PIPE, text=True
    )
    try:
        wait_until(lambda: len(pictures(out)) >= 3, driver)
    finally:
        driver.kill()
        driver.communicate()
    again = jobs.run(out, "--server", server.url)
    assert "of them done before." in again.stderr
    check_complete(out)
    assert pictures(out) == pictures(undisturbed)


@pytest.mark.long
def test_killed_workers_and_a_killed_driver_lose_nothing(undisturbed, jobs, server, tmp_path):
    out = tmp_path / "out"
    arguments = local(tmp_path / "base")
    command = jobs.command(out, "--workers", "2", arguments=arguments)  # as many threads as the server has
    driver = subprocess.Popen(command, cwd=jobs.folder, env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: len(pictures(out)) >= 1, driver)
        workers = children(driver.pid)
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)
        wait_until(lambda: len(pictures(out)) >= 4, driver)
    finally:
        driver.kill()
        driver.communicate()
    done = pictures(out)
    assert len([name for name in done if not name.startswith(".")]) < GOOD
    wait_until(lambda: not any(map(alive, workers)))  # no ComfyUI is left behind

    again = jobs.run(out, "--server", server.url)
    assert again.returncode == 1, again.stderr
    assert "of them done before." in again.stderr
    check_complete(out)
    assert pictures(out) == pictures(undisturbed)


def running(base: Path) -> list[int]:
    """Processes of the ComfyUIs with this base directory, wherever they were started from."""
    found = subprocess.run(
        ["pgrep", "-f", f"guard.py .* --base-directory {base} "], capture_output=True, text=True
    ).stdout
    return [int(each) for each in found.split()]


@pytest.mark.long
def test_on_ray_killed_comfyuis_and_killed_actors_lose_nothing(undisturbed, jobs, tmp_path):
    out, base = tmp_path / "out", tmp_path / "base"
    threads = str(torch.get_num_threads())  # the server's: with others the last bit of a picture may differ
    command = jobs.command(out, "--ray", "local", "--workers", "2", "--threads", threads, arguments=local(base))
    driver = subprocess.Popen(command, cwd=jobs.folder, env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: len(pictures(out)) >= 1, driver)
        first, second = running(base)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: len(pictures(out)) >= 4, driver)
        actor = subprocess.run(["ps", "-o", "ppid=", "-p", str(second)], capture_output=True, text=True).stdout
        os.kill(int(actor), signal.SIGKILL)
        _, said = driver.communicate(timeout=300)
    finally:
        driver.kill()
    assert driver.returncode == 1, said
    assert "ComfyUI was killed (signal 9)" in said
    assert "Ray lost it" in said
    assert not running(base)
    check_complete(out)
    assert pictures(out) == pictures(undisturbed)


def small_disk() -> list[str] | None:
    """A command that runs another with a disk of its own, or None where this user may have none."""
    for prefix in (["unshare", "-m"], ["unshare", "-rm"]):
        if (
            shutil.which("unshare")
            and subprocess.run([*prefix, "mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", "/mnt"]).returncode == 0
        ):
            return prefix
    return None


def test_a_full_disk_stops_with_one_sentence_and_loses_no_finished_job(undisturbed, jobs, server, tmp_path):
    prefix = small_disk()
    if prefix is None:
        pytest.skip("this user may not mount a small disk: needs Linux with unshare; tests/headless plays a full one")
    small, kept = tmp_path / "small", tmp_path / "kept"
    small.mkdir()
    mounted = 'mount -t tmpfs -o size=160k tmpfs "$1"; out="$1"; kept="$2"; shift 2'
    script = f'{mounted}; "$@"; code=$?; cp -a "$out" "$kept"; exit $code'
    told = jobs.command(small, "--server", server.url)
    command = [*prefix, "sh", "-c", script, "sh", str(small), str(kept), *told]
    done = subprocess.run(command, capture_output=True, text=True, cwd=jobs.folder, env=environment(), timeout=300)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("is full") == 1, done.stderr
    assert "Traceback" not in done.stderr
    finished = pictures(kept)
    assert 0 < len(finished) < GOOD
    assert finished.items() <= pictures(undisturbed).items()

    again = jobs.run(kept, "--server", server.url)
    assert "of them done before." in again.stderr
    check_complete(kept)
    assert pictures(kept) == pictures(undisturbed)


def test_ctrl_c_ends_in_order(jobs, server, tmp_path):
    out = tmp_path / "out"
    driver = subprocess.Popen(
        jobs.command(out, "--server", server.url), cwd=jobs.folder, env=environment(), stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: len(pictures(out)) >= 1, driver)
    driver.send_signal(signal.SIGINT)
    _, said = driver.communicate(timeout=60)
    assert driver.returncode == 130, said
    assert "Stopped. The same command goes on from here." in said
    rows = parquet.read_table(out / "results.parquet").to_pylist()
    assert len(rows) == GOOD + 1
    assert {f"files/{name}" for name in pictures(out)} == {name for row in rows for name in row["files"]}
    queue = server.client.get_json("/queue")
    assert queue["queue_pending"] == []
    for entry in queue["queue_running"]:  # it was told to stop, and does at its next step, if it has one left
        with contextlib.suppress(PromptInterrupted):
            server.client.wait(entry[1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--set", "KSampler.sedd={seed}"), "no input 'sedd'. Near misses: seed"),
        (("--set", "KSampler.steps={stps}"), "no column 'stps'"),
        (("--set", "KSampler.steps={prompt}"), "jobs.csv, row 1: KSampler.steps needs a whole number"),
        (("--key", "prompt"), "the key 'a star 0' is that of jobs.csv, row 1 too"),
        (("--files", ".."), "which is not in"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_runs(jobs, server, tmp_path, capsys, options, words):
    assert cli.main(jobs.words(tmp_path / "out", "--server", server.url, *options)) == 1
    said = capsys.readouterr().err
    assert words in said
    assert len(said.splitlines()) == 1, said
    assert not pictures(tmp_path / "out")


def test_a_dry_run_shows_three_jobs_and_leaves_nothing(jobs, server, tmp_path, capsys):
    assert cli.main(jobs.words(tmp_path / "out", "--server", server.url, "--dry-run")) == 0
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if line.startswith("job ")] == ["job k00", "job k01", "job k02"]
    assert "KSampler.seed = 1" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.long
@pytest.mark.parametrize("stem", [stem for stem in workflows.stems() if workflows.is_embedded(stem)])
def test_an_example_runs_from_the_file_of_the_page(stem, server, tmp_path):
    (tmp_path / "one.csv").write_text("id\nonly\n")
    command = [
        sys.executable,
        str(ROOT / "headless"),
        "run",
        str(WORKFLOWS / f"{stem}.json"),
        "--table",
        str(tmp_path / "one.csv"),
        "--out",
        str(tmp_path / "out"),
        "--server",
        server.url,
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment(), timeout=900)
    assert done.returncode == 0, done.stderr
    assert "will carry their prompt" not in done.stderr
    assert any(name.startswith("only") for name in pictures(tmp_path / "out"))
