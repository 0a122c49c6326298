"""What features ask of core before a run, from shapes, is what their tensors take in it.

Every feature, every tap, every family: the two are held within 5 %, in runs that are long enough to fill all histories.
What is held is counted twice: by the feature, and here by the storages that its objects really keep alive.
"""

from __future__ import annotations

import gc
import json
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from torch import Tensor

from dit_toolkit.host import memory
from dit_toolkit.host.accelerate.re_ttention_run import ReTtentionRun
from dit_toolkit.host.accelerate.step_cache_run import StepCacheRun
from dit_toolkit.host.accelerate.step_cache_taps import LastBlockTap, SpanTap, block_hooks
from dit_toolkit.host.animate.dynamictrl_run import Stream
from dit_toolkit.host.control import conditions
from dit_toolkit.host.control.conditions_run import Encoder
from dit_toolkit.host.control.easycontrol import EasyControl
from dit_toolkit.host.control.freecus_run import ReferencePass
from dit_toolkit.host.memory import Bytes, Memory, Usage
from dit_toolkit.host.resting import RestingKeys
from dit_toolkit.host.run import Run, attached
from dit_toolkit.models.accelerate.cg_taylor import FirstBlockGate
from dit_toolkit.models.accelerate.delta_dit import Stages
from dit_toolkit.models.accelerate.input_change import InputChange
from dit_toolkit.models.accelerate.policies import Interval, Policy
from dit_toolkit.tests.host import families, tiny
from dit_toolkit.tests.host.accelerate.caching import cached, last_run, settings_of
from dit_toolkit.tests.host.families import ALL, Family
from dit_toolkit.tests.host.promises import FEATURES, FLUX1, WITH_BLOCKS, WITH_GRID, prompts_of

pytestmark = pytest.mark.comfy

Put = Callable[[ModelPatcher], ModelPatcher]
NEAR = 0.05
ALL_COMPUTED = Interval(1, 1)  # every evaluation is, so histories fill as fast as they can


# What is held, counted by storages


def storages(*things: Any) -> dict[int, int]:
    """Bytes of each storage that a thing keeps alive: a tensor, or a container or record of some."""
    found: dict[int, int] = {}
    for thing in things:
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, RestingKeys):
            found |= storages(thing.keys_by_block)
        elif isinstance(thing, dict):
            found |= storages(*thing.values())
        elif isinstance(thing, list | tuple):
            found |= storages(*thing)
        elif is_dataclass(thing):
            found |= storages(*(getattr(thing, each.name) for each in fields(thing)))
        elif hasattr(thing, "forecaster"):  # a history
            found |= storages(thing.values)
    return found


@dataclass(eq=False)
class Meter:
    """accounts: of the last run, by feature and usage. counted: the most bytes in storages, by the feature's object."""

    accounts: list[tuple[str, Usage]]
    counted: dict[int, int]
    runs: list[Memory]

    def note(self, who: object, *things: Any) -> None:
        self.counted[id(who)] = max(self.counted.get(id(who), 0), sum(storages(*things).values()))

    @property
    def asked(self) -> int:
        return sum(usage.asked.device for _, usage in self.accounts)

    def of(self, feature: str) -> Usage:
        (usage,) = (usage for name, usage in self.accounts if name == feature)
        return usage


@contextmanager
def metered() -> Iterator[Meter]:
    with pytest.MonkeyPatch.context() as patch:
        meter = Meter([], {}, [])
        open_account, lanes, note = Memory.open, Run.lanes_of, StepCacheRun.note
        compute, at, note_keys = ReferencePass.compute, Stream.at, Encoder.note
        streams: weakref.WeakSet[Stream] = weakref.WeakSet()

        def opened(self, feature, *args, **kwargs):
            usage = open_account(self, feature, *args, **kwargs)
            meter.accounts.append((feature, usage))
            meter.runs.append(self)
            return usage

        def lanes_of(self, owner):
            found = lanes(self, owner)
            if isinstance(owner, ReTtentionRun):
                meter.note(owner, found)
            return found

        def encoded(self, keys):
            note_keys(self, keys)
            meter.note(self, [lane.keys for lane in lanes(self.run, self)], keys)

        def noted(self, visit):
            note(self, visit)
            meter.note(self, lanes(self.run, self), visit.captured, visit.entry)

        def computed(self):
            keys = compute(self)
            meter.note(self.run, keys)
            return keys

        def added(self, *args):
            n = at(self, *args)
            streams.add(self)
            meter.note(Stream, n, [stream.c for stream in streams])
            return n

        patch.setattr(Memory, "open", opened)
        patch.setattr(Run, "lanes_of", lanes_of)
        patch.setattr(Encoder, "note", encoded)
        patch.setattr(StepCacheRun, "note", noted)
        patch.setattr(ReferencePass, "compute", computed)
        patch.setattr(Stream, "at", added)
        yield meter


