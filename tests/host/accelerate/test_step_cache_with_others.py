"""Step caches beside what else users put on a MODEL: guidance, areas, windows, EasyControl, LoRAs, other caches."""

from __future__ import annotations

import threading

import comfy.hooks
import comfy.model_patcher
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from comfy_extras.nodes_flux import FluxKVCache
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

from dit_toolkit.host.accelerate.step_cache_run import StepCacheRun
from dit_toolkit.host.part_of_run import PartOfRun
from dit_toolkit.host.run import CHUNK, Run
from dit_toolkit.host.run import attach as attach_description
from dit_toolkit.models.accelerate.cg_taylor import FirstBlockGate
from dit_toolkit.models.accelerate.input_change import InputChange
from dit_toolkit.models.accelerate.policies import COMPUTE, FORECAST, PROBE, Interval, Listed
from dit_toolkit.tests.host import families
from dit_toolkit.tests.host.accelerate.caching import TAPS, cached, calls, last_run, settings_of, strip
from dit_toolkit.tests.host.tiny import (
    HIDDEN,
    close,
    controlled,
    flux_state,
    latent,
    load_flux,
    lora_file,
    prompt,
    sample,
)

pytestmark = [pytest.mark.comfy, pytest.mark.sweep(together=True)]

every_tap = pytest.mark.parametrize("tap", TAPS)
QKV = "diffusion_model.double_blocks.0.img_attn.qkv"
NEVER = {"threshold": 1e-12, "warm_up": 1}
ALWAYS = {"threshold": 1e6, "warm_up": 2}


def gate(tap: str, **values) -> FirstBlockGate:
    return FirstBlockGate(**values, compare="residual" if tap == "gated residual" else "output")


def neutral(model, tap):
    """Attached, storing and asking, and never forecasting."""
    return cached(model, gate(tap, **NEVER) if tap.startswith("gated") else Interval(1, 1), tap, 1)


def accelerated(model, tap, order=1, every=2, **settings):
    return cached(model, gate(tap, **ALWAYS) if tap.startswith("gated") else Interval(every, 2), tap, order, **settings)


# one evaluation, many calls of the model


@pytest.fixture
def room(monkeypatch):
    """Whether core finds room for conditions side by side: `room.append(False)` parts them from then on."""
    wanted = [True]
    get_free_memory = comfy.model_patcher.ModelPatcher.get_free_memory

    def free(self, device):
        return get_free_memory(self, device) if wanted[-1] else 0

    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", free)
    return wanted


@pytest.fixture
def chunks(monkeypatch):
    """The conditions of every call of the model, in the order of calls: [0] positive, [1] negative, [1, 0] both."""
    seen = []
    apply_model = StepCacheRun.apply_model

    def watched(self, executor, *args, **kwargs):
        seen.append([condition.index for condition in args[5][CHUNK].conditions])
        return apply_model(self, executor, *args, **kwargs)

    monkeypatch.setattr(StepCacheRun, "apply_model", watched)
    return seen


@every_tap
def test_conditions_side_by_side_or_one_by_one_are_the_same(tiny_flux, tap, room, chunks):
    model = accelerated(tiny_flux, tap)
    together = sample(model, 6, cfg=3.0, batch=2)
    marks = strip(model)
    assert chunks == [[1, 0]] * 6
    chunks.clear()
    room.append(False)
    apart = sample(model, 6, cfg=3.0, batch=2)
    assert len(chunks) == 12
    assert {len(chunk) for chunk in chunks} == {1}
    assert strip(model) == marks
    assert "." in marks
    close(apart, together, atol=1e-4)


@every_tap
def test_conditions_may_part_and_meet_during_a_run(tiny_flux, tap, room, chunks):
    """Free memory changes from step to step. History belongs to the condition, not to the place in the batch."""
    model = accelerated(tiny_flux, tap)
    together = sample(model, 6, cfg=3.0)
    chunks.clear()
    for keep in (True, False):
        wanted = iter([keep, not keep] * 20)

        class Alternating(list):
            def __getitem__(self, _, wanted=wanted):
                return next(wanted)

        room[:] = [True]
        alternating = Alternating()
        with pytest.MonkeyPatch.context() as patch:
            free = comfy.model_patcher.ModelPatcher.get_free_memory
            patch.setattr(
                comfy.model_patcher.ModelPatcher,
                "get_free_memory",
                lambda self, device, free=free, each=alternating: free(self, device) if each[0] else 0,
            )
            out = sample(model, 6, cfg=3.0)
        assert {len(chunk) for chunk in chunks} == {1, 2}
        close(out, together, atol=1e-4)


