"""Workers on a Ray cluster: each an actor that holds a ComfyUI of its machine, on a device that Ray gives it.

Jobs go to actors and files come back through Ray's object store, so the machines need no common folder. What must be
the same on each: ComfyUI, packs, models. Pictures and masks of the table travel with their job.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .bindings import File
from .errors import DiskFull, Refused, WorkerLost, is_full
from .plan import Job
from .server import Outcome
from .workers import END, TEMPORARY, Comfy, LocalWorker

HERE = Path(__file__).resolve().parent
Told = tuple[str | None, str | None, tuple[str, ...]]  # folder, Python and arguments of ComfyUI
ANSWER = 10  # seconds for the head of a cluster to be found
PLACED = 120  # seconds until Ray must have found a place for an actor


def connect(address: str) -> Any:
    """Ray, connected: to a cluster, to the one of this machine ("auto"), or to one that ends with us ("local")."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray would give way to every other program
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise Refused("--ray needs Ray: pip install ray") from None
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal() and "/" not in address:  # Ray itself would try for minutes
        try:
            socket.create_connection((host.strip("[]"), int(port)), ANSWER).close()
        except (OSError, OverflowError):
            raise Refused(f"Nothing answers at {address}. Start Ray there, or use --ray local.") from None
    where: dict[str, Any] = {"include_dashboard": False} if address == "local" else {"address": address}
    try:
        ray.init(**where, log_to_driver=False, logging_level=logging.ERROR, runtime_env={"py_modules": [str(HERE)]})
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise Refused(f"There is no Ray cluster at {address}: {str(error).splitlines()[0]}") from None
    return ray


class Actor:
    """What runs on the other machine. `comfy`: folder, Python and arguments of its ComfyUI, as the command was told."""

    def __init__(self, name: str, comfy: Told, patience: float, threads: int | None):
        self.name, self.comfy, self.patience, self.threads = name, comfy, patience, threads
        self.worker: LocalWorker

    async def start(self) -> None:
        comfy = Comfy.found(*self.comfy, self.patience)
        self.worker = LocalWorker(self.name, comfy, threads=self.threads)  # Ray has set which devices it sees
        await self.worker.start()

    async def known(self) -> dict:
        return await self.worker.known()

    async def run(self, job: Job, contents: Sequence[bytes]) -> Outcome:
        folder, files = self.worker.life.folder, []
        for file, content in zip(job.files, contents, strict=True):
            path = folder / file.name
            try:
                if not path.exists():
                    path.write_bytes(content)
            except OSError as error:
                path.unlink(missing_ok=True)
                raise (DiskFull(TEMPORARY) if is_full(error) else WorkerLost(f"{path}: {error.strerror}")) from None
            files.append(File(str(path), file.name))
        return await self.worker.run(Job(job.position, job.key, job.prompt, tuple(files), job.graph))

    async def stop(self) -> None:
        await self.worker.stop()


class RayWorker:
    """The same as a LocalWorker, somewhere else."""

    again = True

    def __init__(self, ray: Any, name: str, comfy: Told, patience: float, devices: int, threads: int | None):
        self.ray, self.name, self.comfy, self.patience, self.threads = ray, name, comfy, patience, threads
        self.needs = {"num_gpus": 1, "num_cpus": 1} if devices else {"num_cpus": 1}
        self._actor: Any = None
        self._running: list[object] = []  # in the order they were sent: ComfyUI takes one at a time

    async def start(self) -> None:
        await self.stop()
        remote = self.ray.remote(**self.needs, max_concurrency=8, max_restarts=0, scheduling_strategy="SPREAD")(Actor)
        self._actor = remote.remote(self.name, self.comfy, self.patience, self.threads)
        try:
            await self._asked(self._actor.start.remote(), PLACED + max(self.patience, 60) + 60)
        except Refused as error:  # by that machine
            raise WorkerLost(str(error)) from None

    async def known(self) -> dict:
        return await self._asked(self._actor.known.remote(), None)

    async def run(self, job: Job) -> Outcome:
        token = object()
        self._running.append(token)
        try:
            contents = [await asyncio.to_thread(Path(file.path).read_bytes) for file in job.files]
            return await self._asked(self._actor.run.remote(job, contents), None, lambda: self._running[:1] == [token])
        finally:
            self._running.remove(token)

    async def stop(self) -> None:
        actor, self._actor = self._actor, None
        if actor is None:
            return
        with contextlib.suppress(Exception):  # it may be gone, or hang
            await asyncio.wait_for(_awaited(actor.stop.remote()), END + 5)
        with contextlib.suppress(Exception):  # what is left ends with it
            await asyncio.to_thread(self.ray.kill, actor)

    async def _asked(self, answer: Any, seconds: float | None, was_running=lambda: False) -> Any:
        from ray.exceptions import RayError, RayTaskError

        try:
            return await asyncio.wait_for(_awaited(answer), seconds)
        except asyncio.TimeoutError:
            raise WorkerLost("Ray finds no place for it, or its ComfyUI does not start") from None
        except RayTaskError as error:
            if isinstance(error.cause, (Refused, WorkerLost)) or type(error.cause).__module__ == WorkerLost.__module__:
                raise error.cause from None
            raise
        except RayError as error:
            raise WorkerLost(f"Ray lost it ({type(error).__name__})", was_running()) from None


async def _awaited(answer: Any) -> Any:
    return await answer


def workers(
    address: str,
    count: int | None,
    folder: str | None,
    python: str | None,
    arguments: Sequence[str],
    patience: float,
    threads: int | None,
) -> tuple[Any, list[RayWorker]]:
    """One for each device of the cluster, or `count`; where there are no devices, one for each machine."""
    ray = connect(address)
    resources = ray.cluster_resources()
    devices = int(resources.get("GPU", 0))
    machines = sum(node["Alive"] for node in ray.nodes())
    number = count or devices or machines
    room = devices or int(resources.get("CPU", 0))
    if number > room:
        ray.shutdown()
        raise Refused(f"The cluster has room for {room} workers, not for {number}.")
    made = [
        RayWorker(ray, f"ray-{each}", (folder, python, tuple(arguments)), patience, devices, threads)
        for each in range(1, number + 1)
    ]
    return ray, made
