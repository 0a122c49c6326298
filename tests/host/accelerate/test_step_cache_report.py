"""What a step cache tells: live, in the log, and in words afterwards."""

from __future__ import annotations

import json
from threading import Thread
from types import SimpleNamespace

import comfy.model_management
import pytest
from comfy.patcher_extension import WrappersMP
from comfy_execution.utils import CurrentNodeContext, current_executing_context

from dit_toolkit.host.accelerate import step_cache_report as report_module
from dit_toolkit.host.accelerate.step_cache_report import Entry, StepCacheReport, StepCacheRunReport
from dit_toolkit.host.memory import Bytes
from dit_toolkit.host.part_of_run import PartOfRun
from dit_toolkit.models.accelerate.cg_taylor import FirstBlockGate
from dit_toolkit.models.accelerate.policies import Guard, Interval
from dit_toolkit.tests.host.accelerate.caching import cached, last_run, settings_of
from dit_toolkit.tests.host.tiny import sample

pytestmark = pytest.mark.comfy


def entry(index=0, computed=True, reason="interval", error=None, threshold=None, seconds=1.0):
    return Entry(index, 1 - index / 10, computed, reason, error, threshold, seconds)


def run_of(*entries: Entry) -> StepCacheRunReport:
    return StepCacheRunReport(1, "Test", len(entries), entries=list(entries))


@pytest.fixture
def page(monkeypatch):
    """ComfyUI's server, as far as we speak to it: (event, data) in the order they were sent."""

    class Server:
        client_id = "tab"  # whose workflow runs

        def __init__(self):
            self.sent = []
            self.running = []
            self.prompt_queue = SimpleNamespace(get_current_queue_volatile=lambda: (self.running, []))

        def run(self, prompt, nodes, extra):
            self.running.append((7, prompt, nodes, extra, ["20"], {}))

        def send_sync(self, event, data, sid=None):
            assert sid == self.client_id  # other tabs have other workflows, with nodes of the same ids
            json.dumps(data, allow_nan=False)  # what the page cannot read would break it
            self.sent.append((event, data))

    server = Server()
    monkeypatch.setattr(report_module, "page_server", lambda: server)
    with CurrentNodeContext("prompt 1", "20"):  # as ComfyUI does around the sampler's node
        yield server


def test_the_speed_up_is_that_of_the_median_computed_evaluation():
    """8 s for the first, which warms up; 2 and 4 s for two more; 0.5 s for each of 3 forecasts."""
    times = [(True, 8.0), (True, 2.0), (False, 0.5), (True, 4.0), (False, 0.5), (False, 0.5)]
    run = run_of(*(entry(i, computed, seconds=seconds) for i, (computed, seconds) in enumerate(times)))
    assert run.speedup == pytest.approx((8 + 5 * 3.0) / 15.5)
    assert run.computed == 3


@pytest.mark.parametrize(
    ("entries", "speedup"),
    [
        ([], None),
        ([entry(computed=False)], None),
        ([entry(seconds=0.0)], None),
        ([entry(seconds=2.0)], 1.0),
        ([entry(seconds=2.0), entry(1, False, seconds=0.0)], 2.0),
    ],
)
def test_the_speed_up_of_little(entries, speedup):
    assert run_of(*entries).speedup == speedup


def test_the_text_says_what_a_reader_needs_to_set_the_knobs():
    run = run_of(
        entry(0, reason="first"),
        entry(1, reason="first"),
        entry(2, False, "gate", 0.02, 0.08, seconds=0.5),
        entry(3, True, "gate", 0.5, 0.08),
        entry(4, False, "gate", 0.04, 0.08, seconds=0.5),
        entry(5, True, "last"),
    )
    run.memory.asked = Bytes(2**21)
    run.memory.hold(Bytes(3 * 2**19))
    run.memory.hold(Bytes(2**19))
    run.notes.append("Something happened.")
    assert run.text().splitlines() == [
        "Test: 6 evaluations, 4 computed, 2 forecast, 1.20 x faster",
        "evaluations: ##.#.#",
        "computed because of: first 2, gate 1, last 1",
        "gate error: 0.02 to 0.5, median 0.04; threshold 0.08",
        "memory: 2.0 MiB asked for, 1.5 MiB held at most",
        "Something happened.",
    ]


def test_a_run_that_broke_off_before_anything_was_computed_has_a_text():
    report = StepCacheReport("Test", "Test, settings")
    run = report.start(4)
    report.end(run, completed=False)
    assert report.text().splitlines()[:2] == [
        "Test, settings",
        "Test: 0 evaluations, 0 computed, 0 forecast, interrupted",
    ]
    assert json.loads(report.json())["evaluations"] == []


