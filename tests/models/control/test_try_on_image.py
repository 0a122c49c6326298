"""Cutting out, masking and pasting back, judged by their definitions and by what may not change."""

from __future__ import annotations

import math
import random

import pytest
import torch

from dit_toolkit.models.control.pixels import bounds, dilate, distance_to, lanczos, resize, rgb
from dit_toolkit.models.control.try_on_image import (
    FILLS,
    Crop,
    Paste,
    composite,
    crop_around,
    fitted_masks,
    garments_on_white,
    masked_persons,
    paste_weight,
    placed_masks,
    plan,
    size_for,
)

GREY = FILLS["grey"]


def picture(height, width, channels=3, count=1, seed=0):
    return torch.rand(count, height, width, channels, generator=torch.Generator().manual_seed(seed))


def smooth(height, width):
    """A picture that survives resampling: slow waves."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    waves = [torch.sin(3 * x + a) * torch.cos(4 * y - a) for a in (0.0, 1.0, 2.0)]
    return (0.5 + 0.4 * torch.stack(waves, -1))[None]


def rectangle(height, width, left, top, right, bottom):
    mask = torch.zeros(1, height, width)
    mask[:, top:bottom, left:right] = 1
    return mask


def clamp(index, length):
    return min(max(index, 0), length - 1)


def disc(height, width, x, y, radius):
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return ((rows - y) ** 2 + (columns - x) ** 2 <= radius**2).float()[None]


def random_case(seed):
    """Sizes, a mask and settings of a user: odd, small, at the border, upright and lying."""
    rng = random.Random(seed)
    height, width = rng.randint(20, 90), rng.randint(20, 90)
    left, top = rng.randint(0, width - 3), rng.randint(0, height - 3)
    mask = rectangle(height, width, left, top, rng.randint(left + 2, width), rng.randint(top + 2, height))
    person = picture(height, width, rng.choice([1, 3, 4]), seed=seed)
    size = rng.choice([(rng.randint(1, 6) * 16, rng.randint(1, 6) * 16), rng.uniform(300, 9000)])
    settings = dict(margin=rng.choice([None, 0.0, 0.3, 2.0]), size=size)
    return person, mask, rng.randint(0, 9), settings, rng.randint(0, 12)


# Pixels


@pytest.mark.parametrize(("old", "new"), [(7, 7), (5, 13), (40, 9), (1, 4), (6, 1)])
def test_lanczos_weights_by_definition(old, new):
    def kernel(x):
        return math.prod(1.0 if x == 0 else math.sin(math.pi * x / n) / (math.pi * x / n) for n in (1, 3))

    scale = max(old / new, 1)
    for i in range(new):
        at = [((j + 0.5) - (i + 0.5) * old / new) / scale for j in range(old)]
        weights = [kernel(x) if abs(x) < 3 else 0.0 for x in at]
        expected = torch.tensor([weight / sum(weights) for weight in weights])
        torch.testing.assert_close(lanczos(old, new)[i], expected, rtol=0, atol=1e-6)


def test_a_picture_of_the_same_size_is_not_computed():
    image = picture(9, 12)
    assert resize(image, 9, 12) is image


def test_resampling_keeps_what_is_flat_and_follows_what_is_smooth():
    flat = torch.full((1, 11, 17, 3), 0.3)
    torch.testing.assert_close(resize(flat, 40, 5), torch.full((1, 40, 5, 3), 0.3))
    torch.testing.assert_close(resize(smooth(60, 80), 30, 40), smooth(30, 40), rtol=0, atol=0.02)
    assert (resize(resize(smooth(60, 80), 90, 120), 60, 80) - smooth(60, 80)).abs().max() < 0.003


def test_resampling_agrees_with_pillow_up_to_its_eight_bits():
    image = pytest.importorskip("PIL.Image")
    np = pytest.importorskip("numpy")
    bytes_ = (picture(33, 47)[0] * 100 + 70).round().byte()  # Pillow cuts off what overshoots between its passes
    for height, width in ((20, 31), (70, 60)):
        other = image.fromarray(bytes_.numpy()).resize((width, height), image.Resampling.LANCZOS)
        ours = resize(bytes_.float() / 255, height, width) * 255
        assert (ours - torch.from_numpy(np.array(other, np.float32))).abs().max() < 1.6


@pytest.mark.parametrize("limit", [0, 1, 4, 60])
def test_distances_by_definition(limit):
    target = torch.rand(13, 17, generator=torch.Generator().manual_seed(limit)) > 0.97
    target[3, 5] = True
    places = torch.nonzero(target).float()
    every = torch.cartesian_prod(torch.arange(13.0), torch.arange(17.0))
    expected = torch.cdist(every, places).min(1).values.view(13, 17).clamp(max=limit + 1)
    torch.testing.assert_close(distance_to(target, limit), expected)
    assert torch.equal(dilate(target, limit), expected <= limit)


def test_nothing_is_far_from_everything():
    assert (distance_to(torch.zeros(4, 6, dtype=torch.bool), 3) == 4).all()
    assert bounds(rectangle(9, 9, 2, 3, 5, 9)[0] > 0) == (2, 3, 3, 6)


def test_grey_and_alpha_become_rgb():
    assert torch.equal(rgb(picture(4, 4, 4)), picture(4, 4, 4)[..., :3])
    assert rgb(picture(4, 4, 1)).shape == (1, 4, 4, 3)
    with pytest.raises(ValueError, match="1, 3 or 4 channels, got 2"):
        rgb(picture(4, 4, 2))


# Masks and crops


def test_masks_come_to_the_size_of_the_person():
    person = picture(40, 60)
    half = fitted_masks(rectangle(20, 30, 5, 5, 15, 10), person)
    assert half.shape == (1, 40, 60)
    assert torch.equal(half, rectangle(40, 60, 10, 10, 30, 20) > 0.5)
    assert torch.equal(fitted_masks(rectangle(40, 60, 3, 3, 9, 9)[0], person)[0], rectangle(40, 60, 3, 3, 9, 9)[0] > 0)
    many = fitted_masks(rectangle(40, 60, 3, 3, 9, 9), picture(40, 60, count=3), dilation=2)
    assert many.shape == (3, 40, 60)
    assert many[1, 5, 1]
    assert not many[1, 1, 1]  # the corner is 2.8 pixels away


@pytest.mark.parametrize(
    ("mask", "count", "message"),
    [
        (torch.zeros(1, 40, 60), 1, r"The mask is empty\. Paint over the garment"),
        (torch.stack([torch.ones(40, 60), torch.zeros(40, 60)]), 2, "The mask of person 2 is empty"),
        (torch.zeros(1, 64, 64), 1, "The mask is empty"),  # of a picture without alpha
        (torch.eye(400, 600)[None] * (torch.arange(600) == 7), 1, "The mask is too small: nothing is left of it"),
        (torch.ones(1, 64, 64), 1, r"The mask is 64 x 64 pixels and the person 60 x 40\. Use a mask that was made of"),
        (torch.ones(2, 40, 60), 3, r"Got 2 masks for 3 persons\. Give one mask for all, or one for each"),
        (torch.ones(1, 1, 40, 60), 1, r"A mask must be \[N, H, W\], got \(1, 1, 40, 60\)"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask, count, message):
    with pytest.raises(ValueError, match=message):
        fitted_masks(mask, picture(40, 60, count=count))


def test_a_crop_has_its_margin_and_the_proportions_of_the_working_picture():
    mask = rectangle(100, 80, 30, 40, 50, 80)[0] > 0
    assert crop_around(mask, 0.25) == Crop(20, 30, 40, 60)
    assert crop_around(mask, 5) == Crop(0, 0, 80, 100)
    assert Crop(20, 30, 40, 60).grown((64, 64), (100, 80)) == Crop(10, 30, 60, 60)
    assert Crop(0, 30, 40, 60).grown((64, 64), (100, 80)) == Crop(0, 30, 60, 60)  # pushed back in
    assert Crop(0, 0, 80, 100).grown((16, 32), (100, 80)) == Crop(-60, 0, 200, 100)  # no room: over both borders
    assert size_for([Crop(0, 0, 40, 60)], 24 * 1024) == (192, 128)
    assert size_for([Crop(0, 0, 40, 10), Crop(5, 5, 10, 60)], 24 * 1024) == (192, 128)
    assert size_for([Crop(0, 0, 4000, 3)], 256) == (16, 592)


@pytest.mark.parametrize("seed", range(30))
def test_plans_hold_the_mask_and_the_proportions(seed):
    person, mask, dilation, settings, _ = random_case(seed)
    paste = plan(fitted_masks(mask, person, dilation), **settings, dilation=dilation)
    (crop,), (rows, columns) = paste.crops, paste.crops[0].inside(paste.picture)
    assert paste.masks[0][rows, columns].sum() == paste.masks.sum()  # nothing of the mask is cut off
    assert all(side % 16 == 0 and side > 0 for side in paste.working)
    assert abs(crop.width * paste.working[0] - crop.height * paste.working[1]) < max(paste.working)
    for start, length, available in (
        (crop.left, crop.width, paste.picture[1]),
        (crop.top, crop.height, paste.picture[0]),
    ):
        assert (start >= 0 and start + length <= available) or length > available


@pytest.mark.parametrize("size", [(100, 67), (768, 1000), (96, 96), (333, 61), (75, 53)])
@pytest.mark.parametrize("margin", [None, 4.0])
@pytest.mark.parametrize("pixels", [6e3, 3e4])
def test_rounding_to_tokens_does_not_reach_over_the_border(size, margin, pixels):
    mask = rectangle(*size, size[1] // 3, size[0] - 9, size[1] // 2, size[0])  # at the lower border
    paste = plan(fitted_masks(mask, picture(*size)), margin, pixels)
    (crop,), whole = paste.crops, Crop(0, 0, size[1], size[0])
    box = whole if margin is None else crop_around(paste.masks[0], margin)
    assert whole.holds(crop)
    assert crop.holds(Crop(*bounds(paste.masks[0])))
    assert margin or crop.width == size[1] or crop.height == size[0]  # as large as it can be
    assert crop.width * crop.height >= 0.75 * box.width * box.height
    assert abs(crop.width * paste.working[0] - crop.height * paste.working[1]) < max(paste.working)


def test_a_mask_that_needs_all_of_the_picture_gets_it():
    person = picture(100, 67)
    paste = plan(fitted_masks(torch.ones(1, 100, 67), person), None, 6e3)
    assert paste.crops[0].holds(Crop(0, 0, 67, 100))
    flat = plan(fitted_masks(rectangle(3, 400, 5, 0, 9, 3), picture(3, 400)), None, 600)
    assert flat.crops[0].holds(Crop(0, 0, 400, 3))  # cut to the size's proportions, little would be left
    assert plan(fitted_masks(rectangle(9, 9, 2, 2, 5, 5), picture(9, 9)), None, (32, 64)).crops[0].width == 18


def test_one_mask_for_many_persons_is_grown_once(monkeypatch):
    from dit_toolkit.models.control import try_on_image

    grown = []
    monkeypatch.setattr(try_on_image, "dilate", lambda mask, by: grown.append(by) or dilate(mask, by))
    masks = fitted_masks(rectangle(40, 60, 3, 3, 9, 9), picture(40, 60, count=5), dilation=2)
    assert masks.shape == (5, 40, 60)
    assert grown == [2]


# What the model gets


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("fill", ["grey", "black"])
def test_what_was_under_the_mask_does_not_show(seed, fill):
    person, mask, dilation, settings, _ = random_case(seed)
    masks = fitted_masks(mask, person, dilation)
    paste = plan(masks, **settings, dilation=dilation)
    shown, small = masked_persons(person, paste, fill)
    assert shown.shape == (1, *paste.working, 3)
    assert small.shape == (1, *paste.working)
    assert (shown[small > 0.5] == FILLS[fill]).all()
    garment = person.clone()
    garment[masks] = 1 - garment[masks]
    assert torch.equal(masked_persons(garment, paste, fill)[0], shown)


@pytest.mark.parametrize("seed", range(12))
def test_a_working_pixel_is_masked_when_any_part_of_it_is(seed):
    person, mask, dilation, settings, _ = random_case(seed)
    paste = plan(fitted_masks(mask, person, dilation), **settings, dilation=dilation)
    (crop,), small = paste.crops, masked_persons(person, paste, "grey")[1][0]
    for y in range(0, paste.working[0], 5):
        for x in range(0, paste.working[1], 5):
            rows = range(y * crop.height // paste.working[0], math.ceil((y + 1) * crop.height / paste.working[0]))
            columns = range(x * crop.width // paste.working[1], math.ceil((x + 1) * crop.width / paste.working[1]))
            touched = [
                bool(
                    paste.masks[0, clamp(row + crop.top, paste.picture[0]), clamp(column + crop.left, paste.picture[1])]
                )
                for row in rows
                for column in columns
            ]
            assert bool(small[y, x]) == any(touched)


@pytest.mark.parametrize("side", ["left", "right"])
def test_beyond_the_border_the_mask_goes_on_as_the_picture_does(side):
    """Else a strip of fill would be shown as if it were the person's."""
    person = picture(100, 60) * 0.9
    mask = rectangle(100, 60, 0, 0, 20, 100) if side == "left" else rectangle(100, 60, 40, 0, 60, 100)
    paste = plan(fitted_masks(mask, person), None, (96, 96))
    assert paste.crops == (Crop(-20, 0, 100, 100),)
    shown, small = masked_persons(person, paste, "grey")
    assert torch.equal((shown == GREY).all(-1), small > 0.5)
    edge = small[0, :, 0 if side == "left" else -1]
    assert edge.all()


