"""Sparse attention and step caches on CUDA: FlexAttention compiled, statistics, and what rests in main memory.

`pytest -m gpu` runs these alone, because ComfyUI chooses its device once per process.
"""

from __future__ import annotations

import pytest
import torch

from dit_toolkit.host.accelerate import re_ttention, sparse_attention, sparse_backends
from dit_toolkit.host.accelerate.re_ttention_report import ReTtentionReport
from dit_toolkit.models.accelerate.policies import Interval
from dit_toolkit.models.accelerate.re_ttention import Schedule, full_attention, full_log_sum_exp
from dit_toolkit.models.accelerate.sparse_attention import Band, Disc, FrameBand, Grid, PooledDisc, dense, masked
from dit_toolkit.models.accelerate.sparse_attention_flex import flex, flex_dense, flex_plan
from dit_toolkit.models.accelerate.sparse_attention_tiles import tile, tiled
from dit_toolkit.tests.host.accelerate.caching import TAPS, cached, last_run
from dit_toolkit.tests.host.tiny import close, load_flux, sample

pytestmark = [pytest.mark.comfy, pytest.mark.gpu]

ROUNDING = 2**-5  # latents of order 1, a few roundings of bfloat16, 2^-8 each
GRID = Grid(24, 20, before=37, after=5)
VIDEO = Grid(12, 10, frames=3, before=20)
PATTERNS = [(Disc(5), GRID), (PooledDisc(4, 4), GRID), (Band(40), GRID), (FrameBand(15), VIDEO), (Disc(3), VIDEO)]
NAMES = [f"{pattern}, {grid.frames} frames" for pattern, grid in PATTERNS]


@pytest.fixture(autouse=True)
def cuda():
    """Each test asks FlexAttention anew."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA")
    sparse_backends.UNABLE.clear()


@pytest.fixture(scope="module")
def model(tiny_state):
    """In bfloat16, on the device that ComfyUI puts it on."""
    model = load_flux(tiny_state, dtype=torch.bfloat16)
    assert model.load_device.type == "cuda"
    return model


def attention(grid: Grid, dtype: torch.dtype, extra: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = grid.length, grid.length + extra, grid.length + extra
    return [torch.randn(2, 3, n, 64, generator=generator).to("cuda", dtype) for n in lengths]


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=2e-2)


@pytest.mark.parametrize("extra", [0, 11])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("pattern", "grid"), PATTERNS, ids=NAMES)
def test_compiled_flex_attention_and_tiles_give_what_the_mask_gives(pattern, grid, dtype, extra):
    q, k, v = attention(grid, dtype, extra)
    expected = masked(q.float(), k.float(), v.float(), pattern, grid, with_lse=True)
    plan = flex_plan(pattern, grid, extra, q.device)
    for found in (flex(q, k, v, plan, with_lse=True), tiled(q, k, v, tile(pattern, grid, q.device), with_lse=True)):
        near(found.out, expected.out)
        near(found.lse, expected.lse)


def test_a_bias_on_keys_reaches_flex_attention():
    q, k, v = attention(GRID, torch.bfloat16, 11)
    bias = torch.zeros(1, 1, 1, k.shape[2], device="cuda", dtype=q.dtype)
    bias[..., -11:] = -1.5
    expected = masked(q, k, v, Disc(5), GRID, bias=bias)
    near(flex(q, k, v, flex_plan(Disc(5), GRID, 11, q.device), bias=bias).out, expected.out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_statistics_are_those_of_attention_written_out(dtype):
    q, k, v = attention(GRID, dtype)
    expected = dense(q.float(), k.float(), v.float(), with_lse=True)
    ways = [flex_dense(q, k, v), (expected.out, full_log_sum_exp(q, k))]
    if (kernel := full_attention(q, k, v)) is not None:
        ways.append(kernel)
    for out, lse in ways:
        near(out, expected.out)
        near(lse, expected.lse)


def test_clear_is_the_same_picture_by_flex_attention_and_in_tiles(model, monkeypatch):
    settings = sparse_attention.SparseAttention("CLEAR", Disc(2), min_tokens=0)
    by_flex = sample(sparse_attention.attach(model, settings), size=(24, 24), cfg=2.0)
    assert not sparse_backends.UNABLE
    monkeypatch.setattr(sparse_backends, "has_flex", lambda device: False)
    close(by_flex, sample(sparse_attention.attach(model, settings), size=(24, 24), cfg=2.0), atol=ROUNDING)
    assert (by_flex - sample(model, size=(24, 24), cfg=2.0)).abs().mean() > 0.01


@pytest.mark.parametrize("storage", ["bf16", "cpu"])
def test_where_re_ttention_keeps_its_statistics_does_not_show(model, storage):
    def run(storage):
        report = ReTtentionReport()
        settings = re_ttention.ReTtention(0.3, Schedule(0, 3), storage=storage, min_tokens=0, report=report)
        out = sample(re_ttention.attach(model, settings), 5, size=(24, 24), cfg=2.0)
        return out, report.runs[-1]

    (expected, _), (found, report) = run("full"), run(storage)
    assert report.evaluations == "R..R."
    assert not report.failed
    close(found, expected, atol=ROUNDING)
    assert (report.planned[1] > 0) == (storage == "cpu")


@pytest.mark.parametrize("tap", TAPS)
def test_what_a_step_cache_keeps_in_main_memory_does_not_show(model, tap):
    def run(**settings):
        patched = cached(model, Interval(2, 2), tap, 1, **settings)
        return sample(patched, 7, cfg=2.0), last_run(patched)

    (expected, plain), (found, offloaded) = run(), run(offload=True)
    assert torch.equal(found, expected)
    assert offloaded.computed == plain.computed < 7