def test_before_any_sampler_ran():
    assert StepCacheReport("Test").text() == "No sampler has run with this model yet."
    assert StepCacheReport("Test", "Interval 3").text() == "Interval 3\nNo sampler has run with this model yet."
    assert json.loads(StepCacheReport("Test").json()) == {"method": "Test", "settings": "", "evaluations": []}


def test_the_newest_runs_are_kept_and_numbered_on():
    report = StepCacheReport("Test")
    for _ in range(24):
        report.end(report.start(3), completed=True)
    assert [run.number for run in report.runs] == list(range(9, 25))


def test_the_page_is_told_of_every_evaluation_as_it_happens(tiny_flux, page):
    model = cached(tiny_flux, Interval(2, 2), report=StepCacheReport("Test", node="17"))
    counts = []

    def look(executor, *args):
        counts.append(sum(event == "dit_toolkit.evaluation" for event, _ in page.sent))
        return executor(*args)

    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "look", look)
    sample(model, 6)
    assert counts == list(range(6))
    events = [event.removeprefix("dit_toolkit.") for event, _ in page.sent]
    assert events == ["run_start", *["evaluation"] * 6, "run_end"]
    assert {(data["node"], data["prompt_id"], data["run"]) for _, data in page.sent} == {("17", "prompt 1", 1)}
    start, *middle, end = [data for _, data in page.sent]
    assert (start["planned"], start["method"]) == (6, "Test")
    assert [data["computed"] for data in middle] == [True, True, False, True, False, True]
    assert [data["index"] for data in middle] == list(range(6))
    assert (end["computed"], end["forecast"], end["interrupted"]) == (4, 2, False)
    sample(model, 6)
    assert page.sent[-1][1]["run"] == 2


def test_an_event_says_which_workflow_and_tab_it_is_of_and_the_kind_of_the_node(tiny_flux, page):
    """All that it takes to find the node: numbers of nodes and ids of graphs are not the page's alone."""
    graph = {"id": "graph 1", "extra": {"dit_toolkit.tab": "tab 1", "ds": {}}}
    page.run("prompt 0", {"17": {"class_type": "Other"}}, {"extra_pnginfo": {"workflow": {"id": "graph 0"}}})
    page.run("prompt 1", {"17": {"class_type": "Seer"}}, {"client_id": "tab", "extra_pnginfo": {"workflow": graph}})
    model = cached(tiny_flux, Interval(2, 2), report=StepCacheReport("Test", node="17"))
    sample(model, 3)
    assert [event for event, _ in page.sent].count("dit_toolkit.evaluation") == 3
    assert {(data["workflow"], data["tab"], data["kind"]) for _, data in page.sent} == {("graph 1", "tab 1", "Seer")}


@pytest.mark.parametrize("extra", [{}, {"extra_pnginfo": None}, {"extra_pnginfo": {"workflow": "text"}}, None])
def test_a_program_may_queue_without_a_workflow(tiny_flux, page, extra):
    page.run("prompt 1", {"16": {"class_type": "Seer"}}, extra)
    sample(cached(tiny_flux, Interval(2, 2), report=StepCacheReport("Test", node="17")), 3)
    assert {(data["workflow"], data["tab"], data["kind"]) for _, data in page.sent} == {(None, None, None)}


def test_a_node_without_an_id_and_a_page_that_is_not_there_are_no_matter(tiny_flux, page, monkeypatch):
    sample(cached(tiny_flux, Interval(2, 2)), 4)
    assert page.sent == []
    monkeypatch.setattr(report_module, "page_server", lambda: None)
    sample(cached(tiny_flux, Interval(2, 2), report=StepCacheReport("Test", node="17")), 4)


@pytest.mark.parametrize("client", [None, ""])
def test_a_prompt_that_no_page_sent_is_told_to_none(tiny_flux, page, client):
    """A program queues without a client id, and ComfyUI sends to every page what has no addressee."""
    page.client_id = client
    sample(cached(tiny_flux, Interval(2, 2), report=StepCacheReport("Test", node="17")), 4)
    assert page.sent == []


def test_a_sampler_that_no_prompt_runs_tells_nobody(tiny_flux, page):
    token = current_executing_context.set(None)
    try:
        sample(cached(tiny_flux, Interval(2, 2), report=StepCacheReport("Test", node="17")), 4)
    finally:
        current_executing_context.reset(token)
    assert page.sent == []


def test_an_event_names_its_prompt_from_any_thread(page):
    """With several GPUs chunks run in threads, where ComfyUI does not know its prompt."""
    report = StepCacheReport("Test", node="17")
    run = report.start(1)
    thread = Thread(target=report.add, args=(run, entry()))
    thread.start()
    thread.join()
    assert [data["prompt_id"] for _, data in page.sent] == ["prompt 1", "prompt 1"]


