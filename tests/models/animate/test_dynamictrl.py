"""The pose norms against their formula, and the rules of frames, sizes and masks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dit_toolkit.models.animate.cogvideox_sampling import trailing
from dit_toolkit.models.animate.dynamictrl import (
    PoseNorms,
    latent_frames,
    latent_mask,
    nearest_length,
    nearest_side,
)


def by_the_formula(norm: PoseNorms, i: int, c, e):
    """Token by token."""
    weights = norm.blocks[i].control_norm1.state_dict()
    shift, scale, gate = (F.silu(e) @ weights["linear.weight"].T + weights["linear.bias"]).chunk(3, 1)
    n = torch.empty(len(e), c.shape[1], c.shape[2])
    for b in range(len(e)):
        for token in range(c.shape[1]):
            x = c[b if len(c) > 1 else 0, token]
            x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * weights["norm.weight"] + weights["norm.bias"]
            n[b, token] = x * (1 + scale[b]) + shift[b]
    return n, (1 + gate[:, None]) * n


@pytest.fixture(scope="module")
def norms():
    made = PoseNorms(16, 8, 2, operations=nn)
    for weight in made.parameters():
        weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())) / 2
    return made


@pytest.mark.parametrize("poses", [1, 3])
def test_a_pose_norm_is_its_formula(norms, poses):
    c, e = torch.randn(poses, 5, 16), torch.randn(3, 8)
    before = c.clone()
    for i in range(2):
        for found, expected in zip(norms.run(i, c, e), by_the_formula(norms, i, c, e), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert torch.equal(c, before)


def test_one_pose_for_all_is_as_many_of_the_same(norms):
    c, e = torch.randn(1, 5, 16), torch.randn(3, 8)
    one, many = norms.run(0, c, e), norms.run(0, c.expand(3, -1, -1), e)
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def test_its_state_has_the_names_of_the_file(norms):
    assert set(norms.state_dict()) == {
        f"blocks.{i}.control_norm1.{part}.{leaf}"
        for i in range(2)
        for part in ("linear", "norm")
        for leaf in ("weight", "bias")
    }


# Frames, sizes, masks


def test_lengths_are_the_nearest_with_pairs_of_latent_frames():
    valid = [8 * k + 5 for k in range(40)]
    for frames in range(1, 250):
        found = nearest_length(frames)
        assert found in valid
        assert abs(found - frames) == min(abs(each - frames) for each in valid)
        assert latent_frames(found) % 2 == 0
    assert [nearest_length(n) for n in (1, 5, 9, 37, 81, 84)] == [5, 5, 13, 37, 85, 85]
    assert latent_frames(37) == 10


def test_sides_are_the_nearest_multiples_of_a_token():
    assert [nearest_side(n) for n in (1, 16, 23, 24, 768, 1359)] == [16, 16, 16, 32, 768, 1360]


def test_a_mask_of_frames_is_one_of_latent_frames():
    """A cell is free where any pixel of any of its frames is."""
    mask = torch.zeros(13, 32, 48)
    mask[0, 0, 0] = 1  # the first frame is a latent frame of its own
    mask[4, 9, 17] = 0.5  # the last of the second
    mask[5, 31, 47] = 1  # the first of the third
    found = latent_mask(mask, (4, 6))
    assert found.shape == (1, 1, 4, 4, 6)
    assert {tuple(at): float(found[0, 0][tuple(at)]) for at in found[0, 0].nonzero().tolist()} == {
        (0, 0, 0): 1,
        (1, 1, 2): 0.5,
        (2, 3, 5): 1,
    }


def test_a_mask_of_one_frame_is_one_latent_frame():
    assert torch.equal(latent_mask(torch.ones(1, 16, 16), (2, 2)), torch.ones(1, 1, 1, 2, 2))


# Steps


def test_steps_are_trailing():
    assert trailing(25) == list(range(999, 0, -40))
    assert trailing(50) == list(range(999, 0, -20))
    assert trailing(1) == [999]
    assert trailing(3) == [999, 666, 332]
    for steps in (7, 30, 199, 1000):
        found = trailing(steps)
        assert len(found) == steps
        assert found[0] == 999
        assert sorted(set(found), reverse=True) == found


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_that_there_are_not_are_refused(steps):
    with pytest.raises(ValueError, match="steps must be from 1 to 1000"):
        trailing(steps)
