"""The prediction tap on every way in which a model of ComfyUI's predicts: flow, noise, v, and CogVideoX's v."""

from __future__ import annotations

from types import SimpleNamespace

import comfy.model_sampling
import pytest
import torch

from dit_toolkit.host.accelerate.step_cache_taps import PredictionTap, input_and_output_weight
from dit_toolkit.models.accelerate.policies import COMPUTE, FORECAST, PROBE
from dit_toolkit.models.accelerate.taylorseer import Point
from dit_toolkit.tests.host.tiny import close

pytestmark = pytest.mark.comfy

SIGMA = torch.tensor([0.3, 0.8])
X, RAW = (torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))


def sampling_of(prediction: str):
    """Core's own, with the data's spread at 0.5, so that no factor of it goes unseen."""
    sampling = type("Sampling", (getattr(comfy.model_sampling, prediction),), {})()
    sampling.sigma_data = 0.5
    return sampling


def by_definition(prediction: str, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of `x0 = A * x - B * m`, from the definitions of the parametrisations."""
    one, data = torch.ones_like(sigma), 0.5
    return {
        "CONST": (one, sigma),
        "EPS": (one, sigma),
        "V_PREDICTION": (data**2 / (sigma**2 + data**2), sigma * data / (sigma**2 + data**2).sqrt()),
        "V_PREDICTION_DDPM": (1 / (sigma**2 + 1).sqrt(), sigma / (sigma**2 + 1).sqrt()),
        "X0": (0 * one, -one),
    }[prediction]


class Visit(SimpleNamespace):
    def forecast(self, part: str):
        assert part == "prediction"
        return (self.stored,)


every_prediction = pytest.mark.parametrize("prediction", ["CONST", "EPS", "V_PREDICTION", "V_PREDICTION_DDPM", "X0"])


@every_prediction
def test_the_weights_of_input_and_output_are_those_of_the_definition(prediction):
    for found, weight in zip(
        input_and_output_weight(sampling_of(prediction), SIGMA, X), by_definition(prediction, SIGMA), strict=True
    ):
        close(found.expand(2, 1, 1, 1).flatten(), weight, atol=1e-6)


@every_prediction
@pytest.mark.parametrize("choice", [COMPUTE, PROBE])
def test_what_is_stored_is_what_the_model_put_out(prediction, choice):
    sampling = sampling_of(prediction)
    denoised = sampling.calculate_denoised(SIGMA, RAW, X)
    visit = Visit(point=Point(0, 0.3), choice=choice, captured={})
    out = PredictionTap().denoise(visit, lambda: denoised, SimpleNamespace(model_sampling=sampling), X, SIGMA)
    assert out is denoised
    assert visit.choice is COMPUTE
    close(visit.captured["prediction"][0], RAW)


@every_prediction
def test_a_forecast_output_becomes_the_denoised_latent_that_core_makes_of_it(prediction):
    sampling = sampling_of(prediction)
    visit = Visit(point=Point(0, 0.3), choice=FORECAST, captured={}, stored=RAW)
    out = PredictionTap().denoise(
        visit, lambda: pytest.fail("called"), SimpleNamespace(model_sampling=sampling), X, SIGMA
    )
    close(out, sampling.calculate_denoised(SIGMA, RAW, X))
    assert visit.choice is FORECAST
    assert not visit.captured


def test_where_the_output_has_no_weight_nothing_is_stored_or_forecast():
    """At sigma 0 the output cannot be read off the result."""
    sampling, sigma = sampling_of("EPS"), torch.zeros(2)
    visit = Visit(point=Point(0, 0.0), choice=FORECAST, captured={}, stored=RAW)
    out = PredictionTap().denoise(visit, lambda: X, SimpleNamespace(model_sampling=sampling), X, sigma)
    assert out is X
    assert visit.choice is COMPUTE
    assert not visit.captured
