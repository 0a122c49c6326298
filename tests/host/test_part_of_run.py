"""A part of the run begins where a timestep range of ComfyUI does. That every feature acts in it: `promises.py`."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.comfy

import comfy.model_sampling  # noqa: E402
import comfy.samplers  # noqa: E402

from dit_toolkit.host.part_of_run import PartOfRun  # noqa: E402

SCHEDULERS = ("simple", "normal", "sgm_uniform", "beta", "karras", "linear_quadratic")
STEPS = (4, 10, 20)


def flow(shift):
    class Sampling(comfy.model_sampling.ModelSamplingFlux, comfy.model_sampling.CONST):
        pass

    sampling = Sampling()
    sampling.set_parameters(shift=shift)
    return sampling


def flow_of_sd3(shift):
    class Sampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    sampling = Sampling()
    sampling.set_parameters(shift=shift, multiplier=1000)
    return sampling


def eps():
    class Sampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
        pass

    return Sampling()


SAMPLINGS = {
    "flux 0.63": flow(0.63),
    "flux 1.15": flow(1.15),
    "sd3 1": flow_of_sd3(1.0),
    "sd3 3": flow_of_sd3(3.0),
    "eps": eps(),
}


def cores(sampling, sigma, **percent) -> bool:
    """Whether core uses a prompt with this timestep range at `sigma`, a tensor as samplers hand it over."""
    bounds = {f"timestep_{side}": sampling.percent_to_sigma(value) for side, value in percent.items()}
    x = torch.zeros(1, 4, 2, 2)
    prompt = {**bounds, "model_conds": {}, "uuid": None}
    return comfy.samplers.get_area_and_mult(prompt, x, sigma) is not None


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.sweep
def test_it_begins_where_cores_ranges_begin_and_ends_where_the_next_begins(name, scheduler):
    sampling, boundaries = SAMPLINGS[name], 0
    for steps in STEPS:
        sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, steps)[:-1]
        for k in range(steps + 1):
            percent = k / steps
            for sigma in sigmas.split(1):
                begins = cores(sampling, sigma, start=percent)
                if percent < 1:
                    assert PartOfRun(percent, 1.0).includes(float(sigma), sampling) == begins
                if 0 < percent < 1:
                    assert PartOfRun(0.0, percent).includes(float(sigma), sampling) != begins
                    boundaries += 1
    assert boundaries


def test_all_of_the_run_is_every_step_also_beyond_the_schedule():
    for sampling in SAMPLINGS.values():
        for sigma in (0.0, 1e-6, 1.0, 14.6, 500.0):
            assert PartOfRun().includes(sigma, sampling)


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        ((0.5, 0.5), r"start_percent \(0\.5\) must be below end_percent \(0\.5\)"),
        ((0.8, 0.3), r"start_percent \(0\.8\) must be below end_percent \(0\.3\)"),
        ((float("nan"), 1.0), "start_percent must be between 0 and 1, got nan"),
        ((0.0, float("inf")), "end_percent must be between 0 and 1, got inf"),
        ((-0.1, 1.0), "start_percent must be between 0 and 1, got -0.1"),
        ((0.0, 1.5), "end_percent must be between 0 and 1, got 1.5"),
    ],
)
def test_parts_that_mean_nothing_are_refused(part, sentence):
    with pytest.raises(ValueError, match=sentence):
        PartOfRun(*part)
