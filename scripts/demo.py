"""`make demo`: run the example workflows on this computer and put the pictures on one sheet.

Starts a real ComfyUI, sends each row of ROWS to it, once as the workflow stands and once with every control at strength
0, and writes the pictures and `output/contact_sheet.png`.

    python -m scripts.demo --convert     renew the prompts in API format from the workflows, in the real page
"""

from __future__ import annotations

import copy
import errno
import http.client
import json
import sys
import textwrap
import time
import urllib.error
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from PIL import Image, ImageDraw, ImageFont

from . import workflows
from .browser import Browser, BrowserError
from .client import Prompt, PromptFailed, PromptInterrupted, PromptRefused
from .places import CACHE, DEMO_INPUTS, DEMO_PROMPTS, ROOT
from .server import Server, ServerError

OUTPUT = ROOT / "output"
LOG = CACHE / "demo" / "server.log"

# All that can end a demo without a fault in this file. A connection breaks in different ways, by where it was.
BROKEN = (urllib.error.URLError, ConnectionError, http.client.HTTPException, aiohttp.ClientError)
FAILURES = (ServerError, BrowserError, PromptRefused, PromptFailed, PromptInterrupted, OSError, *BROKEN)


@dataclass(frozen=True)
class Row:
    workflow: str  # its title, the stem of its file
    control: str  # picture in web/examples/, in the place of the workflow's first one (by node id)
    prompt: str
    seed: int
    subject: str | None = None  # picture in the place of the workflow's second one


OUTLINE, PHOTO = "CPU 01 canny edges to picture", "CPU 02 canny edges of a photo"
BOTH = "CPU 03 canny, subject reference"

ROWS: tuple[Row, ...] = (
    Row(
        OUTLINE,
        "drawn_doll.png",
        "a doll with long blonde hair, a blue striped shirt and an orange skirt, waving, on a pale ground",
        7,
    ),
    Row(OUTLINE, "drawn_star.png", "a red star, on a white ground", 8),
    Row(OUTLINE, "drawn_fish.png", "an orange fish, on a pale ground", 5),
    Row(PHOTO, "photo_coin.jpg", "a yellow ball, on a dark ground", 10),
    Row(BOTH, "drawn_doll.png", "a doll waving, on a dark ground", 6, subject="painted_doll.png"),
)


def main(arguments: list[str]) -> int:
    start = time.monotonic()
    try:
        if arguments == ["--convert"]:
            convert()
        else:
            print("Demo")
            sheet = demo()
            print(f"\nThe pictures are in {OUTPUT.relative_to(ROOT)}/, side by side in {sheet.relative_to(ROOT)}")
    except FAILURES as error:
        print(f"\n{sentence(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nThe demo was stopped.", file=sys.stderr)
        return 130
    print(f"Done in {time.monotonic() - start:.0f} s")
    return 0


def sentence(error: Exception) -> str:
    """What happened, and where ComfyUI's log is when that helps."""
    log = f"ComfyUI's log is {LOG.relative_to(ROOT)}."
    if isinstance(error, (ServerError, BrowserError)):
        return str(error)  # brings the end of its log along
    if isinstance(error, PromptRefused):
        return f"ComfyUI refused the example: {error}. {log}"
    if isinstance(error, PromptFailed):
        return f"The example failed in {error}. {log}"
    if isinstance(error, PromptInterrupted):
        return f"The example was stopped from elsewhere: {error}."
    if isinstance(error, TimeoutError):
        return f"ComfyUI took too long: {error}. {log}"
    if isinstance(error, BROKEN):
        return f"ComfyUI stopped in the middle of the demo ({type(error).__name__}: {error}). {log}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "The disk is full. Make room and run the demo again."
    return f"The demo could not read or write a file: {error}."


def demo() -> Path:
    """Run every row; returns the sheet."""
    OUTPUT.mkdir(exist_ok=True)
    for old in OUTPUT.glob("[0-9][0-9] *.png"):  # a picture of an earlier run would pass for one of this
        old.unlink()
    lines = []
    with Server(CACHE / "demo") as server:
        for number, row in enumerate(ROWS, start=1):
            for name in filter(None, (row.control, row.subject)):
                server.client.upload(DEMO_INPUTS / name)
            prompt = filled(workflows.read_prompt(row.workflow), row)
            pictures = []
            for kind, sent in (("with", prompt), ("without", without_control(prompt))):
                step = f"  {number}/{len(ROWS)} {row.workflow}, {kind} control"
                result = server.client.run(sent, workflows.read(row.workflow), progress=progress_line(step))
                saved = [image for image in result.images if image.type == "output"]
                file = OUTPUT / f"{number:02d} {row.workflow} - {kind}.png"
                file.write_bytes(server.client.fetch(saved[-1]))
                pictures.append(file)
                print(f"\r{step}: {result.seconds:.1f} s", flush=True)
            inputs = [DEMO_INPUTS / name for name in (row.control, row.subject) if name]
            lines.append((row, [*inputs, *pictures]))
    return contact_sheet(lines, OUTPUT / "contact_sheet.png")


