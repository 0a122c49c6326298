"""Apply Re-ttention as a user meets it, on a tiny model that ComfyUI samples."""

from __future__ import annotations

import json

import pytest
import torch

pytestmark = pytest.mark.comfy

from dit_toolkit.host.accelerate.re_ttention_settings import STORAGE  # noqa: E402
from dit_toolkit.host.run import attached  # noqa: E402
from dit_toolkit.models.accelerate.re_ttention import Schedule  # noqa: E402
from dit_toolkit.nodes.re_ttention import ApplyReTtention  # noqa: E402
from dit_toolkit.nodes.step_cache import AccelerationReport  # noqa: E402
from dit_toolkit.tests.host import tiny  # noqa: E402
from dit_toolkit.tests.nodes.calling import run_node  # noqa: E402


def apply(model, **values):
    return run_node(ApplyReTtention, model=model, **values)


@pytest.mark.parametrize("neutral", [{"keep": 1.0}, {"interval": 1}])
def test_neutral_values_give_the_model_back(tiny_flux, neutral):
    patched, report = apply(tiny_flux, **neutral, min_tokens=0)
    assert patched is tiny_flux
    assert report.text() == "Re-ttention is off: the model is as it came."
    assert json.loads(report.json())["settings"] == "off"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("name", ["drift", "max_memory"])
def test_numbers_that_mean_nothing_are_answered_with_a_sentence(tiny_flux, name, value):
    with pytest.raises(ValueError, match=f"Apply Re-ttention: '{name}' must be a number from 0.0 to .*, got {value}"):
        apply(tiny_flux, **{name: value})


def test_settings_reach_the_model(tiny_flux):
    patched, _ = apply(
        tiny_flux,
        keep=0.1,
        interval=4,
        first_full=3,
        pattern="disc",
        drift=0.02,
        as_published=True,
        sigma_ratio=0.5,
        storage="8 bits",
        min_tokens=7,
        max_memory=1.5,
    )
    (settings,) = attached(patched)
    assert attached(tiny_flux) == ()
    assert (settings.keep, settings.schedule, settings.pattern) == (0.1, Schedule(3, 4, 0.5), "disc")
    assert (settings.drift, settings.clamp, settings.storage) == (0.02, False, "fp8")
    assert (settings.min_tokens, settings.max_bytes) == (7, 3 << 29)


def test_the_defaults_leave_small_pictures_alone(tiny_flux):
    patched, report = apply(tiny_flux)
    assert torch.equal(tiny.sample(patched), tiny.sample(tiny_flux))
    assert "21 tokens are fewer than min_tokens" in report.text()


@pytest.mark.parametrize("storage", STORAGE)
def test_it_acts_and_the_report_can_be_read(tiny_flux, storage):
    patched, report = apply(tiny_flux, keep=0.3, first_full=1, min_tokens=0, storage=storage)
    got = tiny.sample(patched, steps=4)
    text, values, after = AccelerationReport.execute(report, got).result
    assert after is got
    assert not torch.allclose(got, tiny.sample(tiny_flux, steps=4), atol=1e-3)
    assert "#R.." in text
    assert json.loads(values)["evaluations"] == "#R.."
    assert storage in text
