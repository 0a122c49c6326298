"""TaylorSeer's forecasts, judged by the authors' recursion over stored derivatives, and by polynomials."""

from __future__ import annotations

import random
from dataclasses import replace
from math import factorial, log

import pytest
import torch

from dit_toolkit.models.accelerate.schedules import UNDAMPED, Damping
from dit_toolkit.models.accelerate.taylorseer import (
    FORECASTS,
    Forecaster,
    Point,
    damped_weights,
    newton_weights,
    taylor_weights,
    weighted_sum,
)


def derivatives_by_recursion(features: dict[int, torch.Tensor], order: int, first_enhance: int = 1) -> dict:
    """The authors' loop: one dictionary of derivatives, updated at each full step from the one before.

    A derivative is made only where the older dictionary has its lower one, and the step is above first_enhance - 2.
    """
    stored, last = {}, None
    for step, feature in sorted(features.items()):
        made = {0: feature}
        for i in range(order):
            if i not in stored or step <= first_enhance - 2:
                break
            made[i + 1] = (made[i] - stored[i]) / (step - last)
        stored, last = made, step
    return stored


def forecast_by_recursion(features: dict[int, torch.Tensor], at: int, order: int, first_enhance: int = 1):
    distance = at - max(features)
    stored = derivatives_by_recursion(features, order, first_enhance)
    return sum(derivative * distance**i / factorial(i) for i, derivative in stored.items())


def newton_by_divided_differences(points: list[float], values: list[torch.Tensor], at: float):
    """Y0 + f[c0,c1](c - c0) + f[c0,c1,c2](c - c0)(c - c1) + ..., newest first."""
    if len(points) == 1:
        return values[0]

    def divided(low: int, high: int):
        if low == high:
            return values[low]
        return (divided(low, high - 1) - divided(low + 1, high)) / (points[low] - points[high])

    total, product = torch.zeros_like(values[0]), 1.0
    for i in range(len(points)):
        total = total + divided(0, i) * product
        product *= at - points[i]
    return total


def features_at(steps, seed=0, dtype=torch.float64) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {step: torch.randn(2, 3, 4, generator=generator, dtype=dtype) for step in steps}


@pytest.mark.parametrize("first_enhance", [1, 2, 3, 5])
@pytest.mark.parametrize("order", range(5))
def test_the_weights_are_the_recursion_of_the_authors(order, first_enhance):
    """Also at uneven gaps, and from the newest `order + 1` features alone, though the recursion saw them all."""
    chosen = random.Random(order)
    steps = [0, *sorted(chosen.sample(range(1, 60), 14))]
    features = features_at(steps)
    for count in range(1, len(steps) + 1):
        known = {step: features[step] for step in steps[:count]}
        newest = steps[:count][::-1]
        for at in (newest[0], newest[0] + 1, newest[0] + 7):
            expected = forecast_by_recursion(known, at, order, first_enhance)
            for points in (newest, newest[: order + 1]):
                weights = taylor_weights(points, at, order, first_enhance - 1)
                assert len(weights) == len(points)
                got = weighted_sum([known[p] for p in points], weights)
                torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_first_enhance_keeps_the_first_derivatives_from_being_made():
    """taylorseer.md: with 3, steps 0 and 1 get no derivative, step 2 gets the first, step 8 the second."""
    features = features_at([0, 1, 2, 8, 14])
    orders = [len(derivatives_by_recursion({s: features[s] for s in features if s <= last}, 4, 3)) for last in features]
    assert orders == [1, 1, 2, 3, 4]
    assert taylor_weights([1, 0], 3, 4, derivatives_from=2) == [1.0, 0.0]
    assert taylor_weights([2, 1, 0], 3, 4, derivatives_from=2) == [2.0, -1.0, 0.0]


def test_a_derivative_less_or_more_is_noticed():
    """The judge tells first_enhance 1 from 3, and gap of one from gap of the last."""
    features = features_at([0, 1, 2, 8])
    assert not torch.allclose(forecast_by_recursion(features, 9, 2, 1), forecast_by_recursion(features, 9, 3, 1))
    assert not torch.allclose(forecast_by_recursion(features, 9, 3, 1), forecast_by_recursion(features, 9, 3, 3))