@every_tap
def test_three_conditions_one_of_them_for_an_area(tiny_flux, tap, room):
    given = {"cfg": 2.5, "positive": [*prompt(), *prompt(5, area=(4, 4, 0, 4), strength=0.7)]}
    assert torch.equal(sample(neutral(tiny_flux, tap), 3, **given), sample(tiny_flux, 3, **given))
    model = accelerated(tiny_flux, tap)
    out = sample(model, 5, **given)
    assert "." in strip(model)
    room.append(False)
    close(sample(model, 5, **given), out, atol=1e-4)


def guided(model, **layers):
    return SkipLayerGuidanceDiT.execute(model, 2.0, 0.0, 1.0, **layers).args[0]


FIRST, SOME = {"double_layers": "0"}, {"double_layers": "1", "single_layers": "1"}


@pytest.mark.parametrize(
    ("tap", "layers"), [*[(tap, SOME) for tap in TAPS], ("gated", FIRST), ("span", FIRST), ("every module", FIRST)]
)
def test_skip_layer_guidance_keeps_a_history_of_its_own(tiny_flux, tap, layers, monkeypatch):
    """It calls the model once more for the positive prompt, with blocks taken out: those too that we would ask."""
    plain = guided(tiny_flux, **layers)
    assert torch.equal(sample(neutral(plain, tap), 3, cfg=2.0), sample(plain, 3, cfg=2.0))
    lanes, finish = [], StepCacheRun.finish
    monkeypatch.setattr(
        StepCacheRun,
        "finish",
        lambda self, seconds: (finish(self, seconds), lanes.append(len(self.run.lanes_of(self)))),
    )
    before, behind = accelerated(plain, tap), guided(accelerated(tiny_flux, tap), **layers)
    out = sample(before, 5, cfg=2.0)
    assert torch.isfinite(out).all()
    assert torch.equal(sample(behind, 5, cfg=2.0), out)
    assert set(lanes) == {3}
    assert "." in strip(before)


def test_the_pass_of_skip_layer_guidance_is_forecast_from_itself(tiny_flux):
    """At order 0 with one computed evaluation, what the guidance adds to the output stays what it was, bit for bit."""
    seen = []
    model = accelerated(tiny_flux, "prediction", order=0, every=9)

    def keep(executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        seen.append((args[5]["cond_or_uncond"], (args[0] - out) / args[1].view(-1, 1, 1, 1)))
        return out

    model = guided(model, double_layers="0", single_layers="1")
    model.add_wrapper_with_key("apply_model", "keep", keep)
    sample(model, 5, cfg=1.0)
    by_pass = [seen[0::2], seen[1::2]]
    assert len(seen) == 10
    for passes in by_pass:
        close(passes[4][1], passes[1][1], atol=1e-5)
    assert (by_pass[0][1][1] - by_pass[1][1][1]).abs().mean() > 0.01


@pytest.mark.parametrize("first", [0, 1])
def test_when_one_lane_cannot_be_forecast_the_others_still_are(tiny_flux, first, chunks):
    """Prompts of two lengths are never side by side. The one that joins late is computed, the other one forecast."""
    late = prompt(4, length=9, start_percent=0.6)
    model = cached(tiny_flux, Listed((True,) + (False,) * 99), "prediction")
    with calls(transformer=tiny_flux.model.diffusion_model) as count:
        sample(model, 10, cfg=2.0, **({"negative": late} if first else {"positive": [*prompt(), *late]}))
    assert count["transformer"] in (2, 3)
    assert strip(model).count("#") == 1


THRESHOLDS = (0.05, 0.1, 0.2, 0.35)  # on the tiny model: from hardly ever open to nearly always


def gated(model, threshold=1e-12, **settings):
    return cached(model, FirstBlockGate(threshold, 2, **settings), "gated", 1)


@pytest.fixture
def one_by_one(monkeypatch):
    """ComfyUI as it is on a GPU that is nearly full: it calls the model for one prompt after the other."""

    def short_of_memory():
        monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda *_: 0)

    return short_of_memory


