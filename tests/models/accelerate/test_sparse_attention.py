"""Patterns, counts and backends, held to loops over all pairs of tokens and to softmax written out."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import flex_attention

from dit_toolkit.models.accelerate import sparse_attention as core
from dit_toolkit.models.accelerate.sparse_attention import Band, Disc, FrameBand, Grid, PooledDisc
from dit_toolkit.models.accelerate.sparse_attention_flex import (
    BLOCK,
    MOST_SHAPES,
    all_but_padding,
    compiled,
    computed_pairs,
    flex,
    flex_dense,
    flex_plan,
    for_many_shapes,
)
from dit_toolkit.models.accelerate.sparse_attention_tiles import tile, tiled

GRIDS = [
    Grid(12, 10, before=7),
    Grid(9, 13, before=3, after=5),
    Grid(7, 11),
    Grid(5, 4, frames=3, before=4),
    Grid(1, 30, after=2),
]
PATTERNS = [
    Disc(1),
    Disc(2),
    Disc(4),
    Disc(8),
    Disc(40),
    PooledDisc(3, 4),
    PooledDisc(2, 2),
    Band(0),
    Band(5),
    Band(400),
    FrameBand(0),
    FrameBand(4),
]
EVERY = [(pattern, grid) for pattern in PATTERNS for grid in GRIDS]
every = pytest.mark.parametrize(("pattern", "grid"), EVERY, ids=lambda value: str(value).replace(" ", ""))


def sees(pattern, grid: Grid, extra: int, query: int, key: int) -> bool:
    """One pair, from the sentences of the papers."""
    picture = range(grid.before, grid.before + grid.picture)
    if key >= grid.length + extra:  # pooled
        return query in picture
    if query not in picture or key not in picture:
        return True
    area = grid.height * grid.width
    place_q, place_k = (query - grid.before) % area, (key - grid.before) % area
    if isinstance(pattern, FrameBand):
        return abs(place_q - place_k) <= pattern.half
    if isinstance(pattern, Band):
        return abs(query - key) <= pattern.half
    row_q, column_q = divmod(place_q, grid.width)
    row_k, column_k = divmod(place_k, grid.width)
    return (row_q - row_k) ** 2 + (column_q - column_k) ** 2 < pattern.radius**2


@cache
def mask_by_definition(pattern, grid: Grid, extra: int) -> torch.Tensor:
    f = pattern.pool
    pooled = grid.frames * math.ceil(grid.height / f) * math.ceil(grid.width / f) if f else 0
    keys = range(grid.length + extra + pooled)
    return torch.tensor([[sees(pattern, grid, extra, q, k) for k in keys] for q in range(grid.length)])


def random(grid: Grid, extra: int = 0, batch: int = 2, heads: int = 2, d: int = 8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    lengths = (grid.length, grid.length + extra, grid.length + extra)
    return [torch.randn(batch, heads, n, d, generator=generator, dtype=dtype) for n in lengths]


def pooled_by_definition(x: torch.Tensor, grid: Grid, weight: torch.Tensor) -> torch.Tensor:
    """Cell by cell, the last row and column standing in for those beyond the edge."""
    f = weight.shape[0]
    cells = []
    for t in range(grid.frames):
        for top in range(0, grid.height, f):
            for left in range(0, grid.width, f):
                total = torch.zeros_like(x[:, :, 0])
                for i in range(f):
                    for j in range(f):
                        row, column = min(top + i, grid.height - 1), min(left + j, grid.width - 1)
                        token = grid.before + (t * grid.height + row) * grid.width + column
                        total += weight[i, j] * x[:, :, token]
                cells.append(total)
    return torch.stack(cells, dim=2)


def attention_by_definition(q, k, v, pattern, grid, *, scale=None, bias=None, weight=None):
    """Softmax over the keys that each query sees, in float64. Returns the result and the log of the denominator."""
    extra = k.shape[2] - grid.length
    q, k, v = q.double(), k.double(), v.double()
    if pattern.pool:
        weight = torch.full((pattern.pool,) * 2, 1 / pattern.pool**2) if weight is None else weight
        k = torch.cat([k, pooled_by_definition(k, grid, weight.double())], dim=2)
        v = torch.cat([v, pooled_by_definition(v, grid, weight.double())], dim=2)
    logits = torch.einsum("bhqd,bhkd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        logits[..., : bias.shape[-1]] += bias.double()
    exponents = logits.exp() * mask_by_definition(pattern, grid, extra)
    total = exponents.sum(-1)
    return torch.einsum("bhqk,bhkd->bhqd", exponents, v) / total[..., None], total.log()


@every
def test_the_mask_is_the_predicate_of_every_pair(pattern, grid):
    for extra in (0, 3):
        assert torch.equal(core.mask(pattern, grid, extra), mask_by_definition(pattern, grid, extra))


@every
def test_kept_pairs_are_those_of_the_mask(pattern, grid):
    for extra in (0, 3):
        assert core.kept_pairs(pattern, grid, extra) == int(mask_by_definition(pattern, grid, extra).sum())


def test_pairs_are_counted_once_for_a_grid():
    core.kept_pairs.cache_clear()
    for _ in range(3):
        core.kept_pairs(Disc(4), Grid(12, 10, before=7), 3)
    assert core.kept_pairs.cache_info().misses == 1


def test_a_distance_of_exactly_the_radius_is_too_far():
    grid = Grid(12, 10, before=7)
    seen = core.mask(Disc(4), grid)
    token = 7 + 6 * 10 + 5
    assert seen[token, token + 3]
    assert not seen[token, token + 4]
    assert not seen[token, token - 40]


@pytest.mark.parametrize(("radius", "kept"), [(1, 1), (8, 193), (16, 793), (32, 3205)])
def test_the_disc_of_an_inner_token_holds_as_many_as_published(radius, kept):
    grid = Grid(2 * radius + 1, 2 * radius + 1)
    middle = radius * grid.width + radius
    assert int(core.mask(Disc(radius), grid)[middle].sum()) == kept


PUBLISHED_RATIOS = {  # of dense attention, with 512 text tokens: radius 8, 16, 32, then 8 and 16 with cells of 4
    512: (0.623, 0.768, 0.989, 0.651, 0.796),
    1024: (0.243, 0.332, 0.591, 0.293, 0.382),
    1536: (0.120, 0.169, 0.332, 0.176, 0.225),
    2048: (0.070, 0.101, 0.207, 0.129, 0.159),
    4096: (0.018, 0.027, 0.059, 0.080, 0.088),
    8192: (0.0046, 0.0068, 0.0154, 0.067, 0.069),
}


@pytest.mark.parametrize("pixels", PUBLISHED_RATIOS)
def test_kept_share_to_the_digit(pixels):
    """The table was rounded to four digits, then to three: .65046 is .6505 and then .651."""
    grid = Grid(pixels // 16, pixels // 16, before=512)
    patterns = (Disc(8), Disc(16), Disc(32), PooledDisc(8, 4), PooledDisc(16, 4))
    for pattern, expected in zip(patterns, PUBLISHED_RATIOS[pixels], strict=True):
        assert core.kept_ratio(pattern, grid) == pytest.approx(expected, abs=0.00055 if expected > 0.016 else 0.00005)


def test_a_window_beyond_the_diagonal_covers_the_grid_and_one_short_of_it_does_not():
    grid = Grid(4, 5)  # the diagonal is 5
    assert core.covers(Disc(6), grid)
    assert not core.covers(Disc(5), grid)
    assert core.covers(Band(19), grid)
    assert not core.covers(Band(18), grid)


BIASES = {
    "no bias": lambda k: None,
    "one bias for all": lambda k: torch.randn(1, 1, 1, k.shape[2], generator=torch.Generator().manual_seed(1)),
    "a bias per picture": lambda k: torch.randn(2, 1, 1, k.shape[2], generator=torch.Generator().manual_seed(1)),
}


def settings_of(pattern, k, bias: str) -> dict:
    weight = None
    if pattern.pool:
        weight = torch.rand(pattern.pool, pattern.pool, generator=torch.Generator().manual_seed(2)) / pattern.pool**2
    return {"scale": 0.4, "bias": BIASES[bias](k), "weight": weight}


def backends(pattern, grid, extra):
    yield "masked", lambda q, k, v, **settings: core.masked(q, k, v, pattern, grid, **settings)
    for side in (None, (3, 4), (16, 16)):
        tiling = tile(pattern, grid, side=side)
        yield f"tiles {side}", lambda q, k, v, tiling=tiling, **settings: tiled(q, k, v, tiling, **settings)


@every
@pytest.mark.sweep
def test_every_backend_is_softmax_over_the_kept_pairs(pattern, grid):
    for extra, bias in ((0, "no bias"), (4, "one bias for all"), (4, "a bias per picture")):
        q, k, v = random(grid, extra)
        settings = settings_of(pattern, k, bias)
        out, lse = attention_by_definition(q, k, v, pattern, grid, **settings)
        for name, attend in backends(pattern, grid, extra):
            plain, full = attend(q, k, v, **settings), attend(q, k, v, with_lse=True, **settings)
            assert plain.lse is None
            for found, expected in ((plain.out, out), (full.out, out), (full.lse, lse)):
                torch.testing.assert_close(found, expected.float(), rtol=0, atol=5e-6, msg=name)


@pytest.fixture
def uncompiled(monkeypatch):
    """FlexAttention's own definition: a whole matrix of scores."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    return flex_attention


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("pattern", [Disc(4), PooledDisc(3, 4), Band(5), FrameBand(4), Disc(60)], ids=str)
@pytest.mark.parametrize("grid", [Grid(19, 33, before=3, after=5), Grid(10, 20, frames=3, before=4)], ids=str)
def test_flex_attention_is_softmax_over_the_kept_pairs(pattern, grid, uncompiled):
    for extra, bias in ((0, "no bias"), (6, "a bias per picture")):
        q, k, v = random(grid, extra, d=16)
        settings = settings_of(pattern, k, bias)
        expected = core.masked(q, k, v, pattern, grid, with_lse=True, **settings)
        plan = flex_plan(pattern, grid, extra)
        found = flex(q, k, v, plan, with_lse=True, run=uncompiled, **settings)
        torch.testing.assert_close(found.out, expected.out, rtol=0, atol=5e-6)
        torch.testing.assert_close(found.lse, expected.lse, rtol=0, atol=5e-6)


