"""Sparse attention over a picture's tokens: which pairs of tokens see each other, their number, and their mask.

The tokens of one attention call lie in a `Grid`: some in front (text), then the picture, frame by frame and row by row,
then some behind it (reference pictures). Tokens outside the picture are *global*: they see all tokens, and all see
them. So are *extra* keys, which a call may have behind its own tokens. Between picture tokens a `Pattern` decides.

Every pattern here is a window in a plane that repeats over frames. It keeps a pair by its distance `(dy, dx)` in that
plane, whatever the frames of the two. The window has no holes: a kept pair stays kept when `dy` or `dx` shrinks. The
backends (`sparse_attention_tiles`, `sparse_attention_flex`) rely on nothing else, so a new pattern is a few lines.

Sources: CLEAR, arXiv:2412.16112 (disc, pooled disc); Re-ttention, arXiv:2505.22918 (bands).
Shapes: q `[B, H, L, d]`, k and v `[B, H, L + extra, d]`; masks `[L, L + extra + pooled]`, True is seen.
Units: radius and half width in tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Grid:
    """The tokens of one attention call: `before` global ones, the picture, `after` more global ones."""

    height: int
    width: int
    frames: int = 1
    before: int = 0
    after: int = 0

    def __post_init__(self):
        if min(self.height, self.width, self.frames) < 1 or min(self.before, self.after) < 0:
            raise ValueError(f"a grid needs at least 1 frame, row and column and no negative counts, got {self}")

    @property
    def picture(self) -> int:
        return self.frames * self.height * self.width

    @property
    def globals(self) -> int:
        return self.before + self.after

    @property
    def length(self) -> int:
        return self.picture + self.globals

    def global_indices(self, extra: int = 0, device: torch.device | None = None) -> Tensor:
        """Indices of the global tokens and `extra` keys on the key axis, `[globals + extra]`."""
        behind = torch.arange(self.before + self.picture, self.length + extra, device=device)
        return torch.cat([torch.arange(self.before, device=device), behind])


class Plane(NamedTuple):
    """A pattern's layout of the picture's tokens: `frames` sheets of `rows` x `columns`, in token order."""

    frames: int
    rows: int
    columns: int


class Pattern(Protocol):
    """Which pairs of picture tokens are kept. Frozen and hashable."""

    @property
    def pool(self) -> int:
        """Side of the cells that each also give one averaged key; 0 for none."""
        ...

    @property
    def reach(self) -> tuple[int, int]:
        """The largest `dy` and `dx` of kept pairs."""
        ...

    def plane(self, grid: Grid) -> Plane: ...

    def keeps(self, dy: Tensor, dx: Tensor) -> Tensor:
        """Whether to keep a pair at this distance; whole numbers of either sign."""
        ...


@dataclass(frozen=True)
class Disc:
    """Tokens nearer than `radius`: `dy^2 + dx^2 < radius^2`, strictly. Source: CLEAR.

    For video we extend the paper: the same disc in every frame. Neutral value: beyond the grid's diagonal.
    """

    radius: int

    def __post_init__(self):
        if self.radius < 1:
            raise ValueError(f"radius must be at least 1 token, got {self.radius}: a token sees itself")

    @property
    def pool(self) -> int:
        return 0

    @property
    def reach(self) -> tuple[int, int]:
        return self.radius - 1, self.radius - 1

    def plane(self, grid: Grid) -> Plane:
        return Plane(grid.frames, grid.height, grid.width)

    def keeps(self, dy: Tensor, dx: Tensor) -> Tensor:
        return dy * dy + dx * dx < self.radius * self.radius


@dataclass(frozen=True)
class PooledDisc(Disc):
    """A disc, and the whole picture as weighted means over cells of `factor` x `factor` tokens.

    Picture tokens see the pooled keys, global tokens do not, as in CLEAR. If `factor` does not divide the grid, cells
    at its edge repeat its last row and column. That is our extension: CLEAR has no such grids.
    """

    factor: int

    def __post_init__(self):
        super().__post_init__()
        if self.factor < 1:
            raise ValueError(f"factor must be at least 1 token, got {self.factor}")

    @property
    def pool(self) -> int:
        return self.factor


@dataclass(frozen=True)
class Band:
    """Tokens at most `half` tokens away in raster order, across rows too. Source: Re-ttention, images."""

    half: int

    def __post_init__(self):
        _check_half(self.half)

    @property
    def pool(self) -> int:
        return 0

    @property
    def reach(self) -> tuple[int, int]:
        return 0, self.half

    def plane(self, grid: Grid) -> Plane:
        return Plane(1, 1, grid.picture)

    def keeps(self, dy: Tensor, dx: Tensor) -> Tensor:
        return (dx.abs() <= self.half) & (dy == 0)


@dataclass(frozen=True)
class FrameBand(Band):
    """Tokens at most `half` tokens away in a frame's raster order, in all frames. Source: Re-ttention, CogVideoX."""

    def plane(self, grid: Grid) -> Plane:
        return Plane(grid.frames, 1, grid.height * grid.width)