@pytest.mark.parametrize("lengths", [(5, 5), (5, 9)], ids=["like prompts", "prompts of two lengths"])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_gate_does_not_depend_on_free_memory(tiny_flux, one_by_one, batch, lengths):
    """Side by side or one after the other: the same prompt decides, so one seed has one picture."""
    prompts = {"positive": prompt(3, lengths[0]), "negative": prompt(4, lengths[1])}

    def runs():
        for threshold in THRESHOLDS:
            model = gated(tiny_flux, threshold)
            found = sample(model, 10, cfg=3.0, batch=batch, **prompts)
            yield found, strip(model), last_run(model).errors

    together = list(runs())
    one_by_one()
    apart = list(runs())
    assert len({strip for _, strip, _ in together}) > 1
    for (found, strips, errors), (alone, strips_alone, errors_alone) in zip(together, apart, strict=True):
        assert strips == strips_alone
        assert errors == pytest.approx(errors_alone, rel=1e-4)
        close(found, alone, atol=1e-4)


def test_the_pictures_of_a_batch_have_one_gate_by_the_rule_that_was_chosen(tiny_flux):
    """Until the gate opens, each picture is as it is alone, and so are the errors that the rule goes by."""
    noise = latent(7, (8, 8), 2)
    alone = []
    for row in range(2):
        model = gated(tiny_flux)
        sample(model, 6, noise=noise[row : row + 1])
        alone.append(last_run(model).errors)
    assert alone[0] != pytest.approx(alone[1], rel=1e-2)
    found = {}
    for how in ("max", "mean", "cond", "published"):
        model = gated(tiny_flux, reduce=how)
        sample(model, 6, noise=noise)
        found[how] = last_run(model).errors
    pairs = list(zip(*alone, strict=True))
    assert found["max"] == pytest.approx([max(pair) for pair in pairs], rel=1e-4)
    assert found["mean"] == pytest.approx([sum(pair) / 2 for pair in pairs], rel=1e-4)
    assert found["cond"] == found["mean"]
    assert found["published"] != found["mean"]
    assert all(min(pair) < error < max(pair) for pair, error in zip(pairs, found["published"], strict=True))


class Device:
    """One of several GPUs, in a thread: what it decides once the MODEL's own device has decided."""

    def __init__(self, run, name):
        self.run, self.name, self.choice = run, name, None
        self.thread = threading.Thread(target=self.decide)
        self.thread.start()

    def decide(self):
        self.run.wait_for_the_first({"multigpu_thread_device": self.name})
        self.choice = self.run.choice


@pytest.fixture
def at_a_probe(tiny_flux):
    """A run whose gate is asked, with nothing computed yet."""
    cache = settings_of(gated(tiny_flux, 0.1))
    run = StepCacheRun(cache, Run(tiny_flux, [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]))
    for sigma in (1.0, 0.8, 0.6):
        run.begin(sigma)
    assert run.choice is PROBE
    return run


@pytest.mark.parametrize(("error", "choice"), [(0.05, FORECAST), (0.2, COMPUTE)])
def test_other_gpus_wait_for_the_one_that_decides(at_a_probe, tiny_flux, error, choice):
    others = [Device(at_a_probe, torch.device("meta", i)) for i in range(2)]
    own = Device(at_a_probe, tiny_flux.load_device)
    own.thread.join()
    assert own.choice is PROBE  # it waits for nobody
    assert all(other.choice is None for other in others)
    at_a_probe.settle(error)
    for other in others:
        other.thread.join()
        assert other.choice is choice


def test_nobody_waits_for_a_gpu_that_failed(at_a_probe):
    other = []

    def evaluation(x, timestep):
        other.append(Device(at_a_probe, torch.device("meta")))
        raise RuntimeError("out of memory")

    at_a_probe.run.begin_evaluation(timestep=torch.tensor([0.4]))
    with pytest.raises(RuntimeError, match="out of memory"):
        at_a_probe.predict_noise(evaluation, torch.zeros(1), torch.tensor([0.4]))
    other[0].thread.join()
    assert other[0].choice is COMPUTE


def windowed(model):
    """Core's node: windows of two pictures of the batch."""
    schedule = {"context_schedule": "standard_static", "context_stride": 1, "closed_loop": False, "fuse_method": "flat"}
    return ContextWindowsManualNode.execute(model, 2, 0, **schedule, dim=0, freenoise=False).args[0]


