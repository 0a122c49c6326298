"""Sparse attention in tiles: exact, on any device, without compiling.

We cut a pattern's plane into tiles. All queries of a tile share one list of keys: every position that at least one of
them sees, without the empty corners of a bounding box. The global keys and the pooled ones come in front. Tiles of the
same shape, clipped alike at the edges of the plane, form a group. A group shares one small mask and is computed side by
side; all tiles of the interior are one group. Nothing is padded.

Limits: this copies keys once for each tile. Kernels that skip blocks (`sparse_attention_flex`) do not.

Shapes: q `[B, H, L, d]`, k and v `[B, H, L + extra, d]`, masks `[queries, keys]`, True is seen.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .sparse_attention import (
    Attended,
    Grid,
    Pattern,
    additive,
    at_once,
    check,
    dense,
    pooled_grid,
    softmax_attention,
    with_pooled,
)


@dataclass(frozen=True, eq=False)
class Group:
    """`n` tiles of one shape. Indices count the picture's tokens from 0.

    queries: `[n, repeats * rows]`, frame by frame. keys: `[n, K]`. seen: `[rows, K]`, the same in every frame, or None
    if every query sees every key.
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
        """Query-key pairs computed between picture tokens, a few more than the pattern keeps."""
        return sum(group.queries.numel() * group.keys.shape[1] for group in self.groups)

    @property
    def size(self) -> int:
        """Bytes held."""
        tensors = [x for g in self.groups for x in (g.queries, g.keys, g.seen) if x is not None]
        return sum(x.numel() * x.element_size() for x in tensors)


def tile(
    pattern: Pattern, grid: Grid, device: torch.device | None = None, side: tuple[int, int] | None = None
) -> Tiling:
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
    """Rows and columns of a tile. Larger tiles copy fewer keys, but compute more masked pairs."""
    plane = pattern.plane(grid)
    reach_y, reach_x = pattern.reach
    if plane.rows == 1:
        return 1, max(32, min(128, reach_x))
    return (8, 8) if max(reach_y, reach_x) < 7 else (16, 16)


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
    """Sparse attention. Arguments as in `sparse_attention.masked`."""
    grid = tiling.grid
    check(q, k, grid)
    b, heads, length, d = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((b, heads, length), dtype=torch.float32) if with_lse else None
    if grid.globals:
        rows = grid.global_indices(0, q.device)
        result = dense(q[:, :, rows], k, v, scale=scale, bias=bias, with_lse=with_lse)
        out[:, :, rows] = result.out
        if lse is not None and result.lse is not None:
            lse[:, :, rows] = result.lse

    extra, own = k.shape[2] - length, k.shape[2]
    k, v, bias = with_pooled(k, v, bias, tiling.pattern, grid, weight)
    pooled = k.shape[2] - own
    if pooled != math.prod(pooled_grid(tiling.pattern, grid)):
        raise ValueError(f"the pooled cells need weights [{tiling.pattern.pool}, {tiling.pattern.pool}]")
    every = grid.global_indices(extra, q.device)
    shared = torch.cat([every, torch.arange(own, own + pooled, device=q.device)])
    if bias is not None:
        bias = bias.expand(b, heads, 1, -1).flatten(0, 1)  # [B * H, 1, L + extra + pooled]
    flat = Heads(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), bias)
    answers, sums = out.view(b * heads, length, d), None if lse is None else lse.view(b * heads, length)
    for group in tiling.groups:
        _attend_group(flat, group, shared, grid.before, scale, answers, sums)
    return Attended(out, lse)


class Heads(NamedTuple):
    """Queries `[B * H, L, d]`, keys and values `[B * H, L + extra + pooled, d]`, bias on each key or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None  # [B * H, 1, L + extra + pooled]


def _attend_group(
    heads: Heads,
    group: Group,
    shared: Tensor,
    before: int,
    scale: float | None,
    answers: Tensor,
    sums: Tensor | None,
) -> None:
    """Write attention of a group's queries into `answers` `[B * H, L, d]`, and log-sum-exp into `sums` `[B * H, L]`.

    Args:
        shared: keys that every query sees, by index.
        before: global tokens in front of the picture.
    """
    (batch, _, d), with_lse = heads.q.shape, sums is not None
    seen = None if group.seen is None else F.pad(group.seen, (len(shared), 0), value=True)
    added = None if seen is None or with_lse else additive(seen, heads.q.dtype)  # once: SDPA would do it in each call
    for some, part in _portions(group, len(shared), batch, d, with_lse, heads.q.device):
        queries = group.queries[some] + before  # [n, repeats * rows]
        keys = torch.cat([shared.expand(queries.shape[0], -1), group.keys[some] + before], dim=1)  # [n, K]
        q, k, v = (_gather(x[part], at) for x, at in zip(heads[:3], (queries, keys, keys), strict=True))
        bias = None if heads.bias is None else heads.bias[part][:, :, keys].movedim(1, 2)  # [B * H, n, 1, K]
        for start in range(0, queries.shape[1], group.rows):  # one frame at a time
            rows = slice(start, start + group.rows)
            where = queries[:, rows].flatten()
            if sums is None:
                allowed = _sum(added, bias)
                answer = F.scaled_dot_product_attention(q[:, :, rows], k, v, attn_mask=allowed, scale=scale)
            else:
                answer, lse = softmax_attention(q[:, :, rows], k, v, scale=scale, bias=bias, allowed=seen)
                sums[part, where] = lse.flatten(1, 2)
            answers[part, where] = answer.reshape(-1, len(where), d)


def _cuts(size: int, side: int, reach: int) -> dict[tuple[int, int, int], list[int]]:
    """Starts of the tiles along one axis, by (length, positions in sight before, positions in sight behind)."""
    cuts = defaultdict(list)
    for start in range(0, size, side):
        stop = min(start + side, size)
        cuts[stop - start, min(reach, start), min(reach, size - stop)].append(start)
    return dict(cuts)


def _box(top: int, bottom: int, left: int, right: int) -> tuple[Tensor, Tensor]:
    """Row and column of every position in a box, `[positions]` each, row by row."""
    y, x = torch.arange(top, bottom), torch.arange(left, right)
    return y.repeat_interleave(len(x)), x.repeat(len(y))


def _portions(
    group: Group, shared: int, batch: int, d: int, with_lse: bool, device: torch.device
) -> Iterator[tuple[slice, slice]]:
    """Slices of a group's tiles and of the batch of heads, small enough to compute at once."""
    keys = shared + group.keys.shape[1]
    most = at_once(device) // (keys * (max(d, group.rows) if with_lse else d))
    heads = min(max(most, 1), batch)
    tiles = max(most // heads, 1)
    for start in range(0, group.queries.shape[0], tiles):
        for head in range(0, batch, heads):
            yield slice(start, start + tiles), slice(head, head + heads)


def _gather(x: Tensor, indices: Tensor) -> Tensor:
    """Tokens `[n, K]` of `[N, L, d]`, as `[N, n, K, d]`."""
    return x.index_select(1, indices.flatten()).view(-1, *indices.shape, x.shape[-1])


def _sum(added: Tensor | None, bias: Tensor | None) -> Tensor | None:
    if added is None or bias is None:
        return bias if added is None else added
    return added + bias.to(added)
