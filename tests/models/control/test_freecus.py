"""The formulas of FreeCus against its own words: schedules, tokens and keys written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from dit_toolkit.models.control.freecus import (
    REFERENCE_SHIFT,
    THIN,
    VITAL_LAYERS,
    in_bytes,
    layers_from,
    reference_latent,
    reference_sigma,
    subject_keys,
    subject_tokens,
)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shifted(mu: float, t: float) -> float:
    """The dynamic shift of FLUX.1's schedule."""
    return math.exp(mu) / (math.exp(mu) + 1 / t - 1)


@pytest.mark.parametrize(
    ("mode", "shift"), [("reversed", -0.46), ("half", -0.23), ("twice", -0.92), ("linear", 0.0), ("normal", 0.46)]
)
@pytest.mark.parametrize("mu", [0.0, 0.63, 1.15])
def test_the_reference_runs_through_the_same_steps_shifted_otherwise(mode, shift, mu):
    for i in range(1, 31):
        t = i / 30
        found = reference_sigma(shifted(mu, t), mu, mode, 0.46)
        assert found == pytest.approx(shifted(shift, t), abs=1e-12)


def test_published_levels_of_thirty_steps():
    """At 512 x 512 mu is 0.63; read off the authors' schedulers."""
    published = {1.0: 1.0, 0.904: 0.760, 0.653: 0.387, 0.273: 0.112, 0.061: 0.021}
    for sigma, expected in published.items():
        assert reference_sigma(sigma, 0.63) == pytest.approx(expected, abs=2e-3)


def test_the_reference_is_cleaner_than_the_picture_and_ends_meet():
    levels = [reference_sigma(i / 20, 1.15) for i in range(21)]
    assert levels[0] == 0
    assert levels[-1] == 1
    assert levels == sorted(levels)
    assert all(level < i / 20 for i, level in enumerate(levels) if 0 < i < 20)
    assert reference_sigma(0.4, 0.7, "normal", 0.7) == pytest.approx(0.4)


def test_an_unknown_mode_is_named():
    with pytest.raises(ValueError, match="reversed, half"):
        reference_sigma(0.5, 1.0, "sideways")


def test_the_reference_is_a_mix_of_latent_and_noise():
    latent, noise = random(1, 4, 3, 3), random(2, 4, 3, 3, seed=1)
    before = latent.clone(), noise.clone()
    mixed = reference_latent(latent, noise, 0.25)
    torch.testing.assert_close(mixed, torch.cat([0.25 * each[None] + 0.75 * latent for each in noise]))
    assert torch.equal(reference_latent(latent, noise, 0.0), latent.expand(2, -1, -1, -1))
    assert torch.equal(reference_latent(latent, noise, 1.0), noise)
    assert torch.equal(latent, before[0])
    assert torch.equal(noise, before[1])


def tokens_by_definition(mask, grid):
    """Bilinear interpolation at the middle of every token, by hand; then the thin parts, far from all of those."""
    rule = tokens_by_the_authors(mask, grid)
    found = []
    height, width = mask.shape
    for row in range(grid[0]):
        for column in range(grid[1]):
            around = [
                r * grid[1] + c
                for r in range(max(row - 1, 0), min(row + 2, grid[0]))
                for c in range(max(column - 1, 0), min(column + 2, grid[1]))
            ]
            top, bottom = row * height // grid[0], math.ceil((row + 1) * height / grid[0])
            left, right = column * width // grid[1], math.ceil((column + 1) * width / grid[1])
            thin = mask[top:bottom, left:right].mean() >= THIN and not set(around) & set(rule)
            if thin or row * grid[1] + column in rule:
                found.append(row * grid[1] + column)
    return found


def tokens_by_the_authors(mask, grid):
    """Bilinear interpolation at the middle of every token, by hand."""
    found = []
    height, width = mask.shape
    for row in range(grid[0]):
        for column in range(grid[1]):
            y = max((row + 0.5) * height / grid[0] - 0.5, 0.0)
            x = max((column + 0.5) * width / grid[1] - 0.5, 0.0)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            value = 0.0
            for yy, wy in ((y0, 1 - (y - y0)), (y1, y - y0)):
                for xx, wx in ((x0, 1 - (x - x0)), (x1, x - x0)):
                    value += wy * wx * float(mask[yy, xx])
            if value > 0:
                found.append(row * grid[1] + column)
    return found


@pytest.mark.parametrize("size", [(64, 48), (10, 30), (4, 3), (3, 2), (129, 31)])
def test_a_token_shows_the_subject_where_the_resized_mask_is_above_zero(size):
    mask = (random(*size, seed=sum(size)) > 1.2).float() / 255  # faint: soft values count in full
    found = subject_tokens(mask, (4, 3))
    assert found.tolist() == tokens_by_definition(mask, (4, 3))
    assert 0 < len(found) < 12 or size[0] < 5


