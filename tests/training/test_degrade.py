"""What wears the pictures that the restoration is trained on, and the photographs among them."""

import numpy as np
import pytest

from dit_toolkit.training import degrade, photographs


def test_a_worn_copy_is_a_quarter_of_the_size_and_the_same_for_the_same_seed():
    picture = photographs.crop(np.random.default_rng(0), 128)
    worn = degrade.degraded(picture, np.random.default_rng(1))
    assert worn.shape == (32, 32, 3)
    assert worn.dtype == np.uint8
    assert np.array_equal(worn, degrade.degraded(picture, np.random.default_rng(1)))
    assert not np.array_equal(worn, degrade.degraded(picture, np.random.default_rng(2)))


def test_wear_costs_more_than_size():
    """A worn copy is farther from the picture than a clean one of that size, and still of the same picture."""
    rng = np.random.default_rng(3)
    pictures = [photographs.crop(rng, 128) for _ in range(12)]

    def error(small: list[np.ndarray]) -> float:
        pairs = zip(small, pictures, strict=True)
        return float(np.mean([np.square(degrade.enlarged(s, 128, 128) - p.astype(float)).mean() for s, p in pairs]))

    clean = [p.reshape(32, 4, 32, 4, 3).mean((1, 3)).round().astype(np.uint8) for p in pictures]
    worn = [degrade.degraded(p, rng) for p in pictures]
    assert error(clean) < error(worn) < error(worn[1:] + worn[:1]) / 3


def test_the_sinc_filter_passes_what_is_slow_and_stops_what_is_fast():
    kernel = next(
        kernel for kernel in map(degrade._sinc, map(np.random.default_rng, range(99)))
        if np.abs(np.fft.fft2(kernel, (64, 64)))[0, 24] < 0.3
    )  # fmt: skip
    passed = np.abs(np.fft.fft2(kernel, (64, 64)))
    assert passed[0, 0] == pytest.approx(1, abs=1e-6)
    assert passed[0, 3] > 0.9
    assert np.allclose(kernel, kernel.T, atol=1e-7)


def test_photographs_are_read_and_whole_ones_are_held_out():
    trained, held = photographs.photographs(), photographs.photographs(held_out=True)
    assert len(trained) == len(photographs.TRAINED_ON)
    assert all(p.ndim == 3 and p.shape[2] == 3 and p.dtype == np.uint8 and min(p.shape[:2]) >= 300 for p in held)
    assert all(min(p.shape[:2]) >= 300 for p in trained)
    assert not set(photographs.TRAINED_ON) & set(photographs.HELD_OUT)
