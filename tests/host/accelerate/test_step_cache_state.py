"""What a step cache keeps: of one run only, never written to, as much as was said, and nothing afterwards."""

from __future__ import annotations

import gc
import weakref

import comfy.model_management
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.k_diffusion.sampling import sample_euler
from comfy.patcher_extension import WrappersMP

from dit_toolkit.host.accelerate import step_cache_run
from dit_toolkit.host.accelerate.report import NodeReport
from dit_toolkit.host.accelerate.step_cache_run import History, Lane, StepCacheRun
from dit_toolkit.host.accelerate.step_cache_taps import ModuleTap, SpanTap, block_hooks
from dit_toolkit.host.resting import Shelf
from dit_toolkit.host.run import Run
from dit_toolkit.models.accelerate.cg_taylor import FirstBlockGate
from dit_toolkit.models.accelerate.delta_dit import Stages
from dit_toolkit.models.accelerate.policies import Interval, Listed
from dit_toolkit.models.accelerate.taylorseer import Forecaster, Point
from dit_toolkit.tests.host.accelerate.caching import TAPS, cached, last_run, settings_of, strip
from dit_toolkit.tests.host.tiny import HIDDEN, close, latent, prompt, sample

pytestmark = [pytest.mark.comfy, pytest.mark.sweep(together=True)]

every_tap = pytest.mark.parametrize("tap", TAPS)
TOKENS = 16  # of a picture of 8 x 8
LATENT = 16 * 8 * 8
FLOAT = 4


def gate_for(tap: str, threshold=1e6, warm_up=2) -> FirstBlockGate:
    """Wide open, unless said otherwise."""
    return FirstBlockGate(threshold, warm_up, compare="residual" if tap == "gated residual" else "output")


def policy_for(tap: str):
    """One that forecasts at every tap."""
    return gate_for(tap) if tap.startswith("gated") else Interval(3, 2)


def accelerated(model, tap, order=1, **settings):
    return cached(model, policy_for(tap), tap, order, **settings)


class Broken(RuntimeError):
    pass


def broken_at(model, evaluation: int, error: type[BaseException]):
    """`model`, whose second block raises in one evaluation: some of it is computed by then. Counts from now on."""
    seen = [-1]

    def count(executor, *args, **kwargs):
        seen[0] += 1
        return executor(*args, **kwargs)

    def fail(executor, *args, **kwargs):
        if seen[0] == evaluation:
            raise error()
        return executor(*args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "broken", count)
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "broken", fail)
    return model


@pytest.mark.parametrize(
    ("tap", "error"),
    [("last block", Broken), ("gated", comfy.model_management.InterruptProcessingException)],
)
def test_a_run_that_broke_off_is_reported_as_such(tiny_flux, tap, error):
    """In the 5th evaluation, which is computed. The next run on the same MODEL is a fresh one."""
    policy = gate_for(tap, warm_up=5) if tap.startswith("gated") else Listed.parse("0, 1, 4, 7")
    model = cached(broken_at(tiny_flux, 4, error), policy, tap, 1)
    with pytest.raises(error):
        sample(model, 8, cfg=2.0)
    assert last_run(model).interrupted
    assert len(last_run(model).entries) == 4
    out = sample(model, 8, cfg=2.0)
    assert not last_run(model).interrupted
    assert torch.equal(out, sample(cached(tiny_flux, policy, tap, 1), 8, cfg=2.0))


def test_nothing_is_recorded_of_a_call_that_broke_off(tiny_flux):
    """An interrupt may come from inside any layer: the histories are those of before."""
    lanes = []

    def last(executor, *args, **kwargs):
        try:
            return executor(*args, **kwargs)
        except Broken:
            lanes.extend(lane for run in runs for lane in run.run.lanes_of(run))
            raise

    runs = []
    original = StepCacheRun.install
    model = cached(broken_at(tiny_flux, 2, Broken), Interval(1, 1), "last block", 1)
    model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "last", last)
    try:
        StepCacheRun.install = lambda self, options: (runs.append(self), original(self, options))[1]
        with pytest.raises(Broken):
            sample(model, 6)
    finally:
        StepCacheRun.install = original
    (lane,) = lanes
    assert lane.full == 2
    assert [point.index for history in lane.histories.values() for point in history.points] == [1, 0]


