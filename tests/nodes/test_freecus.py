"""The nodes of FreeCus, as ComfyUI calls them."""

from __future__ import annotations

import inspect

import pytest
import torch

from dit_toolkit.host import embedded
from dit_toolkit.host.part_of_run import WHOLE_RUN
from dit_toolkit.host.run import attached
from dit_toolkit.nodes.freecus import ApplyFreeCus, SubjectDescription
from dit_toolkit.tests.host.tiny import sample
from dit_toolkit.tests.nodes.calling import run_node

pytestmark = pytest.mark.comfy


def freed(model, **values):
    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(20))
    return run_node(ApplyFreeCus, **{"model": model, "vae": embedded.load_vae(), "reference": image, **values})[0]


def test_defaults_are_as_published(tiny_flux):
    (settings,) = attached(freed(tiny_flux))
    assert (settings.key_scale, settings.text_key_scale) == (1.1, 1.1)
    assert (settings.part, settings.seed) == (WHOLE_RUN, None)
    assert (settings.shift_mode, settings.reference_shift) == ("reversed", 0.459375)
    assert settings.blocks == {("double", 0), ("double", 1), ("single", 0), ("single", 1)}
    assert settings.prompts == "positive only"
    assert not attached(tiny_flux)


def test_the_seed_is_read_with_noise_of_its_own_only(tiny_flux):
    assert torch.equal(sample(freed(tiny_flux, noise_seed=9), 2), sample(freed(tiny_flux), 2))


def test_fit_reaches_the_method(tiny_flux):
    """Reference and mask are oblong, the picture is square."""
    oblong = torch.rand(1, 64, 128, 3, generator=torch.Generator().manual_seed(21))
    mask = torch.zeros(1, 64, 128)
    mask[:, 16:48, 24:104] = 1
    drawn = [sample(freed(tiny_flux, reference=oblong, subject=mask, fit=fit), 2) for fit in ("crop", "pad", "stretch")]
    for i in range(3):
        assert (drawn[i] - drawn[i - 1]).abs().mean() > 1e-4


def test_another_kind_of_noise_is_refused(tiny_flux):
    with pytest.raises(ValueError, match="own seed"):
        freed(tiny_flux, noise="pink")


def test_execute_takes_what_the_schema_names():
    for node in (ApplyFreeCus, SubjectDescription):
        assert set(inspect.signature(node.execute).parameters) == {entry.id for entry in node.GET_SCHEMA().inputs}


def words(subject="", prompt="", text="", aspect="subject"):
    return SubjectDescription.execute(subject, prompt, text, aspect).args


@pytest.mark.parametrize(
    ("prompt", "text", "joined"),
    [
        ("a teapot on a beach", "white porcelain, a blue spout", "a teapot on a beach. white porcelain, a blue spout"),
        ("a teapot on a beach. ", " white porcelain\n", "a teapot on a beach. white porcelain"),
        ("a teapot", "", "a teapot"),
        ("", "white porcelain", "white porcelain"),
        ("", "", ""),
    ],
)
def test_prompt_and_description_are_joined(prompt, text, joined):
    assert words(prompt=prompt, text=text)[0] == joined


def test_instructions_name_the_subject_and_hold_the_description():
    _, describe, keep = words("a teapot", text="A teapot stands on a table.")
    assert "the teapot" in describe
    assert "20 words" in describe
    assert "the teapot" in keep
    assert keep.endswith("A teapot stands on a table.")
    assert "pose" in keep
    _, describe, keep = words(aspect="style")
    assert "style" in describe
    assert "the subject" in keep
    assert "technique" in keep
