"""The race of the accelerators: fair ground, true counts, rows that can be read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dit_toolkit.benchmarks import accelerators

pytestmark = pytest.mark.long

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


def peer(name: str, knobs):
    """What runs under a name in the race with `knobs`."""
    from dit_toolkit.benchmarks.race import grids

    return next(each.run for each in grids.METHODS if each.name == name and each.peer is not None), knobs


def measured(arena, *contenders, steps=STEPS, rounds=1):
    from dit_toolkit.benchmarks.race.cost import race

    rows = []
    race(arena, contenders, steps, rounds, 1, rows.append)
    return rows


def ours(**values):
    from dit_toolkit.benchmarks.race import cost
    from dit_toolkit.nodes.step_cache import TaylorSeer

    return cost.ours("TaylorSeer", TaylorSeer, **values)


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
@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("TaylorSeer", (3, 1, 3, "forecast")),
        ("TaylorSeer Lite", (3, 1, 3, "forecast")),
        ("FirstBlockCache", (0.9,)),
        ("MagCache", (0.9, 5, 0.1)),
    ],
)
def test_what_a_peer_kept_of_one_picture_does_not_reach_the_next(task, name, knobs):
    run, knobs = peer(name, knobs)
    model, steps = run(task, *knobs)
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

    from dit_toolkit.benchmarks.race.contenders import easycache

    model, _ = easycache(task, 3.0)
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


# What it costs


@pytest.mark.comfy
def test_everybody_skips_about_two_of_three_and_has_a_row(arena):
    from dit_toolkit.benchmarks.race import cost

    found = measured(arena, *cost.chosen(["Fewer", "TaylorSeer", "Delta"]), steps=10)
    assert [row["method"] for row in found][:3] == ["Fewer steps", "TaylorSeer", "TaylorSeer Lite"]
    for row in found:
        assert 0.25 < row["computed"] < 0.65, row
        assert row["efficiency"] == pytest.approx(row["speedup"] * row["computed"], abs=0.002)
    text = cost.table(found)
    assert text.count("\n| ") == len(found)
    assert "| TaylorSeer, prediction | ours | 0.3" in text


@pytest.mark.comfy
def test_a_cache_that_never_skips_wins_nothing_and_loses_nothing(arena):
    from dit_toolkit.benchmarks.race import cost
    from dit_toolkit.benchmarks.race.contenders import first_block_cache

    never = cost.of_diffusers("FirstBlockCache", first_block_cache, 0.0)
    own, other = measured(arena, ours(interval=1), never, rounds=5)
    assert own["computed"] == other["computed"] == 1
    assert 0.5 < own["speedup"] < 2


@pytest.mark.comfy
def test_what_is_computed_is_counted_by_what_runs(arena):
    from dit_toolkit.benchmarks.race import cost

    (theirs,) = [each for each in cost.CONTENDERS if (each.name, each.peer) == ("TaylorSeer", "diffusers")]
    whole, every, other = measured(
        arena, ours(interval=3, order=1), ours(interval=3, order=1, tap="every module"), theirs, steps=9
    )
    assert whole["computed"] == pytest.approx(3 / 9, abs=1e-4)
    assert 3 / 9 < every["computed"] < 0.6  # embeddings and modulation run at every evaluation
    assert 4 / 9 < other["computed"] < 0.75


@pytest.mark.comfy
def test_extra_memory_is_that_of_the_kept_features(arena):
    """Order 1 at the prediction: the derivatives of the raw output in float32, and what it takes to make them."""
    from dit_toolkit.benchmarks.race.cost import MB

    (row,) = measured(arena, ours(interval=2, order=1))
    latent = arena.heats[0].noise.numel() * 4 / MB
    assert latent - 0.001 <= row["extra_mb"] <= 8 * latent


@pytest.mark.comfy
def test_the_random_model_has_all_blocks_of_flux1_and_the_weights_of_two():
    from dit_toolkit.benchmarks.race import arena

    shaped = arena.flux1_shape(arena.Shape(128, 19, 38, 2, 2, 4), torch.float32)
    flux = shaped.model.model.diffusion_model
    assert (len(flux.double_blocks), len(flux.single_blocks)) == (19, 38)
    assert len({id(block) for block in [*flux.double_blocks, *flux.single_blocks]}) == 2
    assert torch.isfinite(shaped.sample(shaped.model, shaped.heats[0], 2, "euler")).all()


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