def test_persons_of_a_batch_have_crops_of_their_own_and_one_size():
    person = picture(60, 60, count=2)
    mask = torch.cat([rectangle(60, 60, 2, 2, 12, 30), rectangle(60, 60, 40, 20, 58, 40)])
    paste = plan(fitted_masks(mask, person), 0.2, (48, 32))
    assert paste.crops[0] != paste.crops[1]
    both, masks = masked_persons(person, paste, "grey")
    assert both.shape == (2, 48, 32, 3)
    assert masks.shape == (2, 48, 32)
    alone = plan(fitted_masks(mask[1:], person[1:]), 0.2, (48, 32))
    assert torch.equal(masked_persons(person[1:], alone, "grey")[0][0], both[1])


@pytest.mark.parametrize(("height", "width"), [(30, 10), (10, 30), (33, 47), (64, 32), (300, 7)])
def test_garments_are_whole_in_the_middle_on_white(height, width):
    garment = torch.full((2, height, width, 3), 0.25)
    fitted = garments_on_white(garment, None, (64, 32))
    assert fitted.shape == (2, 64, 32, 3)
    factor = min(64 / height, 32 / width)
    left, top, w, h = bounds(fitted[0, ..., 0] < 0.6)
    assert (w, h) == (max(round(width * factor), 1), max(round(height * factor), 1))
    assert abs(2 * left + w - 32) <= 1
    assert abs(2 * top + h - 64) <= 1
    torch.testing.assert_close(fitted[:, top : top + h, left : left + w], torch.full((2, h, w, 3), 0.25))
    assert (fitted.sum((1, 2, 3)) - 0.25 * 3 * w * h - 3 * (64 * 32 - w * h)).abs().max() < 0.01