def squares():
    """Coordinates of the middles of the pixels of the authors' masks, 512 x 512."""
    return torch.meshgrid(torch.arange(512.0) + 0.5, torch.arange(512.0) + 0.5, indexing="ij")


@pytest.mark.parametrize("radius", [12, 20, 50, 120])
@pytest.mark.parametrize("soft", [False, True])
def test_at_512_a_subject_of_some_width_has_the_tokens_of_the_authors(radius, soft):
    y, x = squares()
    for i in range(20):
        at = 200 + 100 * torch.rand(2, generator=torch.Generator().manual_seed(i))
        away = radius - ((y - at[0]) ** 2 + (x - at[1]) ** 2).sqrt()
        mask = in_bytes(away.sigmoid() if soft else (away > 0).float())
        resized = F.interpolate(mask[None, None], (32, 32), mode="bilinear")
        assert torch.equal(subject_tokens(mask, (32, 32)), (resized.flatten() > 0).nonzero().flatten())


@pytest.mark.parametrize("width", [4, 7])
@pytest.mark.parametrize("at", [0, 3, 5, 9, 12, 15])
def test_a_thin_subject_is_there_wherever_it_lies(width, at):
    """A pole. The authors' rule alone sees it where it happens to cross the middle of tokens."""
    mask = torch.zeros(512, 512)
    mask[100:400, 256 + at : 256 + at + width] = 1
    found = subject_tokens(mask, (32, 32))
    assert 18 <= len(set((found // 32).tolist())) <= 20  # one in every row, the ends as they fall
    assert set((found % 32).tolist()) <= {16, 17}


def test_specks_do_not_count():
    mask = torch.zeros(512, 512)
    mask[256:261, 256:261] = 1  # a tenth of a token, beside its middle
    assert len(subject_tokens(mask, (32, 32))) == 0


def test_masks_are_read_in_steps_of_a_byte():
    """As the authors' are. Background removal gives sigmoids, which are never 0."""
    steps = torch.arange(256) / 255
    torch.testing.assert_close(in_bytes(steps), steps)
    assert in_bytes(torch.tensor([0.99 / 255, 1e-6, 1.99 / 255])).tolist() == pytest.approx([0, 0, 1 / 255])
    logits = torch.full((512, 512), -9.0)
    logits[128:384, 128:384] = 9
    assert len(subject_tokens(logits.sigmoid(), (32, 32))) == 1024
    assert len(subject_tokens(in_bytes(logits.sigmoid()), (32, 32))) == 256


def test_no_mask_no_tokens():
    assert subject_tokens(torch.zeros(32, 32), (2, 2)).tolist() == []
    assert subject_tokens(torch.ones(32, 32), (2, 3)).tolist() == [0, 1, 2, 3, 4, 5]


def test_keys_of_the_subject_are_scaled_values_are_not():
    k, v = random(2, 3, 9, 4), random(2, 3, 9, 4, seed=1)
    tokens = torch.tensor([0, 2, 4])
    kept_k, kept_v = subject_keys(k, v, tokens, text=4, scale=1.1)
    for place, token in enumerate(tokens.tolist()):
        torch.testing.assert_close(kept_k[:, :, place], 1.1 * k[:, :, 4 + token])
        assert torch.equal(kept_v[:, :, place], v[:, :, 4 + token])
    before = kept_v.clone()
    v.zero_()  # the model goes on writing
    assert torch.equal(kept_v, before)
    assert subject_keys(k.bfloat16(), v.bfloat16(), tokens, 4, 1.1)[0].dtype == torch.bfloat16


def test_the_published_layers_are_those_of_flux():
    assert layers_from("published", 19, 38) == VITAL_LAYERS == (0, 1, 2, 17, 18, 25, 28, 53, 54, 56)
    assert layers_from(" Published ", 2, 6) == tuple(range(8))
    assert REFERENCE_SHIFT == 0.459375
    # mu for 16 tokens, in the schedule's line from (256, 0.5) to (4096, 1.15)
    assert pytest.approx(0.5 + (16 - 256) * (1.15 - 0.5) / (4096 - 256)) == REFERENCE_SHIFT


@pytest.mark.parametrize(
    ("text", "expected"),
    [("all", (0, 1, 2, 3)), ("0-2", (0, 1, 2)), ("3, 0 - 1", (0, 1, 3)), ("2", (2,)), ("1,1, 0-1", (0, 1))],
)
def test_layers_can_be_named(text, expected):
    assert layers_from(text, 1, 3) == expected


@pytest.mark.parametrize(
    ("text", "told"),
    [("", "numbers such as"), ("some", "numbers such as"), ("-1", "numbers"), ("1,,2", "numbers"), ("3-1", "Write 1-3"),
     ("0, 4", "0 to 3"), ("2-9", "0 to 3")],
)  # fmt: skip
def test_what_is_no_layer_is_refused(text, told):
    with pytest.raises(ValueError, match=told):
        layers_from(text, 1, 3)
