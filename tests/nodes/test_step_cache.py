"""The nodes: what they offer, what they refuse, and that they do what the host does."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

pytestmark = pytest.mark.comfy

from comfy_extras.nodes_easycache import EasyCacheNode  # noqa: E402

from dit_toolkit.host.accelerate.step_cache_taps import LastBlockTap, ModuleTap, PredictionTap, SpanTap  # noqa: E402
from dit_toolkit.host.part_of_run import PartOfRun  # noqa: E402
from dit_toolkit.models.accelerate.cg_taylor import FirstBlockGate  # noqa: E402
from dit_toolkit.models.accelerate.delta_dit import Stages  # noqa: E402
from dit_toolkit.models.accelerate.policies import (  # noqa: E402
    Guard,
    Interval,
    Listed,
    Spread,
)
from dit_toolkit.models.accelerate.taylorseer import FORECASTS, Forecaster  # noqa: E402
from dit_toolkit.nodes.step_cache import (  # noqa: E402
    SPACINGS,
    AccelerationReport,
    ConfidenceGatedTaylor,
    DeltaDiT,
    TaylorSeer,
)
from dit_toolkit.tests.host import families  # noqa: E402
from dit_toolkit.tests.host.accelerate.caching import settings_of, strip  # noqa: E402
from dit_toolkit.tests.host.families import FAMILIES  # noqa: E402
from dit_toolkit.tests.host.tiny import sample  # noqa: E402
from dit_toolkit.tests.nodes.calling import run_node  # noqa: E402

CACHES = (TaylorSeer, ConfidenceGatedTaylor, DeltaDiT)
every_cache = pytest.mark.parametrize("node", CACHES)


def test_inputs_keep_their_places():
    """Saved workflows hold widget values by position: adding at the end is free, everything else is not."""
    ids = {node.define_schema().node_id: [entry.id for entry in node.define_schema().inputs] for node in CACHES}
    assert ids["DiTTaylorSeer"][:5] == ["model", "interval", "order", "first_full", "last_full"]
    assert ids["DiTCGTaylor"][:5] == ["model", "threshold", "warm_up", "max_consecutive", "last_full"]
    assert ids["DiTDeltaDiT"][:6] == ["model", "interval", "share", "boundary", "first_full", "last_full"]
    for node in CACHES:
        schema = node.define_schema()
        assert [output.io_type for output in schema.outputs] == ["MODEL", "DIT_REPORT"]
        assert len([entry for entry in schema.inputs if not getattr(entry, "advanced", None)]) <= 6
    assert AccelerationReport.define_schema().inputs[0].io_type == "DIT_REPORT"


@every_cache
def test_with_its_defaults_it_skips_and_says_so(tiny_flux, node):
    model, report = run_node(node, model=tiny_flux, **({"threshold": 2.0} if node is ConfidenceGatedTaylor else {}))
    out = sample(model, 12)
    assert torch.isfinite(out).all()
    assert "." in strip(model)
    assert not torch.equal(out, sample(tiny_flux, 12))
    assert (report.node, report.method) == ("12", settings_of(model).method)
    text, values, after = AccelerationReport.execute(report, out).args
    settings, summary, marks = text.splitlines()[:3]
    assert settings.startswith(report.method)
    assert summary.startswith(f"{report.method}: 12 evaluations, {strip(model).count('#')} computed, ")
    assert marks == f"evaluations: {strip(model)}"
    assert len(json.loads(values)["evaluations"]) == 12
    assert after is out


NEUTRAL = [
    (TaylorSeer, {"interval": 1}),
    (TaylorSeer, {"interval": 1, "order": 4, "tap": "every module"}),
    (ConfidenceGatedTaylor, {"threshold": 0.0}),
    (DeltaDiT, {"interval": 1}),
    (DeltaDiT, {"share": 0.0}),
]


@pytest.mark.parametrize(("node", "values"), NEUTRAL)
def test_neutral_values_pass_the_model_on(tiny_flux, node, values):
    model, report = run_node(node, model=tiny_flux, **values)
    assert torch.equal(sample(model, 4), sample(tiny_flux, 4))
    assert isinstance(AccelerationReport.execute(report, None).args[0], str)


@pytest.mark.parametrize("schedule", ["1111", "11"])
def test_a_schedule_that_names_all_computes_all(tiny_flux, schedule):
    model, _ = run_node(TaylorSeer, model=tiny_flux, schedule=schedule)
    assert torch.equal(sample(model, 4), sample(tiny_flux, 4))
    assert strip(model) == "####"


def test_settings_of_taylorseer_reach_the_cache(tiny_flux):
    values = {
        "interval": 4,
        "order": 2,
        "first_full": 5,
        "last_full": 2,
        "tap": "prediction",
        "spacing": "as published",
        "forecast": "Taylor (paper)",
    }
    values |= {"start_percent": 0.1, "end_percent": 0.9, "offload": True}
    settings = settings_of(run_node(TaylorSeer, model=tiny_flux, **values)[0])
    assert settings.policy == Interval(4, 5)
    assert settings.forecaster == Forecaster(2, derivatives_from=4)
    assert (settings.guard, settings.part, settings.offload) == (Guard(2), PartOfRun(0.1, 0.9), True)
    assert isinstance(settings.tap, PredictionTap)
    spaced = [settings_of(run_node(TaylorSeer, model=tiny_flux, spacing=name)[0]).policy for name in SPACINGS]
    assert spaced == [Spread(3), Interval(3, 1, to_end=True), Interval(3, 1)]
    listed = settings_of(run_node(TaylorSeer, model=tiny_flux, schedule=" 0-2, 5 ")[0])
    assert listed.policy == Listed.parse("0-2,5")


def test_a_schedule_takes_the_place_of_first_full(tiny_flux):
    """Also for the rule that keeps early features from having derivatives."""
    models = [run_node(TaylorSeer, model=tiny_flux, schedule="0, 1, 5", order=1, first_full=n)[0] for n in (1, 6)]
    assert torch.equal(*(sample(model, 8) for model in models))


@pytest.mark.parametrize("name", FORECASTS)
def test_every_form_of_forecast_can_be_chosen(tiny_flux, name):
    model, _ = run_node(TaylorSeer, model=tiny_flux, forecast=name, order=2)
    assert settings_of(model).forecaster == replace(FORECASTS[name], order=2)
    assert torch.isfinite(sample(model, 9, sampler="heun")).all()


@pytest.mark.parametrize(
    ("name", "tap", "kind"),
    [
        ("flux", "auto", LastBlockTap),
        ("flux", "last block", LastBlockTap),
        ("flux", "prediction", PredictionTap),
        ("flux", "every module", ModuleTap),
        ("wan", "auto", LastBlockTap),
        ("cogvideox", "auto", PredictionTap),
        ("pixart", "prediction", PredictionTap),
    ],
)
def test_the_tap_is_what_was_chosen_and_auto_what_is_there(name, tap, kind):
    assert type(settings_of(run_node(TaylorSeer, model=FAMILIES[name].load(), tap=tap)[0]).tap) is kind


def test_most_memory_is_a_limit(tiny_flux):
    """Two points of a tiny model's modules are 126 KiB: 1/16384 GiB is too little, 1/1024 is enough."""
    model, _ = run_node(TaylorSeer, model=tiny_flux, tap="every module", max_memory=1 / 16384)
    with pytest.raises(ValueError, match=r"TaylorSeer on every module would hold .* Set 'tap' to 'last block'"):
        sample(model, 8)
    model, _ = run_node(TaylorSeer, model=tiny_flux, tap="every module", max_memory=1 / 1024)
    sample(model, 8)
    assert "." in strip(model)