@pytest.fixture
def traced():
    """FlexAttention as `compiled` has it, without code being generated for it."""
    torch._dynamo.reset()
    counters.clear()
    yield torch.compile(flex_attention, dynamic=False, fullgraph=True, backend="eager")
    torch._dynamo.reset()


def test_texts_of_nearly_one_length_share_what_is_compiled(traced):
    for text in (2, 9, 27):
        grid = Grid(10, 12, before=text)
        q, k, v = random(grid, d=16)
        found = flex(q, k, v, flex_plan(Disc(4), grid), run=traced)
        expected = core.masked(q, k, v, Disc(4), grid)
        torch.testing.assert_close(found.out, expected.out, rtol=0, atol=5e-6)
        assert counters["stats"]["unique_graphs"] == (1 if text < 9 else 2)  # 122 tokens are one block, 129 are two


def test_dense_attention_shares_it_too(traced):
    for length in (20, 90, 128):
        q, k, v = random(Grid(1, length), 6, d=16)
        expected = core.dense(q, k, v, with_lse=True)
        out, lse = flex_dense(q, k, v, run=traced)
        torch.testing.assert_close(out, expected.out, rtol=0, atol=5e-6)
        torch.testing.assert_close(lse, expected.lse, rtol=0, atol=5e-6)
        assert counters["stats"]["unique_graphs"] == (1 if length < 128 else 2)  # of 134 keys, two blocks


