"""Thumbnails of the workflows: what goes in, what comes out, and a ribbon with what is needed.

Nodes are looked up by their type, so that a workflow may be laid out anew. A CPU workflow is run as it stands. Of the
others, whose weights nobody had here, only what needs no weights is run: their inputs and conditions are shown, and
never a result.
"""

from __future__ import annotations

import copy
import re

import numpy as np
from PIL import Image, ImageDraw

from .. import workflows
from ..client import Prompt
from ..places import DEMO_INPUTS, WORKFLOWS
from . import sheet
from .studio import Picture, Studio

SHOWS = ("SaveImage", "PreviewImage", "DiTPosePreview")
INPUTS = ("DiTExamplePicture", "LoadImage")
RESULTS = ("VAEDecode", "DiTAccelerateAutotune", "DiTTryOnComposite")  # previews of these are results
POSES = "the poses"  # a preview that is added here
NOTE = "needs the published weights"
MOST_FRAMES = 21  # of a thumbnail that plays


def ids(prompt: Prompt, *kinds: str) -> list[str]:
    """Nodes of these kinds, in the order of the page."""
    return [name for name, node in prompt.items() if node["class_type"] in kinds]


def behind(prompt: Prompt, name: str) -> set[str]:
    """A node and all that lead to it."""
    found, waiting = set(), [name]
    while waiting:
        here = waiting.pop()
        if here in found or here not in prompt:
            continue
        found.add(here)
        waiting += [
            value[0] for value in prompt[here]["inputs"].values() if isinstance(value, list) and len(value) == 2
        ]
    return found


def without_weights(prompt: Prompt) -> Prompt:
    """The pictures that need no weights, and what leads to them."""
    kept: set[str] = set()
    for name in ids(prompt, *SHOWS):
        needed = behind(prompt, name)
        kinds = {prompt[each]["class_type"] for each in needed}
        loads = any("Load" in kind and kind not in (*INPUTS, "LoadVideo") for kind in kinds)
        if not loads and all(is_there(prompt[each]) for each in needed):
            kept |= needed
    return {name: copy.deepcopy(node) for name, node in prompt.items() if name in kept}


def given(prompt: Prompt) -> list[Picture]:
    """The example pictures that a prompt begins with, each once. Masks say nothing by themselves."""
    names: list[str] = []
    for name in ids(prompt, *INPUTS):
        inputs = prompt[name]["inputs"]
        file = inputs.get("picture") or inputs.get("image")
        if (
            isinstance(file, str)
            and (DEMO_INPUTS / file).is_file()
            and not file.startswith("mask")
            and file not in names
        ):
            names.append(file)
    return [Image.open(DEMO_INPUTS / file).convert("RGB") for file in names]


def compared(prompt: Prompt, made: dict[str, list[Picture]]) -> tuple[list[Picture], list[str]]:
    """The results, at most four, with the titles of their nodes where these say something.

    A preview counts where it shows a decoded picture itself, not a part of one, nor a map of what differs.
    """
    shown = ids(prompt, "SaveImage", "PreviewImage")
    names = [
        name
        for name in shown
        if made.get(name)
        and (prompt[name]["class_type"] == "SaveImage" or prompt[direct(prompt, name)[0]]["class_type"] in RESULTS)
    ]
    names = sorted(names, key=lambda name: prompt[name]["class_type"] == "SaveImage")[-4:]  # what is kept comes last
    titles = [prompt[name].get("_meta", {}).get("title", "") for name in names]
    pictures = [picture for name in names for picture in made[name][:4]][:4]
    telling = len(names) > 1 and len(pictures) == len(names) and not {"Save Image", "Preview Image", ""} & set(titles)
    return pictures, titles if telling else []


def direct(prompt: Prompt, name: str) -> list[str]:
    return [value[0] for value in prompt[name]["inputs"].values() if isinstance(value, list) and value[0] in prompt]


def alike(a: Picture, b: Picture) -> bool:
    """Whether two pictures show the same, whatever their size."""
    small = [np.asarray(picture.convert("RGB").resize((32, 32)), float) for picture in (a, b)]
    return float(np.abs(small[0] - small[1]).mean()) < 6


def with_poses(prompt: Prompt) -> Prompt:
    """The prompt, showing the drawn poses too, if it draws any."""
    found = ids(prompt, "DiTPoseVideo")
    shows = {POSES: {"class_type": "PreviewImage", "inputs": {"images": [found[0], 0]}}} if found else {}
    return {**prompt, **shows}


def as_written(prompt: Prompt) -> Prompt:
    """The prompt, drawing poses where they were written, not moved to a person: to find joints, weights are needed."""
    prompt = copy.deepcopy(prompt)
    for name in ids(prompt, "DiTPoseVideo"):
        inputs = prompt[name]["inputs"]
        inputs.pop("reference", None)
        inputs.update(alignment="none", prepend_reference=False, style="bold")
    return prompt


def schedule(outputs: dict[str, dict]) -> str:
    """The first run that a report tells of: "1" for a computed evaluation, "0" for a forecast one."""
    for output in outputs.values():
        for text in output.get("text", ()):
            if match := re.search(r"#[#.]{7,}", str(text)):
                return match[0].replace("#", "1").replace(".", "0")
    return ""


