"""What features ask of core before a run, from shapes, is what their tensors take in it.

Every feature, every tap, every family: the two are held within 5 %, in runs that are long enough to fill all histories.
What is held is counted twice: by the feature, and here by the storages that its objects really keep alive.
"""

from __future__ import annotations

import gc
import json
import logging
import math
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
from dit_toolkit.host.run import Run
from dit_toolkit.models.accelerate.cg_taylor import FirstBlockGate
from dit_toolkit.models.accelerate.delta_dit import Stages
from dit_toolkit.models.accelerate.input_change import InputChange
from dit_toolkit.models.accelerate.policies import Interval, Policy
from dit_toolkit.nodes.step_cache import TaylorSeer
from dit_toolkit.tests.host import families, tiny
from dit_toolkit.tests.host.accelerate.caching import cached, last_run, settings_of
from dit_toolkit.tests.host.families import ALL, Family
from dit_toolkit.tests.host.promises import FEATURES, FLUX1, WITH_BLOCKS, WITH_GRID, prompts_of
from dit_toolkit.tests.nodes.calling import run_node

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


@pytest.mark.parametrize(("case", "family"), [(case, family) for case, (_, names) in CASES.items() for family in names])
def test_what_is_asked_is_what_is_held(case, family):
    put, _ = CASES[case]
    model = put(ALL[family].load())
    for cfg, batch in runs_of(case, family):
        agrees(sampled(ALL[family], model, 4 if "order 2" in case else 3, cfg=cfg, batch=batch))