def sampled(family: Family, model: ModelPatcher, steps: int = 3, **given: Any) -> Meter:
    positive, negative = prompts_of(model, family.prompt(3), family.prompt(4))
    with metered() as meter:
        families.sample(family, model, steps, **{"positive": positive, "negative": negative, **given})
    return meter


def agrees(meter: Meter) -> None:
    """What was asked, what features say that they held, and what was there."""
    for feature, usage in meter.accounts:
        for asked, held in ((usage.asked.kept, usage.held.kept), (usage.asked.main, usage.held.main)):
            assert abs(asked - held) <= NEAR * asked, (feature, usage)
    held = sum(usage.held.device + usage.held.main for _, usage in meter.accounts)
    assert 0 < held <= sum(meter.counted.values()) <= (1 + NEAR) * held


# Every feature


def caching(tap: Any, policy: Policy = ALL_COMPUTED, order: int = 1, **settings: Any) -> Put:
    def put(model: ModelPatcher) -> ModelPatcher:
        return cached(model, policy, tap(*block_hooks(model)) if callable(tap) else tap, order, **settings)

    return put


def gate(compare: str) -> FirstBlockGate:
    return FirstBlockGate(1e-12, warm_up=9, compare=compare)


def plain_tokens(model: ModelPatcher) -> ModelPatcher:
    """Without a LoRA, values are a part of what a layer makes."""
    return conditions.attach(model, EasyControl(None, "plain", tiny.latent(11), "spatial"), None, (tiny.HIDDEN, 2, 2))


FEATURE = {feature.name: feature for feature in FEATURES}
REAR, FRONT = Stages(0.75, 1.0), Stages(0.75, 0.0)
CASES: dict[str, tuple[Put, tuple[str, ...]]] = {
    "prediction": (caching("prediction"), tuple(ALL)),
    "prediction, order 2": (caching("prediction", order=2), ("flux",)),
    "prediction, input change": (caching("prediction", InputChange(0.0, 2)), ("flux", "wan")),
    "last block": (caching("last block"), WITH_BLOCKS),
    "last block, order 0": (caching("last block", order=0), ("flux", "wan")),
    "gated": (caching("gated", gate("output")), WITH_BLOCKS),
    "gated residual": (caching("gated residual", gate("residual")), WITH_BLOCKS),
    "residual": (caching(partial(LastBlockTap, residual=True)), ("flux", "sd35")),
    "rear span": (caching(partial(SpanTap, stages=REAR)), WITH_BLOCKS),
    "front span": (caching(partial(SpanTap, stages=FRONT)), WITH_BLOCKS),
    "every module": (caching("every module"), FLUX1),
    "every module, order 0": (caching("every module", order=0), ("flux",)),
    "EasyControl": (FEATURE["EasyControl"].put, FLUX1),
    "EasyControl, twice": (FEATURE["EasyControl, a second one"].put, ("flux",)),
    "EasyControl, not kept": (partial(FEATURE["EasyControl"].put, kv_cache="off"), ("flux",)),
    "EasyControl, plain tokens": (plain_tokens, ("flux",)),
    "Try-On": (FEATURE["Try-On"].put, FLUX1),
    "FreeCus": (FEATURE["FreeCus"].put, FLUX1),
    "FreeCus, both prompts": (partial(FEATURE["FreeCus"].put, prompts="positive and negative"), ("flux",)),
    "DynamiCtrl": (FEATURE["DynamiCtrl"].put, FEATURE["DynamiCtrl"].families),
    "Re-ttention": (FEATURE["Re-ttention"].put, WITH_GRID),
    **{
        f"Re-ttention, {storage}": (partial(FEATURE["Re-ttention"].put, storage=storage), ("flux", "sd35"))
        for storage in ("16 bits", "8 bits", "share only")
    },
}
RUNS = ((1.0, 1), (1.0, 2), (2.0, 1), (2.0, 2))  # cfg, pictures


def runs_of(case: str, family: str) -> tuple[tuple[float, int], ...]:
    """All of them on the first family, and the largest on the others; FLUX.2's text is long."""
    return RUNS if family == CASES[case][1][0] else RUNS[-2:-1] if family == "flux2" else RUNS[-1:]