def test_settings_of_the_gate_reach_the_cache(tiny_flux):
    values = {"threshold": 0.2, "warm_up": 4, "max_consecutive": 3, "last_full": 2, "first_order": 2, "last_order": 0}
    values |= {"compare": "residual", "gate_rows": "cond", "forecast": "Newton, sigma"}
    settings = settings_of(run_node(ConfidenceGatedTaylor, model=tiny_flux, **values)[0])
    assert settings.policy == FirstBlockGate(0.2, 4, 2, "residual", "cond")
    assert settings.forecaster == Forecaster(0, "newton", "sigma")
    assert settings.guard == Guard(2, 3)
    assert (settings.tap.gated, settings.tap.residual) == (True, True)
    paper = settings_of(run_node(ConfidenceGatedTaylor, model=tiny_flux)[0])
    assert (paper.tap.residual, paper.guard) == (False, Guard(1))


def test_settings_of_delta_dit_reach_the_cache(tiny_flux):
    model, _ = run_node(
        DeltaDiT, model=tiny_flux, interval=3, share=0.5, boundary=0.25, first_full=2, last_full=1, order=1
    )
    settings = settings_of(model)
    assert isinstance(settings.tap, SpanTap)
    assert settings.tap.stages == Stages(0.5, 0.25)
    assert (settings.policy, settings.guard, settings.forecaster.order) == (Interval(3, 2), Guard(1), 1)


