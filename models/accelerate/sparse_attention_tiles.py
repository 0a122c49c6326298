"""Sparse attention in tiles: exact, on any device, without compiling.

A pattern's plane is cut into tiles. All queries of a tile share one list of keys: every place that at least one of them
sees, so the corners that a bounding box would have are left out; in front of it come the global keys, behind it the
pooled ones. Tiles of the same shape, cut off at the edges of the plane in the same way, share one small mask as well
and are computed side by side: all tiles of the interior are one such group. Nothing is padded.

Where this stops: keys are copied once for each tile. Kernels that skip blocks (`sparse_attention_flex`) need not.

Shapes: q `[B, H, L, d]`, k and v `[B, H, L + extra, d]`, masks `[queries, keys]`, True is seen.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

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
    """Rows and columns of a tile. Larger ones copy fewer keys and compute more pairs that are masked."""
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
    """Sparse attention. Arguments as of `sparse_attention.masked`."""
    grid = tiling.grid
    check(q, k, grid)
    b, heads, length, d = q.shape
    extra = k.shape[2] - length
    own_k, own_v, own_bias = k, v, bias
    k, v, bias = with_pooled(k, v, bias, tiling.pattern, grid, weight)
    pooled = k.shape[2] - own_k.shape[2]
    if pooled != math.prod(pooled_grid(tiling.pattern, grid)):
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
    flat = [x.flatten(0, 1) for x in (q, k, v)]  # [B * H, tokens, d]
    if bias is not None:
        bias = bias.expand(b, heads, 1, -1).flatten(0, 1)  # [B * H, 1, L + extra + pooled]
    answers, sums = out.view(b * heads, length, d), None if lse is None else lse.view(b * heads, length)
    for group in tiling.groups:
        seen = None if group.seen is None else F.pad(group.seen, (len(shared), 0), value=True)
        added = None if seen is None or with_lse else additive(seen, q.dtype)  # once: SDPA would do it in each call
        for some, part in _portions(group, len(shared), b * heads, d, with_lse, q.device):
            queries = group.queries[some] + grid.before  # [n, repeats * rows]
            keys = torch.cat([shared.expand(queries.shape[0], -1), group.keys[some] + grid.before], dim=1)  # [n, K]
            asked, near_k, near_v = (_gather(x[part], at) for x, at in zip(flat, (queries, keys, keys), strict=True))
            near_bias = None if bias is None else bias[part][:, :, keys].movedim(1, 2)  # [B * H, n, 1, K]
            for start in range(0, queries.shape[1], group.rows):  # one frame at a time
                rows = slice(start, start + group.rows)
                where = queries[:, rows].flatten()
                if sums is None:
                    allowed = _sum(added, near_bias)
                    answer = F.scaled_dot_product_attention(
                        asked[:, :, rows], near_k, near_v, attn_mask=allowed, scale=scale
                    )
                else:
                    answer, sums[part, where] = (
                        x.flatten(1, 2)
                        for x in softmax_attention(
                            asked[:, :, rows], near_k, near_v, scale=scale, bias=near_bias, allowed=seen
                        )
                    )
                answers[part, where] = answer.reshape(-1, len(where), d)
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


def _portions(
    group: Group, shared: int, batch: int, d: int, with_lse: bool, device: torch.device
) -> Iterator[tuple[slice, slice]]:
    """Tiles of a group and rows of the batch of heads that are computed at once."""
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