@pytest.mark.parametrize("weights_of", [taylor_weights, newton_weights])
@pytest.mark.parametrize("order", range(5))
def test_weights_sum_to_one(weights_of, order):
    chosen = random.Random(order)
    for _ in range(20):
        points = sorted(chosen.sample(range(50), chosen.randint(1, 6)), reverse=True)
        assert sum(weights_of(points, points[0] + chosen.randint(1, 9), order)) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("weights_of", [taylor_weights, newton_weights])
def test_order_0_and_a_single_point_repeat_the_newest_feature(weights_of):
    assert weights_of([14, 8, 2], 19, 0) == [1, 0, 0]
    assert weights_of([14], 19, 4) == [1]
    features = features_at([2, 8, 14], dtype=torch.float32)
    newest = [features[s] for s in (14, 8, 2)]
    assert torch.equal(weighted_sum(newest, weights_of([14, 8, 2], 19, 0)), features[14])


@pytest.mark.parametrize("weights_of", [taylor_weights, newton_weights])
@pytest.mark.parametrize("order", range(5))
def test_the_forecast_of_a_computed_evaluation_is_what_was_computed(weights_of, order):
    weights = weights_of([14, 11, 2, 1, 0], 14, order)
    assert weights[0] == 1
    assert not any(weights[1:])


def polynomial(degree: int, at: float) -> float:
    return [7.0, 2.0 - 3 * at, 0.25 * at**2 - at + 5, at**3 / 8 - at][degree]


@pytest.mark.parametrize(("degree", "order"), [(d, o) for d in (0, 1) for o in range(d, 5)])
def test_taylor_is_exact_for_straight_lines_at_even_gaps(degree, order):
    for gap in (1, 3, 6):
        points = [4 * gap, 3 * gap, 2 * gap, gap, 0]
        for ahead in range(1, gap + 1):
            weights = taylor_weights(points, points[0] + ahead, order)
            got = sum(w * polynomial(degree, p) for w, p in zip(weights, points, strict=True))
            assert got == pytest.approx(polynomial(degree, points[0] + ahead), abs=1e-9)


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize(("gap", "ahead"), [(1, 1), (4, 3), (6, 5)])
def test_taylor_misses_parabolas_by_the_gap_times_the_distance(gap, ahead, order):
    """For a * s^2 it is off by -a * gap * ahead: -12 a for 4 and 3. Higher orders do not mend it."""
    a, points = 0.75, [4 * gap, 3 * gap, 2 * gap, gap, 0]
    weights = taylor_weights(points, points[0] + ahead, order)
    got = sum(w * a * p**2 for w, p in zip(weights, points, strict=True))
    assert got - a * (points[0] + ahead) ** 2 == pytest.approx(-a * gap * ahead, rel=1e-9)


@pytest.mark.parametrize("order", range(5))
def test_newton_is_the_polynomial_of_divided_differences(order):
    chosen = random.Random(order)
    for _ in range(10):
        points = sorted((chosen.uniform(0, 1) for _ in range(6)), reverse=True)
        values = list(features_at(range(6), seed=order).values())
        at = points[0] + chosen.uniform(-0.2, 0.3)
        expected = newton_by_divided_differences(points[: order + 1], values, at)
        got = weighted_sum(values, newton_weights(points, at, order))
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("coordinate", ["index", "step", "sigma", "log sigma"])
@pytest.mark.parametrize("degree", range(4))
def test_newton_is_exact_up_to_its_degree_at_uneven_spacing(degree, coordinate):
    """On a shifted flow schedule, whose sigmas are far from even; computed at 0, 1, 2, 5 and 9 of 14."""
    sigmas = [3 * t / (1 + 2 * t) for t in (1 - i / 14 for i in range(14))]
    forecaster = Forecaster(degree, "newton", coordinate)
    points = [Point(i, sigmas[i], i / 2) for i in (9, 5, 2, 1, 0)]
    for i in (10, 11, 13):
        at = Point(i, sigmas[i], i / 2)
        place = {"index": float(i), "step": i / 2, "sigma": sigmas[i], "log sigma": log(sigmas[i])}[coordinate]
        assert forecaster.coordinate_of(at) == place
        weights = forecaster.weights(points, at)
        got = sum(w * polynomial(degree, forecaster.coordinate_of(p)) for w, p in zip(weights, points, strict=True))
        assert got == pytest.approx(polynomial(degree, place), rel=1e-9, abs=1e-9)
        if degree:
            lower = Forecaster(degree - 1, "newton", coordinate).weights(points, at)
            short = sum(w * polynomial(degree, forecaster.coordinate_of(p)) for w, p in zip(lower, points, strict=True))
            assert abs(short - got) > 1e-4


