"""What a stranger sees of the example workflows, as far as their files say it: names, notes, sizes, links, nodes."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
from collections import defaultdict
from pathlib import Path

import pytest

from dit_toolkit.scripts import workflows
from dit_toolkit.scripts.places import BLUEPRINTS

STEMS = workflows.stems()
FILES = sorted((*workflows.WORKFLOWS.glob("*.json"), *BLUEPRINTS.glob("*.json")))
every_workflow = pytest.mark.parametrize("stem", STEMS)

# What people type into the search of the template browser, which looks at titles only.
SEARCHED = ("canny", "pose", "depth", "style", "clothes", "speed up", "consistent character", "upscale", "subject",
            "video", "try on", "LoRA", "Ghibli", "photo")  # fmt: skip
NEEDS = ("CPU", "FLUX.1", "SD3.5", "CogVideoX")


@every_workflow
def test_a_name_fits_its_card_and_says_first_what_it_needs(stem):
    """35 characters are what a card shows."""
    assert len(stem) <= 35
    assert re.fullmatch(rf"({'|'.join(map(re.escape, NEEDS))}) \d\d [a-zA-Z].+", stem)


def test_the_names_of_each_model_are_counted_from_one():
    numbers = defaultdict(list)
    for stem in STEMS:
        need, number, _ = stem.split(" ", 2)
        numbers[need].append(int(number))
    assert numbers.keys() == set(NEEDS)
    assert all(found == list(range(1, len(found) + 1)) for found in numbers.values()), numbers


@pytest.mark.parametrize("words", SEARCHED)
def test_what_people_type_finds_a_workflow(words):
    assert any(words.lower() in stem.lower() for stem in STEMS)


@every_workflow
def test_the_note_is_first_and_short(stem):
    """At the top left, eight lines at most, and none of them long."""
    workflow = workflows.read(stem)
    notes = [node for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
    assert len(notes) == 1
    left = min(node["pos"][0] for node in workflow["nodes"])
    top = min(node["pos"][1] for node in workflow["nodes"] if node["pos"][0] == left)
    assert notes[0]["pos"] == [left, top]
    lines = [line for line in notes[0]["widgets_values"][0].splitlines() if line]
    assert 3 <= len(lines) <= 8
    assert max(map(len, lines)) <= 160
    assert any("Run" in line for line in lines)


@every_workflow
def test_it_is_small_enough_to_be_read_when_it_opens(stem):
    """The page fits a template into three quarters of the window: 1200 x 750 of 1600 x 1000."""
    nodes = workflows.read(stem)["nodes"]
    width = max(node["pos"][0] + node["size"][0] for node in nodes) - min(node["pos"][0] for node in nodes)
    height = max(node["pos"][1] + node["size"][1] for node in nodes) - min(node["pos"][1] for node in nodes) + 30
    assert width <= 1790
    assert height <= 1110


@pytest.mark.comfy
def test_every_node_of_the_pack_stands_in_a_workflow():
    from dit_toolkit.nodes import DiTToolkit

    ours = {node.GET_SCHEMA().node_id for node in asyncio.run(DiTToolkit().get_node_list())}
    shown = {node["type"] for stem in STEMS for node in workflows.nodes_of(workflows.read(stem))}
    assert ours - shown == set()


# Model files


@pytest.fixture(scope="module")
def core_models() -> dict[str, set[tuple[str, str]]]:
    """Folder and address of every model file of core's own templates, by its name."""
    package = importlib.util.find_spec("comfyui_workflow_templates_json")
    if package is None or not package.submodule_search_locations:
        pytest.skip("core's templates are not installed")
    named = {model["name"] for stem in STEMS for model in workflows.models_of(workflows.read(stem))}
    found = defaultdict(set)
    for file in Path(package.submodule_search_locations[0], "templates").glob("*.json"):
        text = file.read_text(encoding="utf-8")
        if '"nodes"' not in text or not any(f'"{name}"' in text for name in named):  # reading them all takes long
            continue
        for model in workflows.models_of(json.loads(text)):
            if "/resolve/" in model.get("url", ""):
                found[model["name"]].add((model["directory"], model["url"].partition("?")[0]))
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_model_file_comes_from_where_core_gets_it(file, core_models):
    """Mirrors without a gate, for every file that one of core's templates names."""
    for model in workflows.models_of(json.loads(file.read_text(encoding="utf-8"))):
        assert "black-forest-labs" not in model["url"]
        if model["name"] in core_models:
            assert (model["directory"], model["url"]) in core_models[model["name"]], model["name"]


def test_core_has_most_of_the_large_files(core_models):
    """Says that the test above compares something."""
    ours = {model["name"] for stem in STEMS for model in workflows.models_of(workflows.read(stem))}
    assert {"flux1-dev.safetensors", "flux1-fill-dev.safetensors", "ae.safetensors", "clip_l.safetensors",
            "t5xxl_fp16.safetensors"} <= ours & core_models.keys()  # fmt: skip