@pytest.mark.sweep
@pytest.mark.parametrize(("case", "family"), [(case, family) for case, (_, names) in CASES.items() for family in names])
def test_what_is_asked_is_what_is_held(case, family):
    put, _ = CASES[case]
    model = put(ALL[family].load())
    for cfg, batch in runs_of(case, family):
        agrees(sampled(ALL[family], model, 4 if "order 2" in case else 3, cfg=cfg, batch=batch))


# The same in other settings


OFFLOADED: dict[str, tuple[Put, str]] = {
    "EasyControl": (partial(FEATURE["EasyControl"].put, kv_cache="offload to CPU"), "flux"),
    "Re-ttention": (partial(FEATURE["Re-ttention"].put, storage="offload to CPU"), "flux"),
    "last block": (caching("last block", offload=True), "wan"),
}


@pytest.mark.parametrize("case", OFFLOADED)
def test_what_rests_in_main_memory_is_not_asked_of_the_device(case):
    put, family = OFFLOADED[case]
    meter = sampled(ALL[family], put(ALL[family].load()), cfg=2.0)
    agrees(meter)
    ((_, usage),) = meter.accounts
    assert usage.asked.main > 0
    assert usage.asked.device < usage.asked.main / 2 + 1
    assert (usage.asked.device == 0) == (case == "EasyControl")


def test_half_precision_counts_half():
    """Blocks compute in the model's dtype, and the prediction is float32."""
    family = ALL["flux"]
    half = family.load().clone()
    half.set_model_compute_dtype(torch.bfloat16)
    for tap, share in (("last block", 2), ("prediction", 1)):
        asked = []
        for model in (family.load(), half):
            meter = sampled(family, caching(tap)(model))
            agrees(meter)
            asked.append(meter.asked)
        assert asked[0] == share * asked[1]


def test_a_span_that_moves_is_asked_for_with_its_larger_stage():
    family = ALL["flux"]
    moving = partial(SpanTap, stages=Stages(0.75, 0.5))
    agrees(sampled(family, caching(moving)(family.load()), 12))


def test_poses_of_their_own_have_streams_of_their_own():
    """The streams of both, and what one of them adds."""
    family = ALL["cogvideox_i2v"]
    model = FEATURE["DynamiCtrl"].put(family.load())
    shared = sampled(family, model, cfg=2.0).asked
    positive, _ = prompts_of(model, family.prompt(3), family.prompt(4))
    _, negative = prompts_of(FEATURE["DynamiCtrl"].put(family.load()), family.prompt(3), family.prompt(4))
    meter = sampled(family, model, cfg=2.0, positive=positive, negative=negative)
    agrees(meter)
    assert 2 * meter.asked == 3 * shared


def windowed(model: ModelPatcher, length: int, overlap: int) -> ModelPatcher:
    schedule = {"context_schedule": "standard_static", "context_stride": 1, "closed_loop": False, "fuse_method": "flat"}
    return ContextWindowsManualNode.execute(model, length, overlap, **schedule, dim=2, freenoise=False).args[0]


@pytest.mark.parametrize("case", ["last block", "Re-ttention", "prediction"])
def test_each_context_window_holds_its_own(case):
    """Three windows of two frames over five, and the frame before the second and the third one."""
    family = ALL["wan"]
    put, _ = CASES[case]
    noise = families.random_noise(family, size=(5, 6, 6))
    model = windowed(put(family.load()), 2, 0)
    meter = sampled(family, model, cfg=2.0, noise=noise)
    agrees(meter)
    assert meter.asked != sampled(family, put(family.load()), cfg=2.0, noise=noise).asked


@pytest.mark.parametrize("tile_batch", [1, 2])
def test_each_tile_holds_its_own(tile_batch):
    """Apply DiT4SR cuts them. What a call has captured is of the tiles that are side by side."""
    family = ALL["sd35"]
    photo = partial(FEATURE["DiT4SR"].put, tile=4, overlap=2, tile_batch=tile_batch)
    agrees(sampled(family, caching("last block")(photo(family.load())), cfg=2.0))


# Core


@contextmanager
def watched_core() -> Iterator[list[float]]:
    """The least memory that core makes room for, for each model that it loads."""
    asked, load = [], comfy.model_management.load_models_gpu

    def spy(models, memory_required=0, minimum_memory_required=None, **kwargs):
        if minimum_memory_required is not None:
            asked.append(minimum_memory_required)
        return load(models, memory_required=memory_required, minimum_memory_required=minimum_memory_required, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.model_management, "load_models_gpu", spy)
        yield asked