def test_orders_fall_to_what_the_points_allow():
    assert newton_weights([3, 1], 5, 4) == newton_weights([3, 1], 5, 1)
    assert taylor_weights([3, 1], 5, 4) == taylor_weights([3, 1], 5, 1) == [2.0, -1.0]


def test_taylor_counts_evaluations_whatever_coordinate_is_set():
    points, at = [Point(5, 0.2), Point(2, 0.9)], Point(7, 0.1)
    for coordinate in ("index", "sigma", "log sigma"):
        assert Forecaster(1, "taylor", coordinate).weights(points, at) == taylor_weights([5, 2], 7, 1)


def test_points_at_one_place_are_told_by_the_coordinate():
    """heun evaluates twice at a sigma: one place in sigma, two places in evaluations."""
    a, b = Point(3, 0.75), Point(4, 0.75)
    assert not Forecaster(1).too_near(a, b)
    assert not Forecaster(1, "newton", "index").too_near(a, b)
    assert Forecaster(1, "newton", "sigma").too_near(a, b)
    assert Forecaster(1, "newton", "log sigma").too_near(a, b)
    assert not Forecaster(1, "newton", "sigma").too_near(a, Point(4, 0.7499))
    assert not Forecaster(1, "newton", "step").too_near(a, b)  # without a schedule, evaluations
    assert Forecaster(1, "newton", "step").too_near(Point(3, 0.75, 1.0), Point(4, 0.75, 1.0))
    one = Point(0, 1.0), Point(1, 0.9999)  # as dpmpp_2s_ancestral begins; log 1 is 0
    assert not Forecaster(1, "newton", "log sigma").too_near(*one)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("slope", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("bend", [0.0, 0.3, 1.0])
def test_damping_keeps_a_part_of_what_each_degree_adds(order, slope, bend):
    """The newest value, plus a part of the line's step away from it, plus a part of the polynomial's away from that."""
    points, at = [11.0, 7.0, 4.0, 0.0], 14.0
    held, line, full = (torch.tensor(newton_weights(points, at, degree)) for degree in (0, min(order, 1), order))
    weights = torch.tensor(damped_weights(points, at, order, Damping(slope, bend)))
    torch.testing.assert_close(weights, held + slope * (line - held) + slope * bend * (full - line))
    assert float(weights.sum()) == pytest.approx(1)
    if slope == 0:
        assert weights.tolist() == held.tolist()


def test_without_damping_the_forecast_is_newtons_bit_for_bit():
    plain, damped = Forecaster(2, "newton", "step"), replace(FORECASTS["Newton, damped"], order=2)
    points = [Point(9, 0.3), Point(6, 0.5), Point(0, 1.0)]
    assert damped.for_run(9, 1.0).damping == UNDAMPED
    assert damped.for_run(9, 1.0).weights(points, Point(11, 0.2)) == plain.weights(points, Point(11, 0.2))
    assert plain.for_run(3, 7.0) is plain
    assert FORECASTS["Taylor (paper)"].for_run(3, 7.0) == Forecaster()


@pytest.mark.parametrize(
    ("count", "guidance", "order"), [(9, 1.0, 2), (9, 2.0, 2), (9, 2.5, 1), (6, 2.5, 1), (3, 2.5, 0)]
)
def test_a_run_holds_no_more_points_than_it_reads(count, guidance, order):
    forecaster = replace(FORECASTS["Newton, damped"], order=2).for_run(count, guidance)
    assert forecaster.order == order
    weights = forecaster.weights([Point(9, 0.3), Point(6, 0.5), Point(0, 1.0)], Point(11, 0.2))
    assert sum(weight != 0 for weight in weights) == order + 1


def test_what_users_choose_is_what_they_get():
    newton = {"Newton, steps": "step", "Newton, sigma": "sigma", "Newton, log sigma": "log sigma"}
    assert set(FORECASTS) == {"Taylor (paper)", "Newton, damped", *newton}
    assert FORECASTS["Taylor (paper)"] == Forecaster()
    assert FORECASTS["Newton, damped"] == Forecaster(form="newton", coordinate="step", damped=True)
    for name, coordinate in newton.items():
        assert FORECASTS[name] == Forecaster(form="newton", coordinate=coordinate)


def test_an_order_that_means_nothing_is_refused():
    with pytest.raises(ValueError, match=r"order must be 0 or more, got -1\."):
        Forecaster(-1)
