"""Sparse attention by FlexAttention: compiled, and never loads a block of pairs if none of them is kept.

We sort the picture's tokens by small patches. A block of 128 tokens is then compact in the plane, and few blocks touch
a window: at 2048 x 2048 pixels and radius 16, 15 % instead of 27 % in the order of rows, as in CLEAR's source. Global,
extra and pooled tokens follow. Rotary positions are applied before, so any order is right; the result goes back to the
old order. The rectangles of the blocks tell which blocks are needed, never a mask of all pairs.

Copies of one token, which nothing sees, fill queries and keys up to whole blocks. So texts of nearly the same length
share a compilation.

Limits: compiles for every new number of blocks, for some 10 to 60 s; these calls raise torch's limit of 8 shapes per
process. Uncompiled it is exact too, but holds all scores. We have not tried it on a GPU.
Shapes as in `sparse_attention.masked`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .sparse_attention import Attended, Grid, Pattern, check, pooled_grid, token_positions, with_pooled

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
PATCH = (8, 16)  # rows and columns of one block's tokens
PICTURE, GLOBAL, POOLED, PADDING = 0, 1, 2, 3
MOST_SHAPES = {"recompile_limit": 256, "accumulated_recompile_limit": 1024}  # torch allows 8 and 256


@dataclass(frozen=True, eq=False)
class FlexPlan:
    """All that depends on pattern, grid, extra keys and device alone: make it once for many calls.

    queries: order of the queries, `[L + padding]`. keys: order of the keys, `[L + padding + extra + pooled + padding]`.
    back: order that undoes `queries`, `[L]`. mask: FlexAttention's block mask.
    """

    pattern: Pattern
    grid: Grid
    extra: int
    queries: Tensor
    keys: Tensor
    back: Tensor
    mask: BlockMask

    @property
    def size(self) -> int:
        """Bytes held, almost all."""
        per_row = [self.mask.kv_indices, self.mask.full_kv_indices, self.queries, self.keys, self.back]
        return sum(x.numel() * x.element_size() for x in per_row if x is not None)


def flex_plan(pattern: Pattern, grid: Grid, extra: int = 0, device: torch.device | None = None) -> FlexPlan:
    """The order of tokens and the blocks of pairs to compute."""
    from torch.nn.attention.flex_attention import BlockMask  # late: it is slow to load

    y, x = token_positions(pattern, grid)
    pooled = math.prod(pooled_grid(pattern, grid))
    patches = _patch_order(pattern, grid)
    own, more = grid.global_indices(), torch.arange(grid.length, grid.length + extra + pooled)
    queries = _whole_blocks(torch.cat([patches + grid.before, own]))
    keys = _whole_blocks(torch.cat([queries, more]))

    kinds = torch.full((len(keys),), PADDING)
    kinds[: grid.length] = GLOBAL
    kinds[: grid.picture] = PICTURE
    kinds[len(queries) : len(queries) + extra] = GLOBAL
    kinds[len(queries) + extra : len(queries) + extra + pooled] = POOLED
    key_y, key_x = torch.zeros(2, len(keys), dtype=torch.int64)
    key_y[: grid.picture], key_x[: grid.picture] = y[patches], x[patches]

    needed, full = _needed(pattern, (kinds, key_y, key_x), len(queries))
    key_kind, at_y, at_x = (values.to(torch.int32).to(device) for values in (kinds, key_y, key_x))

    def kept(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        near = pattern.keeps(at_y[q] - at_y[k], at_x[q] - at_x[k])
        of_picture = (key_kind[k] != PICTURE) | near
        seen = torch.where(key_kind[q] == PICTURE, of_picture, key_kind[k] != POOLED)
        return seen & (key_kind[k] != PADDING)

    mask = BlockMask.from_kv_blocks(
        *_rows_of_blocks(needed & ~full, device),
        *_rows_of_blocks(full, device),
        BLOCK_SIZE=BLOCK,
        mask_mod=kept,
        seq_lengths=(len(queries), len(keys)),
        compute_q_blocks=False,
    )
    back = torch.argsort(queries[: grid.length])
    return FlexPlan(pattern, grid, extra, queries.to(device), keys.to(device), back.to(device), mask)


def flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: FlexPlan,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
    with_lse: bool = False,
    run: Callable[..., Any] | None = None,
) -> Attended:
    """Sparse attention. Arguments as in `sparse_attention.masked`; `run` replaces compiled FlexAttention."""
    check(q, k, plan.grid)
    if k.shape[2] != plan.grid.length + plan.extra:
        raise ValueError(f"planned for {plan.extra} extra keys, got {k.shape[2] - plan.grid.length}")
    k, v, bias = with_pooled(k, v, bias, plan.pattern, plan.grid, weight)
    q, k, v = q[:, :, plan.queries], k[:, :, plan.keys], v[:, :, plan.keys]
    score: Callable[..., Tensor] | None = None
    if bias is not None:
        of_key = bias.expand(*k.shape[:2], 1, -1)[:, :, 0, plan.keys].contiguous()  # [B, H, keys]

        def add(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return s + of_key[b, h, j]

        score = add

    run = run or compiled()
    asked = _asks_for_lse() if with_lse else {}
    result = run(q, k, v, score_mod=score, block_mask=plan.mask, scale=scale, **asked)
    if not with_lse:
        return Attended(result[:, :, plan.back], None)
    out, lse = _out_and_lse(result)
    return Attended(out[:, :, plan.back], lse[:, :, plan.back])


def flex_dense(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, run: Callable[..., Any] | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of every query to every key and its log-sum-exp, in one pass. Shapes as in `flex`."""
    length, keys = q.shape[2], k.shape[2]
    mask = all_but_padding(length, keys, q.device)
    q, k, v = (F.pad(x, (0, 0, 0, -x.shape[2] % BLOCK)) for x in (q, k, v))
    out, lse = _out_and_lse((run or compiled())(q, k, v, block_mask=mask, scale=scale, **_asks_for_lse()))
    return out[:, :, :length], lse[:, :, :length]


