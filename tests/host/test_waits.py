"""The pack makes nobody wait for a card: every call that would is counted, on a card that only pretends (`card.py`).

A wait empties the card's queue, once for each time. The rule, for every feature, family and setting, in the evaluations
after the first:

- in the blocks none, but the answer of a gate that looks at a block;
- one for the noise level, where a setting depends on it, shared by all features;
- one more where the method itself decides from values: the gates.

What a run needs once may wait in its first evaluation. Core's own waits are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import comfy.model_management
import pytest
import torch
from comfy.model_patcher import ModelPatcher

from dit_toolkit.host.accelerate import sparse_attention
from dit_toolkit.models.accelerate.sparse_attention import PooledDisc
from dit_toolkit.tests.host import families
from dit_toolkit.tests.host.card import CARD, Meter, metered
from dit_toolkit.tests.host.families import ALL, Family
from dit_toolkit.tests.host.promises import FEATURES, STEPS, Feature, prompts_of

pytestmark = pytest.mark.comfy

Put = Callable[[ModelPatcher], ModelPatcher]

LEVEL = 1  # the noise level is read
GATE = 1  # the gate's answer
ALLOWED = {  # in one evaluation; other features read nothing
    "FreeCus": LEVEL,
    "Re-ttention": LEVEL,
    "TaylorSeer, prediction": LEVEL,
    "TaylorSeer, last block": LEVEL,
    "TaylorSeer, every module": LEVEL,
    "Confidence-Gated Taylor, output": LEVEL + GATE,
    "Confidence-Gated Taylor, residual": LEVEL + GATE,
    "Confidence-Gated Taylor, input change": LEVEL + GATE,
    "Delta-DiT": LEVEL,
}
INSIDE = {"Confidence-Gated Taylor, output": GATE, "Confidence-Gated Taylor, residual": GATE}

OFFLOADED = {"offload": True}
NEWTON = {"forecast": "Newton, log sigma"}
KEPT = ({"kv_cache": "offload to CPU"}, {"kv_cache": "off"})
MORE: Mapping[str, tuple[Mapping[str, Any], ...]] = {  # settings that take other ways through the code
    "EasyControl": ({"influence": 0.5}, *KEPT),
    "EasyControl, a second one": ({"influence": 0.5}, {"kv_cache": "offload to CPU", "influence": 0.5}),
    "Try-On": (*KEPT, {"garment_position": "below"}),
    "FreeCus": ({"prompts": "positive and negative"}, {"noise": "own seed", "noise_seed": 3}),
    "DiT4SR": ({"tile": 4, "overlap": 2}, {"tile": 4, "overlap": 2, "tile_batch": 2}, {"strength": 0.5}),
    "DynamiCtrl": ({"pose_strength": 0.5},),
    "TaylorSeer, prediction": (OFFLOADED, NEWTON),
    "TaylorSeer, last block": (OFFLOADED, NEWTON),
    "TaylorSeer, every module": (OFFLOADED,),
    "Confidence-Gated Taylor, output": (OFFLOADED,),
    "Confidence-Gated Taylor, residual": (OFFLOADED,),
    "Confidence-Gated Taylor, input change": (OFFLOADED,),
    "Delta-DiT": (OFFLOADED,),
    "CLEAR": ({"scale": "log-proportional"},),
    "Re-ttention": tuple({"storage": storage} for storage in ("16 bits", "8 bits", "offload to CPU", "share only")),
}
PARTLY = {"end_percent": 0.9}


def settings_of(feature: Feature) -> tuple[Mapping[str, Any], ...]:
    """All settings of a feature that are tried on its first family."""
    more = MORE.get(feature.name, ())
    return ({}, *more, PARTLY) if feature.has_part else ({}, *more)


def allowed(feature: Feature, values: Mapping[str, Any]) -> int:
    """The bar that shows tiles asks for the step, and so for the noise level, as a part of the run does."""
    return max(ALLOWED.get(feature.name, 0), LEVEL if values is PARTLY or "tile" in values else 0)


def sampled(monkeypatch: pytest.MonkeyPatch, family: Family, put: Put, steps: int = STEPS, **given: Any) -> Meter:
    """What a run on the card waits for. Weights stay in main memory: they are core's to move."""
    model = put(family.load())
    model = model.clone() if model is family.load() else model
    comfy.model_management.load_models_gpu([model, *model.get_nested_additional_models()])
    model.load_device = CARD
    positive, negative = prompts_of(model, family.prompt(3), family.prompt(4))
    with torch.no_grad(), metered(monkeypatch) as meter:
        families.sample(family, model, steps, **{"cfg": 2.0, "positive": positive, "negative": negative, **given})
    return meter


def keeps_the_rule(meter: Meter, most: int, inside: int = 0) -> None:
    assert meter.evaluation >= 0 or not meter.waits
    for evaluation in range(1, meter.evaluation + 1):
        waits = meter.of(evaluation)
        assert len(waits) <= most, (evaluation, waits)
        assert sum(wait.inside for wait in waits) <= inside, (evaluation, waits)
    assert not meter.pinned, "memory that core pinned for a run outlives it"


ON_ITS_FAMILY = [(feature, values) for feature in FEATURES for values in settings_of(feature)]
ON_THE_OTHERS = [(feature, name) for feature in FEATURES for name in feature.families[1:]]


@pytest.mark.parametrize(("feature", "values"), ON_ITS_FAMILY, ids=str)
def test_a_feature_waits_for_nothing_but_its_own_decisions(feature, values, monkeypatch):
    meter = sampled(monkeypatch, ALL[feature.families[0]], lambda model: feature.put(model, **values))
    keeps_the_rule(meter, allowed(feature, values), INSIDE.get(feature.name, 0))


def test_nor_with_weights_of_its_own_for_pooled_cells(monkeypatch):
    """CLEAR's files bring them, one for each block."""

    def put(model: ModelPatcher) -> ModelPatcher:
        blocks = [*(("double", i) for i in range(2)), *(("single", i) for i in range(2))]
        cells = {block: torch.full((2, 2), 0.25) for block in blocks}
        settings = sparse_attention.SparseAttention("CLEAR", PooledDisc(1, 2), min_tokens=0, cells=cells)
        return sparse_attention.attach(model, settings)

    keeps_the_rule(sampled(monkeypatch, ALL["flux"], put), 0)


@pytest.mark.parametrize(("feature", "name"), ON_THE_OTHERS, ids=str)
@pytest.mark.sweep
def test_nor_on_any_other_family(feature, name, monkeypatch):
    meter = sampled(monkeypatch, ALL[name], feature.put, steps=3)
    keeps_the_rule(meter, allowed(feature, {}), INSIDE.get(feature.name, 0))