def moving(stem: str, inputs: list[Picture], poses: list[Picture], clip: list[Picture]) -> None:
    """A thumbnail that plays: the clip and its poses, or the picture and the poses alone."""
    count = len(clip) or len(poses)
    frames = [
        sheet.thumbnail(stem, [clip[k]], [*inputs, *poses[k : k + 1]])
        if clip
        else sheet.thumbnail(stem, [inputs[0], poses[k]], note=NOTE)
        for k in range(0, count, -(-count // MOST_FRAMES))
    ]
    sheet.save_moving(frames, WORKFLOWS / f"{stem}.jpg")


def embedded(studio: Studio, stem: str, times: dict[str, float]) -> None:
    page, workflow = studio.page, workflows.read(stem)
    page.load_workflow(workflow)
    prompt = with_poses(page.prompt())
    result = studio.server.client.run(prompt, workflow, timeout=1200)
    times[stem] = round(result.seconds, 1)
    made = studio.pictures(result)
    inputs = given(prompt)
    clips = [frames for name, frames in made.items() if prompt[name]["class_type"] == "SaveVideo"]
    if clips:
        moving(stem, inputs[:1], made.get(POSES, []), clips[-1])
        return
    results, labels = compared(prompt, made)
    strip = schedule(result.outputs)
    sheet.save(sheet.thumbnail(stem, results, inputs[:3], labels, strip=strip), WORKFLOWS / f"{stem}.jpg")


def published(studio: Studio, stem: str) -> None:
    page, workflow = studio.page, workflows.read(stem)
    page.load_workflow(workflow)
    prompt = with_poses(as_written(page.prompt()))
    inputs = given(prompt)
    some = without_weights(prompt)
    made: dict[str, list[Picture]] = {}
    if some:
        made = studio.pictures(studio.server.client.run(some))
    if POSES in made and inputs:
        moving(stem, inputs[:1], made[POSES], [])
        return
    shown = inputs[:2]
    for picture in (pictures[0] for pictures in made.values()):
        if len(shown) < 4 and not any(alike(picture, other) for other in shown):
            shown.append(picture)
    shown = shown or emblem(prompt)
    sheet.save(sheet.thumbnail(stem, shown, note=NOTE), WORKFLOWS / f"{stem}.jpg")


def is_there(node: dict) -> bool:
    """Whether the file that a node loads comes with the pack."""
    return node["class_type"] not in ("LoadImage", "LoadVideo") or (
        bool(node["inputs"].get("image")) and (DEMO_INPUTS / str(node["inputs"]["image"])).is_file()
    )


def emblem(prompt: Prompt) -> list[Picture]:
    """A drawing of the method, for workflows that begin with words alone."""
    kinds = {node["class_type"] for node in prompt.values()}
    if "DiTPanelLayout" in kinds:
        return [panels(prompt[ids(prompt, "DiTPanelLayout")[0]]["inputs"])]
    if "DiTClear" in kinds:
        return [disc()]
    if "DiTCGTaylor" in kinds:
        return [sheet.bars("1111100010000100001000010001", 440, 180)]
    if kinds & {"DiTTaylorSeer", "DiTAccelerate"}:  # one in three of 28, by noise and step
        return [sheet.bars("1000100010001000100100100101", 440, 180)]
    return []


def panels(inputs: dict) -> Picture:
    rows, columns = (1, 2) if inputs["preset"] != "custom" else (inputs["rows"], inputs["columns"])
    made = Image.new("RGB", (440, 220), sheet.DARK)
    draw = ImageDraw.Draw(made)
    wide, high = 440 / columns, 220 / rows
    for number in range(rows * columns):
        left, top = number % columns * wide, number // columns * high
        draw.rectangle((left + 4, top + 4, left + wide - 4, top + high - 4), fill=("#4a9eff", "#5fc9a8")[number % 2])
        sheet.words(draw, ("LEFT", "RIGHT")[number] if columns == 2 else str(number + 1),
                    (round(left), round(top), round(left + wide), round(top + high)), 36, "white")  # fmt: skip
    return made


def disc(side: int = 15, radius: int = 5) -> Picture:
    cell = 16
    made = Image.new("RGB", (side * cell, side * cell), sheet.DARK)
    draw, middle = ImageDraw.Draw(made), side // 2
    for y in range(side):
        for x in range(side):
            near = (y - middle) ** 2 + (x - middle) ** 2 < radius**2
            fill = "#ff9800" if y == x == middle else "#4a9eff" if near else "#363a42"
            draw.rectangle((x * cell + 1, y * cell + 1, (x + 1) * cell - 1, (y + 1) * cell - 1), fill=fill)
    return made


def make(studio: Studio, stem: str, times: dict[str, float]) -> None:
    if stem in workflows.APPS:
        workflows.copy_thumbnail(stem)
    elif workflows.is_embedded(stem):
        embedded(studio, stem, times)
    else:
        published(studio, stem)
