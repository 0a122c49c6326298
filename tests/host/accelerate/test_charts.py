"""The chart: where its points are, and that nothing falls off it."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.comfy

from dit_toolkit.host.accelerate.charts import BAD, GOOD, HEIGHT, WIDTH, trade_off  # noqa: E402


def places(chart: torch.Tensor, colour: str) -> torch.Tensor:
    """Rows and columns of all pixels of a colour, `[N, 2]`."""
    wanted = torch.tensor([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return ((chart[0] - wanted).abs().amax(-1) < 1e-3).nonzero()


def test_it_is_an_image():
    chart = trade_off([(2.0, 40.0, "a")], 30.0, 0)
    assert chart.shape == (1, HEIGHT, WIDTH, 3)
    assert chart.dtype == torch.float32
    assert 0 <= chart.min() < chart.max() <= 1


def test_faster_is_further_right_and_better_is_higher():
    slow, fast = places(trade_off([(1.5, 60.0, ""), (5.0, 10.0, "")], 30.0, None), GOOD).float().mean(0), None
    fast = places(trade_off([(5.0, 60.0, ""), (1.5, 10.0, "")], 30.0, None), GOOD).float().mean(0)
    assert fast[1] > slow[1] + 300
    low = places(trade_off([(5.0, 35.0, ""), (1.5, 60.0, "")], 30.0, None), GOOD)[:, 0].max()
    assert low > slow[0] + 100


def test_points_below_the_floor_have_another_colour():
    assert len(places(trade_off([(2.0, 29.0, "")], 30.0, None), GOOD)) == 0
    assert len(places(trade_off([(2.0, 31.0, "")], 30.0, None), GOOD)) > 50
    assert len(places(trade_off([(2.0, 31.0, "")], 30.0, None), BAD)) > 50  # the line of the floor


@pytest.mark.parametrize("points", [[], [(1.0, float("inf"), "")], [(100.0, -20.0, ""), (1.0, 90.0, "")]])
def test_extremes_are_drawn(points):
    assert torch.isfinite(trade_off(points, 30.0, 0 if points else None)).all()
