"""Talk to a running ComfyUI as its own page does: HTTP for requests, a websocket for what happens meanwhile."""

from __future__ import annotations

import contextlib
import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .websocket import WebSocket

Prompt = dict[str, dict]  # API format: {node id: {"class_type": ..., "inputs": {...}}}
Progress = Callable[[str, int, int], None]  # node id, steps done, steps in all
VIDEOS = (".mp4", ".webm")

# A proxy in the environment is meant for the network, never for a server on this machine.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


class PromptRefused(ValueError):
    """ComfyUI's validation did not accept the prompt. `details` is its answer."""

    def __init__(self, details: dict):
        self.details = details
        lines = [details.get("error", {}).get("message", "Some outputs failed validation")]
        for node_id, node in details.get("node_errors", {}).items():
            for error in node["errors"]:
                lines.append(f"node {node_id} ({node['class_type']}): {error['message']}: {error['details']}")
        super().__init__("\n".join(lines))


class PromptFailed(RuntimeError):
    """A node raised an error while the prompt ran. `details` is ComfyUI's `execution_error` message."""

    def __init__(self, details: dict):
        self.details = details
        self.node_id: str = str(details.get("node_id"))
        self.class_type: str = details.get("node_type", "")
        self.exception_message: str = details.get("exception_message", "").strip()
        super().__init__(f"node {self.node_id} ({self.class_type}): {self.exception_message}")


class PromptInterrupted(RuntimeError):
    """The prompt was interrupted."""


@dataclass(frozen=True)
class Image:
    """A picture, or a clip, that a node saved or previewed."""

    node_id: str
    filename: str
    subfolder: str
    type: str


@dataclass(frozen=True)
class Result:
    prompt_id: str
    seconds: float  # as ComfyUI measured them, without the time in the queue
    outputs: dict[str, dict] = field(repr=False)  # node id -> what the node showed

    @property
    def images(self) -> list[Image]:
        return [file for file in self._files if not file.filename.endswith(VIDEOS)]

    @property
    def videos(self) -> list[Image]:
        """What Save Video saved. ComfyUI lists clips among the images."""
        return [file for file in self._files if file.filename.endswith(VIDEOS)]

    @property
    def _files(self) -> list[Image]:
        return [
            Image(node_id, image["filename"], image["subfolder"], image["type"])
            for node_id, output in self.outputs.items()
            for image in output.get("images", ())
        ]


