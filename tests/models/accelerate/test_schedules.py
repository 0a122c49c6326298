"""Schedules from noise levels, judged by their definition; damping by its table."""

from __future__ import annotations

from itertools import pairwise

import pytest

from dit_toolkit.models.accelerate.policies import COMPUTE, FORECAST, Interval, Moment, Spread
from dit_toolkit.models.accelerate.schedules import UNDAMPED, damping_of, progress_of, spread


def simple(total: int, shift: float) -> list[float]:
    """Flow sigmas of an even schedule, moved to the noisy side."""
    times = [1 - i / total for i in range(total)]
    return [shift * t / (1 + (shift - 1) * t) for t in times]


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0])
@pytest.mark.parametrize("total", [8, 28, 50])
def test_a_schedule_is_a_rising_list_of_the_number_asked_for(total, shift):
    levels = simple(total, shift)
    for count in range(1, total + 1):
        chosen = spread(levels, count)
        assert len(chosen) == count
        assert chosen[0] == 0
        assert chosen[-1] < total
        assert all(a < b for a, b in pairwise(chosen))
        if count >= 7:
            assert chosen[-1] == total - 1
    assert spread(levels, total) == tuple(range(total))


@pytest.mark.parametrize("count", [7, 9, 14])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_no_evaluation_is_nearer_to_its_place_than_the_chosen_one(shift, count):
    levels = simple(50, shift)
    progress = progress_of(levels)
    for number, index in enumerate(spread(levels, count)):
        place = progress[-1] * number / (count - 1)
        assert abs(progress[index] - place) == pytest.approx(min(abs(each - place) for each in progress))


def test_with_all_weight_on_the_step_the_gaps_are_even():
    assert spread(simple(28, 3.0), 10, mix=1.0) == (0, 3, 6, 9, 12, 15, 18, 21, 24, 27)


def test_more_is_computed_where_the_noise_falls_fastest():
    chosen = spread(simple(28, 3.0), 9)  # a high shift: the noise falls late
    gaps = [b - a for a, b in pairwise(chosen)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] >= 2 * gaps[-1]
    assert chosen == (0, 5, 9, 13, 17, 20, 23, 25, 27)


@pytest.mark.parametrize(
    ("count", "guidance", "last"),
    [(7, 1.0, 27), (6, 1.0, 25), (4, 1.0, 23), (4, 2.0, 23), (4, 2.5, 21)],  # on, half a gap before, a gap before
)
def test_where_few_are_computed_the_last_ones_move_to_the_middle(count, guidance, last):
    assert spread(simple(28, 1.15), count, guidance)[-1] == last


@pytest.mark.parametrize("count", [0, 9])
def test_a_number_that_the_run_does_not_have_is_refused(count):
    with pytest.raises(ValueError, match=rf"count must be between 1 and 8, .*, got {count}\."):
        spread(simple(8, 1.0), count)


def test_a_run_without_noise_is_spread_over_its_steps():
    assert spread([0.0] * 13, 7) == (0, 2, 4, 6, 8, 10, 12)


@pytest.mark.parametrize(
    ("count", "guidance", "slope", "bend"),
    [
        (9, 1.0, 1.0, 1.0),
        (3, 1.0, 1.0, 1.0),
        (3, 0.0, 1.0, 1.0),  # no guidance damps less than none
        (9, 1.75, 1.0, 0.5),
        (6, 2.5, 1.0, 0.0),
        (5, 2.5, 0.857, 0.0),
        (4, 2.5, 0.5, 0.0),
        (3, 2.5, 0.0, 0.0),
        (10, 7.0, 0.286, 0.0),
    ],
)
def test_forecasts_follow_less_where_gaps_are_wide_and_guidance_is_strong(count, guidance, slope, bend):
    damping = damping_of(count, guidance)
    assert damping.slope == pytest.approx(slope, abs=1e-3)
    assert damping.bend == pytest.approx(bend, abs=1e-3)


@pytest.mark.parametrize(("count", "slope"), [(9, 1.0), (7, 0.857), (6, 0.619), (5, 0.286), (4, 0.0)])
def test_with_samplers_that_follow_slopes_themselves_they_follow_less(count, slope):
    assert damping_of(count, 2.5, multistep=True).slope == pytest.approx(slope, abs=1e-3)
    assert spread(simple(28, 1.15), 5, 2.5, multistep=True)[-1] < spread(simple(28, 1.15), 5, 2.5)[-1]


def test_nothing_is_damped_without_guidance():
    assert all(damping_of(count, 1.0) == UNDAMPED for count in range(3, 50))


# the policy


@pytest.mark.parametrize(("every", "total", "count"), [(1, 28, 28), (2, 28, 14), (3, 28, 9), (5, 28, 6), (20, 28, 2)])
def test_one_in_every_few_is_computed(every, total, count):
    assert Spread(every).count(total) == count


def test_the_plan_decides_and_the_interval_where_there_is_none():
    policy = Spread(4, first_full=2)
    assert policy.choose(Moment(1, 1, planned=False)) == (COMPUTE, "first")
    assert policy.choose(Moment(5, 3, planned=True)) == (COMPUTE, "planned")
    assert policy.choose(Moment(5, 4, planned=False)) == (FORECAST, "planned")
    for moment in (Moment(0, 0), Moment(5, 3), Moment(5, 4)):
        assert policy.choose(moment) == Interval(4, 2).choose(moment)


@pytest.mark.parametrize(("every", "first"), [(0, 1), (2, 0)])
def test_what_means_nothing_is_refused_as_with_an_interval(every, first):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        Spread(every, first)
