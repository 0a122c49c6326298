"""The cases that the panel editor in the page is held to are what Panel Layout really does."""

import json

import pytest

pytestmark = pytest.mark.comfy

from dit_toolkit.nodes.in_context_lora import PanelLayout  # noqa: E402
from dit_toolkit.scripts.places import ROOT  # noqa: E402

CASES = json.loads((ROOT / "tests/reference/panel_captions.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_panel_layout_gives_the_caption_of_the_case(case):
    values, expected = case["values"], case["expected"]
    if expected is None:
        with pytest.raises(ValueError, match=r"'(panel_prompts|given|tags)'"):
            PanelLayout.execute(**values)
        return
    layout, prompt, width, height = PanelLayout.execute(**values).result
    assert prompt == expected["prompt"]
    assert list(layout.tags) == expected["tags"]
    assert [index + 1 for index in layout.given] == expected["given"]
    sizes = ("rows", "columns", "panel_width", "panel_height")
    assert {size: getattr(layout, size) for size in sizes} == {size: expected[size] for size in sizes}
    assert (width, height) == (
        expected["columns"] * expected["panel_width"],
        expected["rows"] * expected["panel_height"],
    )


def test_every_preset_is_among_the_cases():
    (presets,) = (entry.options for entry in PanelLayout.GET_SCHEMA().inputs if entry.id == "preset")
    assert {case["values"]["preset"] for case in CASES} == set(presets)