@every_tap
def test_context_windows_are_runs_of_their_own(tiny_flux, tap):
    """Two windows of two pictures each, without overlap: the same as two runs."""
    noise = latent(7, (8, 8), 4)
    together = sample(windowed(accelerated(tiny_flux, tap)), 5, noise=noise)
    model = accelerated(tiny_flux, tap)
    halves = [sample(model, 5, noise=noise[start : start + 2]) for start in (0, 2)]
    assert "." in strip(model)
    close(together, torch.cat(halves), atol=1e-4)
    plain = windowed(tiny_flux)
    assert torch.equal(sample(neutral(plain, tap), 3, noise=noise), sample(plain, 3, noise=noise))


# other step caches


@pytest.mark.parametrize("node", [EasyCacheNode, LazyCacheNode])
def test_core_s_step_caches_are_refused_before_and_after_ours(tiny_flux, node):
    name = node.define_schema().node_id
    (theirs,) = node.execute(tiny_flux, 0.2, 0.15, 0.95, False).args
    message = rf"^Test cannot work on a model that {name} already caches\. Remove one of the two\.$"
    with pytest.raises(ValueError, match=message):
        cached(theirs, Interval(2, 1))
    (theirs,) = node.execute(cached(tiny_flux, Interval(2, 1)), 0.2, 0.15, 0.95, False).args
    with pytest.raises(ValueError, match=message):
        sample(theirs, 3)


def test_a_second_step_cache_is_refused(tiny_flux):
    first = cached(tiny_flux, Interval(2, 1))
    with pytest.raises(
        ValueError, match=r"^Test cannot work on a model that Test already caches\. Remove one of the two\.$"
    ):
        cached(first, Interval(3, 1), "last block")
    assert "." in (sample(first, 4), strip(first))[1]


def test_teacache_is_refused(tiny_flux):
    model = tiny_flux.clone()
    model.model_options["transformer_options"]["rel_l1_thresh"] = 0.4
    with pytest.raises(ValueError, match="Test cannot work on a model that TeaCache already caches"):
        cached(model, Interval(2, 1))


# EasyControl


def with_conditions(model, count, **settings):
    for i in range(count):
        model = controlled(
            model, file=lora_file(1 + i), condition=latent(11 + i), kind=("spatial", "subject")[i], **settings
        )
    return model


@every_tap
def test_easycontrol_is_accelerated_the_same_in_both_orders(tiny_flux, tap, encodings):
    """The condition is encoded once, as without the cache."""
    ours_last = accelerated(with_conditions(tiny_flux, 2), tap)
    expected = sample(ours_last, 6)
    assert len(encodings) == 2
    ours_first = with_conditions(accelerated(tiny_flux, tap), 2)
    assert torch.equal(sample(ours_first, 6), expected)
    assert strip(ours_first) == strip(ours_last)
    assert "." in strip(ours_last)
    assert (expected - sample(accelerated(tiny_flux, tap), 6)).abs().mean() > 0.01  # the condition acts


@pytest.mark.parametrize("ours_first", [True, False])
def test_nothing_is_encoded_for_a_forecast_that_needs_no_model(tiny_flux, encodings, ours_first):
    """Without its own cache EasyControl encodes for each call: what is skipped must be skipped before."""
    if ours_first:
        model = with_conditions(accelerated(tiny_flux, "prediction", every=3), 1, cache="off")
    else:
        model = accelerated(with_conditions(tiny_flux, 1, cache="off"), "prediction", every=3)
    sample(model, 8)
    assert strip(model) == "##..#..#"
    assert len(encodings) == 4


def test_a_condition_that_stops_half_way_is_gone_in_forecasts_too(tiny_flux):
    """Forecasts repeat what was computed, so it shows until the next computed evaluation at most."""
    model = accelerated(with_conditions(tiny_flux, 1, part=PartOfRun(end=0.5)), "last block", every=2)
    plain = with_conditions(tiny_flux, 1, part=PartOfRun(end=0.5))
    whole = with_conditions(tiny_flux, 1)
    out = sample(model, 12)
    assert (out - sample(plain, 12)).abs().mean() < (sample(whole, 12) - sample(plain, 12)).abs().mean() * 3


# LoRAs, and other packs' patches


def small(*shape, seed=0):
    return 0.03 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@every_tap
def test_a_lora_on_the_model_acts_in_what_is_computed(tiny_flux, tap):
    change = small(3 * HIDDEN, HIDDEN)
    patched = tiny_flux.clone()
    patched.add_patches({f"{QKV}.weight": ("diff", (change,))}, 0.7)
    assert torch.equal(sample(neutral(patched, tap), 3), sample(patched, 3))
    above = accelerated(tiny_flux, tap)
    above.add_patches({f"{QKV}.weight": ("diff", (change,))}, 0.7)  # a LoRA node behind ours
    out = sample(accelerated(patched, tap), 5)
    assert torch.equal(sample(above, 5), out)
    assert (out - sample(accelerated(tiny_flux, tap), 5)).abs().mean() > 1e-3