def test_a_garment_is_cut_out_along_its_mask_or_its_alpha():
    garment = torch.full((1, 20, 40, 3), 0.2)
    fitted = garments_on_white(garment, rectangle(20, 40, 10, 4, 20, 14) > 0, (32, 32))
    assert (fitted - 0.2).abs().max() < 1e-6  # trimmed to a square of garment alone
    clear = torch.cat([garment, rectangle(20, 40, 10, 4, 20, 14)[..., None]], -1)
    fitted = garments_on_white(clear, None, (20, 40))
    assert torch.equal(fitted[0, ..., 0] < 0.5, rectangle(20, 40, 10, 4, 20, 14)[0] > 0)


def test_a_garment_of_soft_alpha_is_mixed_with_white():
    garment = picture(20, 40, 4)
    expected = garment[..., 3:] * garment[..., :3] + (1 - garment[..., 3:])
    torch.testing.assert_close(garments_on_white(garment, None, (20, 40)), expected)


def test_garments_of_a_batch_have_masks_of_their_own():
    garments = picture(20, 40, count=2)
    masks = torch.cat([rectangle(20, 40, 10, 4, 20, 14), rectangle(20, 40, 0, 9, 30, 20)]) > 0
    both = garments_on_white(garments, masks, (32, 32))
    alone = [garments_on_white(garments[[i]], masks[[i]], (32, 32)) for i in range(2)]
    assert torch.equal(both, torch.cat(alone))
    assert not torch.equal(both, garments_on_white(garments, masks.flip(0), (32, 32)))


