"""Sparse attention in tiles: exact, on any device, without compiling.

A pattern's plane is cut into tiles. All queries of a tile share one list of keys: every place that at least one of them
sees, so the corners that a bounding box would have are left out; in front of it come the global keys, behind it the
pooled ones. Tiles of the same shape, cut off at the edges of the plane in the same way, share one small mask as well
and are computed side by side: all tiles of the interior are one such group. Nothing is padded.

Where this stops: keys are copied once for each tile. Kernels that skip blocks (`sparse_attention_flex`) need not.

Shapes: q `[B, H, L, d]`, k and v `[B, H, L + extra, d]`, masks `[queries, keys]`, True is seen.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from .sparse_attention import (
    SCORES,
    Attended,
    Grid,
    Pattern,
    check,
    dense,
    places,
    pooled_grid,
    softmax_attention,
    with_pooled,
)

COPIED = 1 << 23  # numbers of keys copied at once: 32 MB in float32


@dataclass(frozen=True, eq=False)
class Group:
    """Tiles that look alike, `n` of them. Indices count the picture's tokens from 0.

    queries: `[n, repeats * rows]`, frame by frame. keys: `[n, K]`. seen: `[rows, K]`, the same in every frame, or None
    where every query sees every key.
    """

    queries: Tensor
    keys: Tensor
    seen: Tensor | None
    rows: int


@dataclass(frozen=True, eq=False)
class Tiling:
    """All that depends on pattern, grid and device alone: make it once for many calls."""

    pattern: Pattern
    grid: Grid
    groups: tuple[Group, ...]

    @property
    def pairs(self) -> int:
        """Query-key pairs that are computed between picture tokens; a little more than are kept."""
        return sum(group.queries.numel() * group.keys.shape[1] for group in self.groups)

    @property
    def size(self) -> int:
        """Bytes held."""
        tensors = [x for g in self.groups for x in (g.queries, g.keys, g.seen) if x is not None]
        return sum(x.numel() * x.element_size() for x in tensors)

    @cached_property
    def device(self) -> torch.device:
        return self.groups[0].queries.device


def tile(pattern: Pattern, grid: Grid, device: torch.device | None = None, side: tuple[int, int] | None = None) -> Tiling:
    """Cut the plane of `pattern` into tiles.

    Args:
        side: rows and columns of a tile; None chooses by the window, see `tile_side`.
    """
    plane = pattern.plane(grid)
    height, width = side or tile_side(pattern, grid)
    reach_y, reach_x = pattern.reach
    rows = _cuts(plane.rows, height, reach_y)
    columns = _cuts(plane.columns, width, reach_x)
    area = plane.rows * plane.columns
    frames = torch.arange(plane.frames) * area
    groups = []
    for (tall, above, below), tops in rows.items():
        for (wide, left, right), lefts in columns.items():
            qy, qx = _box(0, tall, 0, wide)
            ky, kx = _box(-above, tall + below, -left, wide + right)
            seen = pattern.keeps(qy[:, None] - ky, qx[:, None] - kx)  # [tall * wide, box]
            wanted = seen.any(0)
            ky, kx, seen = ky[wanted], kx[wanted], seen[:, wanted]
            corner = (torch.tensor(tops)[:, None] * plane.columns + torch.tensor(lefts)).flatten()  # [n]
            queries = corner[:, None, None] + frames[:, None] + (qy * plane.columns + qx)  # [n, frames, tall * wide]
            keys = corner[:, None, None] + frames[:, None] + (ky * plane.columns + kx)  # [n, frames, K]
            groups.append(
                Group(
                    queries.flatten(1).to(device),
                    keys.flatten(1).to(device),
                    None if seen.all() else seen.repeat(1, plane.frames).to(device),
                    tall * wide,
                )
            )
    return Tiling(pattern, grid, tuple(groups))


def tile_side(pattern: Pattern, grid: Grid) -> tuple[int, int]:
    """Rows and columns of a tile. Larger ones copy fewer keys and compute more pairs that are masked."""
    plane = pattern.plane(grid)
    reach_y, reach_x = pattern.reach
    if plane.rows == 1:
        return 1, max(32, min(128, reach_x))
    return (8, 8) if max(reach_y, reach_x) < 24 else (16, 16)


def tiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiling: Tiling,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
    with_lse: bool = False,
) -> Attended:
    """Sparse attention. Arguments as of `sparse_attention.masked`."""
    grid = tiling.grid
    check(q, k, grid)
    b, heads, length, d = q.shape
    extra = k.shape[2] - length
    own_k, own_v, own_bias = k, v, bias
    k, v, bias = with_pooled(k, v, bias, tiling.pattern, grid, weight)
    pooled = k.shape[2] - own_k.shape[2]
    if pooled != _product(pooled_grid(tiling.pattern, grid)):
        raise ValueError(f"the pooled cells need weights [{tiling.pattern.pool}, {tiling.pattern.pool}]")

    every = grid.global_indices(extra, q.device)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((b, heads, length), dtype=torch.float32) if with_lse else None
    if grid.globals:
        rows = grid.global_indices(0, q.device)
        result = dense(q[:, :, rows], own_k, own_v, scale=scale, bias=own_bias, with_lse=with_lse)
        out[:, :, rows] = result.out
        if lse is not None and result.lse is not None:
            lse[:, :, rows] = result.lse

    shared = torch.cat([every, torch.arange(length + extra, length + extra + pooled, device=q.device)])
    for group in tiling.groups:
        seen = None if group.seen is None else F.pad(group.seen, (len(shared), 0), value=True)
        for some in _portions(group, len(shared), b * heads, d, with_lse):
            queries = group.queries[some] + grid.before  # [n, repeats * rows]
            keys = torch.cat([shared.expand(queries.shape[0], -1), group.keys[some] + grid.before], dim=1)  # [n, K]
            near_k, near_v = _gather(k, keys), _gather(v, keys)  # [B * H, n, K, d]
            near_bias = None if bias is None else _gather_bias(bias, keys, b, heads)
            for rows in queries.split(group.rows, dim=1):  # one frame at a time
                asked = _gather(q, rows)
                if lse is None:
                    allowed = _combine(seen, near_bias, asked.dtype)
                    answer = F.scaled_dot_product_attention(asked, near_k, near_v, attn_mask=allowed, scale=scale)
                else:
                    answer, sums = softmax_attention(asked, near_k, near_v, scale=scale, bias=near_bias, allowed=seen)
                    lse.view(b * heads, length)[:, rows.flatten()] = sums.flatten(1)
                out.view(b * heads, length, d)[:, rows.flatten()] = answer.flatten(1, 2)
    return Attended(out, lse)


def _cuts(size: int, side: int, reach: int) -> dict[tuple[int, int, int], list[int]]:
    """Starts of the tiles along one axis, by (length, places before, places behind) that its queries may see."""
    cuts = defaultdict(list)
    for start in range(0, size, side):
        stop = min(start + side, size)
        cuts[stop - start, min(reach, start), min(reach, size - stop)].append(start)
    return dict(cuts)


def _box(top: int, bottom: int, left: int, right: int) -> tuple[Tensor, Tensor]:
    """Row and column of every place in a box, `[places]` each, row by row."""
    y, x = torch.arange(top, bottom), torch.arange(left, right)
    return y.repeat_interleave(len(x)), x.repeat(len(y))


def _portions(group: Group, shared: int, batch: int, d: int, with_lse: bool) -> Iterator[slice]:
    """Slices of a group's tiles that fit the memory allowed at once."""
    keys = shared + group.keys.shape[1]
    most = COPIED // (batch * keys * d)
    if with_lse:
        most = min(most, SCORES // (batch * keys * group.rows))
    count = group.queries.shape[0]
    for start in range(0, count, max(most, 1)):
        yield slice(start, start + max(most, 1))


def _gather(x: Tensor, indices: Tensor) -> Tensor:
    """Tokens `[n, K]` of `[B, H, L, d]`, as `[B * H, n, K, d]`."""
    picked = x.index_select(2, indices.flatten())
    return picked.view(-1, *indices.shape, x.shape[-1])


def _gather_bias(bias: Tensor, indices: Tensor, b: int, heads: int) -> Tensor:
    """Bias of keys `[n, K]`, from `[B or 1, H or 1, 1, L]`, as `[B * H or 1, n, 1, K]`."""
    if bias.shape[0] > 1 or bias.shape[1] > 1:
        bias = bias.expand(b, heads, 1, -1)
    picked = bias.reshape(-1, bias.shape[-1])[:, indices.flatten()]
    return picked.view(-1, indices.shape[0], 1, indices.shape[1])


def _combine(seen: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if bias is None:
        return seen
    bias = bias.to(dtype)
    return bias if seen is None else bias.masked_fill(~seen, float("-inf"))


def _product(sizes: tuple[int, ...]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