def test_the_released_baseline_of_delta_dit_skips_the_single_blocks_of_flux(tiny_flux):
    """19 double and 38 single blocks: interval 3, from the first evaluation on, the same span in the whole run."""
    model, _ = run_node(DeltaDiT, model=tiny_flux, interval=3, share=0.67, boundary=1.0)
    settings = settings_of(model)
    assert settings.tap.stages.span(57, early=True) == (19, 57)
    assert settings.tap.stages.boundary == 1  # never late
    assert (settings.policy, settings.forecaster.order) == (Interval(3, 1), 0)
    sample(model, 9)
    assert strip(model) == "#..#..#.."


@pytest.mark.parametrize(
    ("node", "values", "message"),
    [
        (
            TaylorSeer,
            {"schedule": "3, 6"},
            r"schedule must name evaluation 0: there is nothing to forecast from before it\.",
        ),
        (TaylorSeer, {"schedule": "every third"}, r"schedule must be a mask such as 1110100, .* got 'every'\."),
        (TaylorSeer, {"start_percent": 0.6, "end_percent": 0.4}, r"start_percent .* must be below end_percent"),
        (TaylorSeer, {"end_percent": float("nan")}, "TaylorSeer: 'end_percent' must be a number from .* got nan"),
        (TaylorSeer, {"interval": 0}, r"'interval' must be a whole number from 1 to 20, got 0\."),
        (TaylorSeer, {"first_full": 0}, "'first_full' must be a whole number from 1 to 50, got 0"),
        (TaylorSeer, {"order": -1}, "'order' must be a whole number from 0 to 4, got -1"),
        (TaylorSeer, {"last_full": -1}, "'last_full' must be a whole number from 0 to 50, got -1"),
        (ConfidenceGatedTaylor, {"threshold": float("nan")}, "'threshold' must be a number from 0.0 to 2.0, got nan"),
        (ConfidenceGatedTaylor, {"threshold": -0.5}, r"'threshold' must be a number from 0\.0 to 2\.0, got -0\.5"),
        (ConfidenceGatedTaylor, {"threshold": float("inf")}, "'threshold' must be a number from .*, got inf"),
        (ConfidenceGatedTaylor, {"warm_up": 0}, "'warm_up' must be a whole number from 1 to 50, got 0"),
        (DeltaDiT, {"share": 1.5}, r"'share' must be a number from 0\.0 to 1\.0, got 1\.5\."),
        (DeltaDiT, {"boundary": -0.1}, r"'boundary' must be a number from 0\.0 to 1\.0, got -0\.1\."),
    ],
)
def test_wrong_inputs_are_answered_with_a_sentence(tiny_flux, node, values, message):
    with pytest.raises(ValueError, match=message):
        run_node(node, model=tiny_flux, **values)


