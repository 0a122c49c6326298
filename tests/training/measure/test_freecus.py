"""The figures of FreeCus: the scenes are the model card's, the judge is right on the truth and sees what is wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dit_toolkit.training import world
from dit_toolkit.training.measure import freecus

SIDE = 96


@pytest.fixture(scope="module")
def chosen() -> list[freecus.Case]:
    return freecus.cases((0, 0, 1.0, 0), seed=11, count=8)


def test_scenes_are_held_out_and_prompts_leave_the_looks_to_the_reference(chosen):
    for case in chosen:
        assert world.held_out(case.scene)
        assert not any(word in case.text for word in (*world.COLOURS, *world.HAIR, "shirt", "skirt", "trousers"))
        around = np.abs(case.reference.astype(int) - freecus.GREY).max(-1) <= 255 * freecus.MASK
        assert 0.5 < around.mean() < 0.95  # the mask covers the subject, not the picture


def test_the_tally_is_right_on_the_truth_and_on_other_dolls(chosen):
    truth = np.stack([world.render(case.scene, SIDE).image for case in chosen])
    found = freecus.tally(truth, chosen)
    assert min(found[name] for name in ("colour", "shirt", "bottom", "hair", "pattern", "garment", "doll")) == 1.0
    bare = [replace(case.scene.things[0], colour=other(case.scene.things[0].colour)) for case in chosen]
    changed = [replace(case.scene, things=(doll,)) for case, doll in zip(chosen, bare, strict=True)]
    found = freecus.tally(np.stack([world.render(scene, SIDE).image for scene in changed]), chosen)
    assert (found["colour"], found["shirt"], found["bottom"], found["hair"]) == (0.0, 0.0, 1.0, 1.0)
    assert freecus.tally(np.full_like(truth, 150), chosen)["doll"] == 0.0


def other(colour: str) -> str:
    colours = list(world.COLOURS)
    return colours[(colours.index(colour) + 1) % len(colours)]


@pytest.mark.comfy
def test_drawing_is_the_node_on_and_off(chosen, monkeypatch):
    """Two steps: the same seeds without it, other pictures with it, and settings that reach it."""
    monkeypatch.setattr(freecus, "STEPS", 2)
    alone, again, carried, both = (freecus.draw(chosen[:2], s) for s in (None, None, {}, freecus.BOTH))
    assert alone.shape == (2, SIDE, SIDE, 3)
    assert alone.dtype == np.uint8
    assert np.array_equal(alone, again)
    assert np.abs(alone.astype(int) - carried).mean() > 1
    assert np.abs(both.astype(int) - carried).mean() > 1
    with pytest.raises(ValueError, match="key_scale"):
        freecus.draw(chosen[:1], {"key_scale": -1.0})