def test_clones_with_other_settings_do_not_know_each_other(tiny_flux):
    first = cached(tiny_flux, Interval(2, 1))
    second = cached(tiny_flux, Interval(3, 1), order=1)
    expected = sample(first, 6), sample(second, 6)
    assert not torch.equal(*expected)
    for _ in range(2):
        assert torch.equal(sample(first, 6), expected[0])
        assert torch.equal(sample(second, 6), expected[1])
    assert (strip(first), strip(second)) == ("#.#.#.", "#..#..")
    clone = first.clone()
    assert torch.equal(sample(clone, 6), expected[0])
    assert settings_of(clone) is settings_of(first)
    assert torch.equal(sample(tiny_flux, 6), sample(tiny_flux.clone(), 6))


def test_two_samplers_in_one_graph_have_a_run_each(tiny_flux):
    """As a base pass and a refining pass: what the first stored is nothing to the second."""
    model = cached(tiny_flux, Interval(3, 2), "last block", 1)
    first = sample(model, 6)
    refined = img2img(model, first, 0.5)
    assert [run.number for run in settings_of(model).report.runs] == [1, 2]
    fresh = cached(tiny_flux, Interval(3, 2), "last block", 1)
    assert torch.equal(refined, img2img(fresh, first, 0.5))


def img2img(model, picture, denoise, steps=6):
    return comfy.sample.sample(
        model,
        latent(seed=7, size=picture.shape[-2:]),
        steps,
        1.0,
        "euler",
        "simple",
        prompt(),
        prompt(4),
        picture,
        denoise=denoise,
        disable_pbar=True,
        seed=0,
    )


@every_tap
def test_a_run_that_begins_late_counts_from_its_first_evaluation(tiny_flux, tap):
    """denoise 0.3: all of it lies in the last part of the noise schedule."""
    model = accelerated(tiny_flux, tap)
    picture = latent(seed=20, size=(8, 8))
    out = img2img(model, picture, 0.3)
    assert torch.isfinite(out).all()
    assert last_run(model).entries[0].sigma < 0.7
    assert strip(model) == ("##...." if tap.startswith("gated") else "##..#.")
    change = (out - img2img(tiny_flux, picture, 0.3)).abs().mean()
    assert 1e-5 < change < 1


def test_a_late_run_of_delta_dit_skips_front_blocks_from_the_start(tiny_flux):
    """The stage is a place in the model's noise schedule, not in the run."""
    model = cached(tiny_flux, Interval(2, 1), "span")
    kept = watched_histories(model, lambda: img2img(model, latent(seed=20, size=(8, 8)), 0.3))
    assert {name for name, *_ in kept} == {"0:3"}


def restarted(model, x, sigmas, extra_args=None, callback=None, disable=None, **_):
    """Two Euler runs over the same sigmas, as restart sampling and refiners within one run do."""
    sample_euler(model, x, sigmas, extra_args, None, disable)
    return sample_euler(model, x, sigmas, extra_args, None, disable)


@every_tap
@pytest.mark.parametrize("first", [1, 3])
def test_when_sigma_rises_everything_starts_anew(tiny_flux, tap, first):
    """The second half is bit for bit a run of its own, warm-up and authors' rule for early derivatives included."""
    noise = latent(seed=7, size=(8, 8))
    sigmas = comfy.samplers.calculate_sigmas(tiny_flux.get_model_object("model_sampling"), "simple", 7)

    def run(function):
        policy = gate_for(tap, warm_up=first) if tap.startswith("gated") else Interval(3, first)
        model = cached(tiny_flux, policy, tap, Forecaster(1, derivatives_from=first - 1))
        args = prompt(), prompt(4), torch.zeros_like(noise)
        sampler = comfy.samplers.KSAMPLER(function)
        return model, comfy.sample.sample_custom(model, noise, 1.0, sampler, sigmas, *args, disable_pbar=True, seed=0)

    once, expected = run(sample_euler)
    twice, out = run(restarted)
    assert "." in strip(once)
    assert strip(twice) == strip(once) * 2
    assert last_run(twice).notes == ["Started anew at evaluation 7: sigma rose."]
    assert torch.equal(out, expected)