# Pasting back


@pytest.mark.parametrize("seed", range(60))
def test_pixels_outside_the_mask_are_the_originals(seed):
    person, mask, dilation, settings, feather = random_case(seed)
    masks = fitted_masks(mask, person, dilation)
    paste = plan(masks, **settings, dilation=dilation)
    result = picture(*paste.working, count=2, seed=seed + 1)
    pasted = composite(result, person, paste, feather)
    original = person if person.shape[-1] == 4 else rgb(person)
    assert pasted.shape == (2, *original.shape[1:])
    for each in pasted:
        assert torch.equal(each[~masks[0]], original[0][~masks[0]])
        assert torch.equal(each[..., 3:], original[0][..., 3:])
    assert (pasted[0] != original[0]).any()
    broken = composite(torch.full_like(result, math.nan), person, paste, feather)
    assert torch.equal(broken[0][~masks[0]], original[0][~masks[0]])
    if feather == 0:
        assert (pasted[0][..., 0] != original[0][..., 0])[masks[0]].float().mean() > 0.8  # some are 0 or 1 in both


@pytest.mark.parametrize("seed", range(20))
def test_a_crop_that_nobody_edited_comes_back(seed):
    """Exactly outside, within the error of resampling twice inside."""
    _, mask, dilation, settings, feather = random_case(seed)
    person = smooth(*mask.shape[1:])
    paste = plan(fitted_masks(mask, person, dilation), **settings, dilation=dilation)
    (crop,) = paste.crops
    pasted = composite(resize(crop.of(person[0]), *paste.working)[None], person, paste, feather)
    assert torch.equal(pasted[0][~paste.masks[0]], person[0][~paste.masks[0]])
    shrunk = max(crop.width / paste.working[1], crop.height / paste.working[0], 1)
    assert (pasted - person).abs().max() < 0.02 * shrunk**2


