"""The promises of all features, kept by each: the registry is in `promises.py`, and nothing here knows a feature."""

from __future__ import annotations

import asyncio
import gc
import weakref
from functools import cache
from itertools import combinations, permutations
from typing import Any

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from dit_toolkit.host.run import Run, attached
from dit_toolkit.host.transformer import live_blocks
from dit_toolkit.nodes import DiTToolkit
from dit_toolkit.tests.host import families
from dit_toolkit.tests.host.accelerate.caching import calls
from dit_toolkit.tests.host.families import ALL, Family
from dit_toolkit.tests.host.promises import FEATURES, RIVALS, STEPS, Feature, prompts_of
from dit_toolkit.tests.host.shared import state_of
from dit_toolkit.tests.host.test_part_of_run import cores

pytestmark = pytest.mark.comfy

CFG = 2.0  # two prompts side by side
SAMPLERS = ("heun", "euler_ancestral", "dpmpp_2s_ancestral", "dpmpp_2m", "uni_pc")

every_feature = pytest.mark.parametrize("feature", FEATURES, ids=str)
with_a_part = pytest.mark.parametrize("feature", [each for each in FEATURES if each.has_part], ids=str)
on_every_family = pytest.mark.parametrize(
    ("feature", "family"),
    [(feature, ALL[name]) for feature in FEATURES for name in feature.families],
    ids=lambda value: getattr(value, "name", None),
)


def home(feature: Feature) -> Family:
    return ALL[feature.families[0]]


def sample(family: Family, model: ModelPatcher, steps: int = STEPS, *, longer: bool = False, **given: Any) -> Tensor:
    """`longer`: the negative prompt has more tokens than the positive one, so the two are never side by side."""
    positive, negative = prompts_of(model, family.prompt(3), family.prompt(4, length=9) if longer else family.prompt(4))
    given = {"cfg": CFG, "positive": positive, "negative": negative, **given}
    with torch.no_grad():
        return families.sample(family, model, steps, **given)


@cache
def plain(name: str, steps: int = STEPS, **given: Any) -> Tensor:
    """The picture without us."""
    return sample(ALL[name], ALL[name].load(), steps, **given)


@cache
def alone(feature: Feature, name: str) -> Tensor:
    return sample(ALL[name], feature.put(ALL[name].load()))


def apart(a: Tensor, b: Tensor) -> bool:
    """Another picture, by far more than rounding."""
    return float((a - b).abs().mean()) > 1e-4 * float(b.abs().mean())


def close(a: Tensor, b: Tensor) -> None:
    """Equal up to rounding, relative to the largest value: latents of some families are of order 10."""
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * max(1.0, float(b.abs().max())))


def inner_layer(family: Family) -> torch.nn.Module:
    """The first linear layer of the last block: what calls the model in any way calls it."""
    *_, (_, block) = live_blocks(family.load())
    return next(layer for layer in block.modules() if isinstance(layer, torch.nn.Linear))


# neutral, acts


@every_feature
def test_a_neutral_value_gives_the_model_back(feature):
    model = home(feature).load()
    for values in feature.off:
        assert feature.put(model, **values) is model, values
    assert feature.put(model) is not model


@on_every_family
@pytest.mark.sweep
def test_what_is_idle_changes_no_bit(feature, family):
    for name, idle in feature.idle.items():
        model = idle.put(family.load())
        assert torch.equal(sample(family, model), plain(family.name)), name
        assert idle.there(model), name


@on_every_family
@pytest.mark.sweep
def test_it_acts(feature, family):
    model = feature.put(family.load())
    out = sample(family, model)
    assert torch.isfinite(out).all()
    assert apart(out, plain(family.name))
    assert (out - plain(family.name)).abs().mean() < 2 * plain(family.name).abs().mean()  # and leaves it a picture
    assert feature.worked(model)


@every_feature
def test_each_other_value_makes_another_picture(feature):
    family = home(feature)
    for values in feature.others():
        assert apart(sample(family, feature.put(family.load(), **values)), alone(feature, family.name)), values


