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
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .errors import DiskFull, Refused, WorkerLost, says_full
from .plan import Job
from .server import Outcome, Server

OURS = (
    "--port",
    "--output-directory",
    "--temp-directory",
    "--auto-launch",
)  # arguments that each worker gets its own of
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
        here = Path(__file__).resolve().parents[3]  # ComfyUI/custom_nodes/pack/headless
        chosen = folder or os.environ.get("COMFYUI_PATH") or str(here)
        path = Path(chosen).expanduser().resolve()
        if not (path / "main.py").is_file():
            raise Refused(f"There is no ComfyUI in {path}. Set COMFYUI_PATH to the folder that holds its main.py.")
        return cls(str(path), python or os.environ.get("COMFYUI_PYTHON") or sys.executable, arguments, patience)


class LocalWorker:
    """A ComfyUI of this machine, on one device. Its pictures go to a folder that is gone afterwards."""

    again = True

    def __init__(self, name: str, comfy: Comfy, device: int | None = None, threads: int | None = None):
        self.name, self.comfy, self.device, self.threads = name, comfy, device, threads
        self._process: subprocess.Popen | None = None
        self._server: Server | None = None
        self.folder: Path | None = None  # its log, its pictures; gone when it ends
        self._left: collections.deque[tuple[str, ...]] = collections.deque()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def start(self) -> None:
        await self.stop()
        try:
            self.folder = Path(tempfile.mkdtemp(prefix="dit-headless-"))
            port = free_port()
            with (self.folder / "log.txt").open("wb") as log:
                self._process = subprocess.Popen(
                    self._command(port),
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=self.comfy.folder,
                    env=self._environment(),
                    start_new_session=True,
                )
            await self._connect(f"http://127.0.0.1:{port}")
        except OSError as error:
            await self.stop()
            raise WorkerLost(f"ComfyUI could not be started: {error.strerror or error}") from None
        except BaseException:
            await self.stop()
            raise

    async def known(self) -> dict:
        try:
            return await self._server.known()
        except WorkerLost:
            if (code := await self._code()) is not None:
                raise self._failed(f"ComfyUI {_ended(code)}") from None
            raise

    async def _code(self) -> int | None:
        """How the process ended, if it did. Its connections break a moment before."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self._process.wait, 2)
        return self._process.poll()

    async def run(self, job: Job) -> Outcome:
        try:
            outcome = await self._server.run(job)
        except WorkerLost as error:
            if (code := await self._code()) is not None:
                raise WorkerLost(f"ComfyUI {_ended(code)}", error.started) from None
            raise
        self._tidy(tuple(name for name, _ in outcome.files))
        return outcome

    async def stop(self) -> None:
        server, process, folder = self._server, self._process, self.folder
        self._server = self._process = self.folder = None
        self._left.clear()
        if server is not None:
            await server.close()
        if process is not None:
            process.stdin.close()  # the guard ends
            if process.poll() is None:
                process.terminate()
            try:
                await asyncio.to_thread(process.wait, END)
            except subprocess.TimeoutExpired:
                process.kill()
                await asyncio.to_thread(process.wait)
        if folder is not None:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    def _command(self, port: int) -> list[str]:
        arguments = self.comfy.arguments
        own = ["--port", str(port), "--disable-auto-launch"]
        own += ["--output-directory", str(self.folder / "output"), "--temp-directory", str(self.folder)]
        if "--database-url" not in arguments:  # several workers must not share a file
            own += ["--database-url", "sqlite:///:memory:"]
        if self.device is not None and "--cuda-device" not in arguments:
            own += ["--cuda-device", str(self.device)]
        guard = Path(__file__).with_name("guard.py")
        return [
            self.comfy.python,
            "-u",
            str(guard),
            str(self.folder),
            str(Path(self.comfy.folder) / "main.py"),
            *own,
            *arguments,
        ]

    def _environment(self) -> dict[str, str]:
        return os.environ if self.threads is None else {**os.environ, "OMP_NUM_THREADS": str(self.threads)}

    async def _connect(self, url: str) -> None:
        """Until ComfyUI answers: it opens its port when all packs are loaded."""
        server = Server(url, self.comfy.patience)
        deadline = asyncio.get_running_loop().time() + max(self.comfy.patience, 60)
        while True:
            if (code := self._process.poll()) is not None:
                raise self._failed(f"ComfyUI {_ended(code)} while it started")
            try:
                await server.connect()
                break
            except WorkerLost:
                await asyncio.sleep(0.2)
            if asyncio.get_running_loop().time() > deadline:
                raise self._failed("ComfyUI did not answer after its start")
        self._server = server

    def _failed(self, sentence: str) -> Exception:
        text = (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace")
        if says_full(text):
            return DiskFull()
        lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
        return WorkerLost("\n".join([f"{sentence}. The end of its log:", *lines[-LOG_TAIL:]]))

    def _tidy(self, names: tuple[str, ...]) -> None:
        """Files that have been fetched go, save those of the last jobs: ComfyUI may name them again from its cache."""
        self._left.append(names)
        if len(self._left) > 4:
            kept = {name for each in list(self._left)[1:] for name in each}
            for name in set(self._left.popleft()) - kept:
                for path in (self.folder / "output").rglob(Path(name).name.replace("[", "[[]")):
                    path.unlink(missing_ok=True)


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


def devices() -> list[int]:
    """The NVIDIA devices of this machine, by number."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    listed = subprocess.run([command, "-L"], capture_output=True, text=True)
    return [int(number) for number in re.findall(r"^GPU (\d+):", listed.stdout, re.MULTILINE)]
