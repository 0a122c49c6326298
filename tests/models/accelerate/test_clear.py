"""CLEAR's scale and cost, held to the numbers of its paper."""

import math

import pytest

from dit_toolkit.models.accelerate.clear import (
    Variant,
    attention_share,
    ceiling,
    estimate,
    proportional_scale,
    variant_of,
)
from dit_toolkit.models.accelerate.sparse_attention import Disc, PooledDisc

FLUX = 3072


def test_the_scale_at_the_length_of_the_training_is_the_usual_one():
    assert proportional_scale(4608, 128, pooled=False) == pytest.approx(128**-0.5, rel=1e-12)


def test_the_scale_grows_with_the_logarithm_of_the_length():
    assert proportional_scale(4608**2, 128, pooled=False) == pytest.approx(math.sqrt(2 / 128), rel=1e-12)
    assert proportional_scale(4608, 128, pooled=True) == pytest.approx(
        math.sqrt(math.log(46080) / math.log(4608) / 128)
    )


@pytest.mark.parametrize(
    ("pixels", "share", "limit"), [(1024, 0.20, 1.25), (2048, 0.48, 1.9), (4096, 0.78, 4.6), (8192, 0.93, 15)]
)
def test_attention_takes_the_share_of_a_step_that_the_paper_reports(pixels, share, limit):
    found = attention_share((pixels // 16) ** 2 + 512, FLUX)
    assert found == pytest.approx(share, abs=0.006)
    assert ceiling(found, 0) == pytest.approx(limit, rel=0.03)


def test_the_ceiling_without_sparsity_is_one():
    assert ceiling(0.48, 1.0) == 1


def test_an_estimate_is_share_and_ratio_put_together():
    at = estimate(Disc(16), 2048, FLUX)
    share = 2 * 16896 / (12 * FLUX + 2 * 16896)
    assert at.ratio == pytest.approx(0.101, abs=5e-4)
    assert at.speedup == pytest.approx(1 / (1 - share * (1 - at.ratio)))
    assert at.limit == pytest.approx(1 / (1 - share))


def test_a_radius_beyond_the_picture_saves_nothing():
    assert estimate(Disc(200), 1024, FLUX).speedup == 1


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("clear_local_32.safetensors", Variant(32, 0)),
        ("clear_local_16.safetensors", Variant(16, 0)),
        ("clear_local_8.safetensors", Variant(8, 0)),
        ("clear_local_16_down_4.safetensors", Variant(16, 4)),
        ("sub/CLEAR_local_8_down_4 (1).safetensors", Variant(8, 4)),
        ("clear.safetensors", None),
        ("my_lora.safetensors", None),
    ],
)
def test_published_names_say_radius_and_factor(name, variant):
    assert variant_of(name) == variant


def test_a_variant_is_a_pattern():
    assert Variant(16, 0).pattern == Disc(16)
    assert Variant(16, 4).pattern == PooledDisc(16, 4)
