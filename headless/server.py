"""One ComfyUI over HTTP: what it knows, files to it, a prompt, and what came of it.

A websocket tells what happens meanwhile. A server that says nothing for `patience` seconds while it has a prompt of
ours is taken to hang.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import urllib.parse
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from .bindings import UPLOADED, File
from .errors import DiskFull, JobFailed, OutOfMemory, WorkerLost, says_full
from .plan import Job

ANSWER = 60  # seconds for a request that computes nothing
NODE_LIST = 300  # seconds for /object_info: packs look into folders of models
UPLOAD_TRIES = 10
BROKEN = (aiohttp.ClientError, ConnectionError, asyncio.TimeoutError)


@dataclass
class Run:
    """A prompt that the server has."""

    ended: asyncio.Future
    started: float | None = None
    seconds: float | None = None
    reused: set[str] = field(default_factory=set)

    @property
    def running(self) -> bool:
        """Whether the server computes it now, as far as it has told: neither before nor after."""
        return self.started is not None and self.seconds is None


@dataclass(frozen=True)
class Outcome:
    """What a job gave: files with their names, and what it took."""

    files: tuple[tuple[str, bytes], ...]
    seconds: float
    nodes: int
    reused: int


class Server:
    """A connection, from `connect` to `close`. `url` as in `http://127.0.0.1:8188`."""

    def __init__(self, url: str, patience: float):
        self.url, self.patience = url.rstrip("/"), patience
        self._runs: dict[str, Run] = {}
        self._uploaded: set[str] = set()
        self._heard = time.monotonic()
        self._session: aiohttp.ClientSession | None = None
        self._tasks: list[asyncio.Task] = []
        self._forgetting: set[asyncio.Task] = set()

    async def connect(self) -> None:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER))  # no proxy: it asks for none
        self._client = uuid.uuid4().hex
        try:
            address = f"ws{self.url.removeprefix('http')}/ws?clientId={self._client}"
            self._socket = await self._session.ws_connect(address, max_msg_size=0, heartbeat=None)
        except BROKEN as error:
            await self.close()
            raise WorkerLost(f"{self.url} does not answer: {error}") from None
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._watch())]

    async def close(self) -> None:
        await asyncio.gather(*self._forgetting, return_exceptions=True)
        for task in self._tasks:
            task.cancel()
        self._tasks = []
        if self._session is not None:
            await self._session.close()
            self._session = None

    @property
    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise WorkerLost(f"{self.url} is not connected")
        return self._session

    async def known(self) -> dict:
        """The nodes of this server, with their inputs."""
        try:
            return await self._get_json("/object_info", NODE_LIST)
        except BROKEN as error:
            raise WorkerLost(self._broke(error)) from None

    def _broke(self, error: BaseException) -> str:
        return f"the connection to {self.url} broke ({error or type(error).__name__})"

    async def run(self, job: Job) -> Outcome:
        """Raises JobFailed, WorkerLost, OutOfMemory or DiskFull."""
        prompt_id = str(uuid.uuid4())
        run = self._runs[prompt_id] = Run(asyncio.get_running_loop().create_future())
        if len(self._runs) == 1:
            self._heard = time.monotonic()
        try:
            await self._upload(job.files)
            await self._queue(job, prompt_id)
            await run.ended
            finished = (await self._get_json(f"/history/{prompt_id}")).get(prompt_id)
            if finished is None:
                raise WorkerLost(f"{self.url} has no record of the job")
            _raise(finished["status"]["messages"], job)
            files = [(entry["filename"], await self._file(entry)) for entry in saved(finished["outputs"])]
            seconds = run.seconds if run.seconds is not None else 0.0
            return Outcome(tuple(files), seconds, len(job.prompt), len(run.reused & job.prompt.keys()))
        except BROKEN as error:
            raise WorkerLost(self._broke(error), run.running) from None
        except OutOfMemory:
            await self._post("/free", {"unload_models": True, "free_memory": True})
            raise
        except WorkerLost as error:
            error.started = error.started or run.running
            raise
        except asyncio.CancelledError:  # `close` waits for it
            forgetting = asyncio.create_task(self._forget(prompt_id))
            self._forgetting.add(forgetting)
            forgetting.add_done_callback(self._forgetting.discard)
            raise
        finally:
            self._runs.pop(prompt_id, None)

    async def _queue(self, job: Job, prompt_id: str) -> None:
        extra = {"extra_pnginfo": {"workflow": job.graph}} if job.graph else {}
        body = {"prompt": job.prompt, "client_id": self._client, "prompt_id": prompt_id, "extra_data": extra}
        async with self._http.post(f"{self.url}/prompt", json=body) as response:
            if response.status not in (200, 400):
                raise WorkerLost(f"{self.url} answers with {response.status}")
            answer = await response.json(content_type=None)
        if response.status == 400 or answer.get("node_errors"):
            if response.status == 200:  # some outputs are fine, and ComfyUI would leave the others out
                await self._forget(answer["prompt_id"])
            raise JobFailed(refusal(answer, job))
        if answer["prompt_id"] != prompt_id:
            await self._forget(answer["prompt_id"])
            raise WorkerLost(f"{self.url} is too old: ComfyUI 0.30.0 or newer is needed")

    async def _forget(self, prompt_id: str) -> None:
        """The prompt out of its queue, or stopped."""
        await self._post("/queue", {"delete": [prompt_id]})
        await self._post("/interrupt", {"prompt_id": prompt_id})

    async def _post(self, path: str, body: dict) -> None:
        """Tell a server that may be gone."""
        if self._session is not None:
            with contextlib.suppress(*BROKEN, RuntimeError):
                async with self._session.post(self.url + path, json=body, timeout=aiohttp.ClientTimeout(total=5)):
                    pass

    async def _upload(self, files: Iterable[File]) -> None:
        """Files go into ComfyUI's input folder, each once. ComfyUI itself sees to it that a name means one content."""
        for file in files:
            if file.name in self._uploaded:
                continue
            try:
                data = await asyncio.to_thread(Path(file.path).read_bytes)
            except OSError as error:
                raise JobFailed(f"{Path(file.path).name} cannot be read: {error.strerror}") from None
            for _ in range(UPLOAD_TRIES):
                if await self._sent(file, data) == file.name:
                    self._uploaded.add(file.name)
                    break
                await asyncio.sleep(0.5)  # another worker with the same input folder was still writing it
            else:
                raise JobFailed(f"ComfyUI has another file named {file.name} in its input folder {UPLOADED}. Remove it")

    async def _sent(self, file: File, data: bytes) -> str:
        """Give a file to ComfyUI; returns the name that it has there: another one where the content differs."""
        form = aiohttp.FormData()
        form.add_field("subfolder", UPLOADED)
        form.add_field("type", "input")
        form.add_field("image", data, filename=file.name)
        async with self._http.post(f"{self.url}/upload/image", data=form) as response:
            if response.status != 200:
                raise JobFailed(f"ComfyUI does not take the file {Path(file.path).name} ({response.status})")
            return (await response.json())["name"]

    async def _get_json(self, path: str, seconds: float = ANSWER) -> dict:
        async with self._http.get(self.url + path, timeout=aiohttp.ClientTimeout(total=seconds)) as response:
            if response.status != 200:
                raise WorkerLost(f"{self.url} answers with {response.status}")
            return await response.json()

    async def _file(self, entry: dict) -> bytes:
        query = urllib.parse.urlencode({name: entry.get(name, "") for name in ("filename", "subfolder", "type")})
        timeout = aiohttp.ClientTimeout(total=None, sock_read=ANSWER)  # a long video may take its time
        async with self._http.get(f"{self.url}/view?{query}", timeout=timeout) as response:
            if response.status != 200:
                raise WorkerLost(f"{self.url} does not give the file {entry['filename']} ({response.status})")
            return await response.read()

    async def _listen(self) -> None:
        async for message in self._socket:
            if message.type != aiohttp.WSMsgType.TEXT:  # a preview, sent to us alone
                self._heard = time.monotonic()
                continue
            event = json.loads(message.data)
            kind, data = event.get("type"), event.get("data") or {}
            run = self._runs.get(data.get("prompt_id", ""))
            if run is None or run.ended.done():  # packs that watch the machine speak all the time
                continue
            self._heard = time.monotonic()
            if kind == "execution_start":
                run.started = time.monotonic()
            elif kind == "execution_cached":
                run.reused |= set(data["nodes"])
            elif kind in ("execution_success", "execution_error", "execution_interrupted") and run.started:
                run.seconds = time.monotonic() - run.started
            elif kind == "executing" and data.get("node") is None:  # only now the result is in the history
                run.ended.set_result(None)
        self._break(f"{self.url} closed the connection")

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self.patience / 4))
            if not self._runs or time.monotonic() - self._heard <= self.patience:
                continue
            if not any(run.started for run in self._runs.values()) and await self._waits():
                self._heard = time.monotonic()
            else:
                self._break(f"{self.url} said nothing for {self.patience:g} s")

    async def _waits(self) -> bool:
        """Whether our prompts stand behind those of somebody else."""
        try:
            pending = (await self._get_json("/queue"))["queue_pending"]
        except (*BROKEN, WorkerLost):
            return False
        return bool(self._runs.keys() & {entry[1] for entry in pending})

    def _break(self, sentence: str) -> None:
        for run in self._runs.values():
            if not run.ended.done():
                run.ended.set_exception(WorkerLost(sentence, run.running))