@lru_cache(maxsize=4)
def all_but_padding(queries: int, keys: int, device: torch.device) -> BlockMask:
    """A mask by which every query sees every key, and none sees the padding of the last block."""
    from torch.nn.attention.flex_attention import BlockMask

    rows, columns = -(-queries // BLOCK), -(-keys // BLOCK)
    real = torch.arange(columns * BLOCK, device=device) < keys
    full = torch.ones(rows, columns, dtype=torch.bool)
    full[:, -1] = keys % BLOCK == 0

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return real[k]

    return BlockMask.from_kv_blocks(
        *_rows_of_blocks(~full, device),
        *_rows_of_blocks(full, device),
        BLOCK_SIZE=BLOCK,
        mask_mod=seen,
        seq_lengths=(rows * BLOCK, columns * BLOCK),
        compute_q_blocks=False,
    )


def _out_and_lse(result: tuple[Tensor, Any]) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp from FlexAttention's result; the logarithm is natural."""
    out, rest = result
    lse = rest if isinstance(rest, Tensor) else rest.lse
    return out, lse.float()


def _asks_for_lse() -> dict[str, Any]:
    """The arguments that ask for log-sum-exp: new versions of torch replace `return_lse`."""
    from torch.nn.attention import flex_attention as module

    request = getattr(module, "AuxRequest", None)
    return {"return_lse": True} if request is None else {"return_aux": request(lse=True)}


@cache
def compiled() -> Callable[..., Any]:
    """FlexAttention, compiled. With `fullgraph` it raises past the limit of shapes, instead of running uncompiled."""
    from torch.nn.attention.flex_attention import flex_attention

    return for_many_shapes(torch.compile(flex_attention, dynamic=False, fullgraph=True))


def for_many_shapes(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """`compiled`, with torch's limit of shapes per function raised to `MOST_SHAPES` during a call.

    The limit belongs to the process, and conditions may run in threads, so a lock admits one call at a time.
    """
    import torch._dynamo

    lock = threading.Lock()

    def call(*args: Any, **kwargs: Any) -> Any:
        with lock, torch._dynamo.config.patch(MOST_SHAPES):
            return compiled(*args, **kwargs)

    return call


def computed_pairs(plan: FlexPlan) -> int:
    """Pairs in the loaded blocks."""
    partial, full = plan.mask.kv_num_blocks, plan.mask.full_kv_num_blocks
    return int(partial.sum() + (0 if full is None else full.sum())) * BLOCK * BLOCK


def _patch_order(pattern: Pattern, grid: Grid) -> Tensor:
    """The picture's tokens patch by patch, `[picture]`. For bands, a patch is one stretch of tokens in all frames."""
    plane = pattern.plane(grid)
    height, width = PATCH if plane.rows > 1 else (1, max(BLOCK // plane.frames, 1))
    token = torch.arange(grid.picture).view(plane.frames, plane.rows, plane.columns)
    order = []
    for rows in token.split(height, dim=1):
        order += [patch.flatten() for patch in rows.split(width, dim=2)]
    return torch.cat(order)


def _whole_blocks(order: Tensor) -> Tensor:
    """The order, padded with the first token. As `PADDING` nothing sees it, and its own result is dropped."""
    return F.pad(order, (0, -len(order) % BLOCK))


def _needed(pattern: Pattern, keys: tuple[Tensor, Tensor, Tensor], queries: int) -> tuple[Tensor, Tensor]:
    """Blocks that may have a kept pair, and blocks with kept pairs only; `[query blocks, key blocks]` each.

    keys: kind, row and column of every key; the first `queries` of them are the queries.
    """
    of_keys = _rectangles(*keys)
    of_queries = _rectangles(*(x[:queries] for x in keys))
    has_q, top_q, bottom_q, left_q, right_q = (x[:, None] for x in of_queries)
    has_k, top_k, bottom_k, left_k, right_k = (x[None] for x in of_keys)

    gap_y = torch.maximum(top_k - bottom_q, top_q - bottom_k).clamp(min=0)
    gap_x = torch.maximum(left_k - right_q, left_q - right_k).clamp(min=0)
    far_y = torch.maximum(bottom_k - top_q, bottom_q - top_k)
    far_x = torch.maximum(right_k - left_q, right_q - left_k)
    some, every = pattern.keeps(gap_y, gap_x), pattern.keeps(far_y, far_x)

    q_picture, q_global = has_q[..., PICTURE], has_q[..., GLOBAL]
    k_picture, k_global, k_pooled, k_padding = has_k.unbind(-1)
    needed = (q_picture & (k_global | k_pooled | (k_picture & some))) | (q_global & (k_picture | k_global))
    full = (~q_picture | ~k_picture | every) & (~q_global | ~k_pooled) & ~k_padding & needed
    return needed, full


def _rectangles(kinds: Tensor, y: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """Each block's kinds of tokens, `[blocks, 4]`, and top, bottom, left and right of its picture tokens."""
    has, sides = [], []
    for kind, row, column in zip(kinds.split(BLOCK), y.split(BLOCK), x.split(BLOCK), strict=True):
        picture = kind == PICTURE
        has.append(torch.stack([(kind == each).any() for each in (PICTURE, GLOBAL, POOLED, PADDING)]))
        rows, columns = (row[picture], column[picture]) if picture.any() else (row[:1], column[:1])
        sides.append(torch.stack([rows.min(), rows.max(), columns.min(), columns.max()]))
    return torch.stack(has), *torch.stack(sides).unbind(1)


def _rows_of_blocks(chosen: Tensor, device: torch.device | None) -> tuple[Tensor, Tensor]:
    """Number and indices of the chosen blocks of every row, `[1, 1, rows]` and `[1, 1, rows, columns]`."""
    indices = torch.argsort(~chosen, dim=1, stable=True)
    return (
        chosen.sum(1).to(torch.int32)[None, None].to(device),
        indices.to(torch.int32)[None, None].contiguous().to(device),
    )