def test_a_lora_that_is_scheduled_starts_histories_anew_where_its_strength_changes(tiny_flux):
    """Features jump there: what is stored is of other weights."""
    hooks = comfy.hooks.create_hook_lora({f"{QKV}.diff": small(3 * HIDDEN, HIDDEN)}, 1.0, 0.0)
    frames = comfy.hooks.HookKeyframeGroup()
    frames.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.0))
    frames.add(comfy.hooks.HookKeyframe(strength=0.2, start_percent=0.5))
    hooks.set_keyframes_on_hooks(frames)
    model = cached(tiny_flux, Listed((True,) + (False,) * 99), "last block")
    sample(model, 12, positive=prompt(hooks=hooks))
    assert strip(model) == "#.....#....."


def replacing(model, kind, index, seen):
    """As another pack does: the block, and something of its own."""

    def tinted(args, extra):
        seen.append(index)
        out = extra["original_block"](args)
        return {**out, "img": out["img"] + torch.linspace(-1, 1, HIDDEN)}

    model = model.clone()
    model.set_model_patch_replace(tinted, "dit", kind, index)
    return model


@every_tap
@pytest.mark.parametrize("key", [("double_block", 0), ("single_block", 1)])
def test_blocks_that_others_replaced_are_theirs_when_computed(tiny_flux, tap, key):
    """And are not called where they are skipped, whichever node came first."""
    seen = []
    plain = replacing(tiny_flux, *key, seen)
    expected = sample(plain, 3)
    assert torch.equal(sample(neutral(plain, tap), 3), expected)
    assert torch.equal(sample(replacing(neutral(tiny_flux, tap), *key, seen), 3), expected)
    assert (expected - sample(tiny_flux, 3)).abs().mean() > 1e-3
    seen.clear()
    model = accelerated(plain, tap)
    sample(model, 6)
    half = tiny_flux.get_model_object("model_sampling").percent_to_sigma(0.5) * (1 + 1e-5)
    forecasts = [entry.sigma > half for entry in last_run(model).entries if not entry.computed]
    front = key[0] == "double_block"
    anyway = {"gated": 4 * front, "gated residual": 4 * front, "span": sum(early == front for early in forecasts)}
    assert len(forecasts) == (4 if tap.startswith("gated") else 2)
    assert len(seen) == 6 - len(forecasts) + anyway.get(tap, 0)


def test_another_feature_rides_along(tiny_flux, monkeypatch):
    """Descriptions meet in one run; what makes calls needless stands outermost whatever the order."""
    order = []

    class Watch:
        def bind(self, run, model_options):
            order.append("theirs")

    install = StepCacheRun.install
    monkeypatch.setattr(StepCacheRun, "install", lambda *args: (order.append("ours"), install(*args)))
    for model in (
        attach_description(accelerated(tiny_flux, "prediction"), Watch(), Watch.bind),
        accelerated(attach_description(tiny_flux, Watch(), Watch.bind), "prediction"),
    ):
        order.clear()
        sample(model, 4)
        assert order == ["ours", "theirs"]
        assert "." in strip(model)


def test_fp8_weights_are_cached_like_others(tiny_state):
    model = load_flux(tiny_state, dtype=torch.float8_e4m3fn)
    assert torch.equal(sample(neutral(model, "every module"), 3), sample(model, 3))
    fast = accelerated(model, "every module")
    assert torch.isfinite(sample(fast, 5)).all()
    assert "." in strip(fast)


def test_half_precision_is_forecast_in_half_precision(tiny_state):
    """bfloat16 weights, bfloat16 streams: what is stored is of their size."""
    model = load_flux(tiny_state, dtype=torch.bfloat16)
    model.set_model_compute_dtype(torch.bfloat16)
    assert torch.equal(sample(neutral(model, "last block"), 3), sample(model, 3))
    fast = accelerated(model, "last block")
    assert torch.isfinite(sample(fast, 5)).all()
    assert last_run(fast).bytes_held == 2 * 2 * 16 * HIDDEN


# torch.compile


