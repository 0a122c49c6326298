"""The gate: its error by definition, its strictness, and the schedules it makes of features that can be told."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch

from dit_toolkit.models.accelerate.cg_taylor import FirstBlockGate, gate_error
from dit_toolkit.models.accelerate.policies import COMPUTE, PROBE, Moment
from dit_toolkit.models.accelerate.taylorseer import taylor_weights, weighted_sum


def pair(seed=0, rows=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 5, 7, generator=generator) for _ in range(2)]


def error_by_definition(forecast, actual) -> float:
    """mean |h^ - h| / mean |h|, number by number."""
    a, b = forecast.flatten().tolist(), actual.flatten().tolist()
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / sum(abs(y) for y in b)


EVERY_WAY = ("max", "cond", "mean", "published")


@pytest.mark.parametrize("how", EVERY_WAY)
def test_the_error_of_one_picture_is_that_of_the_paper(how):
    forecast, actual = pair(rows=1)
    assert gate_error(forecast, actual, how) == pytest.approx(error_by_definition(forecast, actual), rel=1e-5)


def test_the_error_of_a_batch_by_definition():
    """Pictures of very different size, so that a ratio of means is no mean of ratios."""
    forecast, actual = pair()
    forecast[1], actual[1] = forecast[1] * 0.1, actual[1] * 10
    each = [error_by_definition(forecast[i], actual[i]) for i in range(3)]
    assert gate_error(forecast, actual, "max") == pytest.approx(max(each), rel=1e-5)
    assert gate_error(forecast, actual, "mean") == pytest.approx(sum(each) / 3, rel=1e-5)
    assert gate_error(forecast, actual, "cond") == gate_error(forecast, actual, "mean")
    published = gate_error(forecast, actual, "published")
    assert published == pytest.approx(error_by_definition(forecast, actual), rel=1e-5)
    assert abs(published - sum(each) / 3) > 0.1


def test_the_error_of_half_precision_is_summed_in_float32():
    """A mean of 70,000 numbers of one size would stick in bfloat16."""
    actual = torch.ones(1, 70_000, dtype=torch.bfloat16)
    assert gate_error(actual * 1.5, actual, "max") == pytest.approx(0.5, rel=1e-6)


def test_the_error_reads_only():
    forecast, actual = pair()
    kept = forecast.clone(), actual.clone()
    gate_error(forecast, actual, "max")
    assert torch.equal(forecast, kept[0])
    assert torch.equal(actual, kept[1])


@pytest.mark.parametrize("how", EVERY_WAY)
@pytest.mark.parametrize("bad", [nan, inf])
def test_one_picture_that_is_no_number_shuts_the_gate(how, bad):
    forecast, actual = pair()
    forecast[1] = bad
    assert not FirstBlockGate(1e30).opens(gate_error(forecast, actual, how))


def test_the_gate_opens_strictly_below_the_threshold():
    gate = FirstBlockGate(0.125)
    assert gate.opens(0.1249)
    assert not gate.opens(0.125)
    assert not gate.opens(0.1251)
    assert not FirstBlockGate(0).opens(0.0)


@pytest.mark.parametrize("error", [nan, inf, -inf])
def test_an_error_that_is_no_number_keeps_the_gate_shut(error):
    assert not FirstBlockGate(inf).opens(error)
    assert FirstBlockGate(inf).opens(1e30)


def test_a_block_that_gives_zeros_keeps_the_gate_shut():
    zero = torch.zeros(1, 4)
    for how in EVERY_WAY:
        assert not FirstBlockGate(inf).opens(gate_error(zero, zero, how))
        assert not FirstBlockGate(inf).opens(gate_error(zero + 1, zero, how))


def test_the_warm_up_is_computed_and_then_the_model_is_asked():
    gate = FirstBlockGate(0.1, warm_up=5)
    assert [gate.choose(Moment(i, 1)) for i in range(7)] == [(COMPUTE, "first")] * 5 + [(PROBE, "gate")] * 2


def test_threshold_0_never_asks():
    assert {FirstBlockGate(0, warm_up=1).choose(Moment(i, 1))[0] for i in range(50)} == {COMPUTE}


@pytest.mark.parametrize(("warm_up", "order", "first"), [(5, 1, 2), (5, 3, 4), (1, 1, 1), (2, 4, 2), (5, 0, 1)])
def test_a_lane_that_starts_late_fills_the_forecast_of_block_0_first(warm_up, order, first):
    assert FirstBlockGate(0.1, warm_up, order).min_full == first


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"threshold": -0.1}, r"threshold must be 0 or more, got -0\.1\."),
        ({"threshold": nan}, "threshold must be 0 or more, got nan"),
        ({"threshold": 0.1, "warm_up": 0}, "warm_up must be at least 1, got 0: a forecast needs a computed evaluation"),
    ],
)
def test_settings_that_mean_nothing_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        FirstBlockGate(**values)


def run_of(block0, gate: FirstBlockGate, evaluations: int) -> tuple[list[int], list[float]]:
    """Which evaluations are computed of a model whose block 0 gives `block0(s)`; the last is always computed."""
    full, stored, errors = [], {}, []
    for s in range(evaluations):
        choice, _ = gate.choose(Moment(s, s - full[-1] if full else 0))
        points = full[::-1]
        if choice is PROBE and s < evaluations - 1:
            forecast = weighted_sum([stored[p] for p in points], taylor_weights(points, s, gate.order))
            errors.append(gate_error(forecast, block0(s), gate.reduce))
            if gate.opens(errors[-1]):
                continue
        full.append(s)
        stored[s] = block0(s)
    return full, errors


def straight(s: float) -> torch.Tensor:
    return torch.tensor([[1.0, -2.0, 3.0]]) * (2 + s / 4)


def test_a_block_that_moves_straight_is_always_told():
    full, errors = run_of(straight, FirstBlockGate(1e-5, warm_up=2), 20)
    assert full == [0, 1, 19]
    assert max(errors) < 1e-6


@pytest.mark.parametrize("k", [7, 8, 13])
def test_a_jump_shuts_the_gate_where_it_happens(k):
    """The forecasts before it are right, the one at it is off, and the first after it starts from its new point.

    The slope then holds the jump: the gate stays shut once more, until two points lie behind it.
    """
    full, _ = run_of(lambda s: straight(s) + (5.0 if s >= k else 0.0), FirstBlockGate(0.01, warm_up=2), 20)
    assert full == [0, 1, k, k + 1, 19]


def test_order_0_compares_with_the_last_and_repeats_the_last():
    """Straight growth by 1/(8 + s) an evaluation: computed again once it has grown by a quarter."""
    gate = FirstBlockGate(0.25, warm_up=1, order=0)
    full, _ = run_of(straight, gate, 30)
    expected = [0]
    for s in range(1, 30):
        if (s - expected[-1]) / (8 + s) >= 0.25 or s == 29:
            expected.append(s)
    assert full == expected
    assert len(full) > 4