def test_a_crop_of_its_own_size_comes_back_bit_for_bit():
    person = picture(96, 64)
    paste = plan(fitted_masks(rectangle(96, 64, 10, 20, 50, 70), person), None, (96, 64))
    assert torch.equal(composite(person, person, paste, 0), person)
    paste = plan(fitted_masks(rectangle(96, 64, 14, 24, 46, 66), person, 4), None, (96, 64), 4)
    result = picture(96, 64, seed=5)
    pasted = composite(result, person, paste, 4)
    assert torch.equal(pasted[0, 24:66, 14:46], result[0, 24:66, 14:46])  # 4 pixels of feather, then the result itself


def test_the_feather_rises_from_the_border_inwards():
    mask = rectangle(40, 40, 10, 0, 30, 40)[0] > 0
    weight = paste_weight(mask, Crop(0, 0, 40, 40), 3)
    assert torch.equal(weight[:, 9:15], torch.tensor([0, 1, 2, 3, 4, 4]).div(4).expand(40, -1))  # not at the edges
    assert torch.equal(weight, weight.flip(0))
    assert torch.equal(paste_weight(mask, Crop(0, 0, 40, 40), 0), mask.float())
    cut = paste_weight(mask, Crop(0, 5, 40, 40), 3)  # the crop ends inside the picture above, with it below
    assert torch.equal(cut[4:9, 20], torch.tensor([0, 1, 2, 3, 4]) / 4)
    assert cut[39, 20] == 1


@pytest.mark.parametrize("dilation", [0, 1, 2, 8])
@pytest.mark.parametrize("feather", [0, 1, 3, 8, 40])
def test_what_was_masked_never_shines_through(dilation, feather):
    """A round mask: at its border, what the dilation added is wider along the axes than between them."""
    drawn = disc(80, 80, 38, 41, 20)
    person = 0.5 * picture(80, 80)
    paste = plan(fitted_masks(drawn, person, dilation), None, (80, 80), dilation)
    result = picture(80, 80, seed=5)
    pasted = composite(result, person, paste, feather)
    assert torch.equal(pasted[drawn > 0], result[drawn > 0])
    between = paste.masks & (drawn == 0)
    mixed = (pasted != result).any(-1) & between
    assert bool(mixed.any()) == (min(feather, dilation) > 0)
    assert torch.equal(pasted, composite(result, person, paste, min(feather, dilation)))


