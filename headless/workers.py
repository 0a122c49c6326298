"""Workers: a ComfyUI process of this machine, or a ComfyUI that runs already. Each does a job at a time, in turn.

await worker.start()            again after a loss
outcome = await worker.run(job)
await worker.stop()
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from .errors import DiskFull, Refused, WorkerLost, is_full, says_full
from .plan import Job
from .server import Outcome, Server

OURS = ("--port", "--output-directory", "--temp-directory", "--auto-launch")  # each worker gets its own
PLACES = {"--cpu", "--cuda-device", "--directml"}  # arguments that say which device it is
NO_CARD = ("Found no NVIDIA driver", "Torch not compiled with CUDA enabled", "No CUDA GPUs are available")
TEMPORARY = "the disk for temporary files"
LOG_TAIL = 12  # lines
END = 10  # seconds that ComfyUI has to end by itself


class Worker(Protocol):
    name: str
    again: bool  # whether it can be started anew after a loss

    async def start(self) -> None: ...
    async def known(self) -> dict: ...
    async def run(self, job: Job) -> Outcome: ...
    async def stop(self) -> None: ...


@dataclass(frozen=True)
class Comfy:
    """How to start ComfyUI on a machine: its folder, its Python, the user's own arguments."""

    folder: str
    python: str
    arguments: tuple[str, ...] = ()
    patience: float = 600  # seconds: also for its start

    @classmethod
    def found(cls, folder: str | None, python: str | None, arguments: tuple[str, ...], patience: float) -> Comfy:
        """As told, else by COMFYUI_PATH, else the ComfyUI that this pack lies in."""
        for argument in arguments:
            if argument.partition("=")[0] in OURS:
                raise Refused(f"{argument.partition('=')[0]} is set for each worker. Leave it out.")
            if argument.startswith("--tls-"):
                raise Refused("Workers that are started here take no --tls arguments. Start ComfyUI, and use --server.")
        here = Path(__file__).resolve().parents[3]  # ComfyUI/custom_nodes/pack/headless
        chosen = folder or os.environ.get("COMFYUI_PATH") or str(here)
        path = Path(chosen).expanduser().resolve()
        if not (path / "main.py").is_file():
            raise Refused(f"There is no ComfyUI in {path}. Set COMFYUI_PATH to the folder that holds its main.py.")
        return cls(str(path), python or os.environ.get("COMFYUI_PYTHON") or sys.executable, arguments, patience)


@dataclass(frozen=True)
class Life:
    """A ComfyUI from its start to its end. `folder`: its log, its pictures; gone when it ends."""

    folder: Path
    process: subprocess.Popen
    server: Server


