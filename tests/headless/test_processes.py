"""The command with processes of its own: killed workers, rows that kill, a killed driver, an early end.

The ComfyUIs are played (`played/main.py`), so that they start at once and wait where a test wants them to.
`tests/workflows/test_headless_run.py` has the same with real ones.
"""

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
from pyarrow import parquet

from dit_toolkit.headless import workers
from dit_toolkit.scripts.places import ROOT
from dit_toolkit.tests.headless import world

PLAYED = Path(__file__).with_name("played")
BOUND = ("--set", "#2.text={words}", "--set", "KSampler.seed={seed}")
LONG = 120  # seconds: all is over long before


class Place:
    """A folder with a ComfyUI, a workflow, and gates that its jobs may wait at."""

    def __init__(self, folder: Path):
        self.folder, self.out, self.gates = folder, folder / "out", folder / "gates"
        shutil.copytree(PLAYED, folder / "ComfyUI")
        (folder / "ComfyUI" / "known.json").write_text(json.dumps(world.KNOWN))
        (folder / "flow.json").write_text(json.dumps(world.prompt()))
        self.gates.mkdir()

    def table(self, *texts: str) -> None:
        rows = [f"k{number},{text},{number}" for number, text in enumerate(texts)]
        (self.folder / "jobs.csv").write_text("\n".join(["key,words,seed", *rows]) + "\n")

    def start(self, *options: str, out: Path | None = None) -> subprocess.Popen:
        files = ("flow.json", "--table", "jobs.csv", "--out", str(out or self.out))
        command = [sys.executable, str(ROOT / "headless"), "run", *files, *BOUND, *options]
        told = {"COMFYUI_PATH": str(self.folder / "ComfyUI"), "GATES": str(self.gates), "TMPDIR": str(self.folder)}
        return subprocess.Popen(command, cwd=self.folder, env={**os.environ, **told}, stderr=subprocess.PIPE, text=True)

    def run(self, *options: str, out: Path | None = None) -> str:
        """What it said."""
        driver = self.start(*options, out=out)
        try:
            return driver.communicate(timeout=LONG)[1]
        finally:
            driver.kill()

    def open(self, gate: str) -> None:
        (self.gates / gate).touch()

    def waits(self, text: str) -> bool:
        return (self.gates / f"{text}.waits").exists()

    def rows(self) -> dict[str, dict]:
        listed = parquet.read_table(self.out / "results.parquet").to_pylist()
        assert len({row["key"] for row in listed}) == len(listed)
        return {row["key"]: row for row in listed}

    def comfyuis(self) -> list[int]:
        """Processes that run."""
        found = subprocess.run(["pgrep", "-f", f"{self.folder}/ComfyUI/main.py"], capture_output=True, text=True)
        return [int(each) for each in found.stdout.split()]


def pictures(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "files").glob("[!.]*"))}


def wait_until(true) -> None:
    deadline = time.monotonic() + LONG
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


def test_a_killed_worker_and_a_killed_driver_lose_nothing_and_leave_nothing(place):
    place.table("wait one", "red", "green", "wait one more", "blue", "white", "wait two")
    driver = place.start("--workers", "2")
    try:
        wait_until(lambda: place.waits("wait one") and place.waits("wait one more"))
        first, _ = place.comfyuis()
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: first not in place.comfyuis() and len(place.comfyuis()) == 2)  # it starts again
        place.open("one")
        wait_until(lambda: {"k0.png", "k3.png"} <= pictures(place.out).keys())  # one of them by the other worker
    finally:
        driver.kill()
        said = driver.communicate()[1]
    assert "was killed (signal 9)" in said
    wait_until(lambda: not place.comfyuis())
    wait_until(lambda: not list(place.folder.glob("dit-headless-*")))
    assert "k6.png" not in pictures(place.out)

    place.open("two")
    said = place.run("--workers", "2")
    assert "of them done before." in said
    assert {row["state"] for row in place.rows().values()} == {"done"}
    undisturbed = place.folder / "undisturbed"
    place.run("--workers", "1", out=undisturbed)
    assert pictures(place.out) == pictures(undisturbed)
    assert len(pictures(undisturbed)) == 7


