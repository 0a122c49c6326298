"""The life of a run: counted by evaluations, kept apart by condition, gone at the end."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import comfy.model_management
import pytest
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

from dit_toolkit.host.run import CHUNK, KEY, PROMPTS, Condition, Run, attach, attached, chunk_of
from dit_toolkit.tests.host.tiny import latent, prompt, sample

pytestmark = pytest.mark.comfy


@dataclass(frozen=True, eq=False)
class Watch:
    """A description that shows every call of the model to `seen`."""

    seen: Callable

    def bind(self, run, model_options):
        def apply_model(executor, *args, **kwargs):
            self.seen(run, chunk_of(args[5]), args)
            return executor(*args, **kwargs)

        add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, apply_model, model_options, is_model_options=True)


@pytest.fixture
def watch(tiny_flux):
    calls = []
    model = attach(tiny_flux, Watch(lambda run, chunk, args: calls.append((run, chunk, run.evaluation))), Watch.bind)
    return model, calls


# Their last step is a single evaluation: heun and dpm_2 evaluate 2n - 1 times.
@pytest.mark.parametrize(("sampler", "evaluations"), [("euler", 4), ("heun", 7), ("dpm_2", 7), ("dpmpp_2m", 4)])
def test_evaluations_are_counted_not_steps(watch, sampler, evaluations):
    model, calls = watch
    sample(model, 4, sampler=sampler)
    assert [evaluation for *_, evaluation in calls] == list(range(evaluations))


def test_each_run_starts_anew(watch):
    model, calls = watch
    sample(model, 2)
    sample(model, 2)
    assert [evaluation for *_, evaluation in calls] == [0, 1, 0, 1]
    assert calls[0][0] is calls[1][0]
    assert calls[0][0] is not calls[2][0]


def test_lanes_are_emptied_when_the_run_ends(tiny_flux):
    """Whoever still holds the run holds no tensors."""
    kept = {}

    def keep(run, chunk, args):
        kept.update(run=run, condition=chunk.conditions[0])
        kept["lane"] = run.lane(keep, chunk.conditions[0], list)
        assert run.lane(keep, chunk.conditions[0], list) is kept["lane"]

    sample(attach(tiny_flux, Watch(keep), Watch.bind), 2)
    assert kept["run"].lane(keep, kept["condition"], list) is not kept["lane"]


def test_the_guider_gets_its_options_back(tiny_flux):
    """Whatever wraps the run from outside sees the options as they were."""
    seen = []

    def outside(executor, *args, **kwargs):
        before = executor.class_obj.model_options
        out = executor(*args, **kwargs)
        seen.append(executor.class_obj.model_options is before)
        return out

    model = tiny_flux.clone()
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "outside", outside)
    sample(attach(model, Watch(lambda *_: None), Watch.bind), 1)
    assert seen == [True]


def test_positive_and_negative_share_a_call_or_have_one_each(watch):
    model, calls = watch
    sample(model, 2, cfg=3.0)
    batched = [chunk for _, chunk, _ in calls]
    assert [[c.index for c in chunk.conditions] for chunk in batched] == [[1, 0], [1, 0]]
    assert batched[0].part(1) == slice(1, 2)
    assert batched[0].conditions == batched[1].conditions
    calls.clear()
    sample(model, 2, cfg=3.0, batch=3, negative=prompt(4, length=9))
    split = [(evaluation, [c.index for c in chunk.conditions], chunk.rows) for _, chunk, evaluation in calls]
    assert split == [(0, [0], 3), (0, [1], 3), (1, [0], 3), (1, [1], 3)]


def test_passes_that_reuse_a_condition_have_lanes_of_their_own(watch):
    model, calls = watch
    (model,) = SkipLayerGuidanceDiT.execute(model, 3.0, 0.0, 1.0, double_layers="0").args
    sample(model, 2, cfg=3.0)
    by_evaluation = [[c for _, chunk, e in calls if e == i for c in chunk.conditions] for i in range(2)]
    assert set(by_evaluation[0]) == set(by_evaluation[1])
    assert len(by_evaluation[0]) == len(set(by_evaluation[0])) == 3
    assert sorted(c.patched for c in by_evaluation[0]) == [(), (), (("double_block", 0),)]


def test_context_windows_have_lanes_of_their_own(watch):
    model, calls = watch
    schedule = {"context_schedule": "standard_static", "context_stride": 1, "closed_loop": False, "fuse_method": "flat"}
    (model,) = ContextWindowsManualNode.execute(model, 2, 0, **schedule, dim=0, freenoise=False).args
    sample(model, 2, batch=4)
    windows = {(evaluation, c.window) for _, chunk, evaluation in calls for c in chunk.conditions}
    assert {w for _, w in windows} == {(0, 1), (2, 3)}
    assert len(calls) == 4


def test_a_lane_is_per_owner_and_every_part_of_the_condition():
    run = Run()
    cpu = torch.device("cpu")
    first = Condition("a", 0, 0, None, None, cpu)
    others = [
        Condition("b", 0, 0, None, None, cpu),
        Condition("a", 1, 0, None, None, cpu),
        Condition("a", 0, 1, None, None, cpu),
        Condition("a", 0, 0, (0, 1), None, cpu),
        Condition("a", 0, 0, None, "hooks", cpu),
        Condition("a", 0, 0, None, None, torch.device("meta")),
    ]
    owner, other_owner = object(), object()
    lane = run.lane(owner, first, list)
    assert run.lane(owner, first, list) is lane
    lanes = [lane, run.lane(other_owner, first, list), *[run.lane(owner, c, list) for c in others]]
    assert len({id(x) for x in lanes}) == 8
    run.close(completed=True)
    assert run.lane(owner, first, list) is not lane


def test_a_call_without_names_is_one_condition():
    chunk = Run().open_chunk(torch.zeros(3, 1), {}, None)
    assert chunk.rows == 3
    assert [c.uuid for c in chunk.conditions] == [None]


def test_a_call_whose_conditions_have_no_uuids_keeps_them_apart():
    """Samplers of other packs call the model with cond_or_uncond alone."""
    chunk = Run().open_chunk(torch.zeros(4, 1), {"cond_or_uncond": [1, 0]}, None)
    assert [(c.uuid, c.index) for c in chunk.conditions] == [(None, 1), (None, 0)]
    assert chunk.rows == 2
    assert [c.name for c in chunk.conditions] == ["negative", "positive"]
    unplaced = Run().open_chunk(torch.zeros(4, 1), {"uuids": ["a", "b"]}, None)
    assert [(c.uuid, c.index) for c in unplaced.conditions] == [("a", 0), ("b", 0)]


def test_conditions_are_told_apart_by_the_guiders_names():
    """Its lists come in any order, and copies of one prompt stand in the list of another."""
    run = Run(names={"a": "positive", "b": "negative", "c": "middle"})
    p, n, m = {"uuid": "a"}, {"uuid": "b"}, {"uuid": "c"}
    assert run.names_of([[n, p], [m], [p]]) == ("negative", "middle", "positive")
    assert run.names_of([[{"uuid": "new"}], None, []])[0] == ""
    options = {"uuids": ["a", "a", "c"], "cond_or_uncond": [2, 0, 1], PROMPTS: run.names_of([[n, p], [m], [p]])}
    chunk = run.open_chunk(torch.zeros(3, 1), options, None)
    assert [c.positive for c in chunk.conditions] == [True, False, False]
    alone = run.open_chunk(torch.zeros(1, 1), {"uuids": ["b"], "cond_or_uncond": [0]}, None)
    assert [(c.name, c.positive) for c in alone.conditions] == [("negative", False)]
    assert alone.in_role("reference", [0]).conditions[0].name == "negative"


def test_a_guider_without_a_positive_has_its_first_prompt_for_it():
    run = Run(names={"a": "cond", "b": "uncond"})
    assert run.names_of([[{"uuid": "a"}], [{"uuid": "b"}]]) == ("positive", "negative")


def test_descriptions_meet_in_one_run_in_the_order_of_their_nodes(tiny_flux):
    order, runs = [], set()
    first = Watch(lambda run, *_: (order.append(1), runs.add(run)))
    second = Watch(lambda run, *_: (order.append(2), runs.add(run)))
    one = attach(tiny_flux, first, Watch.bind)
    both = attach(one, second, Watch.bind)
    assert attached(tiny_flux) == ()
    assert attached(one) == (first,)
    assert attached(both) == (first, second)
    sample(both, 1)
    assert order == [1, 2]
    assert len(runs) == 1
    order.clear()
    sample(one, 1)
    assert order == [1]


class Broken(RuntimeError):
    pass


@pytest.mark.parametrize("error", [Broken, comfy.model_management.InterruptProcessingException])
def test_nothing_outlives_a_run_that_breaks(tiny_flux, error):
    runs = []

    def break_at_second(run, chunk, args):
        runs.append(weakref.ref(run))
        run.lane(break_at_second, chunk.conditions[0], lambda: torch.zeros(1000))
        if run.evaluation == 1:
            raise error()

    model = attach(tiny_flux, Watch(break_at_second), Watch.bind)
    before = model.model_options
    with pytest.raises(error):
        sample(model, 3)
    assert model.model_options is before
    assert CHUNK not in before["transformer_options"]
    assert before["transformer_options"].keys() == {KEY}
    gc.collect()
    assert len(runs) == 2
    assert runs[0]() is None


def test_a_description_that_cannot_start_leaves_nothing(tiny_flux):
    class Refuses:
        def bind(self, run, model_options):
            raise Broken("no")

    model = attach(tiny_flux, Refuses(), Refuses.bind)
    with pytest.raises(Broken):
        sample(model, 1)
    assert model.model_options["transformer_options"].keys() == {KEY}


def test_watching_changes_nothing(watch, tiny_flux):
    model, _ = watch
    assert torch.equal(sample(model, 3), sample(tiny_flux, 3))
    assert KEY not in tiny_flux.model_options["transformer_options"]
    assert KEY not in tiny_flux.wrappers.get(WrappersMP.OUTER_SAMPLE, {})


def test_a_run_of_another_size_has_other_rows(watch):
    model, calls = watch
    sample(model, 1, noise=latent(size=(4, 6), batch=2))
    assert calls[-1][1].rows == 2
