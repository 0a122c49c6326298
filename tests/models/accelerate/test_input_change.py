"""EasyCache's rule, judged by a loop written from the paper's formula."""

from __future__ import annotations

from math import nan

import pytest
import torch

from dit_toolkit.models.accelerate.input_change import Change, InputChange
from dit_toolkit.models.accelerate.policies import COMPUTE, FORECAST, PROBE, Moment


def inputs_of_a_run(count=30, seed=0) -> list[torch.Tensor]:
    """A path that bends, with steps of uneven length."""
    generator = torch.Generator().manual_seed(seed)
    a, b, c = torch.randn(3, 1, 4, 6, 6, generator=generator)
    times = torch.rand(count, generator=generator).cumsum(0) / 10
    return [a + t * b + torch.sin(3 * t) * c for t in times]


def output(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x) * 2 - 0.3 * x


def computed_by_the_paper(xs: list[torch.Tensor], threshold: float, warm_up: int) -> list[int]:
    """E_t = sum over n of k_i |x_n - x_(n-1)| / |v_i|, k_i = |v_i - v_j| / |x_i - x_j| of the last two computed."""
    full: list[int] = []
    for n in range(len(xs)):
        if n >= warm_up and n >= 2:
            i, j = full[-1], full[-2]
            k = (output(xs[i]) - output(xs[j])).abs().mean() / (xs[i] - xs[j]).abs().mean()
            moved = sum((xs[m] - xs[m - 1]).abs().mean() for m in range(i + 1, n + 1))
            if float(k * moved / output(xs[i]).abs().mean()) < threshold:
                continue
        full.append(n)
    return full


def grown(change: Change, x: torch.Tensor) -> float | None:
    change.moved(x)
    return change.total()


def computed_by_us(xs: list[torch.Tensor], threshold: float, warm_up: int) -> list[int]:
    policy, change, full = InputChange(threshold, warm_up), Change(), []
    for n, x in enumerate(xs):
        choice, _ = policy.choose(Moment(n, n - full[-1] if full else 0))
        total = grown(change, x)
        if choice is PROBE:
            choice = FORECAST if total is not None and total < threshold else COMPUTE
        if choice is COMPUTE:
            change.computed(x, output(x))
            full.append(n)
    return full


@pytest.mark.parametrize("warm_up", [2, 3, 6])
@pytest.mark.parametrize("threshold", [0.05, 0.1, 0.2, 0.5])
def test_what_is_computed_is_what_the_formula_says(threshold, warm_up):
    for seed in range(3):
        xs = inputs_of_a_run(seed=seed)
        expected = computed_by_the_paper(xs, threshold, warm_up)
        assert computed_by_us(xs, threshold, warm_up) == expected
        assert warm_up <= len(expected) < 30


def test_a_higher_threshold_computes_less():
    xs = inputs_of_a_run(60)
    counts = [len(computed_by_us(xs, threshold, 3)) for threshold in (0.02, 0.1, 0.5, 1e9)]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 3


def test_threshold_0_computes_everything():
    assert computed_by_us(inputs_of_a_run(), 0.0, 2) == list(range(30))
    assert InputChange(0.0).choose(Moment(20, 1))[0] is COMPUTE


def test_an_input_that_stands_still_changes_nothing():
    """No division by zero, and the ratio of before goes on to hold."""
    xs, change = inputs_of_a_run(3), Change()
    for x in xs[:2]:
        grown(change, x)
        change.computed(x, output(x))
    ratio = change.ratio
    assert grown(change, xs[1]) == 0
    change.computed(xs[1], output(xs[1]))
    assert change.ratio == ratio
    assert grown(change, xs[2]) > 0


def test_outputs_that_are_zero_leave_it_open():
    change = Change()
    for x in inputs_of_a_run(3):
        assert grown(change, x) is None
        change.computed(x, torch.zeros_like(x))


def test_an_input_of_another_shape_starts_anew():
    change = Change()
    for x in inputs_of_a_run(2):
        grown(change, x)
        change.computed(x, output(x))
    assert grown(change, torch.zeros(2, 2)) is None
    change.computed(torch.zeros(2, 2), torch.ones(2, 2))
    assert not change.steps


def test_what_is_kept_is_no_view_of_what_was_given():
    xs, change = inputs_of_a_run(3), Change()
    kept = [x.clone() for x in xs]
    for x in xs[:2]:
        grown(change, x)
        change.computed(x, output(x))
    assert all(torch.equal(a, b) for a, b in zip(xs, kept, strict=True))
    before, ratio = Change(), Change()
    for x in kept[:2]:
        for other in (before, ratio):
            grown(other, x)
            other.computed(x, output(x))
    xs[1].add_(100)  # samplers and blocks write in place
    assert grown(change, xs[2]) == grown(before, kept[2])
    change.computed(xs[2], output(xs[2]))
    ratio.computed(kept[2], output(kept[2]))
    assert change.ratio == ratio.ratio


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"threshold": -1.0}, r"threshold must be 0 or more, got -1\.0\."),
        ({"threshold": nan}, "threshold must be 0 or more, got nan"),
        ({"threshold": 0.1, "warm_up": 1}, "warm_up must be at least 2, got 1: the rule compares two evaluations"),
    ],
)
def test_settings_that_mean_nothing_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        InputChange(**values)
