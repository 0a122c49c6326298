"""`make test-versions`: the pictures of all CPU demos, drawn by two versions of ComfyUI and compared bit for bit.

The page of the newer one turns the workflows into prompts. Each version draws in a process of its own, with the same
Python packages.

    python -m scripts.versions
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from . import setup, workflows
from .browser import Browser
from .places import CACHE, DEMO_INPUTS, ROOT, comfyui
from .server import Server

OLDER, NEWER = "0.27.0", "0.30.0"
FOLDER = CACHE / "versions"
PROMPTS = FOLDER / "prompts.json"


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--draw"]:
        draw(Path(arguments[1]))
        return 0
    older = ROOT / ".comfyui" / OLDER / "ComfyUI"
    setup.fetch_comfyui(older, OLDER)
    convert()
    for version, place in ((OLDER, older), (NEWER, comfyui())):
        print(f"  ComfyUI {version}", flush=True)
        child = [sys.executable, "-m", "scripts.versions", "--draw", str(FOLDER / version)]
        subprocess.run(child, cwd=ROOT, env={**os.environ, "COMFYUI_PATH": str(place)}, check=True)
    return compare()


def convert() -> None:
    """Write the prompts of all workflows that run on the embedded model."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with Server(FOLDER / "base", cpu=True, quiet=True) as server, Browser() as browser:
        upload_pictures(server)
        page = browser.open(server.url)
        prompts = {}
        for stem in filter(workflows.is_embedded, workflows.stems()):
            page.load_workflow(workflows.read(stem))
            prompts[stem] = page.prompt()
    PROMPTS.write_text(json.dumps(prompts), encoding="utf-8")


def upload_pictures(server: Server) -> None:
    for picture in DEMO_INPUTS.iterdir():
        if picture.suffix in (".png", ".jpg"):
            server.client.upload(picture)


def draw(folder: Path) -> None:
    """Every saved picture of every prompt, with the ComfyUI that COMFYUI_PATH names."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):  # one of an earlier run would pass for one of this
        old.unlink()
    with Server(folder / "base", cpu=True, quiet=True) as server:
        upload_pictures(server)
        for stem, prompt in json.loads(PROMPTS.read_text(encoding="utf-8")).items():
            result = server.client.run(prompt)
            saved = [image for image in result.images if image.type == "output"]
            for number, image in enumerate(saved):
                (folder / f"{stem} {number}.png").write_bytes(server.client.fetch(image))
            print(f"    {stem}: {len(saved)} pictures, {result.seconds:.0f} s", flush=True)


def compare() -> int:
    """Say which pictures differ; 0 where none does."""
    older, newer = ({path.name for path in (FOLDER / version).glob("*.png")} for version in (OLDER, NEWER))
    lone = sorted(older ^ newer)
    different = [name for name in sorted(older & newer) if not np.array_equal(*map(pixels, paths(name)))]
    for name in lone:
        print(f"  {name}: drawn by one of the two only")
    for name in different:
        a, b = (pixels(path).astype(int) for path in paths(name))
        print(f"  {name}: {'other size' if a.shape != b.shape else f'differs by up to {abs(a - b).max()} of 255'}")
    same = len(older & newer) - len(different)
    print(f"{same} of {len(older | newer)} pictures are the same on ComfyUI {OLDER} and {NEWER}")
    return 1 if lone or different or not same else 0


def paths(name: str) -> tuple[Path, Path]:
    return FOLDER / OLDER / name, FOLDER / NEWER / name


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