def test_every_node_that_patches_a_model_is_in_the_registry():
    """Those that choose among the others are not."""
    choosers = {"DiTAccelerate", "DiTAccelerateAutotune", "DiTPrepareTraining"}
    for node in asyncio.run(DiTToolkit().get_node_list()):
        schema = node.GET_SCHEMA()
        takes = any(entry.get_io_type() == "MODEL" for entry in schema.inputs)
        gives = any(output.io_type == "MODEL" for output in schema.outputs)
        if takes and gives and schema.node_id not in choosers:
            assert node in {feature.node for feature in FEATURES}, schema.node_id


# untouched, interrupt


@every_feature
def test_the_model_that_comes_in_stays_as_it_was(feature):
    family = home(feature)
    model = family.load()
    before = state_of(model)
    patched = feature.put(model)
    assert state_of(model) == before
    sample(family, patched)
    assert state_of(model) == before
    assert torch.equal(sample(family, model), plain(family.name))


@pytest.fixture
def runs(monkeypatch):
    """Weak references to every run that begins."""
    seen, make = [], Run.__init__

    def watched(self, *args, **kwargs):
        make(self, *args, **kwargs)
        seen.append(weakref.ref(self))

    monkeypatch.setattr(Run, "__init__", watched)
    return seen


@every_feature
def test_a_run_that_is_interrupted_leaves_nothing(feature, monkeypatch, runs):
    """As ComfyUI interrupts: from inside a layer, in its first use in a run, in one in the middle, in its last."""
    family = home(feature)
    layer, state = inner_layer(family), state_of(family.load())
    with calls(layer=layer) as count:
        fresh = sample(family, feature.put(family.load()))
    model, forward, total = feature.put(family.load()), layer.forward, count["layer"]
    for at in sorted({1, total // 2 + 1, total}):
        left = [at]

        def stop(*args, left=left, **kwargs):
            left[0] -= 1
            if not left[0]:
                raise comfy.model_management.InterruptProcessingException()
            return forward(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(layer, "forward", stop)
            with pytest.raises(comfy.model_management.InterruptProcessingException):
                sample(family, model)
        assert torch.equal(sample(family, model), fresh), at
    gc.collect()
    assert runs or not attached(model)
    assert not any(run() for run in runs)
    assert state_of(family.load()) == state


@every_feature
def test_a_model_goes_when_nobody_holds_it_any_more(feature, runs):
    """And not only when Python looks for circles: until then ComfyUI takes its memory for lost, and looks each time."""
    family = home(feature)
    gc.collect()
    gc.disable()
    try:
        model = feature.put(family.load())
        sample(family, model)
        gone = weakref.ref(model)
        del model
        assert gone() is None
        assert not any(run() for run in runs)
    finally:
        gc.enable()


# second run, batch


@every_feature
def test_a_second_run_of_another_kind_is_a_fresh_run(feature):
    family = home(feature)
    model = feature.put(family.load())
    first = sample(family, model)
    for given in ({"size": (7, 10)}, {"batch": 2}, {"longer": True}, {"cfg": 1.0}):
        if "size" in given and feature.other_size:
            with pytest.raises(ValueError, match=feature.other_size):
                sample(family, model, **given)
            continue
        out = sample(family, model, **given)
        assert torch.equal(out, sample(family, feature.put(family.load()), **given)), given
        assert apart(out, plain(family.name, **given)), given
        assert feature.worked(model), given
    assert torch.equal(sample(family, model), first)


@every_feature
def test_pictures_of_a_batch_are_those_drawn_alone(feature):
    family = home(feature)
    noise = families.random_noise(family, batch=3)
    together = sample(family, feature.put(family.load()), noise=noise)
    for i in range(3):
        close(together[[i]], sample(family, feature.put(family.load()), noise=noise[[i]]))


# samplers


@pytest.mark.parametrize("sampler", SAMPLERS)
@every_feature
@pytest.mark.sweep
def test_every_kind_of_sampler_gets_through(feature, sampler):
    family = home(feature)
    model = feature.put(family.load())
    out = sample(family, model, sampler=sampler)
    assert torch.isfinite(out).all()
    assert apart(out, plain(family.name, sampler=sampler))
    assert feature.worked(model)
    for idle in list(feature.idle.values())[:1]:
        unchanged = sample(family, idle.put(family.load()), sampler=sampler)
        assert torch.equal(unchanged, plain(family.name, sampler=sampler))


# part of the run


@with_a_part
def test_a_part_that_never_comes_costs_nothing(feature):
    """Simple schedules evaluate at 1 first, and never between the last percent and 0."""
    family = home(feature)
    with calls(layer=inner_layer(family)) as count:
        assert torch.equal(sample(family, feature.put(family.load(), start_percent=0.9999)), plain(family.name))
    assert count["layer"] == STEPS


@pytest.mark.parametrize("steps", [4, 6])  # one whose bound core takes for that of the step, and one that begins later
@with_a_part
@pytest.mark.sweep
def test_it_acts_in_the_steps_where_comfyui_would_begin(feature, steps):
    """A bound on a step: the picture is that of a bound inside the steps where ComfyUI would begin."""
    family = home(feature)
    sampling, boundary = family.load().get_model_object("model_sampling"), 2 / steps
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", steps)[:-1]
    first = [cores(sampling, sigma, start=boundary) for sigma in sigmas.split(1)].index(True)
    same, other = (boundary - 0.01, boundary + 0.01) if first == 2 else (boundary + 0.01, boundary - 0.01)
    for side in ("start_percent", "end_percent"):
        at, inside, beside = (
            sample(family, feature.put(family.load(), **{**feature.often, side: percent}), steps)
            for percent in (boundary, same, other)
        )
        assert torch.equal(at, inside)
        assert not torch.equal(at, beside)


# stacked


def refusal(a: Feature, b: Feature) -> str:
    """What is said when the two meet on one MODEL; empty where they go together."""
    if a.rival and a.rival == b.rival:
        return RIVALS[a.rival]
    found = (one.refuses.get(name) for one, other in ((a, b), (b, a)) for name in (other.name, other.rival))
    return next((words for words in found if words), "")


def shared_family(a: Feature, b: Feature) -> str:
    """The first family on which both run; empty where there is none."""
    return next((name for name in a.families if name in b.families), "")


def meeting(a: Feature, b: Feature) -> str:
    """The family on which both act together; empty where they cannot."""
    return "" if refusal(a, b) or a.beneath is b or b.beneath is a else shared_family(a, b)


@pytest.mark.parametrize(("a", "b"), [pair for pair in combinations(FEATURES, 2) if meeting(*pair)], ids=str)
@pytest.mark.sweep(2)
def test_two_features_act_together_in_either_order(a, b):
    family = ALL[meeting(a, b)]
    first, last = a.put(b.put(family.load())), b.put(a.put(family.load()))
    out = sample(family, first)
    if a.adds_keys and b.adds_keys:
        close(sample(family, last), out)
    else:
        assert torch.equal(sample(family, last), out)
    assert torch.isfinite(out).all()
    for feature in (a, b):
        assert apart(out, alone(feature, family.name)), feature
        assert feature.worked(first), feature
        assert feature.worked(last), feature


IDLE = [pair for pair in permutations(FEATURES, 2) if pair[0].idle and meeting(*pair)]


@pytest.mark.parametrize(("a", "b"), IDLE, ids=str)
@pytest.mark.sweep
def test_an_idle_feature_leaves_another_as_it_is(a, b):
    """In either order of the nodes."""
    family, idle = ALL[meeting(a, b)], next(iter(a.idle.values()))
    for model in (idle.put(b.put(family.load())), b.put(idle.put(family.load()))):
        assert torch.equal(sample(family, model), alone(b, family.name))
        assert idle.there(model)


# refused

REFUSED = [pair for pair in permutations(FEATURES, 2) if refusal(*pair) and shared_family(*pair)]


@pytest.mark.parametrize(("a", "b"), REFUSED, ids=str)
def test_what_cannot_go_together_says_so(a, b):
    family = ALL[shared_family(a, b)]
    with pytest.raises(ValueError, match=refusal(a, b)) as refused:
        sample(family, a.put(b.put(family.load())))
    assert len(str(refused.value)) < 300
