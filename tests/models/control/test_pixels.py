"""Masks, as far as pixels alone tell what they are."""

import torch

from dit_toolkit.models.control.pixels import any_background, around_something


def ring(height: int, width: int) -> torch.Tensor:
    """All but the middle."""
    mask = torch.ones(height, width)
    mask[height // 4 : -(height // 4), width // 4 : -(width // 4)] = 0
    return mask


def test_a_mask_with_all_corners_and_no_middle_is_a_background():
    assert around_something(ring(8, 12) > 0.5)
    assert not around_something(1 - ring(8, 12) > 0.5)
    assert not around_something(torch.ones(8, 12) > 0.5)
    cut = ring(8, 12)
    cut[-1, 0] = 0
    assert not around_something(cut > 0.5)


def test_one_background_among_several_masks_is_found():
    subject = 1 - ring(8, 12)
    assert any_background(torch.stack([subject, ring(8, 12)]))
    assert not any_background(torch.stack([subject, subject]))
    assert any_background(ring(8, 12))
