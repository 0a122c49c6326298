"""Re-ttention's maths, judged by softmax over all keys with and without a mask, as the paper defines it."""

from __future__ import annotations

import pytest
import torch

from dit_toolkit.models.accelerate.re_ttention import (
    Schedule,
    _memory_efficient,
    aligned,
    drifted,
    full_attention,
    full_log_sum_exp,
    kept_share,
    memory,
    reshaped,
    residual,
    restore,
    scores_at_once,
    store,
    window,
)
from dit_toolkit.models.accelerate.sparse_attention import Band, Disc, FrameBand, Grid, kept_pairs, mask, masked
from dit_toolkit.models.accelerate.sparse_attention_tiles import tile, tiled

B, H, L, D = 2, 3, 37, 8


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def scores(q, k, bias=None):
    z = torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5
    return z if bias is None else z + bias


def attention(q, k, v, kept=None, bias=None):
    """Outputs and log-sum-exps over the kept keys; a row that keeps none is 0."""
    z = scores(q, k, bias)
    if kept is not None:
        z = z.masked_fill(~kept, float("-inf"))
    return torch.nan_to_num(z.softmax(-1)) @ v, z.logsumexp(-1)


def some_kept(share=0.2, seed=5):
    """A random pattern in which every row keeps itself."""
    kept = torch.rand(L, L, generator=torch.Generator().manual_seed(seed)) < share
    return kept | torch.eye(L, dtype=torch.bool)


def qkv(seed=0, dtype=torch.float64, spread=1.0):
    return tuple(random(B, H, L, D, seed=seed + i, dtype=dtype) * spread for i in range(3))


def statistics(q, k, v, kept):
    """full, sparse, rho and R, as a refresh takes them."""
    (full, full_lse), (sparse, sparse_lse) = attention(q, k, v), attention(q, k, v, kept)
    rho = kept_share(sparse_lse, full_lse)
    return full, sparse, rho, residual(full, sparse, rho)


def close(a, b, atol):
    torch.testing.assert_close(a, b, rtol=0, atol=atol, check_dtype=False)


def test_rho_is_the_kept_keys_part_of_the_softmax():
    q, k, v = qkv()
    kept = some_kept()
    *_, rho, _ = statistics(q, k, v, kept)
    close(rho, (scores(q, k).softmax(-1) * kept).sum(-1), 1e-6)  # rho is float32
    assert rho.dtype == torch.float32
    assert ((rho > 0) & (rho <= 1)).all()


def test_the_residual_is_what_the_other_keys_contributed():
    q, k, v = qkv()
    kept = some_kept()
    *_, rest = statistics(q, k, v, kept)
    close(rest, (scores(q, k).softmax(-1) * ~kept) @ v, 1e-6)


def test_a_refresh_is_full_attention_in_two_parts():
    full, sparse, rho, rest = statistics(*qkv(), some_kept())
    close(reshaped(sparse, rho, rest), full, 1e-12)


@pytest.mark.parametrize("share", [0.0, 0.03, 0.5])
def test_unchanged_queries_keys_and_values_give_full_attention_at_any_sparsity(share):
    q, k, v = qkv()
    full, _, rho, rest = statistics(q, k, v, some_kept(share))
    again, _ = attention(q, k, v, some_kept(share))
    close(reshaped(again, drifted(rho, 0.0), rest), full, 1e-12)


@pytest.mark.parametrize("sparse_evaluation", [1, 2, 4])
def test_published_drift_adds_its_multiple_of_the_sparse_output(sparse_evaluation):
    full, sparse, rho, rest = statistics(*qkv(), some_kept())
    for _ in range(sparse_evaluation - 1):
        rho = drifted(rho, 0.04, clamp=False)
    close(reshaped(sparse, rho, rest) - full, (sparse_evaluation - 1) * 0.04 * sparse, 1e-6)


def test_drift_stops_at_the_whole_softmax_unless_as_published():
    rho = torch.tensor([0.2, 0.97, 1.0])
    close(drifted(rho, 0.04), torch.tensor([0.24, 1.0, 1.0]), 1e-6)
    close(drifted(rho, 0.04, clamp=False), torch.tensor([0.24, 1.01, 1.04]), 1e-6)
    close(rho, torch.tensor([0.2, 0.97, 1.0]), 0)