def _check_half(half: int) -> None:
    if half < 0:
        raise ValueError(f"half must be at least 0 tokens, got {half}: a token sees itself")


@lru_cache(maxsize=64)
def covers(pattern: Pattern, grid: Grid) -> bool:
    """Whether the window keeps every pair of picture tokens, as dense attention does."""
    plane = pattern.plane(grid)
    return bool(pattern.keeps(torch.tensor(plane.rows - 1), torch.tensor(plane.columns - 1)))


def pooled_grid(pattern: Pattern, grid: Grid) -> tuple[int, int, int]:
    """Frames, rows and columns of the pooled keys; zeros if there are none."""
    f = pattern.pool
    return (grid.frames, -(-grid.height // f), -(-grid.width // f)) if f else (0, 0, 0)


@lru_cache(maxsize=64)  # every attention call asks again
def kept_pairs(pattern: Pattern, grid: Grid, extra: int = 0) -> int:
    """The number of kept query-key pairs, with the windows clipped at the edges.

    Global queries see `L + extra` keys. Picture queries see the global and extra ones, their window and the pooled
    ones.
    """
    frames, rows, columns = pattern.plane(grid)
    reach_y, reach_x = (min(reach, size - 1) for reach, size in zip(pattern.reach, (rows, columns), strict=True))
    dy, dx = torch.arange(-reach_y, reach_y + 1)[:, None], torch.arange(-reach_x, reach_x + 1)[None]
    at_distance = (rows - dy.abs()) * (columns - dx.abs())  # pairs of positions this far apart, [2 ry + 1, 2 rx + 1]
    in_window = frames * frames * int((at_distance * pattern.keeps(dy, dx)).sum())
    pooled = math.prod(pooled_grid(pattern, grid))
    shared = grid.globals + extra
    return grid.globals * (grid.length + extra) + grid.picture * (shared + pooled) + in_window


def kept_ratio(pattern: Pattern, grid: Grid, extra: int = 0) -> float:
    """Kept pairs as a share of those of dense attention."""
    return kept_pairs(pattern, grid, extra) / (grid.length * (grid.length + extra))


def token_positions(pattern: Pattern, grid: Grid, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Row and column of every picture token in the pattern's plane, `[picture]` each."""
    plane = pattern.plane(grid)
    within = torch.arange(grid.picture, device=device) % (plane.rows * plane.columns)
    return within // plane.columns, within % plane.columns


def mask(pattern: Pattern, grid: Grid, extra: int = 0, device: torch.device | None = None) -> Tensor:
    """The whole mask, `[L, L + extra + pooled]`. For small grids: it has as many entries as dense attention."""
    y, x = token_positions(pattern, grid, device)
    pooled = math.prod(pooled_grid(pattern, grid))
    seen = torch.ones(grid.length, grid.length + extra + pooled, dtype=torch.bool, device=device)
    picture = slice(grid.before, grid.before + grid.picture)
    seen[picture, picture] = pattern.keeps(y[:, None] - y, x[:, None] - x)
    seen[: grid.before, grid.length + extra :] = False
    seen[picture.stop :, grid.length + extra :] = False
    return seen


class Attended(NamedTuple):
    """Result of attention, `[B, H, L, d]`, and on request the log-sum-exp of its scaled logits, `[B, H, L]` float32."""

    out: Tensor
    lse: Tensor | None


def pool(x: Tensor, grid: Grid, weight: Tensor) -> Tensor:
    """The picture's keys or values as weighted sums over cells.

    Args:
        x: `[B, H, L + extra, d]`.
        weight: `[f, f]`, row and column within a cell; 1/f^2 everywhere is the mean.

    Returns:
        `[B, H, frames * ceil(h/f) * ceil(w/f), d]`, in x's dtype.
    """
    f = weight.shape[0]
    b, heads, _, d = x.shape
    cells = x[:, :, grid.before : grid.before + grid.picture].reshape(-1, grid.frames, grid.height, grid.width, d)
    down, right = -grid.height % f, -grid.width % f
    if down or right:  # repeat the last row and column
        rows = torch.arange(grid.height + down, device=x.device).clamp(max=grid.height - 1)
        columns = torch.arange(grid.width + right, device=x.device).clamp(max=grid.width - 1)
        cells = cells[:, :, rows][:, :, :, columns]
    cells = cells.unflatten(3, (-1, f)).unflatten(2, (-1, f))  # [B*H, frames, h/f, f, w/f, f, d]
    weighted = cells * weight.to(x).view(1, 1, 1, f, 1, f, 1)
    return weighted.sum(dim=(3, 5)).reshape(b, heads, -1, d)


def with_pooled(
    k: Tensor, v: Tensor, bias: Tensor | None, pattern: Pattern, grid: Grid, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values and bias with the pooled ones behind them; unchanged for patterns without pooled keys.

    Args:
        bias: added to the logits of each key, `[B or 1, H or 1, 1, L + extra]`. Pooled keys get 0.
        weight: of the cells, `[f, f]`; None is the mean.
    """
    if not pattern.pool:
        return k, v, bias
    if weight is None:
        weight = k.new_full((pattern.pool, pattern.pool), 1 / pattern.pool**2)
    pooled_k, pooled_v = pool(k, grid, weight), pool(v, grid, weight)
    if bias is not None:
        bias = F.pad(bias, (0, pooled_k.shape[2]))
    return torch.cat([k, pooled_k], dim=2), torch.cat([v, pooled_v], dim=2), bias


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    with_lse: bool = False,
    allowed: Tensor | None = None,
) -> Attended:
    """Attention of every query to every key, or to those that `allowed`, `[Lq, Lk]` bool, has.

    With log-sum-exp it computes in float32, some rows at a time, so it never holds the whole score matrix.
    """
    if not with_lse:
        combined = allowed
        if bias is not None:
            combined = bias.to(q.dtype) if allowed is None else additive(allowed, q.dtype) + bias.to(q.dtype)
        return Attended(F.scaled_dot_product_attention(q, k, v, attn_mask=combined, scale=scale), None)

    rows = max(1, at_once(q.device) // (q.shape[0] * q.shape[1] * k.shape[2]))
    parts = []
    for start in range(0, q.shape[2], rows):
        some = slice(start, start + rows)
        seen = None if allowed is None else allowed[some]
        parts.append(softmax_attention(q[:, :, some], k, v, scale=scale, bias=bias, allowed=seen))
    if not parts:
        return Attended(torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32))
    return Attended(torch.cat([part.out for part in parts], 2), torch.cat([part.lse for part in parts], 2))


def at_once(device: torch.device) -> int:
    """How many numbers to hold at once: a CPU's cache (4 MB in float32), more on a GPU, where launches cost."""
    return 1 << 20 if device.type == "cpu" else 1 << 25


class WithLse(NamedTuple):
    out: Tensor
    lse: Tensor


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, bias: Tensor | None, allowed: Tensor | None
) -> WithLse:
    """Attention written out in float32: q `[..., Lq, d]`, k and v `[..., Lk, d]`. Every row needs a key."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q.float() * factor) @ k.float().mT  # [..., Lq, Lk]
    if bias is not None:
        scores = scores + bias.float()
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    weights = scores.softmax(-1)
    lse = scores.amax(-1) - weights.amax(-1).log()  # the heaviest key's weight is exp(its score - lse)
    return WithLse((weights @ v.float()).to(q.dtype), lse)


def masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    grid: Grid,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
    with_lse: bool = False,
) -> Attended:
    """The plainest backend and the reference for the others: dense attention under the whole mask.

    Args:
        q: `[B, H, L, d]`. k, v: `[B, H, L + extra, d]`.
        bias: added to the logits of each key, `[B or 1, H or 1, 1, L + extra]`.
        weight: of the pooled cells, `[f, f]`; None is the mean.
    """
    check(q, k, grid)
    allowed = mask(pattern, grid, k.shape[2] - grid.length, q.device)
    k, v, bias = with_pooled(k, v, bias, pattern, grid, weight)
    return dense(q, k, v, scale=scale, bias=bias, with_lse=with_lse, allowed=allowed)


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to the logits: 0 where `allowed`, else minus infinity."""
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, float("-inf"))


def check(q: Tensor, k: Tensor, grid: Grid) -> None:
    """Refuse tensors of another length than the grid's."""
    if q.shape[2] != grid.length or k.shape[2] < grid.length:
        raise ValueError(f"{grid} has {grid.length} tokens, got {q.shape[2]} queries and {k.shape[2]} keys")