@pytest.mark.parametrize(
    ("node", "name", "values", "message"),
    [
        (
            ConfidenceGatedTaylor,
            "cogvideox",
            {},
            r"^Apply Confidence-Gated Taylor needs a model whose blocks .* Use compare 'input change', which works",
        ),
        (
            DeltaDiT,
            "pixart",
            {},
            r"offers no such hook for PixArtSigma\. Use Apply TaylorSeer with tap 'prediction', which works on every",
        ),
        (TaylorSeer, "lumina2", {"tap": "last block"}, r"^Apply TaylorSeer needs a model whose blocks can be patched"),
        (
            TaylorSeer,
            "wan",
            {"tap": "every module"},
            r"^Apply TaylorSeer with tap 'every module' needs a FLUX\.1 model, got WAN21_T2V\.",
        ),
    ],
)
def test_a_model_that_does_not_offer_it_is_refused(node, name, values, message):
    with pytest.raises(ValueError, match=message):
        run_node(node, model=FAMILIES[name].load(), **values)


@pytest.mark.parametrize(("node", "values"), [(ConfidenceGatedTaylor, {"threshold": 0}), (DeltaDiT, {"share": 0})])
def test_neutral_values_are_neutral_where_blocks_cannot_be_patched(node, values):
    model = FAMILIES["cogvideox"].load()
    assert run_node(node, model=model, **values)[0] is model


@pytest.mark.parametrize("name", ["cogvideox", "flux"])
def test_a_gate_on_the_input_works_on_every_model(name):
    family = FAMILIES[name]
    values = {"compare": "input change", "threshold": 2.0, "warm_up": 3, "last_full": 0}
    model, report = run_node(ConfidenceGatedTaylor, model=family.load(), **values)
    result = families.sample(family, model, steps=8)
    run = report.runs[-1]
    assert torch.isfinite(result).all()
    assert [entry.computed for entry in run.entries[:3]] == [True] * 3
    assert run.computed < 8
    assert len(run.errors) == 5  # the sum after each evaluation that the gate judged
    assert report.text().startswith("Confidence-Gated Taylor by input change")


@pytest.mark.parametrize("first", CACHES)
@pytest.mark.parametrize("second", CACHES)
def test_two_of_them_are_refused(tiny_flux, first, second):
    model, _ = run_node(first, model=tiny_flux)
    names = [settings_of(run_node(node, model=tiny_flux)[0]).method for node in (second, first)]
    with pytest.raises(
        ValueError, match=f"^{names[0]} cannot work on a model that {names[1]} already caches. Remove one"
    ):
        run_node(second, model=model)


@every_cache
def test_easycache_is_refused(tiny_flux, node):
    (theirs,) = EasyCacheNode.execute(tiny_flux, 0.2, 0.15, 0.95, False).args
    with pytest.raises(
        ValueError, match=r"cannot work on a model that EasyCache already caches\. Remove one of the two\."
    ):
        run_node(node, model=theirs)


def test_a_report_before_the_sampler_says_so(tiny_flux):
    _, report = run_node(TaylorSeer, model=tiny_flux)
    text, values, after = AccelerationReport.execute(report, 5).args
    assert text.endswith("No sampler has run with this model yet.")
    assert json.loads(values)["evaluations"] == []
    assert after == 5


@pytest.mark.parametrize(
    ("node", "values"),
    [(TaylorSeer, {"interval": 1}), (ConfidenceGatedTaylor, {"threshold": 0}), (DeltaDiT, {"share": 0})],
)
def test_the_report_of_a_node_that_is_off_says_so(tiny_flux, node, values):
    model, report = run_node(node, model=tiny_flux, **values)
    sample(model, 2)
    assert AccelerationReport.execute(report, 5).args[0].endswith(" is off: the model is as it came.")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_limit_of_memory_that_is_no_number_is_refused(tiny_flux, value):
    with pytest.raises(ValueError, match=f"'max_memory' must be a number from 0.0 to 1024.0, got {value}"):
        run_node(TaylorSeer, model=tiny_flux, max_memory=value)
