"""The race of the accelerators: fair ground, true counts, rows that can be read."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from dit_toolkit.benchmarks import accelerators

pytestmark = pytest.mark.long

KEYS = ["method", "peer", "model", "sampler", "steps", "of", "cfg", "computed", "speedup", "efficiency", "psnr_db"]
KEYS += ["ssim", "extra_mb"]
STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def arena(tiny_flux):
    """A random model and two pictures, shown by three channels of their latents."""
    from dit_toolkit.benchmarks.race.arena import Arena, Heat
    from dit_toolkit.tests.host.tiny import latent, prompt

    heats = [Heat(prompt(seed), latent(seed, (16, 16)), prompt(9)) for seed in (3, 4)]
    return Arena("random", tiny_flux, heats, lambda x: x[0, :3].sigmoid().movedim(0, -1).numpy())


@pytest.fixture
def task(arena):
    from dit_toolkit.benchmarks.race.contenders import Task

    return Task(arena, "euler", STEPS, STEPS)


def named(name: str, peer: str | None = None):
    from dit_toolkit.benchmarks.race import contenders

    return next(each for each in contenders.chosen(()) if (each.name, each.peer) == (name, peer))


def raced(arena, *entries, steps=STEPS, rounds=1):
    from dit_toolkit.benchmarks.race.run import race

    rows = []
    race(arena, entries, "euler", steps, rounds, 1, rows.append)
    return rows


def with_knobs(contender, *knobs):
    return replace(contender, knobs=knobs)


# The ground


@pytest.mark.comfy
@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_without_a_cache_diffusers_modules_and_comfyui_draw_the_same(arena, cfg):
    heat = arena.heats[0]
    here, there = (arena.sample(model, heat, STEPS, "euler", cfg) for model in (arena.model, arena.twin))
    assert here.std() > 0.1
    assert not torch.equal(here, there)  # it was another implementation
    torch.testing.assert_close(here, there, rtol=0, atol=2e-5)


@pytest.mark.comfy
def test_every_weight_of_diffusers_is_one_of_ours(arena):
    from dit_toolkit.benchmarks.race.diffusers_flux import diffusers_state

    state = arena.model.model.diffusion_model.state_dict()
    found = diffusers_state(state)
    assert set(found) == set(arena.transformer.state_dict())
    assert sum(w.numel() for w in found.values()) == sum(w.numel() for w in state.values())


@pytest.mark.comfy
@pytest.mark.parametrize("name", ["TaylorSeer", "TaylorSeer Lite", "FirstBlockCache", "MagCache"])
def test_what_a_peer_kept_of_one_picture_does_not_reach_the_next(task, name):
    knob = {"FirstBlockCache": 0.9, "MagCache": 0.9}.get(name, 3)
    model, steps = named(name, "diffusers").run(task, knob)
    first, second = task.arena.heats
    alone = task.arena.sample(model, second, steps, "euler")
    task.arena.sample(model, first, steps, "euler")
    assert torch.equal(task.arena.sample(model, second, steps, "euler"), alone)
    plain = task.arena.sample(task.arena.twin, second, steps, "euler")
    assert not torch.equal(plain, alone)  # it acts


@pytest.mark.comfy
def test_guidance_draws_another_picture_with_two_prompts_kept_apart(arena):
    """The positive prompt first, as diffusers' pipelines do; a cache sees each in a context of its own."""
    seen = []
    transformer = arena.transformer
    hook = transformer.register_forward_pre_hook(
        lambda module, args, given: seen.append((transformer.place.prompt, len(given["hidden_states"]))),
        with_kwargs=True,
    )
    guided = arena.sample(arena.twin, arena.heats[0], 2, "euler", 2.5)
    hook.remove()
    assert seen == [("cond", 1), ("uncond", 1)] * 2
    assert not torch.equal(guided, arena.sample(arena.twin, arena.heats[0], 2, "euler"))


@pytest.mark.comfy
def test_easycache_gets_a_copy_and_the_samplers_latent_stays(task):
    from comfy.patcher_extension import WrappersMP

    model, _ = named("EasyCache", "ComfyUI").run(task, 3.0)
    model, kept, skipped = model.clone(), [], []

    def watch(executor, x, *args, **kwargs):
        before = x.clone()
        out = executor(x, *args, **kwargs)
        kept.append(torch.equal(x, before))
        return out

    def inside(executor, *args, **kwargs):
        skipped.append(False)
        return executor(*args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "inside", inside)
    wrappers = model.wrappers[WrappersMP.DIFFUSION_MODEL]
    model.wrappers[WrappersMP.DIFFUSION_MODEL] = {"watch": [watch], **wrappers}
    task.arena.sample(model, task.arena.heats[0], 12, "euler")
    assert len(skipped) < len(kept) == 12  # some were skipped
    assert all(kept)


# The rows


@pytest.mark.comfy
def test_runs_with_other_guidance_stand_in_a_table_of_their_own():
    from dit_toolkit.benchmarks.race import report

    row = report.Row("MagCache, threshold 1", "diffusers", "tiny_flux", "euler", 28, 0.5, 2.0, 40.0, 39.0, 0.9, 0)
    text = report.table([row, replace(row, cfg=2.5), replace(row, steps=14), replace(row, of=20)])
    titles = [line for line in text.splitlines() if line.startswith("**")]
    assert titles == [
        f"**tiny_flux, euler, {run}**" for run in ("28 steps, cfg 1", "28 steps, cfg 2.5", "20 steps, cfg 1")
    ]


