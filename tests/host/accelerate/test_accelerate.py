"""Presets and autotune: what is picked for which model, and that what is picked does what it says."""

from __future__ import annotations

import pytest
import torch

from dit_toolkit.host import embedded
from dit_toolkit.host.accelerate import accelerate
from dit_toolkit.host.accelerate.accelerate import (
    PRESETS,
    QUALITIES,
    Setting,
    accelerated,
    candidates,
    family_name,
    preset,
    tune,
)
from dit_toolkit.host.accelerate.step_cache_report import StepCacheReport
from dit_toolkit.host.run import attached
from dit_toolkit.tests.host import families, tiny

pytestmark = [pytest.mark.comfy, pytest.mark.sweep(together=True)]


@pytest.fixture(scope="module")
def shown():
    """What the embedded model draws for one prompt, as latents of its live channels."""
    model, clip = embedded.load_model(), embedded.load_clip()
    prompt = clip.encode_from_tokens_scheduled(clip.tokenize("a red star in the centre on a white ground"))
    noise = tiny.latent(seed=5, size=(12, 12))

    def sample(candidate, steps=20):
        return tiny.sample(candidate, steps, noise=noise, positive=prompt, negative=prompt)[:, :8]

    return model, sample


@pytest.mark.parametrize("name", families.FAMILIES)
@pytest.mark.parametrize("quality", QUALITIES)
def test_every_preset_runs_on_its_family_and_skips(name, quality):
    family = families.FAMILIES[name]
    model, report = family.load(), StepCacheReport("test")
    setting = preset(model, quality)
    assert setting.source
    families.sample(family, accelerated(model, setting, report), steps=12)
    run = report.runs[-1]
    assert len(run.entries) == 12
    if setting.method != "Confidence-Gated Taylor":  # on random weights nothing is predictable, and the gate stays shut
        assert run.computed < 12


def test_every_family_of_the_presets_is_one_that_a_model_is_known_by():
    known = {family_name(family.load()) for family in families.FAMILIES.values()}
    beyond = {"FLUX.1 schnell", "HiDream"}  # by the name of ComfyUI's configuration
    assert set(PRESETS) - known == beyond


@pytest.mark.parametrize("steps", [20, 28, 50])
def test_faster_presets_compute_less(steps):
    for name, table in {**PRESETS, "others": accelerate.OTHERS, "embedded": accelerate.EMBEDDED}.items():
        if {setting.method for setting in table} == {"TaylorSeer"}:
            computed = [accelerate.schedule(setting).count(steps) for setting in table]
            assert computed == sorted(computed, reverse=True), name
            assert len(set(computed)) == 3, name
        elif {setting.method for setting in table} == {"Confidence-Gated Taylor"}:
            thresholds = [setting.amount for setting in table]
            assert thresholds == sorted(set(thresholds)), name


def test_a_picture_without_numbers_is_said_at_once(shown):
    runs = []
    with pytest.raises(ValueError, match="pixels that are no numbers"):
        tune(shown[0], lambda model: torch.full((1, 4), float("nan")) if runs.append(model) is None else None, 40.0, 3)
    assert len(runs) == 1
    with pytest.raises(ValueError, match="floor must be a finite number of dB, got nan"):
        tune(*shown, float("nan"), 3)


def test_the_embedded_model_has_presets_that_were_measured_on_it(shown):
    """Known by its width."""
    assert preset(shown[0], "fast").source == accelerate.HERE
    other = tiny.load_flux(tiny.flux_state(hidden=tiny.WIDE))
    assert preset(other, "fast").source == accelerate.ELSEWHERE


def test_schnell_is_left_alone_where_quality_counts():
    state = tiny.flux_state(hidden=tiny.WIDE)
    without = {name: weight for name, weight in state.items() if not name.startswith("guidance_in")}
    model = tiny.load_flux(without)
    assert family_name(model) == "FLUX.1 schnell"
    assert accelerated(model, preset(model, "quality"), StepCacheReport("test")) is model
    report = StepCacheReport("test")
    tiny.sample(accelerated(model, preset(model, "balanced"), report), 4)
    assert [entry.computed for entry in report.runs[-1].entries] == [True, False, True, False]


def test_autotune_takes_the_setting_that_computes_least_and_keeps_the_floor(shown):
    model, sample = shown
    setting, found = tune(model, sample, 48.0, 6)
    assert len(found) == 6
    kept = [trial for trial in found if trial.psnr_db >= 48]
    assert kept
    assert len(kept) < len(found)  # else the floor decided nothing
    best = min(kept, key=lambda trial: trial.computed)
    assert (setting.method, setting.amount) == (best.setting.method, best.setting.amount)

    report = StepCacheReport("test")
    again = sample(accelerated(model, setting, report))
    assert accelerate.psnr_db(again, sample(model)) >= 48
    assert report.runs[-1].computed == round(best.computed * 20)


def test_a_floor_that_nothing_keeps_leaves_the_model_alone(shown):
    model, sample = shown
    setting, _ = tune(model, sample, 500.0, 2)
    assert setting.method == "none"
    assert accelerated(model, setting, StepCacheReport("test")) is model


def test_the_run_that_calibrates_is_the_model_itself(shown):
    model, sample = shown
    report = StepCacheReport("test")
    closed = accelerated(model, accelerate.gate(accelerate.CLOSED, "", first_full=2), report)
    assert torch.equal(sample(closed), sample(model))
    assert len(report.runs[-1].errors) > 10


def test_autotune_leaves_its_model_as_it_was(shown):
    model, sample = shown
    before = sample(model)
    tune(model, sample, 40.0, 2)
    assert attached(model) == ()
    assert torch.equal(sample(model), before)


def test_models_without_block_hooks_are_tuned_by_interval():
    family = families.FAMILIES["cogvideox"]
    _, found = tune(family.load(), lambda model: families.sample(family, model, steps=8), 0.0, 3)
    assert {trial.setting.method for trial in found} == {"TaylorSeer"}


def test_thresholds_that_are_tried_are_quantiles_of_the_errors():
    errors = [0.01 * i for i in range(1, 101)]
    tried = sorted(s.amount for s in candidates(errors) if s.method == "Confidence-Gated Taylor")
    assert tried == pytest.approx([0.51 * 1.01, 0.71 * 1.01, 0.91 * 1.01], rel=0.02)


def test_no_trials_are_refused(shown):
    with pytest.raises(ValueError, match="trials must be at least 1, got 0"):
        tune(*shown, 40.0, 0)


def test_psnr_is_that_of_the_definition():
    a, b = torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([[0.0, 0.9], [0.1, 1.0]])
    assert accelerate.psnr_db(b, a) == pytest.approx(10 * torch.log10(torch.tensor(1 / 0.005)).item(), abs=1e-4)
    assert accelerate.psnr_db(a, a) == float("inf")


def test_a_setting_reads_like_its_node():
    setting = Setting("TaylorSeer", 3, 2, "Newton, steps", 1)
    assert setting.words == "TaylorSeer, interval 3, first_full 1, Newton, steps 2"