def test_an_unordered_schedule_guards_no_last_steps_and_says_so(tiny_flux):
    sigmas = torch.tensor([1.0, 0.8, 0.6, 0.9, 0.6, 0.4, 0.0])
    model = cached(tiny_flux, Interval(2, 1))
    noise = latent(seed=7, size=(8, 8))
    sampler = comfy.samplers.sampler_object("euler")
    args = prompt(), prompt(4), torch.zeros_like(noise)
    comfy.sample.sample_custom(model, noise, 1.0, sampler, sigmas, *args, disable_pbar=True, seed=0)
    assert strip(model) == "#.##.#"
    assert last_run(model).notes[0].startswith("The schedule does not fall evenly to its end")


# what is stored


def watched_histories(model, run) -> list[tuple[str, int, tuple, list]]:
    """Every tensor that any history was given: (name of the part, evaluation, tensors, copies of them)."""
    kept = []
    add = History.add

    def keep(self, point, values):
        add(self, point, values)
        name = next(n for r in runs for lane in r.run.lanes_of(r) for n, h in lane.histories.items() if h is self)
        kept.append((name, point.index, values, [x.clone() for x in values]))

    runs = []
    install = StepCacheRun.install
    StepCacheRun.install = lambda self, options: (runs.append(self), install(self, options))[1]
    History.add = keep
    try:
        run()
    finally:
        History.add, StepCacheRun.install = add, install
    return kept


def with_residuals(model, scale=3.0, at=("input", "output"), only_from=0):
    """`model` with a ControlNet's residuals, added in place behind every block."""
    seen = [-1]

    def count(executor, *args, **kwargs):
        seen[0] += 1
        return executor(*args, **kwargs)

    def add(executor, x, t, c_concat, c_crossattn, control, options, **kwargs):
        residual = scale * torch.randn(1, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))
        control = {"input": [], "output": []} | {place: [residual, residual] for place in at if seen[0] >= only_from}
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "control", count)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "control", add)
    return model


@every_tap
@pytest.mark.parametrize("control", [False, True])
def test_what_is_stored_never_changes(tiny_flux, tap, control):
    """Blocks write into their input, ControlNets into what a block returned, samplers into x."""
    model = accelerated(with_residuals(tiny_flux) if control else tiny_flux, tap)
    kept = watched_histories(model, lambda: sample(model, 8, cfg=2.0))
    assert len(kept) >= 4
    for name, index, values, copies in kept:
        assert all(torch.equal(a, b) for a, b in zip(values, copies, strict=True)), (name, index)
        assert all(value.abs().max() > 0 for value in values)  # a residual of a stream with itself would be 0


@every_tap
def test_neutral_with_a_controlnet_is_the_controlnet(tiny_flux, tap):
    policy = gate_for(tap, 1e-12, 1) if tap.startswith("gated") else Interval(1, 1)
    plain = with_residuals(tiny_flux)
    assert torch.equal(sample(cached(plain, policy, tap, 1), 4), sample(plain, 4))
    assert not torch.equal(sample(plain, 4), sample(tiny_flux, 4))


def heads_of(model, steps) -> list[torch.Tensor]:
    """What the head was handed at each evaluation."""
    seen = []
    head = model.model.diffusion_model.final_layer
    hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    try:
        sample(model, steps)
    finally:
        hook.remove()
    return seen


@pytest.mark.parametrize("tap", ["last block", "span"])
def test_residuals_between_skipped_blocks_count_once_and_the_one_behind_them_is_always_fresh(tiny_flux, tap):
    """delta_dit.md 7.5: change what is added behind the last block, and the head sees exactly that change."""
    policy = Listed((True,) + (False,) * 99)
    steady = heads_of(cached(with_residuals(tiny_flux, 3.0), policy, tap), 3)
    without = heads_of(cached(tiny_flux, policy, tap), 3)
    late = heads_of(cached(with_residuals(tiny_flux, 3.0, only_from=1), policy, tap), 3)
    residual = 3.0 * torch.randn(1, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))
    if tap == "last block":
        close(steady[1], steady[0])
        close(late[1] - without[1], residual, atol=1e-4)
    else:  # block 0 runs, with its own residual: that change goes through, and the last one is added to it
        close(late[1] - without[1], 2 * residual, atol=1e-4)