@pytest.mark.parametrize(("keys", "partial"), [(300, {2}), (384, set())])
def test_of_dense_attention_only_a_block_that_is_filled_up_is_masked(keys, partial):
    mask = all_but_padding(200, keys, torch.device("cpu"))
    for row in range(2):
        assert chosen(mask.kv_num_blocks, mask.kv_indices, row) == partial
        assert chosen(mask.full_kv_num_blocks, mask.full_kv_indices, row) == {0, 1, 2} - partial
    assert mask.mask_mod(0, 0, 0, torch.arange(384)).tolist() == [True] * keys + [False] * (384 - keys)


@pytest.mark.long
def test_compiling_goes_on_past_the_limit_of_shapes(traced):
    x = [torch.randn(1, 1, 16 * n, 16) for n in range(1, 5)]
    with torch._dynamo.config.patch(recompile_limit=2):
        for each in x:
            for_many_shapes(traced)(each, each, each)
        assert counters["stats"]["unique_graphs"] == 4
        assert torch._dynamo.config.recompile_limit == 2
        torch._dynamo.reset()
        for each in x[:2]:
            traced(each, each, each)
        with pytest.raises(FailOnRecompileLimitHit):
            traced(x[2], x[2], x[2])


def test_flex_attention_is_compiled_with_room_for_many_shapes(monkeypatch):
    names = list(MOST_SHAPES)
    monkeypatch.setattr(
        torch, "compile", lambda *args, **kwargs: lambda: [getattr(torch._dynamo.config, name) for name in names]
    )
    before = [getattr(torch._dynamo.config, name) for name in names]
    inside = compiled.__wrapped__()()
    assert inside == list(MOST_SHAPES.values())
    assert all(a < b for a, b in zip(before, inside, strict=True))
    assert [getattr(torch._dynamo.config, name) for name in names] == before


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_dense_attention_by_flex_and_its_log_sum_exp(uncompiled, recwarn):
    q, k, v = random(Grid(5, 7), 6, d=16)
    everything = torch.ones(35, 41, dtype=torch.bool)
    expected = core.dense(q, k, v, scale=0.4, with_lse=True, allowed=everything)
    out, lse = flex_dense(q, k, v, scale=0.4, run=uncompiled)
    torch.testing.assert_close(out, expected.out, rtol=0, atol=5e-6)
    torch.testing.assert_close(lse, expected.lse, rtol=0, atol=5e-6)
    assert not [warning for warning in recwarn if "return_lse" in str(warning.message)]


