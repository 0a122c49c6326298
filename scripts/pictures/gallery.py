"""The gallery of the README's example of `headless/`: the command is run, and its page photographed."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from ..places import DEMO_INPUTS, ROOT, WORKFLOWS
from .studio import Picture, Studio

EXAMPLE = ROOT / "headless" / "example" / "jobs.csv"
WORKFLOW = WORKFLOWS / "CPU 01 canny edges to picture.json"
SET = ("#6.text={prompt}", "KSampler.seed={seed}", "Apply EasyControl.image={outline}")
WIDE, HIGH = 1180, 860
SEEN = "[...document.images].slice(0, 10).every(image => image.complete && image.naturalWidth)"


def gallery(studio: Studio) -> Picture:
    """Twenty jobs, from outlines and words."""
    with tempfile.TemporaryDirectory() as folder:
        bindings = [word for each in SET for word in ("--set", each)]
        command = [sys.executable, str(ROOT / "headless"), "run", str(WORKFLOW), "--table", str(EXAMPLE), "--files",
                   str(DEMO_INPUTS), "--server", studio.server.url, "--out", folder, *bindings]  # fmt: skip
        subprocess.run(command, check=True)
        page = studio.page
        size = {"width": WIDE, "height": HIGH, "deviceScaleFactor": 1, "mobile": False}
        page.call("Emulation.setDeviceMetricsOverride", **size)
        page.call("Page.navigate", url=Path(folder, "index.html").as_uri())
        page.wait_until(f"document.images.length && {SEEN}", "the gallery shows its pictures")
        data = page.call("Page.captureScreenshot", format="png")["data"]
        page.call("Emulation.clearDeviceMetricsOverride")
        page.open(studio.server.url)
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


def files() -> dict[str, Callable[[Studio], Picture]]:
    return {"docs/pictures/headless_gallery.jpg": gallery}
