"""Curves of the tuned race: which settings count, and what is read off between them."""

from __future__ import annotations

import pytest

from dit_toolkit.benchmarks.race import curves


def test_a_setting_counts_unless_another_one_computes_no_more_and_is_no_further_away():
    points = [(0.5, 40.0), (0.5, 42.0), (0.3, 41.0), (0.6, 41.9), (0.2, 30.0)]
    assert curves.undominated(points) == [1, 2, 4]


def test_of_twins_the_first_one_counts():
    assert curves.undominated([(0.5, 40.0), (0.5, 40.0), (0.5, 40.0)]) == [0]


def test_between_two_settings_quality_is_linear_in_the_logarithm_of_what_is_computed():
    points = [(0.5, 50.0), (0.125, 30.0)]
    assert curves.read_off(points, 0.25) == pytest.approx(40.0)
    assert curves.read_off(points, 0.5) == 50.0
    assert curves.read_off(points, 0.125) == 30.0


def test_a_beaten_setting_does_not_bend_the_curve():
    points = [(0.5, 50.0), (0.125, 30.0), (0.25, 25.0)]
    assert curves.read_off(points, 0.25) == pytest.approx(40.0)


def test_more_settings_on_the_same_line_change_nothing():
    few, many = [(0.5, 50.0), (0.125, 30.0)], [(0.5, 50.0), (0.25, 40.0), (0.125, 30.0)]
    assert curves.curve(few) == pytest.approx(curves.curve(many))


@pytest.mark.parametrize(("fraction", "kept"), [(0.194, None), (0.195, 30.0), (0.515, 50.0), (0.516, None)])
def test_beyond_its_ends_a_curve_says_nothing(fraction, kept):
    """But for a little slack: 7 evaluations and a head are a little more than a quarter of 28."""
    assert curves.read_off([(0.5, 50.0), (0.2, 30.0)], fraction) == kept


def test_a_method_without_settings_has_no_curve():
    assert set(curves.curve([]).values()) == {None}


def test_settings_of_no_use_are_not_chosen():
    found = {"much": (0.63, 70.0), "half": (0.5, 50.0), "worse": (0.51, 49.0), "far": (0.2, 30.0), "less": (0.09, 29.0)}
    assert curves.tuned(found) == ["far", "half"]


def test_of_good_settings_those_next_to_a_fraction_that_is_read_are_chosen():
    found = {computed: (computed, 100 * computed) for computed in (0.5, 0.42, 0.4, 0.36, 0.34, 0.32, 0.26, 0.25)}
    assert curves.tuned(found) == [0.25, 0.32, 0.34, 0.5]


def test_a_first_look_drops_only_what_is_clearly_behind():
    found = {"half": (0.5, 50.0), "near": (0.5, 47.0), "behind": (0.5, 46.9), "less": (0.49, 20.0), "much": (0.9, 99.0)}
    assert curves.promising(found) == ["half", "near", "less"]


def row(method, computed, psnr_db, **values):
    base = {"sampler": "euler", "steps": 28, "cfg": 1.0, "peer": "diffusers", "choice": "tuned"}
    return {**base, "method": method, "computed": computed, "psnr_db": psnr_db, **values}


def test_a_curve_is_of_one_method_one_choice_and_one_run():
    rows = [
        row("MagCache, threshold 1", 0.5, 40.0),
        row("MagCache, threshold 2", 0.25, 30.0),
        row("MagCache, threshold 2", 0.25, 20.0, choice="documented"),
        row("MagCache, threshold 2", 0.25, 10.0, cfg=2.5),
    ]
    first, *others = curves.curves(rows)
    assert (first["method"], first["peer"], first["choice"], first["cfg"]) == ("MagCache", "diffusers", "tuned", 1.0)
    assert first["at"] == {"half": 40.0, "third": 34.15, "quarter": 30.0, "fifth": None, "seventh": None}
    assert [each["at"]["quarter"] for each in others] == [20.0, 10.0]


def test_the_best_of_each_column_is_bold_and_ours_stand_last():
    rows = [
        row("TaylorSeer, interval 2", 0.5, 45.0, peer=None),
        row("MagCache, threshold 1", 0.5, 41.0),
        row("MagCache, threshold 2", 0.25, 30.0),
    ]
    text = curves.table(curves.curves([*rows, row("MagCache, threshold 1", 0.5, 39.0, cfg=2.5)]))
    one, two = text.split("\n\n**")
    assert one.splitlines()[0] == "**euler, 28 steps, cfg 1**"
    assert one.splitlines()[4:6] == [
        "| MagCache | diffusers | tuned | 41.0 | **34.6** | **30.0** | | |",
        "| TaylorSeer | ours | tuned | **45.0** | | | | |",
    ]
    assert two.splitlines()[0] == "euler, 28 steps, cfg 2.5**"
    assert "**39.0**" in two


def test_where_ours_are_behind_the_page_says_so():
    rows = [
        row("TaylorSeer, interval 2", 0.5, 45.0, peer=None, choice="documented"),
        row("TaylorSeer, interval 4", 0.25, 29.0, peer=None, choice="documented"),
        row("MagCache, threshold 1", 0.5, 41.0),
        row("MagCache, threshold 2", 0.25, 30.0),
        row("MagCache, threshold 3", 0.2, 20.0),
    ]
    assert curves.verdict(curves.curves(rows)).splitlines() == [
        "At 1/4 ours are behind: TaylorSeer, as documented, 29.0 dB against MagCache (diffusers), tuned, 30.0 dB.",
        "At 1/5 nothing of ours can be read; MagCache (diffusers), tuned, 20.0 dB is the nearest.",
    ]
    assert curves.verdict(curves.curves(rows[:1])) == "Ours are at least level with everybody at every fraction."