def test_a_row_that_kills_is_tried_again_and_takes_no_other_with_it(place):
    place.table("red", "kill", "green")
    said = place.run("--workers", "1", "--tries", "2")
    found = place.rows()
    assert {key: (row["state"], row["tries"]) for key, row in found.items()} == {
        "k0": ("done", 1), "k1": ("failed", 2), "k2": ("done", 1),
    }  # fmt: skip
    assert found["k1"]["error"] == "tried 2 times; at last ComfyUI was killed (signal 9)"
    assert "2 of 3 jobs are done, 1 failed" in said
    assert "Traceback" not in said
    assert not place.comfyuis()


def test_a_comfyui_that_does_not_start_is_said_with_the_end_of_its_log(place):
    place.table("red")
    said = place.run("--", "--fail", "there is no such device")
    assert said.startswith("No worker could be started.")
    assert "ComfyUI ended (exit code 3) while it started" in said
    assert "there is no such device" in said
    assert "Traceback" not in said


def test_without_a_card_the_command_says_how_to_do_without(place):
    place.table("red")
    said = place.run("--", "--fail", "RuntimeError: Found no NVIDIA driver on your system.")
    assert len(said.splitlines()) == 1
    assert said.rstrip().endswith("end the command with: --threads 1 -- --cpu")


def test_a_cluster_that_is_not_there_is_said_at_once(place):
    place.table("red")
    assert place.run("--ray", "127.0.0.1:1") == "Nothing answers at 127.0.0.1:1. Start Ray there, or use --ray local.\n"


@pytest.mark.long
def test_on_a_cluster_each_machine_gets_a_worker(place, monkeypatch):
    """Two machines of Ray's, played on this one. Ray alone would put both workers on the first."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("GATES", str(place.gates))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    place.table("wait one", "red", "wait one more", "blue")
    cluster = Cluster()
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=4)
        driver = place.start("--ray", cluster.address, "--comfyui", str(place.folder / "ComfyUI"))
        try:
            wait_until(lambda: place.waits("wait one") and place.waits("wait one more"))
            actors = [parent(each) for each in place.comfyuis()]
            assert len({parent(actor) for actor in actors}) == 2
            place.open("one")
            said = driver.communicate(timeout=LONG)[1]
        finally:
            driver.kill()
    finally:
        cluster.shutdown()
    assert driver.returncode == 0, said
    assert Counter(row["worker"] for row in place.rows().values()).keys() == {"ray-1", "ray-2"}
    assert not place.comfyuis()


def parent(pid: int) -> int:
    return int(subprocess.run(["ps", "-o", "ppid=", "-p", str(pid)], capture_output=True, text=True).stdout)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ((), "127.0.0.1"),
        (("--listen",), "127.0.0.1"),
        (("--listen", "--lowvram"), "127.0.0.1"),
        (("--listen", "0.0.0.0,::"), "127.0.0.1"),
        (("--cpu", "--listen", "10.0.0.5"), "10.0.0.5"),
        (("--listen=10.0.0.5,127.0.0.1",), "10.0.0.5"),
        (("--listen", "fd00::5"), "[fd00::5]"),
    ],
)
def test_a_worker_is_reached_where_it_listens(arguments, found):
    assert workers.address(arguments) == found


@pytest.mark.parametrize(
    ("visible", "found"), [(None, ["0", "1"]), ("1", ["1"]), ("", []), ("-1", []), ("GPU-7f, 0", ["GPU-7f", "0"])]
)
def test_a_worker_for_each_card_that_this_program_may_use(tmp_path, monkeypatch, visible, found):
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: GPU-7f)'\necho 'GPU 1: B (UUID: GPU-8a)'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert workers.devices() == found
