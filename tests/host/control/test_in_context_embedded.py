"""The In-Context LoRA of the embedded default through ComfyUI's Load LoRA and KSampler: one doll, two panels.

Pictures are judged by the world's scorer. Thresholds stand well below what weights/README.md measured with the LoRA,
and well above what was measured without.
"""

import folder_paths
import numpy as np
import pytest
import torch

from dit_toolkit.host.model_files import WEIGHTS, names, offer_loras
from dit_toolkit.training import world
from dit_toolkit.training.measure import in_context
from dit_toolkit.training.score import read_doll

pytestmark = pytest.mark.comfy

NAME = "dit_toolkit_demo_in_context.safetensors"
COUNT = 12


@pytest.fixture(scope="module")
def sets():
    return in_context.cases(COUNT, seed=61)


@pytest.fixture(scope="module", autouse=True)
def fewer_steps():
    """Than the workflows take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_context, "STEPS", 12)
        yield


@pytest.fixture(scope="module")
def drawers():
    return {"with": in_context.Drawer(), "without": in_context.Drawer(0.0)}


@pytest.fixture(scope="module")
def panels(sets, drawers):
    """Both panels from words that are silent on what the doll wears; the same seed with and without."""
    texts = [world.set_caption(scenes, named=False) for scenes in sets]
    return {name: drawer.panels(texts, seed=11) for name, drawer in drawers.items()}


def test_the_lora_is_offered_by_comfyuis_own_loader_once():
    before = folder_paths.get_folder_paths("loras")[0]
    offer_loras()
    offer_loras()
    assert NAME in folder_paths.get_filename_list("loras")
    assert folder_paths.get_folder_paths("loras").count(str(WEIGHTS / "loras")) == 1
    assert folder_paths.get_folder_paths("loras")[0] == before  # the user's own folder stays the first


def test_it_is_not_offered_as_an_easycontrol_adapter():
    offer_loras()
    assert NAME not in names("easycontrol")


def test_the_two_panels_show_the_same_doll(sets, panels):
    found = {name: in_context.tally(left, right, sets) for name, (left, right) in panels.items()}
    left, right = panels["with"]
    other = in_context.tally(np.roll(left, 1, 0), right, sets)  # what chance alone gives
    assert found["with"]["outfit"] >= 2 * max(found["without"]["outfit"], other["outfit"]), (found, other)
    assert found["with"]["outfit"] >= 0.15, found
    for part, more in (("shirt", 0.4), ("bottom", 0.25), ("pattern", 0.2)):
        assert found["with"][part] >= other[part] + more, (part, found, other)


def test_each_panel_is_as_its_part_of_the_prompt_says(sets, panels):
    found = {name: in_context.tally(left, right, sets) for name, (left, right) in panels.items()}
    assert found["with"]["dolls"] >= 0.85, found
    assert found["with"]["ground"] >= 0.8, found
    assert found["without"]["dolls"] <= 0.3, found  # the base knows 96 x 96 only


@pytest.mark.long
def test_clothes_named_in_the_first_panel_are_worn_in_both(sets, drawers):
    texts = [world.set_caption(scenes, named=True) for scenes in sets]
    left, right = drawers["with"].panels(texts, seed=11)
    found = in_context.tally(left, right, sets)
    worn = [read_doll(image) for image in right]
    named = [doll is not None and doll.colour == s[0].things[0].colour for doll, s in zip(worn, sets, strict=True)]
    assert found["outfit"] >= 0.4, found
    assert np.mean(named) >= 0.5


def test_a_given_panel_is_kept_and_its_colours_are_taken_over(sets, drawers):
    texts = [world.set_caption(scenes, named=False) for scenes in sets]
    given = np.stack([world.render(first, in_context.SIDE).image for first, _ in sets])
    left, right = drawers["with"].panels(texts, 11, given)
    found = in_context.tally(left, right, sets)
    other = in_context.tally(np.roll(left, 1, 0), right, sets)
    with torch.inference_mode():
        vae = drawers["with"].vae
        back = (vae.decode(vae.encode(torch.from_numpy(given) / 255)) * 255).numpy()
    inner = slice(None, -24)  # at the border the decoder sees the neighbour
    assert np.abs(left[:, :, inner].astype(int) - back[:, :, inner]).mean() <= 1.0
    for part in ("shirt", "bottom"):
        assert found[part] >= other[part] + 0.2, (part, found, other)
