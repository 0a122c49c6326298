"""Sparse attention that keeps the statistics of the last full attention.

Source: Re-ttention, arXiv:2505.22918, and its published code, cccrrrccc/Re-ttention. A softmax over the few kept keys S
gives each of them too much weight. So we scale it down by the share of the softmax that S had at the last full
attention, and add the other keys' contribution from then:

    rho_i    = sum over S of exp(z_ij) / sum over all of exp(z_ij) = exp(LSE_S - LSE_all)
    R_i      = full_i - rho_i * sparse_i       = what the keys outside S contributed to full_i
    output_i = rho_i * sparse_i + R_i          in a sparse evaluation
    rho_i   <- rho_i + drift                   after each sparse evaluation, drift = 0.04 as published

A refresh is the evaluation that takes rho and R. Its output is full attention itself. The first sparse evaluation after
it uses rho as taken, the second rho + drift, and so on.

Shapes: attention outputs and R are `[B, H, L, d]`; log-sum-exps and rho are `[B, H, L]` in float32.
Units: the schedule counts computed evaluations of one layer for one condition, not steps.

Where we differ: we take R before the output projection, the authors take it after. The projection is linear and its
bias cancels in R, so the result is the same. Our rho is float32 and stops at 1. Rows that keep every key, such as text,
have rho = 1 and R = 0, and the published drift overshoots them by 4 to 12 %. `drifted(..., clamp=False)` does the same.
Their code computes all scores and masks them. Here any backend may compute attention over the kept keys, see
`sparse_attention.py`; `window` says which keys the paper keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .sparse_attention import Band, Disc, FrameBand, Grid, Pattern

DRIFT = 0.04  # section 4 of the paper, and `cached_ratio += 0.04` in the code

Kind = Literal["full", "refresh", "sparse"]
Storage = Literal["full", "bf16", "fp8", "cpu", "none"]
Window = Literal["auto", "band", "tube", "disc"]

FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0  # torch.finfo(FP8).max


def kept_share(sparse_lse: Tensor, full_lse: Tensor) -> Tensor:
    """rho: the share of the full softmax that falls on the kept keys, in [0, 1].

    Args:
        sparse_lse, full_lse: natural log of the sum of exponentials over the kept and over all keys, `[B, H, L]`.

    Returns:
        `[B, H, L]` in float32. 0 for a row that keeps no key, whose log-sum-exp is -inf.
    """
    log_share = (sparse_lse.float() - full_lse.float()).clamp(max=0.0)  # above 0 only by rounding
    return torch.where(torch.isneginf(sparse_lse), 0.0, log_share.exp())


def residual(full: Tensor, sparse: Tensor, rho: Tensor) -> Tensor:
    """R: the contribution of all keys that are not kept, `[B, H, L, d]`, in the dtype of `full`; sums in float32."""
    return (full - rho[..., None] * sparse).to(full.dtype)


def reshaped(sparse: Tensor, rho: Tensor, rest: Tensor | None) -> Tensor:
    """The output of a sparse evaluation, `[B, H, L, d]`, in the dtype of `sparse`; sums in float32.

    Args:
        sparse: attention over the kept keys, normalised over them.
        rest: R, in any floating dtype. None leaves it out: the row then sums to rho, not to 1.
    """
    scaled = rho[..., None] * sparse
    return scaled.to(sparse.dtype) if rest is None else (scaled + rest).to(sparse.dtype)


def drifted(rho: Tensor, drift: float = DRIFT, *, clamp: bool = True) -> Tensor:
    """rho after one sparse evaluation. `clamp=False` goes beyond 1, as published. Neutral value: `drift=0`."""
    moved = rho + drift
    return moved.clamp(max=1.0) if clamp else moved


@lru_cache(maxsize=64)  # every attention call asks again, and the search for a large disc takes tens of milliseconds
def window(kind: Window, grid: Grid, keep: float) -> Pattern:
    """The pattern whose share of kept keys is nearest to `keep`.

    Args:
        kind: "band", the paper's for images: `int(tokens * keep) // 2` tokens before and behind in raster order,
            clipped at the ends. "tube", the paper's for video: the same within a frame, at the same position in all
            frames. "disc", ours: the nearest tokens in the plane, in all frames. "auto": tube for video, else band.
        keep: nominal share, in (0, 1); the exact one is `sparse_attention.kept_ratio`.
    """
    if not 0 < keep < 1:
        raise ValueError(f"keep must be above 0 and below 1, got {keep}")
    frame = grid.height * grid.width
    if kind == "disc":
        radius = 1
        while _tokens_in_disc(radius + 1) <= keep * frame:
            radius += 1
        return Disc(radius)
    if kind == "tube" or (kind == "auto" and grid.frames > 1):
        return FrameBand(int(frame * keep) // 2)
    return Band(int(grid.picture * keep) // 2)


def _tokens_in_disc(radius: int) -> int:
    reach = range(1 - radius, radius)
    return sum(dy * dy + dx * dx < radius * radius for dy in reach for dx in reach)


@dataclass(frozen=True)
class Schedule:
    """Full for the first few evaluations, then a refresh every `period`, sparse between.

    Source: the published code. Unit: computed evaluations. Published for 20 steps of PixArt: first 5, period 5; for 50
    steps of HunyuanDiT: first 10; of CogVideoX: first 15. Neutral value: `period=1` computes everything.
    """

    first_full: int  # evaluations computed in full at the start, without taking statistics
    period: int = 5  # evaluations from one refresh to the next
    sigma_ratio: float = 0.0  # also refresh when sigma falls below this share of the last refresh's; 0 never

    def __post_init__(self):
        if self.first_full < 0:
            raise ValueError(f"first_full must be at least 0 evaluations, got {self.first_full}")
        if self.period < 1:
            raise ValueError(f"period must be at least 1 evaluation, got {self.period}")
        if not 0 <= self.sigma_ratio < 1:
            raise ValueError(f"sigma_ratio must be at least 0 and below 1, got {self.sigma_ratio}")

    def kind(self, evaluation: int, refreshed: int | None, sigma: float = 0.0, sigma_then: float = 0.0) -> Kind:
        """The kind of the next evaluation.

        Args:
            evaluation: how many evaluations were computed before this one.
            refreshed: `evaluation` of the last refresh; None before the first.
            sigma, sigma_then: noise level now and at the last refresh. A rise, as when a sampler starts over, asks for
                a refresh.
        """
        if evaluation < self.first_full:
            return "full"
        if refreshed is None or evaluation - refreshed >= self.period:
            return "refresh"
        if sigma > 1.01 * sigma_then or sigma < self.sigma_ratio * sigma_then:
            return "refresh"
        return "sparse"

    def kinds(self, evaluations: int) -> list[Kind]:
        """The kind of each of `evaluations`, by number alone."""
        kinds: list[Kind] = []
        refreshed = None
        for evaluation in range(evaluations):
            kinds.append(self.kind(evaluation, refreshed))
            if kinds[-1] == "refresh":
                refreshed = evaluation
        return kinds


@dataclass(frozen=True)
class Stored:
    """R between evaluations: its values, and with fp8 the factor of each row, `[B, H, L, 1]`."""

    values: Any  # a tensor, or what `store` was told to keep it as
    scale: Tensor | None = None

    @property
    def bytes(self) -> int:
        return self.values.nbytes + (0 if self.scale is None else self.scale.nbytes)


def store(rest: Tensor, storage: Storage, put_away: Callable[[Tensor], Any] = lambda x: x.to("cpu")) -> Stored | None:
    """Keep R, `[B, H, L, d]`.

    Args:
        storage: "full": unchanged. "bf16". "fp8": with one factor for each row of each head, off by up to 2^-4 of each
            value. "cpu": unchanged, in host memory. "none": not at all.
        put_away: brings a tensor to host memory, into anything that knows its bytes.
    """
    if storage == "none":
        return None
    if storage == "bf16":
        return Stored(rest.to(torch.bfloat16))
    if storage == "cpu":
        return Stored(put_away(rest))
    if storage == "fp8":
        largest = rest.abs().amax(-1, keepdim=True).float()
        scale = torch.where(largest > 0, largest / FP8_LARGEST, 1.0)
        return Stored((rest / scale).to(FP8), scale)
    return Stored(rest)


def restore(stored: Stored | None, like: Tensor) -> Tensor | None:
    """R on the device of `like`, in its dtype or, from fp8, in float32."""
    if stored is None:
        return None
    values = stored.values.to(like.device)
    if stored.scale is None:
        return values.to(like.dtype)
    return values.float() * stored.scale


def memory(rows: int, tokens: int, heads: int, head_dim: int, storage: Storage, itemsize: int) -> tuple[int, int]:
    """Bytes that one layer keeps between evaluations, on the model's device and in host memory.

    Args:
        rows: pictures times conditions.
        itemsize: bytes of one number of the model's dtype, for "full" and "cpu".
    """
    outputs = rows * heads * tokens
    rho = 4 * outputs
    whole = head_dim * itemsize
    rest = {"full": whole, "cpu": whole, "bf16": 2 * head_dim, "fp8": head_dim + 4, "none": 0}
    held = rest[storage] * outputs
    return (rho, held) if storage == "cpu" else (rho + held, 0)


def full_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """Full attention `[B, H, L, d]` and its log-sum-exp `[B, H, L]` at the cost of one, from torch's own kernels.

    torch has no public function that returns both. None if the kernel is missing or does not take these tensors; then
    use `full_log_sum_exp`, at the cost of a second attention. We have not tried the CUDA kernel on a GPU.

    Args:
        bias: added to the scores, broadcastable to `[B, H, L, Lk]`. None on a CPU, whose kernel takes none here.
    """
    if q.device.type == "cuda":
        return _memory_efficient(q, k, v, scale, bias)
    kernel = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    if kernel is None or q.device.type != "cpu" or q.shape[-1] != v.shape[-1] or bias is not None:
        return None
    out, lse = kernel(q, k, v, scale=scale)
    return out, lse.float()


ALIGNED = 16  # numbers: rows of a bias must begin at multiples of it in memory, as in torch's own attention


def _memory_efficient(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, bias: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Both by the memory-efficient kernel of CUDA, or None if it refuses."""
    kernel = getattr(torch.ops.aten, "_scaled_dot_product_efficient_attention", None)
    if kernel is None:
        return None
    if bias is not None:
        bias = aligned(bias.to(q.dtype)).expand(*q.shape[:3], k.shape[2])
    try:
        out, lse, *_ = kernel(q, k, v, bias, True, scale=scale)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # it does not take this head size, dtype or card
        return None
    return out, lse[:, :, : q.shape[2]].float()  # the kernel pads rows to a multiple of 32