def test_a_forecast_is_a_tensor_of_its_own():
    """Also where it repeats the newest one: the model adds to what it is given."""
    for order in (0, 1):
        history = History(Forecaster(order))
        for index in range(order + 1):
            history.add(Point(index, 1.0 - index / 10), (torch.full((2, 3), float(index)),))
        (out,) = history.forecast(Point(4, 0.5), history.kept)
        before = [x.clone() for values in history.values for x in values]
        out.add_(100)
        assert all(torch.equal(a, b) for values, b in zip(history.values, before, strict=True) for a in values)


def test_a_history_keeps_the_newest_points_and_one_at_each_place():
    history = History(Forecaster(1, "newton", "sigma"))
    for index, sigma in enumerate([1.0, 0.75, 0.75, 0.5, 0.5, 0.25]):
        history.add(Point(index, sigma), (torch.tensor([float(index)]),))
        assert len(history.points) <= 2
        assert len({point.sigma for point in history.points}) == len(history.points)
    assert [point.index for point in history.points] == [5, 4]
    assert [float(values[0]) for values in history.values] == [5.0, 4.0]
    weighted = history.forecast(Point(6, 0.0), history.kept)[0]
    assert float(weighted) == pytest.approx(6.0)  # index is straight in sigma between the two


# memory


def expected_bytes(tap: str, order: int, lanes: int, text=5) -> int:
    """accelerators.md 5.10: points x lanes x size of what the tap takes, float32."""
    points = order + 1
    picture, both = TOKENS * HIDDEN, (TOKENS + text) * HIDDEN
    one = {
        "prediction": LATENT,
        "last block": picture,
        "span": picture,  # the rear span ends at the last block: text is read by nobody
        "every module": 2 * both * 2 + both * 2,  # attention and MLP of 2 double blocks, both streams; 2 single blocks
    }
    if tap == "gated":
        return FLOAT * lanes * (points + 2) * picture  # block 0: order 1
    if tap == "gated residual":
        return FLOAT * lanes * (points + 1) * picture  # block 0: the last change
    return FLOAT * lanes * points * one[tap]


@every_tap
@pytest.mark.parametrize(("order", "cfg"), [(0, 1.0), (1, 2.0), (2, 1.0)])
def test_bytes_held_are_the_estimate(tiny_flux, tap, order, cfg):
    policy = gate_for(tap, warm_up=3) if tap.startswith("gated") else Listed.parse("0-2, 4")
    rear = SpanTap(*block_hooks(tiny_flux), stages=Stages(0.75, 1.0))
    model = cached(tiny_flux, policy, rear if tap == "span" else tap, order)
    sample(model, 5, cfg=cfg)
    assert last_run(model).bytes_held == expected_bytes(tap, order, 2 if cfg > 1 else 1)


def test_a_span_that_moves_leaves_nothing_of_the_old_one(tiny_flux):
    """The front span ends before the last block, so its residual is of text and picture."""
    model = cached(tiny_flux, Interval(2, 1), "span", 1)
    held = []

    def look(executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        held.append(list(settings_of(model).report.runs)[-1].bytes_held)
        return out

    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "look", look)
    kept = watched_histories(model, lambda: sample(model, 12))
    assert [name for name, *_ in kept] == ["1:4"] * 3 + ["0:3"] * 3
    assert last_run(model).bytes_held == FLOAT * 2 * (TOKENS + 5) * HIDDEN


def test_storage_is_no_larger_than_what_is_counted(tiny_flux):
    """A slice of a larger tensor would hold all of it."""
    for tap in TAPS:
        model = accelerated(tiny_flux, tap)
        kept = watched_histories(model, lambda model=model: sample(model, 3, cfg=2.0))
        at_one = [values for _, index, values, _ in kept if index == 1]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for values in at_one for x in values}
        assert sum(storages.values()) == sum(x.nbytes for values in at_one for x in values), tap