def test_persons_of_a_batch_get_their_own_results_crops_and_masks():
    person, result = picture(60, 60, count=2), picture(48, 32, count=2, seed=9)
    drawn = torch.cat([rectangle(60, 60, 2, 2, 12, 30), rectangle(60, 60, 40, 20, 58, 40)])
    narrow = torch.cat([rectangle(60, 60, 0, 0, 60, 20), rectangle(60, 60, 50, 0, 60, 60)])
    paste = plan(fitted_masks(drawn, person, 2), 0.2, (48, 32), 2)
    pasted = composite(result, person, paste, 2, placed_masks(narrow, paste))
    for i in range(2):
        alone = plan(fitted_masks(drawn[[i]], person[[i]], 2), 0.2, (48, 32), 2)
        expected = composite(result[[i]], person[[i]], alone, 2, placed_masks(narrow[[i]], alone))
        assert torch.equal(pasted[[i]], expected)
        assert (expected != person[[i]]).any()
    wide = composite(result, person, paste, 2)
    assert all((pasted[i] != wide[i]).any() for i in range(2))
    working = (picture(48, 32, count=2, seed=3)[..., 0] > 0.5).float()
    both = placed_masks(working, paste)
    for i in range(2):
        alone = plan(fitted_masks(drawn[[i]], person[[i]], 2), 0.2, (48, 32), 2)
        assert torch.equal(placed_masks(working[[i]], alone)[0], both[i])


def test_results_may_be_of_another_scale_but_not_of_another_shape():
    person = smooth(96, 64)
    paste = plan(fitted_masks(rectangle(96, 64, 10, 20, 50, 70), person), None, (96, 64))
    large = resize(person, 192, 128)
    assert (composite(large, person, paste, 2) - person).abs().max() < 0.01
    with pytest.raises(ValueError, match=r"The result is 64 x 64 pixels, the crop was 64 x 96\. Sample at the width"):
        composite(picture(64, 64), person, paste, 2)
    with pytest.raises(ValueError, match=r"'mask' must be 64 x 96 pixels like the person"):
        placed_masks(torch.ones(1, 50, 50), paste)


def test_persons_and_results_that_do_not_belong_together_are_refused():
    person = picture(32, 32, count=2)
    paste = plan(fitted_masks(rectangle(32, 32, 4, 4, 20, 20), person), None, (32, 32))
    with pytest.raises(ValueError, match=r"Got 3 results for 2 persons\. Give one result for each"):
        composite(picture(32, 32, count=3), person, paste, 0)
    with pytest.raises(ValueError, match=r"made of 2 person\(s\) of 32 x 32 pixels, got 1 of 32 x 32\. Connect"):
        composite(picture(32, 32), person[:1], paste, 0)
    with pytest.raises(ValueError, match="got 2 of 48 x 32"):
        composite(picture(32, 32, count=2), picture(32, 48, count=2), paste, 0)


def test_a_second_mask_narrows_what_changes_and_never_widens_it():
    person, result = picture(60, 60), picture(32, 32, seed=4)
    first = fitted_masks(rectangle(60, 60, 20, 20, 40, 40), person)
    paste = plan(first, 0.3, (32, 32))
    right = placed_masks(rectangle(60, 60, 30, 0, 60, 60), paste)
    pasted = composite(result, person, paste, 0, right)
    changed = (pasted != person).any(-1)[0]
    assert bounds(changed) == (30, 20, 10, 20)
    (crop,) = paste.crops
    working = placed_masks(rectangle(32, 32, 0, 0, 32, 16), paste)  # the upper half of the crop
    assert bounds(working[0]) == (crop.left, crop.top, crop.width, crop.height // 2)
    everything = composite(result, person, paste, 0, placed_masks(torch.ones(1, 60, 60), paste))
    assert torch.equal(everything, composite(result, person, paste, 0))
    with pytest.raises(ValueError, match=r"'mask' must be 60 x 60 pixels like the person, or 32 x 32 like the crop"):
        placed_masks(torch.ones(1, 50, 50), paste)


def test_nothing_that_was_handed_over_is_written_to():
    person, mask = picture(40, 40, 4), rectangle(40, 40, 4, 4, 30, 30)
    before = person.clone(), mask.clone()
    paste = plan(fitted_masks(mask, person, 3), 0.2, (32, 32), 3)
    kept = paste.masks.clone()
    shown, _ = masked_persons(person, paste, "black")
    composite(shown, person, paste, 3)
    assert torch.equal(person, before[0])
    assert torch.equal(mask, before[1])
    assert torch.equal(paste.masks, kept)
    assert isinstance(paste, Paste)


def test_the_largest_crop_has_this_one_in_its_middle_where_the_picture_lets_it():
    assert Crop(15, 5, 20, 10).largest_around((10, 10), (40, 60)) == Crop(5, 0, 40, 40)
    assert Crop(2, 20, 10, 20).largest_around((10, 20), (60, 40)) == Crop(0, 20, 40, 20)