def test_rows_that_keep_every_key_stay_full_attention():
    """Text rows: rho 1, R 0."""
    q, k, v = qkv()
    kept = some_kept()
    kept[:5] = True
    full, sparse, rho, rest = statistics(q, k, v, kept)
    close(rho[..., :5], torch.ones(B, H, 5), 1e-6)
    close(reshaped(sparse, drifted(drifted(rho)), rest)[..., :5, :], full[..., :5, :], 1e-6)


def test_when_only_values_change_the_kept_part_is_new_and_the_rest_old():
    q, k, v = qkv()
    kept = some_kept()
    _, _, rho, rest = statistics(q, k, v, kept)
    new = random(B, H, L, D, seed=9)
    sparse, _ = attention(q, k, new, kept)
    shares = scores(q, k).softmax(-1)
    close(reshaped(sparse, rho, rest), (shares * kept) @ new + (shares * ~kept) @ v, 1e-6)


def test_keeping_every_key_is_full_attention():
    full, sparse, rho, rest = statistics(*qkv(), torch.ones(L, L, dtype=torch.bool))
    close(rho, torch.ones(B, H, L), 1e-6)
    close(rest, torch.zeros_like(full), 1e-6)
    close(reshaped(sparse, rho, rest), full, 1e-12)


def test_before_or_after_the_output_projection_is_the_same():
    """Theirs is taken after it, with the bias in both terms."""
    q, k, v = qkv()
    full, sparse, rho, rest = statistics(q, k, v, some_kept())
    weight, bias = random(H * D, H * D, seed=20), random(H * D, seed=21)

    def project(x):
        return x.transpose(1, 2).flatten(2) @ weight.mT + bias

    theirs = project(full) - project(rho[..., None] * sparse)  # their cached_residual
    new_sparse, _ = attention(*qkv(seed=30), some_kept())
    close(project(rho[..., None] * new_sparse) + theirs, project(reshaped(new_sparse, rho, rest)), 1e-6)


def test_a_row_without_keys_takes_everything_from_before():
    q, k, v = qkv()
    kept = some_kept()
    kept[3] = False
    full, sparse, rho, rest = statistics(q, k, v, kept)
    assert (rho[..., 3] == 0).all()
    close(reshaped(sparse, rho, rest), full, 1e-12)


def test_a_row_that_sees_nothing_at_all_stays_finite():
    minus_inf = torch.full((1, 1, 1), float("-inf"))
    assert kept_share(minus_inf, minus_inf).item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_of_ten_thousand_stay_finite(dtype):
    q, k, v = (x.to(dtype) for x in qkv(spread=80.0))
    assert scores(q.float(), k.float()).abs().max() > 1e4
    kept = some_kept()
    full, _ = attention(q.float(), k.float(), v.float())
    sparse, sparse_lse = attention(q.float(), k.float(), v.float(), kept)
    rho = kept_share(sparse_lse, full_log_sum_exp(q, k))
    full, sparse = full.to(dtype), sparse.to(dtype)
    rest = residual(full, sparse, rho)
    assert ((rho >= 0) & (rho <= 1)).all()
    out = reshaped(sparse, rho, rest)
    assert out.dtype == rest.dtype == dtype
    assert torch.isfinite(out).all()
    close(out, full, 2 * torch.finfo(dtype).eps * full.abs().max())


def test_nothing_is_written_into_what_came_in():
    q, k, v = qkv()
    full, sparse, rho, rest = statistics(q, k, v, some_kept())
    before = [x.clone() for x in (full, sparse, rho, rest)]
    residual(full, sparse, rho)
    reshaped(sparse, rho, rest)
    drifted(rho)
    store(rest, "fp8")
    assert all(torch.equal(x, y) for x, y in zip((full, sparse, rho, rest), before, strict=True))