def saved(outputs: dict) -> list[dict]:
    """The files that a prompt saved; where it saved none, those that it showed."""
    lists = [value for output in outputs.values() for value in output.values() if isinstance(value, list)]
    files = [entry for values in lists for entry in values if isinstance(entry, dict) and entry.get("filename")]
    unique = {(entry["filename"], entry.get("subfolder", ""), entry.get("type")): entry for entry in files}.values()
    return [entry for entry in unique if entry.get("type") == "output"] or [
        entry for entry in unique if entry.get("type") == "temp"
    ]


def _raise(messages: list, job: Job) -> None:
    """What ended the prompt, unless it is success."""
    found = dict(messages)
    if error := found.get("execution_error"):
        text = " ".join(str(error.get("exception_message", "")).split())
        node = job.prompt.get(str(error.get("node_id")), {})
        title = node.get("_meta", {}).get("title") or error.get("node_type", "a node")
        if (
            "OutOfMemory" in str(error.get("exception_type"))
            or "out of memory" in text.lower()
            or "Allocation on device" in text
        ):
            raise OutOfMemory("its memory did not suffice", True)
        if says_full(text):
            raise DiskFull("a disk that ComfyUI writes to")
        raise JobFailed(f"{title}: {text or error.get('exception_type', 'an error without a text')}")
    if "execution_interrupted" in found:
        raise WorkerLost("it was interrupted from elsewhere", True)


def refusal(answer: dict, job: Job) -> str:
    """Why ComfyUI does not take a prompt."""
    errors = [
        f"{job.prompt.get(node_id, {}).get('_meta', {}).get('title', node_id)}: {error['message']} ({error['details']})"
        for node_id, node in (answer.get("node_errors") or {}).items()
        for error in node["errors"]
    ]
    message = (
        (answer.get("error") or {}).get("message", "ComfyUI does not take the job")
        if isinstance(answer.get("error"), dict)
        else str(answer.get("error"))
    )
    return "; ".join(errors) or message