@pytest.mark.parametrize("breaks", [False, True])
def test_all_of_it_is_freed_when_the_run_ends(tiny_flux, breaks, monkeypatch):
    """Whoever still holds the MODEL, its report or the settings holds no tensors."""
    lanes: list[weakref.ref] = []
    tensors: list[weakref.ref] = []
    made, add = Lane.__init__, History.add

    def watched_lane(self, *args, **kwargs):
        made(self, *args, **kwargs)
        lanes.append(weakref.ref(self))

    def watched_add(self, point, values):
        tensors.extend(weakref.ref(x) for x in values)
        add(self, point, values)

    monkeypatch.setattr(Lane, "__init__", watched_lane)
    monkeypatch.setattr(History, "add", watched_add)
    models = []
    for tap in TAPS:
        base = broken_at(tiny_flux, 3, comfy.model_management.InterruptProcessingException) if breaks else tiny_flux
        policy = gate_for(tap, 1e-12) if tap.startswith("gated") else Interval(1, 1)
        models.append(cached(base, policy, tap, 1))
        if breaks:
            with pytest.raises(comfy.model_management.InterruptProcessingException):
                sample(models[-1], 4, cfg=2.0)
        else:
            sample(models[-1], 4, cfg=2.0)
    gc.collect()
    assert len(lanes) == 2 * len(TAPS)
    assert len(tensors) >= 3 * 2 * len(TAPS)
    assert not any(ref() is not None for ref in lanes + tensors)


def tensors_alive() -> int:
    gc.collect()
    return sum(1 for each in gc.get_objects() if issubclass(type(each), torch.Tensor))


def test_ten_runs_of_changing_sizes_leave_nothing(tiny_flux, monkeypatch):
    monkeypatch.setattr(NodeReport, "most_runs", 8)
    model = cached(tiny_flux, Interval(2, 1), "last block", 1)
    sizes = [(8, 8), (8, 12), (6, 4), (4, 4), (10, 6)] * 2
    sample(model, 4, size=sizes[0])
    before = tensors_alive()
    for i, size in enumerate(sizes):
        sample(model, 3, size=size, batch=1 + i % 3, cfg=1.0 + i % 2)
    assert tensors_alive() <= before
    assert len(settings_of(model).report.runs) == 8  # old reports go, too


def test_offloaded_tensors_make_the_same_picture(tiny_flux, monkeypatch):
    """On the CPU there is nowhere to go; that they are asked to is all that shows."""
    asked = []
    monkeypatch.setattr(Shelf, "put", lambda self, x: asked.append(x.shape) or x)
    model = accelerated(tiny_flux, "last block", offload=True)
    out = sample(model, 6)
    assert asked
    assert torch.equal(out, sample(accelerated(tiny_flux, "last block"), 6))


def test_every_module_is_refused_when_it_would_not_fit(tiny_flux):
    """Before anything else is computed, with the size, the limit, and what to do. Then the next run is a fresh one."""
    needed = expected_bytes("every module", 1, 2)
    small = cached(tiny_flux, Interval(3, 2), ModuleTap(*block_hooks(tiny_flux), needed - 1), 1)
    with pytest.raises(
        ValueError, match=r"every module would hold 0 MiB .* 0 MiB are allowed\. Set 'tap' to 'last block'"
    ):
        sample(small, 6, cfg=2.0)
    assert len(last_run(small).entries) == 0
    enough = cached(tiny_flux, Interval(3, 2), ModuleTap(*block_hooks(tiny_flux), needed), 1)
    sample(enough, 6, cfg=2.0)
    assert last_run(enough).bytes_held == needed


def test_conditions_that_are_called_apart_count_together(tiny_flux):
    """Texts of two lengths are never side by side: the second call would pass the limit."""
    needed = expected_bytes("every module", 1, 1) + expected_bytes("every module", 1, 1, text=9)
    given = {"cfg": 2.0, "negative": prompt(4, length=9)}
    small = cached(tiny_flux, Interval(3, 2), ModuleTap(*block_hooks(tiny_flux), needed - 1), 1)
    with pytest.raises(ValueError, match="every module would hold"):
        sample(small, 6, **given)
    enough = cached(tiny_flux, Interval(3, 2), ModuleTap(*block_hooks(tiny_flux), needed), 1)
    sample(enough, 6, **given)
    assert last_run(enough).bytes_held == needed