class LocalWorker:
    """A ComfyUI of this machine, on one device. Its pictures go to a folder that is gone afterwards."""

    again = True

    def __init__(self, name: str, comfy: Comfy, device: str | None = None, threads: int | None = None):
        self.name, self.comfy, self.device, self.threads = name, comfy, device, threads
        self._life: Life | None = None
        self._left: collections.deque[tuple[str, ...]] = collections.deque()

    @property
    def pid(self) -> int | None:
        return self._life.process.pid if self._life else None

    @property
    def life(self) -> Life:
        if self._life is None:
            raise WorkerLost("its ComfyUI does not run")
        return self._life

    async def start(self) -> None:
        await self.stop()
        try:
            folder, port = Path(tempfile.mkdtemp(prefix="dit-headless-")), free_port()
            try:
                with (folder / "log.txt").open("wb") as log:
                    process = subprocess.Popen(
                        self._command(folder, port),
                        stdin=subprocess.PIPE,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        cwd=self.comfy.folder,
                        env=self._environment(),
                        start_new_session=True,
                    )
            except OSError:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            server = Server(f"http://{address(self.comfy.arguments)}:{port}", self.comfy.patience)
            self._life = Life(folder, process, server)
            await self._connect(self._life)
        except OSError as error:
            await self.stop()
            if is_full(error):
                raise DiskFull(TEMPORARY) from None
            raise WorkerLost(f"ComfyUI could not be started: {error.strerror or error}") from None
        except BaseException:
            await self.stop()
            raise

    async def known(self) -> dict:
        life = self.life
        try:
            return await life.server.known()
        except WorkerLost:
            if (code := await _code(life)) is not None:
                raise _failed(life, f"ComfyUI {_ended(code)}") from None
            raise

    async def run(self, job: Job) -> Outcome:
        life = self.life
        try:
            outcome = await life.server.run(job)
        except WorkerLost as error:
            if (code := await _code(life)) is not None:
                raise WorkerLost(f"ComfyUI {_ended(code)}", error.started) from None
            raise
        self._tidy(life, tuple(name for name, _ in outcome.files))
        return outcome

    async def stop(self) -> None:
        life, self._life = self._life, None
        self._left.clear()
        if life is None:
            return
        await life.server.close()
        if life.process.stdin is not None:
            life.process.stdin.close()  # the guard ends
        if life.process.poll() is None:
            life.process.terminate()
        try:
            await asyncio.to_thread(life.process.wait, END)
        except subprocess.TimeoutExpired:
            life.process.kill()
            await asyncio.to_thread(life.process.wait)
        await asyncio.to_thread(shutil.rmtree, life.folder, ignore_errors=True)

    def _command(self, folder: Path, port: int) -> list[str]:
        arguments = self.comfy.arguments
        own = ["--port", str(port), "--disable-auto-launch"]
        own += ["--output-directory", str(folder / "output"), "--temp-directory", str(folder)]
        if "--database-url" not in arguments:  # several workers must not share a file
            own += ["--database-url", "sqlite:///:memory:"]
        if self.device is not None:
            own += ["--cuda-device", self.device]
        guard, main = Path(__file__).with_name("guard.py"), Path(self.comfy.folder) / "main.py"
        return [self.comfy.python, "-u", str(guard), str(folder), str(main), *own, *arguments]

    def _environment(self) -> dict[str, str]:
        return {**os.environ} if self.threads is None else {**os.environ, "OMP_NUM_THREADS": str(self.threads)}

    async def _connect(self, life: Life) -> None:
        """Until ComfyUI answers: it opens its port when all packs are loaded."""
        deadline = asyncio.get_running_loop().time() + max(self.comfy.patience, 60)
        while True:
            if (code := life.process.poll()) is not None:
                raise _failed(life, f"ComfyUI {_ended(code)} while it started")
            try:
                return await life.server.connect()
            except WorkerLost:
                await asyncio.sleep(0.2)
            if asyncio.get_running_loop().time() > deadline:
                raise _failed(life, "ComfyUI did not answer after its start")

    def _tidy(self, life: Life, names: tuple[str, ...]) -> None:
        """Files that have been fetched go, save those of the last jobs: ComfyUI may name them again from its cache."""
        self._left.append(names)
        if len(self._left) > 4:
            kept = {name for each in list(self._left)[1:] for name in each}
            for name in set(self._left.popleft()) - kept:
                for path in (life.folder / "output").rglob(Path(name).name.replace("[", "[[]")):
                    path.unlink(missing_ok=True)


async def _code(life: Life) -> int | None:
    """How the process ended, if it did. Its connections break a moment before."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        await asyncio.to_thread(life.process.wait, 2)
    return life.process.poll()


def _failed(life: Life, sentence: str) -> Exception:
    """Why ComfyUI does not start, with the end of its log."""
    text = (life.folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    if says_full(text):
        return DiskFull("a disk that ComfyUI writes to")
    if any(each in text for each in NO_CARD):
        return Refused(
            "ComfyUI finds no graphics card here. To run on the processor, end the command with: --threads 1 -- --cpu"
        )
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    return WorkerLost("\n".join([f"{sentence}. The end of its log:", *lines[-LOG_TAIL:]]))


class ServerWorker:
    """A ComfyUI that runs already. It is asked again after a loss, and never stopped."""

    again = True

    def __init__(self, url: str, patience: float):
        if not re.fullmatch(r"https?://[^\s/?#]+/?", url):
            raise Refused(f"--server {url} is no address. It reads http://127.0.0.1:8188.")
        self.name, self._server = url, Server(url, patience)

    async def start(self) -> None:
        await self._server.close()
        await self._server.connect()

    async def known(self) -> dict:
        return await self._server.known()

    async def run(self, job: Job) -> Outcome:
        return await self._server.run(job)

    async def stop(self) -> None:
        await self._server.close()


def _ended(code: int) -> str:
    return f"was killed (signal {-code})" if code < 0 else f"ended (exit code {code})"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def address(arguments: Sequence[str]) -> str:
    """Where this machine reaches a ComfyUI with these arguments: at the address that it listens on."""
    listens = ""
    for argument, following in pairwise((*arguments, "--")):
        name, equals, value = argument.partition("=")
        if name == "--listen":
            listens = value if equals else "" if following.startswith("-") else following
    first = listens.split(",")[0].strip()
    if first in ("", "0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{first}]" if ":" in first else first


def devices() -> list[str]:
    """The NVIDIA devices of this machine that this program may use, by number or name."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return [each.strip() for each in allowed.split(",") if each.strip() not in ("", "-1")]
    listed = subprocess.run([command, "-L"], capture_output=True, text=True)
    return re.findall(r"^GPU (\d+):", listed.stdout, re.MULTILINE)