@pytest.mark.parametrize("held", [1, B * H * L * 5, 1 << 24])
@pytest.mark.parametrize(
    "bias",
    [
        None,
        random(1, 1, 1, L, seed=40),
        random(L, L, seed=41),
        random(B, H, L, L, seed=42),
        torch.zeros(1, 1, 1, L).index_fill(-1, torch.arange(4), float("-inf")),
    ],
    ids=["none", "keys", "two axes", "four axes", "hidden keys"],
)
def test_log_sum_exp_in_slices_is_that_of_all_scores(held, bias):
    q, k, v = qkv(dtype=torch.float32)
    _, lse = attention(q.double(), k.double(), v.double(), bias=bias)
    got = full_log_sum_exp(q, k, None if bias is None else bias.float(), scores=held)
    assert got.dtype == torch.float32
    close(got, lse, 1e-5)


def test_log_sum_exp_takes_more_keys_than_queries_and_a_scale():
    q, k = random(1, 2, 5, D), random(1, 2, 9, D, seed=1)
    expected = (torch.einsum("bhid,bhjd->bhij", q, k) * 0.3).logsumexp(-1)
    close(full_log_sum_exp(q, k, scale=0.3), expected, 1e-5)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)])
def test_the_kernel_that_returns_both_is_attention_and_its_log_sum_exp(dtype, atol):
    q, k, v = (random(2, 3, n, D, seed=n, dtype=dtype) for n in (37, 50, 50))
    expected, expected_lse = attention(q.double(), k.double(), v.double())
    together = full_attention(q, k, v)
    assert together is not None
    close(together[0], expected, atol)
    close(together[1], expected_lse, 1e-4)
    assert (together[0].dtype, together[1].dtype) == (dtype, torch.float32)
    _, scaled_lse = full_attention(q, k, v, scale=1.0)
    close(scaled_lse, full_log_sum_exp(q, k, scale=1.0), 1e-4)


@pytest.mark.parametrize("bias", [None, random(1, 1, 1, 50), random(2, 3, 37, 50)], ids=["none", "keys", "four axes"])
def test_the_kernel_of_cuda_takes_such_tensors(bias):
    """As far as shapes go: there are no numbers on this device. Its own rows of sums are longer."""
    q, k, v, bias = (None if x is None else x.to("meta", torch.float16) for x in (*cuda_shapes(), bias))
    whole = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    assert whole[1].shape == (2, 3, 64)
    out, lse = _memory_efficient(q, k, v, None, bias)
    assert (out.shape, out.dtype) == (q.shape, torch.float16)
    assert (lse.shape, lse.dtype) == ((2, 3, 37), torch.float32)


def cuda_shapes():
    return [random(2, 3, n, D, seed=n) for n in (37, 50, 50)]


@pytest.mark.parametrize("error", [RuntimeError("no kernel for this card"), NotImplementedError("no backend")])
def test_a_kernel_of_cuda_that_refuses_is_done_without(monkeypatch, error):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_efficient_attention", refuse)
    assert _memory_efficient(*cuda_shapes(), None, None) is None


