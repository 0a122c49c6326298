"""Screenshots of nodes in ComfyUI's real page, at twice their size and no wider than a help page."""

from __future__ import annotations

import time
from collections.abc import Callable

from .sheets import SPOTTED
from .studio import Picture, Studio, build, screenshot

WIDE = 300  # of a node

SAMPLED = [
    {"name": "load", "type": "DiTLoadEmbedded", "left": -900, "at": 0},
    {"name": "text", "type": "CLIPTextEncode", "left": -900, "at": 200,
     "values": {"text": SPOTTED}},
    {"name": "none", "type": "CLIPTextEncode", "left": -900, "at": 480, "values": {"text": ""}},
    {"name": "latent", "type": "EmptySD3LatentImage", "left": -900, "at": 760, "values": {"width": 96, "height": 96}},
]  # fmt: skip


def sampler(number: int, patch: str, steps: int = 28) -> tuple[list[dict], list[tuple]]:
    """A sampler behind a node, with its decoded picture, out of sight."""
    names = f"sampler{number}", f"decode{number}", f"preview{number}"
    values = {"seed": 16, "steps": steps, "cfg": 2.5, "sampler_name": "euler", "scheduler": "simple",
              "control_after_generate": "fixed"}  # fmt: skip
    nodes = [
        {"name": names[0], "type": "KSampler", "left": 900, "at": 600 * number, "values": values},
        {"name": names[1], "type": "VAEDecode", "left": 1300, "at": 600 * number},
        {"name": names[2], "type": "PreviewImage", "left": 1600, "at": 600 * number},
    ]
    links = [
        ("load", 0, patch, "model"), (patch, 0, names[0], "model"), ("text", 0, names[0], "positive"),
        ("none", 0, names[0], "negative"), ("latent", 0, names[0], "latent_image"), (names[0], 0, names[1], "samples"),
        ("load", 2, names[1], "vae"), (names[1], 0, names[2], "images"),
    ]  # fmt: skip
    return nodes, links


WORDS = [("load", 1, "text", "clip"), ("load", 1, "none", "clip")]


def run(studio: Studio) -> None:
    """Press Run, and wait until the page has shown what came."""
    studio.server.client.wait(studio.page.queue())
    studio.page.settle()
    time.sleep(1)


def timeline(studio: Studio) -> Picture:
    """The three step caches after a run."""
    seen = [
        {"name": "taylor", "type": "DiTTaylorSeer", "left": 0, "at": 0, "width": WIDE},
        {"name": "gate", "type": "DiTCGTaylor", "left": 0, "width": WIDE},
        {"name": "delta", "type": "DiTDeltaDiT", "left": 0, "width": WIDE},
    ]
    nodes, links = [*seen, *SAMPLED], [*WORDS]
    for number, each in enumerate(seen):
        more, wires = sampler(number, each["name"])
        nodes, links = [*nodes, *more], [*links, *wires]
    build(studio.page, nodes, links, hide_links=True)
    run(studio)
    return screenshot(studio.page, ["taylor", "gate", "delta"])


def acceleration_report(studio: Studio) -> Picture:
    """A report behind a sampler, with its text."""
    seen = [
        {"name": "gate", "type": "DiTCGTaylor", "left": 0, "at": 0, "width": WIDE},
        {"name": "report", "type": "DiTAccelerationReport", "left": 0, "width": WIDE},
        {"name": "words", "type": "PreviewAny", "left": 0, "width": WIDE, "height": 300},
    ]
    more, links = sampler(0, "gate")
    links += [*WORDS, ("sampler0", 0, "report", "after"), ("gate", 1, "report", "report"),
              ("report", 0, "words", "source")]  # fmt: skip
    build(studio.page, [*seen, *SAMPLED, *more], links, hide_links=True)
    run(studio)
    return screenshot(studio.page, ["gate", "report", "words"])


def easycontrol_nodes(studio: Studio) -> Picture:
    seen = [
        {
            "name": "loader",
            "type": "DiTEasyControlLoader",
            "left": 0,
            "at": 0,
            "width": WIDE,
            "values": {"file": "tiny_edge.safetensors"},
        },
        {"name": "apply", "type": "DiTEasyControlApply", "left": 0, "width": WIDE, "values": {"condition_size": 96}},
    ]
    build(studio.page, seen, [("loader", 0, "apply", "easycontrol")])
    return screenshot(studio.page, ["loader", "apply"])


def dit4sr_nodes(studio: Studio) -> Picture:
    seen = [
        {
            "name": "loader",
            "type": "DiTLoadDiT4SR",
            "left": 0,
            "at": 0,
            "width": WIDE,
            "values": {"file": "tiny_dit4sr.safetensors"},
        },
        {"name": "apply", "type": "DiTApplyDiT4SR", "left": 0, "width": WIDE},
        {"name": "sampling", "type": "DiTDiT4SRSampling", "left": 0, "width": WIDE},
        {
            "name": "words",
            "type": "DiTDiT4SRPrompt",
            "left": 0,
            "width": WIDE,
            "values": {"caption": "a cat, close up"},
        },
    ]
    build(studio.page, seen, [("loader", 0, "apply", "dit4sr"), ("apply", 0, "sampling", "model")])
    return screenshot(studio.page, ["loader", "apply", "sampling", "words"])


def panel_editor(studio: Studio) -> Picture:
    """Panel Layout with two panels, the first of them given."""
    values = {
        "panel_width": 512, "panel_height": 512, "summary": "Two photos of one woman.",
        "given": "1",
        "panel_prompts": "a woman with short red hair reads in a cafe\nthe woman walks her dog in the rain",
    }  # fmt: skip
    build(
        studio.page, [{"name": "panels", "type": "DiTPanelLayout", "left": 0, "at": 0, "width": 340, "values": values}]
    )
    time.sleep(1)
    return screenshot(studio.page, ["panels"])


SCREENS = {
    "acceleration_report": acceleration_report,
    "dit4sr_nodes": dit4sr_nodes,
    "easycontrol_nodes": easycontrol_nodes,
    "panel_editor": panel_editor,
    "timeline": timeline,
}


def files() -> dict[str, Callable[[Studio], Picture]]:
    return {f"docs/pictures/{name}.png": function for name, function in SCREENS.items()}
