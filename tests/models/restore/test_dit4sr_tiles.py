"""Windows and their blending against the definition, cell by cell."""

from __future__ import annotations

import math

import pytest
import torch

from dit_toolkit.models.restore.dit4sr_tiles import Blend, Window, starts, weights, windows


@pytest.mark.parametrize(
    ("length", "overlap", "expected"),
    [
        (64, 24, [0]),
        (96, 24, [0, 32]),
        (128, 24, [0, 40, 64]),
        (160, 24, [0, 40, 80, 96]),
        (256, 24, [0, 40, 80, 120, 160, 192]),
        (128, 16, [0, 48, 64]),
        (256, 16, [0, 48, 96, 144, 192]),
        (65, 24, [0, 1]),
        (104, 24, [0, 40]),
        (128, 0, [0, 64]),
    ],
)
def test_windows_begin_where_the_authors_begin_them(length, overlap, expected):
    assert starts(length, 64, overlap) == expected


@pytest.mark.parametrize("size", [(64, 64), (32, 128), (1, 1), (48, 85)])
def test_what_is_no_larger_than_a_window_is_one(size):
    assert windows(size, 64, 24) == [Window(0, 0, *size)]


def test_tile_0_is_no_tiling():
    assert windows((300, 500), 0, 24) == [Window(0, 0, 300, 500)]


def test_a_side_that_is_shorter_than_a_window_is_not_cut():
    assert windows((40, 128), 64, 24) == [Window(0, left, 40, 64) for left in (0, 40, 64)]


@pytest.mark.parametrize("size", [(128, 96), (65, 200), (256, 256), (70, 130)])
@pytest.mark.parametrize("overlap", [0, 16, 24, 62])
def test_windows_cover_all_and_lie_inside(size, overlap):
    covered = torch.zeros(size)
    for window in windows(size, 64, overlap):
        assert (window.height, window.width) == (64, 64)
        part = window.of(covered)
        assert part.shape == (64, 64)
        part += 1
    assert covered.min() >= 1


def weight_by_definition(y, x, height, width):
    return math.exp(-(((y - height / 2) / height) ** 2 + ((x - (width - 1) / 2) / width) ** 2) / (2 * 0.01))


@pytest.mark.parametrize("size", [(64, 64), (8, 12)])
def test_weights_are_the_gaussian_of_the_authors(size):
    expected = torch.tensor([[weight_by_definition(y, x, *size) for x in range(size[1])] for y in range(size[0])])
    torch.testing.assert_close(weights(*size), expected, rtol=1e-6, atol=0)


def test_the_edge_of_a_window_hardly_counts():
    weight = weights(64, 64)
    assert weight[32, 0] / weight[32, 32] == pytest.approx(5.6e-6, rel=0.1)


def test_the_blend_is_the_weighted_mean_of_every_cell():
    size, tile, overlap = (14, 20), 8, 4
    generator = torch.Generator().manual_seed(0)
    parts = [(w, torch.randn(2, 3, w.height, w.width, generator=generator)) for w in windows(size, tile, overlap)]
    blend = Blend(size, weights(tile, tile))
    for window, part in parts:
        blend.add(window, part)
    expected = torch.zeros(2, 3, *size, dtype=torch.float64)
    for y in range(size[0]):
        for x in range(size[1]):
            total = 0.0
            for w, part in parts:
                row, column = y - w.top, x - w.left
                if 0 <= row < w.height and 0 <= column < w.width:
                    weight = weight_by_definition(row, column, w.height, w.width)
                    expected[:, :, y, x] += weight * part[:, :, row, column].double()
                    total += weight
            expected[:, :, y, x] /= total
    torch.testing.assert_close(blend.result().double(), expected, rtol=1e-5, atol=1e-6)


def test_windows_of_one_picture_give_the_picture():
    """At its corners too, where one window alone counts, with a weight of 1e-11."""
    picture = torch.randn(1, 16, 128, 96, generator=torch.Generator().manual_seed(1))
    blend = Blend((128, 96), weights(64, 64))
    for window in windows((128, 96), 64, 24):
        blend.add(window, window.of(picture))
    torch.testing.assert_close(blend.result(), picture, rtol=2e-6, atol=1e-6)


def test_windows_that_differ_by_a_constant_leave_no_step():
    """Across a seam the result goes from one window to the next by at most a quarter a cell.

    The share of two Gaussians 40 cells apart is a logistic curve of slope 40 / (64^2 * 0.01) = 0.98 a cell.
    """
    row = Blend((64, 104), weights(64, 64))
    for number, window in enumerate(windows((64, 104), 64, 24)):
        row.add(window, torch.full((1, 1, 64, 64), float(number)))
    profile = row.result()[0, 0, 32]
    assert profile[:40].max() < 1e-3
    assert profile[64:].min() > 1 - 1e-3
    assert profile.diff().min() >= -1e-6
    assert profile.diff().max() < 0.25


@pytest.mark.parametrize(("tile", "overlap"), [(64, 64), (64, 80), (64, -1)])
def test_an_overlap_that_leaves_no_way_forward_is_refused(tile, overlap):
    with pytest.raises(ValueError, match="overlap must be at least 0 and below tile"):
        starts(128, tile, overlap)


def test_nothing_to_blend_is_an_error():
    with pytest.raises(ValueError, match="no window was added"):
        Blend((8, 8), weights(8, 8)).result()