def of_core(family: Family, model: ModelPatcher, **given: Any) -> tuple[float, Meter]:
    with watched_core() as asked:
        meter = sampled(family, model, 1, **given)
    return asked[-1], meter


SOME = ("prediction", "every module", "EasyControl", "FreeCus", "Re-ttention", "DynamiCtrl")


@pytest.mark.parametrize("case", SOME)
@pytest.mark.parametrize("batch", [1, 2])
def test_cores_minimum_grows_by_what_is_asked(case, batch):
    """And by at most one column of the latent, to which it is rounded up."""
    put, (name, *_) = CASES[case]
    family = ALL[name]
    model = put(family.load())
    positive, negative = prompts_of(model, family.prompt(3), family.prompt(4))
    given = {"cfg": 2.0, "batch": batch, "positive": positive, "negative": negative}
    if case == "DynamiCtrl":  # its poses are an error on a model without pose norms, so they are idle there
        before, _ = of_core(family, FEATURE[case].put(family.load(), pose_strength=0.0), cfg=2.0, batch=batch)
    else:
        before, _ = of_core(family, family.load(), **given)
    after, meter = of_core(family, model, **given)
    column = family.load().model.memory_required([batch, *family.latent_shape[:-1], 1])
    assert meter.asked > 0
    assert meter.asked <= after - before <= meter.asked + column


def test_large_sums_are_asked_for_as_they_are():
    """What tiny models hold is less than a column, so a feature that wants a hundred of them."""
    family = ALL["wan"]
    column = family.load().model.memory_required([1, *family.latent_shape[:-1], 1])
    more = int(100.5 * column)
    shape = [1, *family.latent_shape]
    required = family.load().model.memory_required
    grown = required(memory.larger(family.load().model, shape, more)) - required(shape)
    assert more <= grown <= more + column
    assert memory.larger(family.load().model, shape, more)[:-1] == shape[:-1]


def test_several_features_add_up():
    """Each asks what it asks alone, and core is asked for the sum, rounded once."""
    family = ALL["flux"]
    puts = [CASES[case][0] for case in ("EasyControl", "every module", "Re-ttention")]
    alone = [sampled(family, put(family.load()), cfg=2.0).asked for put in puts]
    model = family.load()
    for put in puts:
        model = put(model)
    before, _ = of_core(family, family.load(), cfg=2.0)
    after, meter = of_core(family, model, cfg=2.0)
    assert sorted(usage.asked.device for _, usage in meter.accounts) == sorted(alone)
    assert sum(alone) <= after - before <= sum(alone) + family.load().model.memory_required([1, 16, 8, 1])


@pytest.mark.parametrize("family", FLUX1)
def test_statistics_of_the_pass_of_a_reference_are_asked_for_too(family):
    """FreeCus runs the model once more, with attention as sparse as the picture's, and without reference pictures."""
    model = FEATURE["Re-ttention"].put(FEATURE["FreeCus"].put(ALL[family].load()))
    meter = sampled(ALL[family], model, cfg=2.0)
    agrees(meter)
    alone = sampled(ALL[family], FEATURE["Re-ttention"].put(ALL[family].load()), cfg=2.0)
    assert meter.of("Re-ttention").asked.kept > alone.of("Re-ttention").asked.kept


def test_a_run_without_features_of_ours_and_one_that_holds_nothing_ask_nothing():
    family = ALL["flux"]
    plain, meter = of_core(family, family.load())
    assert not meter.accounts
    put = partial(FEATURE["EasyControl"].put, kv_cache="offload to CPU")
    assert of_core(family, put(family.load()))[0] == plain


# Guiders


def prompts(**names: int) -> dict[str, list[dict]]:
    return {name: [{}] * count for name, count in names.items()}


def guider(kind: type, cfg: float = 1.0) -> Any:
    made = object.__new__(kind)
    made.cfg = cfg
    return made


class Another(comfy.samplers.CFGGuider):
    """It may compute any of its prompts: only core's own way to combine them is known to leave one out."""

    def predict_noise(self, *args, **kwargs):
        return super().predict_noise(*args, **kwargs)