@pytest.mark.parametrize(("away", "kept"), [(0, True), (2, True), (3, False), (9, False)])
def test_a_prompt_that_was_away_for_long_starts_anew(tiny_flux, away, kept):
    """Its history is stale. Other prompts went on; they are not touched."""
    run = Run(tiny_flux, [1.0, 0.5, 0.0])
    cache = StepCacheRun(settings_of(cached(tiny_flux, Interval(3, 1))), run)
    x = torch.zeros(1, 16, 8, 8)

    def evaluation(*uuids):
        run.begin_evaluation()
        cache.begin(1.0)
        for uuid in uuids:
            chunk = run.open_chunk(x, {"uuids": [uuid], "cond_or_uncond": [0]}, None)
            visit = cache.visit(tiny_flux.model, x, None, chunk)
            lanes[uuid] = visit.lanes[0]
            if not lanes[uuid].full:
                visit.captured["prediction"] = (x.clone(),)
                visit.record()
        cache.finish(0.0)

    lanes: dict[str, Lane] = {}
    evaluation("a", "b")
    for _ in range(away):
        evaluation("b")
    assert lanes["a"].bytes == (x.nbytes if kept else 0)  # freed before it comes back
    assert lanes["b"].bytes == x.nbytes
    before = dict(lanes)
    evaluation("a", "b")
    assert lanes == before
    assert lanes["a"].full == 1


def test_a_prompt_that_joins_late_is_computed_until_it_can_be_forecast(tiny_flux):
    late = [[text, {**extra, "start_percent": 0.5}] for text, extra in prompt(6, length=5)]
    positive = [*prompt(), *late]
    model = cached(tiny_flux, Interval(3, 2), "prediction", 1)
    sample(model, 10, positive=positive)
    reasons = [entry.reason for entry in last_run(model).entries]
    assert "new" in reasons
    assert strip(model)[5:7] == "##"  # both wait for the new one: they are in one call


def test_settings_are_frozen_and_keep_their_reports_apart(tiny_flux):
    first = cached(tiny_flux, Interval(2, 1))
    settings = settings_of(first)
    with pytest.raises(AttributeError):
        settings.offload = True
    sample(first, 4)
    second = cached(tiny_flux, Interval(2, 1))
    assert settings_of(second).report.runs == []


def test_thinning_leaves_something_of_every_size():
    for height in (1, 2, 15, 16, 33, 128, 200):
        thin = step_cache_run.thinned(torch.zeros(1, 4, height, 2 * height))
        assert thin.shape[-2] >= min(height, 16)
        assert thin.shape[-1] >= min(2 * height, 16)
    assert step_cache_run.thinned(torch.zeros(1, 4, 128, 128)).shape[-2:] == (16, 16)


@pytest.mark.parametrize("sampler", ["heun", "euler"])
def test_the_last_evaluation_is_known_where_noise_is_left_over(tiny_flux, sampler):
    """As in the first of two stages: the schedule stops above 0, and heun evaluates twice in its last step, too."""
    model = cached(tiny_flux, Interval(3, 2, to_end=True))
    noise = latent(7, (8, 8))
    comfy.sample.sample(
        model, noise, 12, 1.0, sampler, "simple", prompt(), prompt(4), torch.zeros_like(noise), start_step=0,
        last_step=7, force_full_denoise=False, disable_pbar=True, seed=0,
    )  # fmt: skip
    run = last_run(model)
    assert run.planned == len(run.entries)
    assert run.entries[-1].computed


def test_an_evaluation_lasts_until_the_next_one_begins(tiny_flux, monkeypatch):
    """The seconds of all evaluations are those of the run, wherever a GPU is waited for."""
    clock = iter(range(1000))
    monkeypatch.setattr(step_cache_run.time, "perf_counter", lambda: float(next(clock)))
    model = cached(tiny_flux, Interval(2, 1))
    sample(model, 5)
    run = last_run(model)
    assert [entry.seconds for entry in run.entries] == [2.0] * 5  # read when each begins, and when its result is there


@pytest.mark.parametrize("sampler", sorted(step_cache_run.PER_STEP))
def test_samplers_ask_as_often_as_the_table_says(tiny_flux, sampler):
    model = cached(tiny_flux, Interval(1, 1), "prediction", 0)
    sample(model, 4, sampler=sampler.removeprefix("sample_"))
    assert len(strip(model)) == step_cache_run.evaluations_of(range(4), sampler)