LARGE = [
    (Disc(9), Grid(40, 52, before=3, after=5)),
    (PooledDisc(6, 4), Grid(40, 52, before=130)),
    (Band(150), Grid(40, 52, before=3)),
    (FrameBand(21), Grid(20, 24, frames=4, before=7)),
]


@pytest.mark.parametrize(("pattern", "grid"), [*EVERY, *LARGE], ids=lambda value: str(value).replace(" ", ""))
def test_flex_blocks_leave_out_no_kept_pair_and_call_full_only_what_is(pattern, grid):
    extra = 6
    plan = flex_plan(pattern, grid, extra)
    assert plan.size > 8 * (len(plan.queries) + len(plan.keys) + len(plan.back))  # and the blocks
    seen = core.mask(pattern, grid, extra)[plan.queries][:, plan.keys]
    real_queries = torch.arange(len(plan.queries)) < grid.length  # the rest fills up the last block
    real_keys = real_queries.tolist() + [True] * (core.mask(pattern, grid, extra).shape[1] - grid.length)
    seen[:, ~torch.tensor(real_keys + [False] * (len(plan.keys) - len(real_keys)))] = False
    assert len(plan.queries) % BLOCK == len(plan.keys) % BLOCK == 0
    for row in range(-(-seen.shape[0] // BLOCK)):
        partial = chosen(plan.mask.kv_num_blocks, plan.mask.kv_indices, row)
        full = chosen(plan.mask.full_kv_num_blocks, plan.mask.full_kv_indices, row)
        assert not partial & full
        for column in range(-(-seen.shape[1] // BLOCK)):
            rows = slice(row * BLOCK, (row + 1) * BLOCK)
            block = seen[rows, column * BLOCK : (column + 1) * BLOCK][real_queries[rows]]
            assert column in partial | full or not block.any()
            assert column not in full or block.all()


def chosen(counts, indices, row: int) -> set[int]:
    return set(indices[0, 0, row, : counts[0, 0, row]].tolist())


@pytest.mark.parametrize(("pixels", "shares"), [(1024, (0.380, 0.472, 0.772)), (2048, (0.118, 0.153, 0.302))])
def test_blocks_of_patches_touch_as_few_as_computed_for_the_method(pixels, shares):
    grid = Grid(pixels // 16, pixels // 16, before=512)
    for radius, share in zip((8, 16, 32), shares, strict=True):
        found = computed_pairs(flex_plan(Disc(radius), grid)) / grid.length**2
        assert found == pytest.approx(share, abs=5e-4)


def test_tokens_in_patches_and_back_are_the_same_tokens():
    plan = flex_plan(Disc(3), Grid(19, 33, before=3, after=5))
    tokens = torch.arange(plan.grid.length)
    assert torch.equal(tokens[plan.queries][plan.back], tokens)
    assert not torch.equal(plan.queries, tokens)


def test_a_dense_pattern_is_dense_attention():
    grid = Grid(12, 10, before=7)
    q, k, v = random(grid, extra=3)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for _, attend in backends(Disc(17), grid, 3):
        torch.testing.assert_close(attend(q, k, v).out, expected, rtol=0, atol=1e-6)


def test_constant_cells_average_and_text_is_unchanged_by_them():
    grid = Grid(8, 12, before=5)
    q, k, v = random(grid)
    area = v[:, :, 5:].mT.reshape(2, 16, 8, 12)
    mean = torch.nn.functional.avg_pool2d(area, 4).flatten(2).reshape(2, 2, 8, 6).mT
    torch.testing.assert_close(core.pool(v, grid, torch.full((4, 4), 1 / 16)), mean)

    pooled, local = (tiled(q, k, v, tile(pattern, grid)).out for pattern in (PooledDisc(3, 4), Disc(3)))
    assert torch.equal(pooled[:, :, :5], local[:, :, :5])
    assert not torch.allclose(pooled[:, :, 5:], local[:, :, 5:])


def test_the_released_processor_with_pooled_keys():
    """Official parity: H = W = 8, 512 text tokens, radius 4, cells of 4, weights that are not constant."""
    grid = Grid(8, 8, before=512)
    q, k, v = random(grid, batch=1, d=16)
    weight = torch.rand(1, 1, 1, 4, 1, 4, 1, generator=torch.Generator().manual_seed(3))
    scale = math.sqrt(math.log(10 * 576, 64**2 + 512) / 16)
    down_k, down_v = ((x[:, :, 512:].unflatten(2, (2, 4, 2, 4)) * weight).sum((3, 5)).flatten(2, 3) for x in (k, v))

    index = torch.arange(576)
    y, x = (index - 512) // 8, (index - 512) % 8
    text = index < 512
    near = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2 < 16
    own = text[:, None] | text | near
    seen = torch.cat([own, (~text)[:, None].expand(-1, 4)], dim=1)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, torch.cat([k, down_k], 2), torch.cat([v, down_v], 2), attn_mask=seen, scale=scale
    )
    for _, attend in backends(PooledDisc(4, 4), grid, 0):
        found = attend(q, k, v, scale=scale, weight=weight[0, 0, 0, :, 0, :, 0]).out
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite_and_keeps_its_dtype(dtype):
    grid = Grid(12, 10, before=7)
    q, k, v = (100 * x for x in random(grid, dtype=dtype))  # logits up to some 1e5
    out, lse = tiled(q, k, v, tile(Disc(3), grid), with_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert out.isfinite().all()
    assert lse.isfinite().all()


def test_nothing_that_is_handed_over_is_written_to():
    grid = Grid(12, 10, before=7)
    given = random(grid, extra=3)
    bias = BIASES["one bias for all"](given[1])
    copies = [x.clone() for x in (*given, bias)]
    for _, attend in backends(PooledDisc(3, 4), grid, 3):
        attend(*given, bias=bias)
        attend(*given, bias=bias, with_lse=True)
    assert all(torch.equal(x, y) for x, y in zip((*given, bias), copies, strict=True))


def test_views_that_are_not_contiguous_are_taken():
    grid = Grid(12, 10, before=7)
    q, k, v = random(grid)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    tiling = tile(Disc(3), grid)
    torch.testing.assert_close(tiled(*strided, tiling).out, tiled(q, k, v, tiling).out, rtol=0, atol=1e-6)


def test_tiles_compute_little_more_than_is_kept():
    grid = Grid(128, 128)
    for radius, most in ((8, 4.5), (16, 2.4), (32, 1.7)):
        tiling = tile(Disc(radius), grid)
        assert core.kept_pairs(Disc(radius), grid) <= tiling.pairs <= most * core.kept_pairs(Disc(radius), grid)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Disc(0), "radius must be at least 1 token, got 0"),
        (lambda: PooledDisc(3, 0), "factor must be at least 1 token, got 0"),
        (lambda: Band(-1), "half must be at least 0 tokens, got -1"),
        (lambda: Grid(0, 3), "at least 1 frame, row and column"),
        (lambda: Grid(3, 3, before=-1), "no negative counts"),
    ],
)
def test_values_that_mean_nothing_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_tensors_of_another_length_are_refused():
    grid = Grid(12, 10, before=7)
    q, k, v = random(grid)
    with pytest.raises(ValueError, match="has 127 tokens, got 126 queries and 127 keys"):
        tiled(q[:, :, 1:], k, v, tile(Disc(2), grid))
    longer = torch.cat([k, k[:, :, :1]], dim=2)
    with pytest.raises(ValueError, match="planned for 0 extra keys, got 1"):
        flex(q, longer, longer, flex_plan(Disc(2), grid), run=flex_attention)