def test_memory_that_runs_out_in_a_kernel_is_no_refusal(monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_efficient_attention", full)
    with pytest.raises(torch.OutOfMemoryError):
        _memory_efficient(*cuda_shapes(), None, None)


def test_rows_of_a_bias_begin_where_kernels_want_them():
    bias = random(2, 1, 3, 50)
    found = aligned(bias)
    assert torch.equal(found, bias)
    assert all(stride % 16 == 0 for stride in found.stride()[:-1])


def test_slices_are_small_for_a_cpu_s_cache_and_large_where_each_reads_all_keys():
    assert scores_at_once(torch.device("cpu")) == 1 << 21
    assert scores_at_once(torch.device("cuda")) == 1 << 28


def test_there_is_no_such_kernel_for_values_of_another_width():
    assert full_attention(random(1, 1, 4, 8), random(1, 1, 4, 8), random(1, 1, 4, 6)) is None


def test_the_kernel_of_a_cpu_takes_no_bias():
    assert full_attention(*qkv(), bias=random(1, 1, 1, L)) is None


# ---- which keys


@pytest.mark.parametrize(("keep", "half", "share"), [(0.03125, 64, 0.0312), (0.0625, 128, 0.0618)])
def test_the_published_band_of_images(keep, half, share):
    """PixArt at 1024 x 1024: one row of the picture on each side."""
    grid = Grid(64, 64)
    assert window("auto", grid, keep) == Band(half)
    assert kept_pairs(Band(half), grid) / 4096**2 == pytest.approx(share, abs=5e-5)


def test_the_published_tube_of_video():
    """CogVideoX-2B: 226 text tokens, 13 frames of 30 x 45."""
    grid = Grid(30, 45, frames=13, before=226)
    tube = window("auto", grid, 0.03125)
    assert tube == FrameBand(21)
    assert kept_pairs(tube, grid) / 17776**2 == pytest.approx(0.0561, abs=5e-5)
    assert kept_pairs(tube, Grid(30, 45, frames=13)) / 17550**2 == pytest.approx(0.0316, abs=5e-5)


def test_the_tube_token_by_token():
    """3 frames of 5 x 4 behind 2 text tokens, half width 3."""
    grid = Grid(5, 4, frames=3, before=2)
    tube = window("tube", grid, 0.3)
    assert tube == FrameBand(3)
    kept = torch.zeros(62, 62, dtype=torch.bool)
    for i in range(62):
        for j in range(62):
            if i < 2 or j < 2:
                kept[i, j] = True
            else:
                first, last = max(0, (i - 2) % 20 - 3), min(19, (i - 2) % 20 + 3)
                kept[i, j] = first <= (j - 2) % 20 <= last
    assert torch.equal(mask(tube, grid), kept)


def test_the_disc_is_the_largest_within_the_share():
    grid = Grid(32, 48, frames=2)
    disc = window("disc", grid, 0.05)
    places = [(y - 16) ** 2 + (x - 24) ** 2 for y in range(32) for x in range(48)]
    assert isinstance(disc, Disc)
    assert sum(place < disc.radius**2 for place in places) <= 0.05 * 32 * 48
    assert sum(place < (disc.radius + 1) ** 2 for place in places) > 0.05 * 32 * 48


def test_a_window_is_searched_for_once():
    window.cache_clear()
    assert [window("disc", Grid(32, 48), 0.05) for _ in range(3)] == [window("disc", Grid(32, 48), 0.05)] * 3
    assert window.cache_info().misses == 1


@pytest.mark.parametrize("keep", [0.0, 1.0, -0.1, float("nan")])
def test_shares_that_are_no_window_are_refused(keep):
    with pytest.raises(ValueError, match="keep must be"):
        window("auto", Grid(4, 4), keep)


@pytest.mark.parametrize("pattern", [Band(0), Band(5), Band(70), FrameBand(3), FrameBand(40), Disc(3)], ids=str)
def test_the_fast_way_takes_the_same_statistics(pattern):
    """Tiles against the whole mask: text before, 3 frames of 7 x 9, text behind, 4 keys of others."""
    grid = Grid(7, 9, frames=3, before=3, after=2)
    q = random(1, 2, grid.length, D, dtype=torch.float32)
    k, v = (random(1, 2, grid.length + 4, D, seed=seed, dtype=torch.float32) for seed in (1, 2))
    full, full_lse = full_attention(q, k, v)
    fast, plain = tiled(q, k, v, tile(pattern, grid), with_lse=True), masked(q, k, v, pattern, grid, with_lse=True)
    rho = kept_share(fast.lse, full_lse)
    close(rho, kept_share(plain.lse, full_lse), 1e-5)
    close(residual(full, fast.out, rho), residual(full, plain.out, rho), 1e-5)
    close(rho[..., :3], torch.ones(1, 2, 3), 1e-5)  # text sees all
    without_lse = tiled(q, k, v, tile(pattern, grid)).out
    close(reshaped(without_lse, rho, residual(full, fast.out, rho)), full, 1e-5)


# ---- the schedule


def written(kinds) -> str:
    """f full, R refresh, s sparse."""
    return "".join({"full": "f", "refresh": "R", "sparse": "s"}[kind] for kind in kinds)


@pytest.mark.parametrize(
    ("first", "evaluations", "expected", "full"),
    [
        (5, 20, "fffff Rssss Rssss Rssss", 8),  # PixArt
        (10, 50, "ffffffffff" + " Rssss" * 8, 18),  # HunyuanDiT
        (15, 50, "fffffffffffffff" + " Rssss" * 7, 22),  # CogVideoX
    ],
)
def test_the_published_schedules(first, evaluations, expected, full):
    kinds = Schedule(first, 5).kinds(evaluations)
    assert written(kinds) == expected.replace(" ", "")
    assert len(kinds) - kinds.count("sparse") == full


def test_period_1_never_computes_less():
    assert "sparse" not in Schedule(2, 1).kinds(20)


def test_the_first_that_is_not_full_is_a_refresh():
    assert Schedule(0, 5).kind(7, None) == "refresh"


def test_a_refresh_comes_early_when_sigma_has_fallen_far_or_risen():
    schedule = Schedule(0, 5, sigma_ratio=0.5)
    assert schedule.kind(1, 0, sigma=0.6, sigma_then=1.0) == "sparse"
    assert schedule.kind(1, 0, sigma=0.4, sigma_then=1.0) == "refresh"
    assert Schedule(0, 5).kind(1, 0, sigma=0.01, sigma_then=1.0) == "sparse"
    assert Schedule(0, 5).kind(1, 0, sigma=1.0, sigma_then=0.5) == "refresh"
    assert Schedule(0, 5).kind(1, 0, sigma=1.0, sigma_then=0.9999) == "sparse"  # dpmpp_2s_ancestral's second


@pytest.mark.parametrize(
    ("values", "words"),
    [((-1, 5), "first_full must"), ((1, 0), "period must"), ((1, 5, 1.0), "sigma_ratio"), ((1, 5, -0.1), "sigma_rat")],
)
def test_schedules_that_mean_nothing_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        Schedule(*values)


# ---- storage


@pytest.mark.parametrize(
    ("storage", "error"), [("full", 0.0), ("cpu", 0.0), ("bf16", 2**-8), ("fp8", 2**-4)], ids=lambda x: str(x)
)
def test_what_is_stored_comes_back(storage, error):
    rest = random(B, H, L, D, dtype=torch.float32) * torch.logspace(-6, 3, L)[:, None]  # rows of very different size
    back = restore(store(rest, storage), rest)
    assert ((back - rest).abs() <= error * rest.abs() + 1e-5 * error * rest.abs().amax(-1, keepdim=True)).all()
    assert error == 0 or not torch.equal(back, rest)


def test_a_row_of_zeros_is_stored_in_fp8():
    rest = torch.zeros(1, 1, 2, D)
    assert torch.equal(restore(store(rest, "fp8"), rest), rest)


def test_rho_alone_keeps_no_residual():
    assert restore(store(random(1, 1, 2, D), "none"), random(1, 1, 2, D)) is None
    sparse, rho = random(1, 1, 2, D), torch.tensor([[[0.5, 0.25]]])
    close(reshaped(sparse, rho, None), sparse * rho[..., None], 0)


@pytest.mark.parametrize("storage", ["full", "bf16", "fp8", "cpu", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_estimate_of_memory_is_what_is_held(storage, dtype):
    full, _, rho, rest = statistics(*qkv(dtype=dtype), some_kept())
    stored = store(rest, storage)
    device, host = memory(B, L, H, D, storage, full.element_size())
    held = 0 if stored is None else stored.bytes
    assert device + host == rho.nbytes + held
    assert host == (held if storage == "cpu" else 0)


@pytest.mark.parametrize(
    ("layers", "tokens", "heads", "head_dim", "residuals", "rhos"),
    [
        (28, 4096, 16, 72, 0.264e9, 7.3e6),  # PixArt at 1024 x 1024
        (57, 4608, 24, 128, 1.61e9, 25.2e6),  # FLUX at 1024 x 1024
        (30, 17776, 30, 64, 2.05e9, 64.0e6),  # CogVideoX-2B
    ],
)
def test_memory_of_the_published_models_in_16_bits(layers, tokens, heads, head_dim, residuals, rhos):
    whole, _ = memory(1, tokens, heads, head_dim, "full", 2)
    rho, _ = memory(1, tokens, heads, head_dim, "none", 2)
    assert layers * rho == pytest.approx(rhos, rel=0.01)
    assert layers * (whole - rho) == pytest.approx(residuals, rel=0.01)
