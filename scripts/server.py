"""Start a real ComfyUI without a screen, with this pack in it.

    with Server(base) as server:
        result = server.client.run(prompt)

`base` is a folder of its own for models, input, output and settings (places.prepare_base). The API of `server.client`
is in client.py. Run as a program, this is `make serve`.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

from .client import Client
from .places import BASE, ROOT, comfyui, has_accelerator, prepare_base, python

LOG_TAIL = 30  # lines


class ServerError(RuntimeError):
    """ComfyUI did not start, or died."""


class Server:
    """A ComfyUI process, from `start` (or `with`) to `stop`. `cpu` keeps it off an accelerator that is there."""

    def __init__(
        self,
        base: Path,
        *,
        port: int | None = None,
        arguments: tuple[str, ...] = (),
        cpu: bool = False,
        quiet: bool = False,
    ):
        self.base = base
        self.port = port or _free_port()
        self.arguments = arguments
        self.cpu = cpu
        self.quiet = quiet
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = Client(self.url)
        self.log_file = base / "server.log"
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *_) -> None:
        self.stop()

    def start(self, timeout: float = 300) -> Server:
        if not _is_free(self.port):
            raise ServerError(f"Port {self.port} is in use. Stop what listens there, or choose another with PORT=...")
        if not (comfyui() / "main.py").exists():
            raise ServerError(f"There is no ComfyUI in {comfyui()}. Run `make setup`.")
        prepare_base(self.base)
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(self._command(), stdout=log, stderr=subprocess.STDOUT, cwd=self.base)
        try:
            self._wait_until_ready(timeout)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        self.client.close()
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def log(self) -> str:
        """Everything ComfyUI printed so far, without the colours."""
        return re.sub(r"\x1b\[[0-9;]*m", "", self.log_file.read_text(encoding="utf-8", errors="replace"))

    def wait(self) -> int:
        """Until the process ends."""
        assert self._process is not None, "the server is not running"
        return self._process.wait()

    def _command(self) -> list[str]:
        device = ["--cpu"] if self.cpu or not has_accelerator() else []
        return [
            *(str(python()), "-u", str(comfyui() / "main.py"), "--port", str(self.port)),
            *("--base-directory", str(self.base), "--database-url", "sqlite:///:memory:"),
            *("--disable-api-nodes", "--disable-auto-launch", *device, *self.arguments),
        ]

    def _wait_until_ready(self, timeout: float) -> None:
        start, reported = time.monotonic(), 0.0
        while not self._answers():
            seconds = time.monotonic() - start
            if self._process is None or self._process.poll() is not None:
                raise self._error("ComfyUI stopped while it started")
            if seconds > timeout:
                raise self._error(f"ComfyUI did not answer within {timeout:.0f} s")
            if seconds - reported >= 10:
                reported = seconds
                self._say(f"ComfyUI is starting ... {seconds:.0f} s")
            time.sleep(0.2)
        failed = re.findall(r"\(IMPORT FAILED\): (.+)", self.log())
        if failed:
            names = ", ".join(Path(path).name for path in failed)
            raise self._error(f"ComfyUI could not import the node pack {names}")
        self._say(f"ComfyUI is ready at {self.url} ({time.monotonic() - start:.1f} s)")

    def _answers(self) -> bool:
        try:
            self.client.get("/system_stats", timeout=5)
        except (urllib.error.URLError, OSError):
            return False
        return True

    def _error(self, sentence: str) -> ServerError:
        tail = "\n".join(self.log().splitlines()[-LOG_TAIL:])
        return ServerError(f"{sentence}. The end of its log:\n{tail}")

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(f"  {text}", flush=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def main(arguments: list[str]) -> int:
    """Serve until Ctrl-C, with the base directory that keeps its models and pictures from one run to the next."""
    text = arguments[0] if arguments else "8188"
    port = int(text) if text.isascii() and text.isdecimal() else 0
    if not 0 < port < 65536:
        print(f"PORT must be a number from 1 to 65535, not '{text}'.", file=sys.stderr)
        return 1
    try:
        with Server(BASE, port=port) as server:
            print(f"  models, input and output: {BASE.relative_to(ROOT)}\n\n{server.url}   (Ctrl-C stops)", flush=True)
            server.wait()
            print(f"ComfyUI stopped by itself. Its log is {server.log_file.relative_to(ROOT)}.", file=sys.stderr)
            return 1
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"ComfyUI could not be started: {error}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