def aligned(bias: Tensor) -> Tensor:
    """The same numbers, with rows that begin at multiples of `ALIGNED` numbers in memory."""
    keys = bias.shape[-1]
    return F.pad(bias, (0, -keys % ALIGNED))[..., :keys]


def full_log_sum_exp(
    q: Tensor, k: Tensor, bias: Tensor | None = None, *, scale: float | None = None, scores: int | None = None
) -> Tensor:
    """Log-sum-exp of all scores, `[B, H, L]` in float32, beside an attention that another function computes.

    A plain product of queries and keys, one slice of queries at a time. It is half the arithmetic of an attention, but
    in float32 and through memory, so on a CPU it takes as long as a fused attention. On CUDA it runs a fused attention
    and drops the result, if the kernel takes these tensors.

    Args:
        q: `[B, H, L, d]`. k: `[B, H, Lk, d]`.
        bias: added to the scores, broadcastable to `[B, H, L, Lk]`; -inf hides a key.
        scale: on the scores; by default `d ** -0.5`.
        scores: how many scores to hold at a time, in float32. By default few enough for a CPU's cache, which is fastest
            there; elsewhere 1 GiB, because every slice reads all keys again.
    """
    batch, heads, tokens, width = q.shape
    if q.device.type == "cuda":
        together = full_attention(q, k, k, scale, bias)
        if together is not None:
            return together[1]
    scores = scores or scores_at_once(q.device)
    q = q.float() * (width**-0.5 if scale is None else scale)  # scores of 1e4 times sqrt(d) do not fit into float16
    keys = k.float().mT
    rows = max(1, scores // (batch * heads * k.shape[2]))
    parts = []
    for start in range(0, tokens, rows):
        z = q[:, :, start : start + rows] @ keys  # [B, H, rows, Lk]
        if bias is not None:
            z = z + (bias if bias.shape[-2] == 1 else bias[..., start : start + rows, :])
        parts.append(z.logsumexp(-1))
    return torch.cat(parts, -1)


def scores_at_once(device: torch.device) -> int:
    """How many scores `full_log_sum_exp` holds at a time."""
    return 1 << 21 if device.type == "cpu" else 1 << 28
