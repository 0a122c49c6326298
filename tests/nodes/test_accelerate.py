"""Accelerate DiT and its autotune, as ComfyUI calls them."""

from __future__ import annotations

import re

import pytest
import torch

from dit_toolkit.host import embedded
from dit_toolkit.host.accelerate.step_cache_settings import StepCache
from dit_toolkit.host.run import attached
from dit_toolkit.nodes.accelerate import AccelerateDiT, Autotune
from dit_toolkit.tests.host import tiny
from dit_toolkit.tests.nodes.calling import run_node

pytestmark = pytest.mark.comfy


def test_off_gives_the_model_back(tiny_flux):
    model, _, picked = run_node(AccelerateDiT, model=tiny_flux, quality="off")
    assert model is tiny_flux
    assert picked == "off"


def test_it_says_what_it_picked_and_where_the_numbers_come_from():
    wide = tiny.load_flux(tiny.flux_state(hidden=tiny.WIDE))  # of one head it would be the embedded model
    model, report, picked = run_node(AccelerateDiT, model=wide, quality="fast")
    assert "TaylorSeer, interval 5, first_full 1, Newton, damped 2" in picked
    assert "FLUX.1, fast" in picked
    assert "nobody has measured it on this one" in picked
    assert isinstance(attached(model)[0], StepCache)
    assert attached(wide) == ()
    assert picked in report.text()


def test_a_model_that_is_accelerated_already_is_refused(tiny_flux):
    model = run_node(AccelerateDiT, model=tiny_flux, quality="fast")[0]
    with pytest.raises(ValueError, match=r"TaylorSeer|Confidence-Gated Taylor cannot work on a model that"):
        run_node(AccelerateDiT, model=model, quality="fast")


def test_autotune_returns_a_model_a_list_of_trials_and_a_chart():
    model, clip, vae = embedded.load_model(), embedded.load_clip(), embedded.load_vae()
    prompt = clip.encode_from_tokens_scheduled(clip.tokenize("a blue heart on a white ground"))
    values = dict(
        positive=prompt, negative=prompt, latent={"samples": torch.zeros(1, 16, 12, 12)}, floor=25.0, trials=2, seed=3,
        steps=12, cfg=1.0, sampler_name="euler", scheduler="simple",
    )  # fmt: skip
    with torch.inference_mode():
        patched, report, picked, chart = run_node(Autotune, model=model, vae=vae, **values)
        assert len(picked.splitlines()) == 4
        parts = [int(part) / 100 for part in re.findall(r"(\d+)% computed", picked)]
        spent, runs = re.findall(r"Trying took (\d+) .*, as many as (.*) full runs\.$", picked)[0]
        assert int(spent) == round(12 + 12 * sum(parts))
        assert float(runs) == round(1 + sum(parts), 1)
        assert chart.shape[0] == 1
        assert attached(patched)
        tiny.sample(patched, 12, noise=tiny.latent(size=(12, 12)), positive=prompt, negative=prompt)
        assert 0 < report.runs[-1].computed < 12
        strict = run_node(Autotune, model=model, **{**values, "floor": 100.0})
        assert strict[0] is model
        assert strict[2].startswith("nothing")


def test_a_latent_of_other_channels_is_made_to_fit():
    """Empty Latent Image gives 4 channels, and ComfyUI's samplers take it all the same."""
    model, clip = embedded.load_model(), embedded.load_clip()
    prompt = clip.encode_from_tokens_scheduled(clip.tokenize("a blue heart on a white ground"))
    result = run_node(
        Autotune, model=model, positive=prompt, negative=prompt, latent={"samples": torch.zeros(1, 4, 12, 12)},
        floor=10.0, trials=1, seed=3, steps=8, cfg=1.0, sampler_name="heun", scheduler="simple",
    )  # fmt: skip
    assert attached(result[0])