def compiled(model, backend):
    model = model.clone()
    options = {"guard_filter_fn": skip_torch_compile_dict}  # as core's TorchCompileModel, which has no such backend
    set_torch_compile_wrapper(model=model, backend=backend, options=options)
    return model


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(("tap", "texts"), [("prediction", 1), ("gated", 2)])
def test_a_compiled_model_makes_the_same_decisions(tap, texts, backend):
    """A hook that is traced once and frozen would repeat what it did in the first evaluation, or the first run.

    The gate forecasts the last block: it is that tap, and the probe besides. Tracing takes seconds.
    """
    torch._dynamo.reset()
    model = load_flux(flux_state(double=1, single=1))
    policy = Interval(3, 2)
    if tap == "gated":
        shut = cached(model, gate(tap, threshold=1e-12, warm_up=2), tap, 1)
        sample(shut, 6)
        errors = sorted(last_run(shut).errors)
        policy = gate(tap, threshold=errors[len(errors) // 2], warm_up=2)
    plain = cached(model, policy, tap, 1)
    # The order does not matter.
    fast = compiled(plain, backend) if tap == "gated" else cached(compiled(model, backend), policy, tap, 1)
    for text in (prompt(), prompt(9))[:texts]:
        expected, marks = sample(plain, 6, positive=text), strip(plain)
        close(sample(fast, 6, positive=text), expected, atol=1e-4)
        assert strip(fast) == marks
        assert "." in marks
        assert "#" in marks[2:]


def test_input_change_keeps_conditions_apart(tiny_flux, room):
    """One decision for both: that of the first condition of the first call."""
    model = cached(tiny_flux, InputChange(0.3, 2), order=1)
    out = sample(model, 10, cfg=2.0, positive=prompt(), negative=prompt(4, length=9))
    assert torch.isfinite(out).all()
    marks = strip(model)
    assert "." in marks
    sample(model, 10, cfg=2.0, positive=prompt(), negative=prompt(4, length=9))
    assert strip(model) == marks


def test_two_skip_layer_guidances_in_turn_do_not_share_a_history(tiny_flux, monkeypatch):
    """Where one ends and the other begins, the second is the only extra pass. It must not take the first's place."""

    def skipping(model, start, end, layers):
        return SkipLayerGuidanceDiT.execute(model, 2.0, start, end, double_layers=layers, single_layers="").args[0]

    both = skipping(skipping(tiny_flux, 0.0, 0.5, "0"), 0.5, 1.0, "1")
    seen: dict[tuple, set] = {}
    visit = StepCacheRun.visit

    def watched(self, base, x, text, chunk):
        result = visit(self, base, x, text, chunk)
        for condition, lane in zip(chunk.conditions, result.lanes, strict=True):
            seen.setdefault(condition.patched, set()).add(id(lane))
        return result

    monkeypatch.setattr(StepCacheRun, "visit", watched)
    sample(cached(both, Interval(4, 1), order=1), 8, cfg=2.0)
    first, second = seen[(("double_block", 0),)], seen[(("double_block", 1),)]
    assert not first & second
    assert len(first) == len(second) == 1


@pytest.mark.parametrize("tap", TAPS)
@pytest.mark.parametrize("name", ["kontext", "flux2"])
def test_reference_tokens_that_leave_the_stream_are_no_surprise(name, tap):
    """Flux KV Cache takes them out after the first evaluation; what was stored with them has another length."""
    family = families.FAMILIES.get(name) or families.RELATIVES[name]
    if tap == "every module" and name == "flux2":
        pytest.skip("FLUX.1 only")
    model, values = family.load(), {}
    if name == "flux2":
        reference = torch.randn(1, 128, 6, 4, generator=torch.Generator().manual_seed(1))
        values["positive"] = family.prompt(3, reference_latents=[reference])
    model = FluxKVCache.execute(model).args[0]
    plain = families.sample(family, model, 6, **values)
    policy = FirstBlockGate(0.0, 1) if tap.startswith("gated") else Interval(1, 1)
    assert torch.equal(families.sample(family, cached(model, policy, tap, order=2), 6, **values), plain)
    policy = FirstBlockGate(1e9, 1, order=0) if tap.startswith("gated") else Interval(3, 1)
    skipping = cached(model, policy, tap, order=1)
    assert torch.isfinite(families.sample(family, skipping, 6, **values)).all()
    assert "." in strip(skipping)
    if not tap.startswith("gated") and tap != "prediction":
        assert strip(skipping).startswith("##")  # the second one could not be forecast from the first
