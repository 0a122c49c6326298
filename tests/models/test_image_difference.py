"""PSNR and SSIM against scikit-image, boxes against pictures made by hand and a flood fill."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from dit_toolkit.models.image_difference import (
    BOX_COLORS,
    HEAT,
    Box,
    difference,
    draw_boxes,
    find_boxes,
    heat,
    psnr,
    ssim,
)


def picture(seed=0, height=40, width=56, channels=3):
    return torch.rand(height, width, channels, generator=torch.Generator().manual_seed(seed))


def smooth(seed=0, height=64, width=48):
    """A few soft waves, nearer to a photograph than noise is."""
    y, x = torch.meshgrid(torch.linspace(0, 3, height), torch.linspace(0, 2, width), indexing="ij")
    return torch.stack([0.5 + 0.4 * torch.sin(seed + k + 2 * x + (k + 1) * y) for k in range(3)], dim=-1)


def from_rows(*rows):
    return torch.tensor([[mark != "." for mark in row] for row in rows])


PAIRS = [
    (picture(0), picture(1)),
    (picture(0), picture(0) * 0.98),
    (smooth(0), smooth(0.3)),
    (smooth(0), (smooth(0) + 0.02 * torch.randn(64, 48, 3, generator=torch.Generator().manual_seed(2))).clamp(0, 1)),
    (picture(3, 12, 300, 1), picture(4, 12, 300, 1)),
    (picture(5, 11, 11, 4), picture(6, 11, 11, 4)),
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_psnr_is_that_of_scikit_image(first, second):
    expected = peak_signal_noise_ratio(first.numpy(), second.numpy(), data_range=1)
    assert psnr(first, second) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_ssim_is_that_of_scikit_image_with_the_paper_s_settings(first, second):
    expected = structural_similarity(
        first.double().numpy(),
        second.double().numpy(),
        data_range=1,
        channel_axis=-1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert ssim(first, second) == pytest.approx(expected, abs=1e-5)  # ours is in float32


def test_ssim_of_a_tiny_picture_uses_a_window_that_fits():
    for height, width in ((1, 1), (2, 5), (8, 30), (10, 10)):
        first, second = picture(0, height, width), picture(1, height, width)
        assert ssim(first, first) == pytest.approx(1, abs=1e-6)
        assert -1 <= ssim(first, second) < 1


def test_equal_pictures_are_infinitely_near():
    assert psnr(picture(), picture()) == math.inf
    assert ssim(picture(), picture()) == pytest.approx(1, abs=1e-6)


def test_difference_is_that_of_the_channel_that_differs_most():
    first = torch.zeros(1, 2, 3)
    second = torch.tensor([[[0.1, 0.4, 0.2], [0.0, 0.0, 0.0]]])
    assert difference(first, second).tolist() == [[pytest.approx(0.4), 0.0]]
    assert torch.equal(difference(first, second), difference(second, first))


# Boxes


def test_a_spot_gets_the_smallest_rectangle_around_it():
    changed = from_rows(
        "........",
        "..###...",
        "...##...",
        "...#....",
        "........",
    )
    assert find_boxes(changed) == (Box(x=2, y=1, width=3, height=3, pixels=6),)


def test_the_box_with_most_changed_pixels_comes_first_however_wide_others_are():
    changed = from_rows(
        "########",
        "........",
        "....###.",
        "....###.",
        "....###.",
    )
    assert find_boxes(changed) == (Box(4, 2, 3, 3, 9), Box(0, 0, 8, 1, 8))


def test_corners_touch():
    assert find_boxes(from_rows("#..", ".#.", "..#")) == (Box(0, 0, 3, 3, 3),)


@pytest.mark.parametrize("gap", range(6))
@pytest.mark.parametrize("between", range(6))
@pytest.mark.parametrize("turned", [False, True])
def test_spots_share_a_box_up_to_the_gap_exactly(gap, between, turned):
    changed = torch.zeros(1, between + 2, dtype=torch.bool)
    changed[0, 0] = changed[0, -1] = True
    boxes = find_boxes(changed.mT if turned else changed, gap)
    assert len(boxes) == (1 if between <= gap else 2)
    assert sum(box.pixels for box in boxes) == 2
    assert max(box.width * box.height for box in boxes) == (between + 2 if between <= gap else 1)


def test_small_spots_can_be_left_out():
    changed = from_rows("##...#", "##....", ".....#")
    assert [box.pixels for box in find_boxes(changed)] == [4, 1, 1]
    assert [box.pixels for box in find_boxes(changed, least=2)] == [4]
    assert find_boxes(changed, least=5) == ()
    assert find_boxes(torch.zeros(4, 4, dtype=torch.bool), gap=3) == ()


def boxes_by_flood_fill(changed, gap):
    """Any two changed pixels at most `gap` pixels apart, in both directions, belong together."""
    left = {(int(y), int(x)) for y, x in changed.nonzero()}
    found = set()
    while left:
        spot, edge = set(), [left.pop()]
        while edge:
            y, x = edge.pop()
            spot.add((y, x))
            near = {other for other in left if max(abs(other[0] - y), abs(other[1] - x)) <= gap + 1}
            left -= near
            edge += near
        rows, columns = zip(*spot, strict=True)
        found.add(Box(min(columns), min(rows), np.ptp(columns) + 1, np.ptp(rows) + 1, len(spot)))
    return found


@pytest.mark.parametrize("gap", range(5))
@pytest.mark.parametrize("seed", range(4))
def test_boxes_are_those_of_a_flood_fill(gap, seed):
    changed = picture(seed, 24, 31, 1)[..., 0] > 0.97
    assert set(find_boxes(changed, gap)) == boxes_by_flood_fill(changed, gap)


def test_frames_lie_just_outside_of_what_changed_and_leave_the_picture_alone():
    ground = torch.full((12, 14, 3), 0.5)
    before = ground.clone()
    drawn = draw_boxes(ground, (Box(x=4, y=5, width=3, height=2, pixels=6),))
    assert torch.equal(ground, before)
    assert bool((drawn[5:7, 4:7] == 0.5).all())
    light, dark = (torch.tensor(color) for color in BOX_COLORS)
    assert all(torch.equal(drawn[y, x], light) for y, x in ((4, 3), (4, 7), (7, 3), (7, 7), (6, 3), (4, 5)))
    assert all(torch.equal(drawn[y, x], dark) for y, x in ((3, 2), (3, 8), (8, 2), (8, 8), (6, 2), (3, 5)))
    assert int((drawn == 0.5).all(-1).sum()) == 12 * 14 - (5 * 4 - 3 * 2) - (7 * 6 - 5 * 4)


def test_frames_at_the_edge_stay_in_the_picture():
    drawn = draw_boxes(torch.full((9, 9, 3), 0.5), (Box(0, 0, 9, 9, 81),))
    assert drawn.shape == (9, 9, 3)
    assert not bool((drawn[0] == 0.5).any())


# Heat


def test_heat_gets_lighter_all_the_way_and_ends_at_full():
    ramp = torch.linspace(0, 0.5, 101)[None]
    colors = heat(ramp, 0.5)
    assert torch.allclose(colors[0, 0], torch.tensor(HEAT[0]))
    assert torch.allclose(colors[0, 25], torch.tensor(HEAT[1]), atol=1e-5)
    assert torch.allclose(colors[0, -1], torch.tensor(HEAT[-1]))
    lightness = colors[0] @ torch.tensor([0.2126, 0.7152, 0.0722])
    assert bool((lightness.diff() > 0).all())
    assert torch.equal(heat(torch.ones(1, 1), 0.5), heat(torch.full((1, 1), 0.5), 0.5))


def test_heat_needs_a_range():
    for full in (0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"full must be a finite number above 0, got {full}"):
            heat(torch.zeros(2, 2), full)


def test_heat_is_a_colour_everywhere():
    colors = heat(torch.linspace(0, 1, 101)[None], 1.0)
    assert colors.min() >= 0
    assert colors.max() <= 1
    assert colors[0, 0].max() < 0.02  # black
    assert colors[0, -1, 2] < colors[0, -1, :2].min()  # pale yellow
