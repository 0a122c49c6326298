"""The tuned race: settings are chosen on pictures that are not judged, and nothing is measured twice."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytestmark = [pytest.mark.long, pytest.mark.comfy]

STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def arena(tiny_flux):
    from dit_toolkit.benchmarks.race.arena import Arena, Heat
    from dit_toolkit.tests.host.tiny import latent, prompt

    judged, other = (Heat(prompt(seed), latent(seed, (16, 16)), prompt(9)) for seed in (3, 4))
    return Arena("random", tiny_flux, [judged], lambda x: x[0, :3].sigmoid().movedim(0, -1).numpy(), [other])


def methods(*names):
    from dit_toolkit.benchmarks.race import grids

    return [each for each in grids.METHODS if (each.name, each.peer) in names]


def raced(arena, file, *names):
    from dit_toolkit.benchmarks.race import tuned
    from dit_toolkit.benchmarks.race.curves import Run

    rows = []
    tuned.race(arena, methods(*names), Run("euler", STEPS, 1.0), tuned.Diary(file), rows.append, lambda words: None)
    return rows


def test_a_race_that_was_stopped_goes_on_where_it_was(arena, tmp_path, monkeypatch):
    from dit_toolkit.benchmarks.race import tuned

    file, names = tmp_path / "race.jsonl", [("Fewer steps", "ComfyUI"), ("Delta-DiT", None)]
    rows = raced(arena, file, *names)
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    measured = []
    measure = tuned.Ground.measure
    monkeypatch.setattr(tuned.Ground, "measure", lambda *given: measured.append(given) or measure(*given))
    assert raced(arena, file, *names) == rows
    assert len(measured) == 1
    assert file.read_text(encoding="utf-8").splitlines()[:-1] == lines[:-1]
    stages = {json.loads(line)[0][0] for line in lines}
    assert stages == {"calibration", "judged"}
    assert {row["choice"] for row in rows if row["method"].startswith("Fewer")} == {"documented"}  # nothing to choose

    saved = tuned.save(rows, 1, 1, tmp_path / "results" / "tuned-2026-01-01-cpu.json")
    report = json.loads(saved.read_text(encoding="utf-8"))
    assert report["pictures"] == {"calibration": 1, "judged": 1}
    assert report["rows"] == rows
    assert {line["method"] for line in report["curves"]} == {"Fewer steps", "Delta-DiT"}


def test_every_setting_of_every_method_has_words_of_its_own():
    from dit_toolkit.benchmarks.race import grids

    for method in grids.METHODS:
        settings = set(method.grid) | set(method.documented)
        assert len({method.words(knobs) for knobs in settings}) == len(settings), method.name
        assert method.documented
    names = [(each.name, each.peer) for each in grids.METHODS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", [("TaylorSeer", None), ("MagCache", "diffusers"), ("TaylorSeer Lite", "diffusers")])
def test_methods_with_a_plan_draw_in_one_batch_what_they_draw_alone(arena, name):
    from dataclasses import replace

    from dit_toolkit.benchmarks.race import tuned
    from dit_toolkit.benchmarks.race.contenders import Task

    (method,), heats = methods(name), [*arena.heats, *arena.calibration]
    ground = tuned.Ground(Task(arena, "euler", STEPS, STEPS, 2.5), heats)
    knobs = (9.0, 2, 0.1) if name[0] == "MagCache" else method.documented[0]
    batch, alone = (ground.measure(replace(method, planned=planned), knobs) for planned in (True, False))
    assert batch.computed == pytest.approx(alone.computed)
    assert batch.computed < 0.95
    assert batch.psnr_db == pytest.approx(alone.psnr_db, abs=0.01)


@pytest.fixture
def task(arena):
    from dit_toolkit.benchmarks.race.contenders import Task

    return Task(arena, "euler", STEPS, STEPS)


# TeaCache


def drawn_with(task, threshold, cfg=1.0):
    """The picture with TeaCache, expecting that the output changes as the input does; and how often blocks ran."""
    from dit_toolkit.benchmarks.race import teacache
    from dit_toolkit.benchmarks.race.diffusers_flux import cached

    transformer, ran = task.arena.transformer, []
    transformer.place.evaluations = STEPS
    cache = teacache.TeaCache(transformer, np.array([1.0, 0.0]), threshold)
    hook = transformer.single_transformer_blocks[0].attn.register_forward_hook(
        lambda *_: ran.append(transformer.place.evaluation)
    )
    model = cached(task.arena.twin, cache.on, transformer.place)
    picture = task.arena.sample(model, task.arena.heats[0], STEPS, "euler", cfg)
    hook.remove()
    return picture, ran


def test_teacache_that_never_skips_changes_nothing(task):
    picture, ran = drawn_with(task, 0.0)
    assert ran == list(range(STEPS))
    assert torch.equal(picture, task.arena.sample(task.arena.twin, task.arena.heats[0], STEPS, "euler"))


def test_teacache_computes_the_first_and_the_last_evaluation_of_both_prompts(task):
    assert drawn_with(task, 1e9)[1] == [0, STEPS - 1]
    assert drawn_with(task, 1e9, 2.5)[1] == [0, 0, STEPS - 1, STEPS - 1]


def test_teacache_adds_up_what_it_expects_until_the_threshold(task):
    """Each change counts 1: with a threshold of 2.5 two evaluations are skipped, and the third is computed."""
    from dit_toolkit.benchmarks.race import teacache

    cache = teacache.TeaCache(task.arena.transformer, np.array([1.0]), 2.5)
    place, state, skipped = task.arena.transformer.place, teacache.State(), []
    place.evaluations = 9
    for place.evaluation in range(9):
        cache.decide(state, torch.ones(1, 4, 8))
        skipped.append(state.skips)
    assert skipped == [False, True, True, False, True, True, False, True, False]


def test_teacaches_polynomial_is_fitted_to_a_run_of_every_prompt(task):
    from dit_toolkit.benchmarks.race import teacache

    blocks = task.arena.transformer.transformer_blocks
    polynomial = teacache.fit(task.arena, task.arena.heats, 8, "euler", 2.5)
    assert polynomial.shape == (teacache.DEGREE + 1,)
    assert np.isfinite(polynomial).all()
    assert not blocks[0]._forward_pre_hooks


# Peers that need something of the race


def test_seacache_gets_latents_as_the_sampler_has_them(arena):
    from dit_toolkit.benchmarks.race import teacache

    x = torch.randn(1, 16, 6, 10)
    tokens, ids = arena.model.model.diffusion_model.process_img(x)
    assert torch.equal(teacache.unpacked(tokens, ids[0])[:, 0], x[0])


@pytest.mark.parametrize("name", ["SeaCache", "DBCache with steps_mask", "DBCache + FoCa", "DBCache + DMD"])
def test_peers_skip_something_and_leave_the_model_as_it_was(task, name):
    (method,) = [each for each in methods(*[(name, peer) for peer in ("diffusers", "cache-dit")])]
    knobs = (2, "FoCa") if "mask" in name else (1e9, *method.documented[0][1:])
    model, steps = method.run(task, *knobs)
    plain = task.arena.sample(task.arena.twin, task.arena.heats[0], steps, "euler")
    assert not torch.equal(task.arena.sample(model, task.arena.heats[0], steps, "euler"), plain)
    assert torch.equal(task.arena.sample(task.arena.twin, task.arena.heats[0], steps, "euler"), plain)