def filled(prompt: Prompt, row: Row) -> Prompt:
    """The workflow's prompt with the row's pictures, words and seed."""
    prompt = copy.deepcopy(prompt)
    kinds = ("LoadImage", "DiTExamplePicture")
    loaders = [node for _, node in sorted(prompt.items(), key=by_id) if node["class_type"] in kinds]
    pictures = [row.control] if row.subject is None else [row.control, row.subject]
    if len(loaders) != len(pictures):
        raise ValueError(f"{row.workflow} loads {len(loaders)} pictures, and its row in the demo names {len(pictures)}")
    for node, picture in zip(loaders, pictures, strict=True):
        node.update(class_type="LoadImage", inputs={"image": picture})  # a file, as a user drops one in
    positive(prompt)["inputs"]["text"] = row.prompt
    for node in prompt.values():
        for name in ("seed", "noise_seed"):
            if isinstance(node["inputs"].get(name), int):
                node["inputs"][name] = row.seed
    return prompt


def positive(prompt: Prompt) -> dict:
    """The text node that the sampler's positive input, or a guider's conditioning, leads back to."""
    for node in prompt.values():
        link = node["inputs"].get("positive") or (
            node["inputs"].get("conditioning") if node["class_type"] == "BasicGuider" else None
        )
        while link:
            inputs = prompt[link[0]]["inputs"]
            if isinstance(inputs.get("text"), str):
                return prompt[link[0]]
            link = inputs.get("conditioning") or inputs.get("positive")
    raise ValueError("no text leads to a sampler")


def without_control(prompt: Prompt) -> Prompt:
    """The same prompt with every control at strength 0, which is the model without it."""
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        if node["class_type"] == "DiTEasyControlApply":
            node["inputs"]["strength"] = 0.0
    return prompt


def by_id(item: tuple[str, dict]) -> tuple[int, ...]:
    return tuple(int(part) for part in item[0].split(":"))  # "3:7" is node 7 in subgraph 3


def progress_line(step: str):
    """Rewrite one line of a terminal as the sampler goes; say nothing into a file."""

    def show(_node: str, value: int, maximum: int) -> None:
        if sys.stdout.isatty():
            print(f"\r{step}: {value}/{maximum}", end="", flush=True)

    return show


def contact_sheet(lines: list[tuple[Row, list[Path]]], file: Path) -> Path:
    """One line for each row: its pictures under their headings, and below them what was asked for."""
    side, gap, text_height, head = 384, 16, 72, 56  # 384 shows 96 pixels at four times their size
    columns = max(len(pictures) for _, pictures in lines)
    width = columns * (side + gap) + gap
    sheet = Image.new("RGB", (width, head + len(lines) * (side + text_height)), "white")
    draw, font, bold = ImageDraw.Draw(sheet), ImageFont.load_default(16), ImageFont.load_default(20)
    for index, (row, pictures) in enumerate(lines):
        top = head + index * (side + text_height)
        headings = ["control", *(["subject"] if row.subject else []), "result with", "result without"]
        headings_left = [gap + n * (side + gap) for n in range(len(pictures))]
        for heading, left, path in zip(headings, headings_left, pictures, strict=True):
            picture = Image.open(path).convert("RGB")
            picture.thumbnail((side, side), Image.Resampling.LANCZOS)
            if picture.width < side and picture.height < side:  # small pictures: whole pixels, no blur
                factor = side // max(picture.size)
                picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
            sheet.paste(picture, (left + (side - picture.width) // 2, top + (side - picture.height) // 2))
            if index == 0 or len(pictures) != len(lines[index - 1][1]):
                draw.text((left, top - 28), heading, fill="black", font=bold)
        words = textwrap.shorten(f"{row.prompt}  (seed {row.seed}; {row.workflow})", width=width // 8)
        draw.text((gap, top + side + 8), words, fill="#333333", font=font)
    sheet.save(file)
    return file


def convert() -> None:
    """Write `demo_prompts/` from `workflows/`: ComfyUI's page is the only faithful converter."""
    with Server(CACHE / "demo") as server, Browser() as browser:
        for picture in DEMO_INPUTS.iterdir():
            server.client.upload(picture)
        page = browser.open(server.url)
        DEMO_PROMPTS.mkdir(exist_ok=True)
        for stem in sorted({row.workflow for row in ROWS}):
            page.load_workflow(workflows.read(stem))
            text = json.dumps(page.prompt(), indent=2, ensure_ascii=False)
            (DEMO_PROMPTS / f"{stem}.json").write_text(text + "\n", encoding="utf-8")
            print(f"  {stem}: converted")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