@pytest.mark.comfy
def test_a_race_ends_in_rows_with_their_plot(arena, tmp_path):
    from dit_toolkit.benchmarks.race import report

    fewer, easy = named("Fewer steps", "ComfyUI"), with_knobs(named("EasyCache", "ComfyUI"), 3.0)
    ours = with_knobs(named("TaylorSeer at the prediction"), 2)
    rows = raced(arena, fewer, easy, ours, named("No cache", "diffusers"))
    written = report.save(rows, tmp_path, "race")

    data = json.loads(written[0].read_text(encoding="utf-8"))
    assert [list(row) for row in data] == [KEYS] * 7
    assert {(row["method"], row["peer"]) for row in data} >= {
        ("No cache", "ComfyUI"),
        ("Fewer steps, 0.50 of them", "ComfyUI"),
    }
    assert {row["steps"] for row in data if row["method"].startswith("Fewer")} == {2, 1}
    halved = next(row for row in data if row["method"].startswith("Fewer steps, 0.50"))
    assert halved["computed"] == 0.5
    assert halved["efficiency"] == pytest.approx(halved["speedup"] / 2, abs=0.002)
    assert 5 < halved["psnr_db"] < 60
    assert written[1].stat().st_size > 10_000
    text = report.table(rows)
    assert text.count("\n| ") == 8
    assert "| TaylorSeer at the prediction, interval 2 | ours |" in text


@pytest.mark.comfy
def test_a_cache_that_never_skips_wins_nothing_and_loses_nothing(arena):
    ours = with_knobs(named("TaylorSeer order 1"), 1)
    never = with_knobs(named("FirstBlockCache", "diffusers"), 0.0)
    _, own, other = raced(arena, ours, never, rounds=5)
    assert own.computed == other.computed == 1
    assert own.data()["psnr_db"] is None  # no difference at all
    assert own.ssim == 1
    assert other.psnr_db > 90  # rounding of another implementation
    assert 0.5 < own.speedup < 2


@pytest.mark.comfy
def test_what_is_computed_is_counted_by_what_runs(arena):
    prediction, module = named("TaylorSeer at the prediction"), named("TaylorSeer in every module")
    theirs = with_knobs(named("TaylorSeer", "diffusers"), 3)
    whole, every, peer = raced(arena, with_knobs(prediction, 3), with_knobs(module, 3), theirs, steps=9)[1:]
    assert whole.computed == pytest.approx(3 / 9)
    assert 3 / 9 < every.computed < 0.6  # embeddings and modulation run at every evaluation
    assert 4 / 9 < peer.computed < 0.75


@pytest.mark.comfy
def test_extra_memory_is_that_of_the_kept_features(arena):
    """Order 1 at the prediction: the derivatives of the raw output in float32, and what it takes to make them."""
    (_, row) = raced(arena, with_knobs(named("TaylorSeer at the prediction"), 2))
    latent = arena.heats[0].noise.numel() * 4
    assert latent <= row.extra_bytes <= 8 * latent


# The measures


@pytest.mark.comfy
def test_memory_counts_storages_once_and_until_they_are_gone():
    from dit_toolkit.benchmarks.race.measure import Memory

    with Memory() as memory:
        a = torch.zeros(1000)
        b = a[:10]
        assert memory.held == 4000
        del a
        assert memory.held == 4000  # a view keeps all of it
        b = b + 1
        assert memory.held == 40
    assert memory.peak == 4040
    assert b.numel() == 10


@pytest.mark.comfy
def test_quality_is_the_mean_of_the_decibels_of_each_picture():
    from dit_toolkit.benchmarks.race.measure import judge

    flat = np.full((32, 32, 3), 0.5, np.float32)
    near, far = flat + np.float32(0.01), flat + np.float32(0.1)
    assert judge([near, far], [flat, flat]).psnr_db == pytest.approx((40 + 20) / 2, abs=0.01)
    assert judge([near, flat], [flat, flat]).psnr_db == pytest.approx((40 + 100) / 2, abs=0.01)
    assert judge([flat], [flat.copy()]).psnr_db is None
    assert judge([], []).ssim is None


@pytest.mark.comfy
def test_foreground_alone_is_judged_without_the_ground():
    from dit_toolkit.benchmarks.race.measure import judge

    wanted = np.full((64, 64, 3), (245 / 255, 245 / 255, 241 / 255), np.float32)
    wanted[24:40, 24:40] = (0.8, 0.1, 0.1)
    worse = wanted.copy()
    worse[24:40, 24:40] += 0.1
    quality = judge([worse], [wanted])
    assert quality.foreground_db == pytest.approx(20, abs=0.1)
    assert quality.psnr_db == pytest.approx(20 + 10 * np.log10(16), abs=0.1)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--steps=0", "--steps must be at least 1"),
        ("--cfg=0.5", "--cfg must be at least 1"),
        ("--rounds=x", "invalid int value"),
    ],
)
def test_the_race_refuses_settings_that_cannot_be(argument, said, capsys):
    with pytest.raises(SystemExit):
        accelerators.main([argument])
    assert said in capsys.readouterr().err
