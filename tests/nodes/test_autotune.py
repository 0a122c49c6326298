"""What Accelerate DiT: Autotune hands to core's sampling, and what it compares."""

from __future__ import annotations

import re

import comfy.sample
import pytest
import torch

from dit_toolkit.host.accelerate.accelerate import psnr_db
from dit_toolkit.nodes import accelerate
from dit_toolkit.nodes.accelerate import Autotune
from dit_toolkit.tests.host import tiny
from dit_toolkit.tests.nodes.calling import run_node
from dit_toolkit.tests.nodes.test_inputs import Vae

pytestmark = pytest.mark.comfy

VALUES = dict(floor=10.0, trials=2, seed=3, steps=9, cfg=2.0, sampler_name="euler", scheduler="simple")
MASK = torch.ones(1, 1, 8, 8)
MASK[..., :4] = 0


@pytest.fixture
def sampled(monkeypatch) -> list:
    """Arguments and result of every run."""
    calls, sample = [], comfy.sample.sample

    def watched(*args, **kwargs):
        result = sample(*args, **kwargs)
        calls.append((args, kwargs, result))
        return result

    monkeypatch.setattr(comfy.sample, "sample", watched)
    return calls


def tuned(model, latent, vae=None):
    with torch.inference_mode():
        given = {"positive": tiny.prompt(), "negative": tiny.prompt(4), "latent": latent, "vae": vae}
        return run_node(Autotune, model=model, **given, **VALUES), given


def test_every_run_is_sampled_as_its_inputs_say(tiny_flux, sampled):
    latent = {"samples": torch.full((1, 16, 8, 8), 0.5), "noise_mask": MASK, "batch_index": [2]}
    _, given = tuned(tiny_flux, latent)
    assert len(sampled) == 1 + VALUES["trials"]
    noise = comfy.sample.prepare_noise(latent["samples"], VALUES["seed"], [2])
    for (_, ours, steps, cfg, sampler, scheduler, positive, negative, samples), options, _ in sampled:
        assert torch.equal(ours, noise)
        assert (steps, cfg, sampler, scheduler) == (9, 2.0, "euler", "simple")
        assert positive is given["positive"]
        assert negative is given["negative"]
        assert torch.equal(samples, latent["samples"])
        assert options["noise_mask"] is MASK
        assert options["seed"] == VALUES["seed"]


def test_what_the_mask_leaves_out_stays_as_it_came(tiny_flux, sampled):
    latent = {"samples": torch.full((1, 16, 8, 8), 0.5), "noise_mask": MASK}
    tuned(tiny_flux, latent)
    for _, _, result in sampled:
        tiny.close(result[..., :4], latent["samples"][..., :4])
        assert (result[..., 4:] - 0.5).abs().mean() > 0.1


@pytest.mark.parametrize("vae", [None, Vae()])
def test_pictures_are_compared_with_a_vae_and_latents_without(tiny_flux, sampled, vae):
    (_, _, picked, _), _ = tuned(tiny_flux, {"samples": torch.zeros(1, 16, 8, 8)}, vae)
    shown = [result if vae is None else vae.decode(result) for _, _, result in sampled]
    expected = [f"{psnr_db(each, shown[0]):.1f}" for each in shown[1:]]
    assert re.findall(r", (-?[\d.]+|inf) dB", picked.partition("\n")[2]) == expected
    assert expected[0] != expected[1]


def test_the_chart_rings_what_was_picked(tiny_flux, monkeypatch):
    drawn, draw = [], accelerate.trade_off

    def watched(points, floor, chosen):
        drawn.append((points, chosen))
        return draw(points, floor, chosen)

    monkeypatch.setattr(accelerate, "trade_off", watched)
    (_, _, picked, _), _ = tuned(tiny_flux, {"samples": torch.zeros(1, 16, 8, 8)})
    ((points, chosen),) = drawn
    assert len(points) == 2
    assert picked.startswith(f"{points[chosen][2]}. Floor")