@pytest.mark.parametrize(
    ("kind", "cfg", "options", "names"),
    [
        (comfy.samplers.CFGGuider, 1.0, {}, {"positive"}),
        (comfy.samplers.CFGGuider, 1.0 + 1e-12, {}, {"positive"}),  # as core rounds
        (comfy.samplers.CFGGuider, 1.01, {}, {"positive", "negative"}),
        (comfy.samplers.CFGGuider, 1.0, {"disable_cfg1_optimization": True}, {"positive", "negative"}),
        (Another, 1.0, {}, {"positive", "negative", "middle"}),
        (object, 1.0, {}, {"positive", "negative", "middle"}),
    ],
)
def test_prompts_that_nobody_computes_are_not_asked_for(kind, cfg, options, names):
    given = prompts(positive=2, negative=1, middle=1)
    who = object() if kind is object else guider(kind, cfg)
    assert memory.computed(who, given, options).keys() == names


# The end of a run


def broken(model: ModelPatcher) -> ModelPatcher:
    """It is interrupted in its second evaluation."""
    patched, calls = model.clone(), []

    def stop(apply, args):
        calls.append(1)
        if len(calls) > 1:
            raise comfy.model_management.InterruptProcessingException
        return apply(args["input"], args["timestep"], **args["c"])

    patched.set_model_unet_function_wrapper(stop)
    return patched


@pytest.mark.parametrize("case", ["last block", "EasyControl", "FreeCus", "Re-ttention"])
def test_a_run_that_broke_off_leaves_nothing(case):
    put, _ = CASES[case]
    family = ALL["flux"]
    with pytest.MonkeyPatch.context() as patch:
        made: list[weakref.ref] = []
        init = Memory.__init__
        patch.setattr(Memory, "__init__", lambda self, *a: (init(self, *a), made.append(weakref.ref(self)))[0])
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            families.sample(family, broken(put(family.load())), 3)
    (ref,) = made
    gc.collect()
    assert ref() is None
    fresh = sampled(family, put(family.load()), cfg=2.0)
    agrees(fresh)


def lines(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith("Memory:")]


def test_features_without_a_report_share_one_line(caplog):
    family = ALL["flux"]
    model = CASES["FreeCus"][0](CASES["EasyControl"][0](family.load()))
    with caplog.at_level(logging.INFO):
        sampled(family, model, cfg=2.0)
    held = 2**-20 * 73728
    assert lines(caplog) == [
        f"Memory: EasyControl {held:.1f} MiB asked for, {held:.1f} MiB held at most; "
        "FreeCus 0.1 MiB asked for, 0.0 MiB held at most"
    ]


def test_dit4sr_says_what_it_made_of_the_latent(caplog):
    family = ALL["sd35"]
    with caplog.at_level(logging.INFO):
        sampled(family, partial(FEATURE["DiT4SR"].put, tile=4, overlap=2)(family.load()), 1)
    assert lines(caplog) == ["Memory: DiT4SR room for 1 x 16 x 4 x 8 in place of 1 x 16 x 8 x 8"]


def test_features_with_a_report_write_no_line(caplog):
    family = ALL["flux"]
    with caplog.at_level(logging.INFO):
        sampled(family, CASES["last block"][0](family.load()))
        sampled(family, family.load())
    assert not lines(caplog)


def test_a_step_cache_reports_both():
    family = ALL["flux"]
    model = caching("every module")(family.load())
    meter = sampled(family, model)
    values = json.loads(settings_of(model).report.json())
    assert values["bytes_asked"] == meter.asked == values["bytes_at_most"]
    assert values["bytes_held"] == 2 * values["bytes_at_most"] // 3  # without the point that a call has captured
    mib = f"{meter.asked / 2**20:.1f} MiB"
    assert f"memory: {mib} asked for, {mib} held at most" in last_run(model).text().splitlines()


def test_main_memory_is_told_apart():
    usage = Usage(Bytes(2**20, 2**19, 2**22), Bytes(2**20, 0, 2**22))
    assert str(usage) == "1.5 MiB asked for, 1.0 MiB held at most, and 4.0 MiB of main memory"


def test_re_ttention_reports_both():
    family = ALL["flux"]
    model = FEATURE["Re-ttention"].put(family.load())
    meter = sampled(family, model)
    (report,) = (each.report.runs[-1] for each in attached(model) if hasattr(each, "sparse_attention"))
    assert report.values()["bytes_asked"] == meter.asked > 0
    mib = f"{meter.asked / 2**20:.1f} MiB"
    assert f"memory: {mib} asked for, {mib} held at most" in report.text().splitlines()