def test_each_run_names_the_prompt_that_runs_it(tiny_flux, page):
    """The model may come out of ComfyUI's cache, with the report of an earlier prompt."""
    model = cached(tiny_flux, Interval(2, 2), report=StepCacheReport("Test", node="17"))
    sample(model, 3)
    with CurrentNodeContext("prompt 2", "20"):
        sample(model, 3)
    assert [data["prompt_id"] for event, data in page.sent if event.endswith("run_end")] == ["prompt 1", "prompt 2"]


def test_errors_that_are_no_numbers_do_not_break_the_page(tiny_flux, page):
    """Block 0 gives zeros: the error is 0 / 0."""

    def zeros(args, extra):
        out = extra["original_block"](args)
        return {name: value * 0 for name, value in out.items()}

    model = tiny_flux.clone()
    model.set_model_patch_replace(zeros, "dit", "double_block", 0)
    model = cached(model, FirstBlockGate(0.5, 2), "gated", report=StepCacheReport("Test", node="17"))
    sample(model, 5)
    assert [data["error"] for event, data in page.sent if event.endswith("evaluation")] == [None] * 5
    assert all(each.computed for each in last_run(model).entries)
    assert json.loads(settings_of(model).report.json())["computed"] == 5
    assert "gate error" not in last_run(model).text()


def test_the_reasons_of_a_real_run(tiny_flux):
    gate = FirstBlockGate(1e6, 2)
    model = cached(tiny_flux, gate, "gated", guard=Guard(1, 2), part=PartOfRun(start=0.3))
    sample(model, 12)
    told = [(each.reason, each.computed) for each in last_run(model).entries]
    assert told[:4] == [("range", True)] * 4
    assert told[4:] == [
        ("gate", False),
        ("gate", False),
        ("gap", True),
        ("gate", False),
        ("gate", False),
        ("gap", True),
        ("gate", False),
        ("last", True),
    ]
    errors = [each.error for each in last_run(model).entries]
    assert [error is None for error in errors] == [reason != "gate" for reason, _ in told]
    assert {each.threshold for each in last_run(model).entries} == {1e6}


def test_the_json_holds_every_evaluation(tiny_flux):
    model = cached(tiny_flux, Interval(3, 2), order=1)
    sample(model, 6)
    values = json.loads(settings_of(model).report.json())
    run = last_run(model)
    assert values["computed"] == run.computed == 3
    assert values["bytes_held"] == run.bytes_held > 0
    assert [each["computed"] for each in values["evaluations"]] == [each.computed for each in run.entries]
    assert [each["sigma"] for each in values["evaluations"]] == [each.sigma for each in run.entries]
    assert values["evaluations"][0].keys() == {
        "index", "sigma", "computed", "reason", "error", "threshold", "seconds"
    }  # fmt: skip


def test_one_line_in_the_log_for_each_run(tiny_flux, caplog):
    model = cached(tiny_flux, Interval(3, 2), report=StepCacheReport("TaylorSeer"))
    with caplog.at_level("INFO", logger="dit_toolkit.host.accelerate.step_cache_report"):
        sample(model, 6)
        sample(model, 6)
    lines = [
        record.getMessage()
        for record in caplog.records
        if record.name == "dit_toolkit.host.accelerate.step_cache_report"
    ]
    assert len(lines) == 2
    assert all(line.startswith("TaylorSeer: 6 evaluations, 3 computed, 3 forecast") for line in lines)


def test_an_interrupt_is_said(tiny_flux, page):
    def stop(executor, x, t, *args, **kwargs):
        if float(t[0]) < 0.7:
            raise comfy.model_management.InterruptProcessingException
        return executor(x, t, *args, **kwargs)

    model = cached(tiny_flux, Interval(2, 2), report=StepCacheReport("Test", node="1"))
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "stop", stop)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(model, 12)
    assert page.sent[-1][0] == "dit_toolkit.run_end"
    assert page.sent[-1][1]["interrupted"]
    assert last_run(model).summary.endswith(", interrupted")


def test_a_debug_line_for_the_plan_and_for_each_evaluation(tiny_flux, caplog):
    """So that a bug report can be made to speak: ComfyUI's --verbose DEBUG."""
    model = cached(tiny_flux, Interval(2, 2))
    with caplog.at_level("DEBUG", logger="dit_toolkit.host"):
        sample(model, 6, cfg=2.0)
    lines = [record.getMessage() for record in caplog.records if record.levelname == "DEBUG"]
    assert sum(line.startswith("Test: Interval(every=2, first_full=2") for line in lines) == 1
    evaluations = [line for line in lines if line.startswith("Test: evaluation ")]
    assert len(evaluations) == 6
    assert evaluations[0] == "Test: evaluation 0, sigma 1, computed because of first; calls computed 1, forecast 0"
    assert "forecast because of interval; calls computed 0, forecast 1" in evaluations[2]
    assert [line for line in lines if line.startswith("evaluation 0: ")] == [
        "evaluation 0: 1 pictures for each of negative, positive"
    ]
