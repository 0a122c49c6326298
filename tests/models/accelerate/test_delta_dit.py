"""Delta-DiT: spans by stage, what the residual forecasts, and what a run costs."""

from __future__ import annotations

import pytest
import torch

from dit_toolkit.models.accelerate.delta_dit import Stages
from dit_toolkit.models.accelerate.policies import COMPUTE, Interval, Moment
from dit_toolkit.models.accelerate.taylorseer import taylor_weights, weighted_sum


@pytest.mark.parametrize(
    ("share", "depth", "early", "late"),
    [
        (0.75, 4, (1, 4), (0, 3)),
        (0.75, 57, (14, 57), (0, 43)),  # FLUX.1
        (0.5, 40, (20, 40), (0, 20)),  # Wan 14B
        (1.0, 28, (0, 28), (0, 28)),
        (0.0, 28, (28, 28), (0, 0)),
        (0.01, 28, (28, 28), (0, 0)),  # less than half a block is none
        (0.02, 28, (27, 28), (0, 1)),
        (0.99, 28, (0, 28), (0, 28)),
    ],
)
def test_rear_blocks_are_skipped_early_and_front_blocks_late(share, depth, early, late):
    assert Stages(share).span(depth, early=True) == early
    assert Stages(share).span(depth, early=False) == late


def test_the_span_has_its_share_of_every_depth():
    for depth in range(1, 61):
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            for early in (True, False):
                start, stop = Stages(share).span(depth, early)
                assert 0 <= start <= stop <= depth
                assert abs((stop - start) - share * depth) <= 0.5


@pytest.mark.parametrize("name", ["share", "boundary"])
@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan")])
def test_what_is_no_part_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be between 0 and 1, got {value}\."):
        Stages(**{name: value})


@pytest.mark.parametrize(
    ("every", "share", "speedup"), [(2, 0.75, 1.6), (2, 0.5, 4 / 3), (3, 0.75, 2.0), (1, 0.75, 1.0), (2, 0.0, 1.0)]
)
def test_block_calls_are_those_of_the_cost_model(every, share, speedup):
    """Calls counted over a long run, against 1/N + (1 - 1/N)(1 - share). 1.6 is the figure of the abstract."""
    depth, evaluations, calls, last = 40, 1200, 0, 0
    for i in range(evaluations):
        full = Interval(every, 1).choose(Moment(i, i - last))[0] is COMPUTE
        last = i if full else last
        start, stop = Stages(share).span(depth, early=i < evaluations // 2)
        calls += depth if full else depth - (stop - start)
    assert depth * evaluations / calls == pytest.approx(speedup, rel=1e-3)
    assert 1 / (1 / every + (1 - 1 / every) * (1 - share)) == pytest.approx(speedup)


def residual_forecast(span, inputs: list[torch.Tensor], full: list[int], order=0) -> torch.Tensor:
    """`x_s + D^` for the last of `inputs`, D stored at the evaluations in `full`, newest first."""
    at = len(inputs) - 1
    stored = [span(inputs[s]) - inputs[s] for s in full]
    return inputs[at] + weighted_sum(stored, taylor_weights(full, at, order))


def test_what_a_span_adds_is_repeated_on_a_new_input():
    inputs = list(torch.randn(5, 2, 3, 4, generator=torch.Generator().manual_seed(0)).double())
    matrix = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(residual_forecast(lambda x: x + 3.5, inputs, [0]), inputs[4] + 3.5)
    got = residual_forecast(lambda x: x @ matrix, inputs, [0])
    torch.testing.assert_close(got, inputs[4] + inputs[0] @ (matrix - torch.eye(4).double()))
    assert not torch.allclose(got, inputs[0] @ matrix)  # the output itself is not what is repeated


def test_a_residual_that_moves_straight_is_followed_by_order_1():
    inputs = list(torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(0)).double())
    places = {id(x): s for s, x in enumerate(inputs)}

    def drifting(x):
        return x + 0.5 * places[id(x)]

    torch.testing.assert_close(residual_forecast(drifting, inputs, [3, 1], order=1), inputs[5] + 2.5)
    torch.testing.assert_close(residual_forecast(drifting, inputs, [3, 1], order=0), inputs[5] + 1.5)