class Client:
    """`url` is the server's address, as in `http://127.0.0.1:8188`."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.id = uuid.uuid4().hex
        self._socket: WebSocket | None = None

    def get(self, path: str, timeout: float = 60) -> bytes:
        return self._request(urllib.request.Request(self.url + path), timeout)

    def get_json(self, path: str, timeout: float = 60):
        return json.loads(self.get(path, timeout))

    def post_json(self, path: str, body: dict) -> dict:
        """Post `body`; returns the answer, `{}` when there is none. Raises PromptRefused on a 400 that says why."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        try:
            return json.loads(self._request(request, 60) or "{}")
        except urllib.error.HTTPError as error:
            text = error.read()
            if error.code != 400 or not text.startswith(b"{"):
                raise
            raise PromptRefused(json.loads(text)) from None

    def object_info(self, node: str | None = None) -> dict:
        """Every node's inputs and outputs, as the page gets them."""
        return self.get_json("/object_info" + (f"/{node}" if node else ""), timeout=180)

    def upload(self, picture: Path, name: str | None = None) -> str:
        """Put a picture into ComfyUI's input folder; returns the name that LoadImage knows it by."""
        boundary = uuid.uuid4().hex
        file_name = name or picture.name
        parts = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="overwrite"\r\n\r\ntrue\r\n'
            f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{file_name}"\r\n\r\n'
        )
        body = parts.encode() + picture.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        answer = json.loads(self._request(urllib.request.Request(self.url + "/upload/image", body, headers), 60))
        return f"{answer['subfolder']}/{answer['name']}" if answer["subfolder"] else answer["name"]

    def queue(self, prompt: Prompt, workflow: dict | None = None) -> str:
        """Queue a prompt; returns its id. `workflow`, in UI format, is written into the saved pictures."""
        self._listen()
        body: dict = {"prompt": prompt, "client_id": self.id}
        if workflow is not None:
            body["extra_data"] = {"extra_pnginfo": {"workflow": workflow}}
        answer = self.post_json("/prompt", body)
        if answer["node_errors"]:  # some outputs are fine, and ComfyUI would leave the others out
            self.post_json("/queue", {"delete": [answer["prompt_id"]]})
            self.interrupt(answer["prompt_id"])
            raise PromptRefused(answer)
        return answer["prompt_id"]

    def wait(self, prompt_id: str, timeout: float = 600, progress: Progress | None = None) -> Result:
        """Wait until a prompt has run, also one that the page queued; only our own report progress."""
        socket, deadline = self._listen(), time.monotonic() + timeout
        while time.monotonic() < deadline:
            finished = self.history(prompt_id)
            if finished:
                return _result(prompt_id, finished)
            self._follow(socket, prompt_id, progress, until=time.monotonic() + 0.5)
        raise TimeoutError(f"the prompt had not finished after {timeout:.0f} s")

    def run(self, prompt: Prompt, workflow: dict | None = None, timeout: float = 600,
            progress: Progress | None = None) -> Result:  # fmt: skip
        """Queue a prompt and wait for it. Raises PromptRefused, PromptFailed, PromptInterrupted or TimeoutError."""
        return self.wait(self.queue(prompt, workflow), timeout, progress)

    def history(self, prompt_id: str) -> dict:
        """What ComfyUI keeps about a prompt: prompt, outputs, status. Empty until the prompt has ended."""
        return self.get_json(f"/history/{prompt_id}").get(prompt_id, {})

    def fetch(self, image: Image) -> bytes:
        """The file of a picture, with the workflow inside if it was sent."""
        return self.get("/view?" + urllib.parse.urlencode(
            {"filename": image.filename, "subfolder": image.subfolder, "type": image.type}))  # fmt: skip

    def interrupt(self, prompt_id: str | None = None) -> None:
        self.post_json("/interrupt", {"prompt_id": prompt_id} if prompt_id else {})

    def free(self) -> None:
        """Drop loaded models and cached results. ComfyUI does that between two prompts, so a small one runs first."""
        self.post_json("/free", {"unload_models": True, "free_memory": True})
        self.run({"1": {"class_type": "PreviewAny", "inputs": {"source": "free"}}})

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _request(self, request: urllib.request.Request, timeout: float) -> bytes:
        with contextlib.closing(_open(request, timeout=timeout)) as response:
            return response.read()

    def _listen(self) -> WebSocket:
        if self._socket is None:
            self._socket = WebSocket(f"ws{self.url.removeprefix('http')}/ws?clientId={self.id}")
        return self._socket

    def _follow(self, socket: WebSocket, prompt_id: str, progress: Progress | None, until: float) -> None:
        """Read events until this prompt ends, or the time is up."""
        while (left := until - time.monotonic()) > 0:
            message = socket.receive(left)
            if message is None:
                return
            if isinstance(message, bytes):  # a preview image
                continue
            event = json.loads(message)
            kind, data = event["type"], event["data"]
            if data.get("prompt_id") != prompt_id:
                continue
            if kind == "progress" and progress is not None:
                progress(str(data["node"]), data["value"], data["max"])
            if kind in ("execution_success", "execution_error", "execution_interrupted"):
                return


def _result(prompt_id: str, finished: dict) -> Result:
    messages = dict(finished["status"]["messages"])
    if "execution_error" in messages:
        raise PromptFailed(messages["execution_error"])
    if "execution_interrupted" in messages:
        raise PromptInterrupted(f"interrupted at node {messages['execution_interrupted'].get('node_id')}")
    seconds = (messages["execution_success"]["timestamp"] - messages["execution_start"]["timestamp"]) / 1000
    return Result(prompt_id, seconds, finished["outputs"])
