"""What sparse attention costs against dense attention, over the number of picture tokens, on this machine's CPU.

    python -m benchmarks.attention                  1k, 4k, 16k and 64k tokens, a few minutes
    python -m benchmarks.attention --tokens 4096

One attention call as FLUX makes it: 512 text tokens, heads of 128 channels, float32, one thread, square pictures. Two
heads are timed; all heads cost the same. Every method is run on the same tensors, once to warm up, then three times.
"difference" is the largest one from softmax over the kept keys, for some queries of each; Re-ttention is compared with
full attention, which it must equal while queries, keys and values stay the same. "bound" is what the kept
pairs alone would give: dense pairs over kept ones. Rows that would take too long are skipped, and say so; their time is
not guessed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dit_toolkit.models.accelerate import sparse_attention as core
from dit_toolkit.models.accelerate.re_ttention import full_attention, kept_share, reshaped, residual, window
from dit_toolkit.models.accelerate.sparse_attention import Disc, Grid, PooledDisc
from dit_toolkit.models.accelerate.sparse_attention_tiles import tile, tiled
from dit_toolkit.scripts import places

TEXT, HEAD, HEADS = 512, 128, 2
TOKENS = (1024, 4096, 16384, 65536)
SECONDS = 20.0  # the longest a single call may take
ROUNDS = 3
PER_PAIR = 4 * HEAD * HEADS  # operations
KEEP, PERIOD = 1 / 32, 5  # of Re-ttention, as published
CHECKED = 64  # queries whose result is compared with the definition

Row = dict[str, Any]
RESULTS = places.ROOT / "benchmarks" / "results"


def rows(tokens: tuple[int, ...] = TOKENS) -> list[Row]:
    """A row per method and number of tokens: method, peer, tokens, seconds, speedup, bound, difference, note."""
    with torch.inference_mode(), single_thread():
        return [row for count in tokens for row in rows_of(count)]


def rows_of(tokens: int) -> Iterator[Row]:
    side = math.isqrt(tokens)
    grid = Grid(side, side, before=TEXT)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, grid.length, HEAD, generator=generator) for _ in range(3))
    speed = rate(q, k, v)

    dense = None
    expected = grid.length**2 * PER_PAIR / speed
    if expected <= SECONDS:
        dense = timed(lambda: core.dense(q, k, v))
    yield row("dense", tokens, dense, dense, 1.0, None, expected)

    patterns = {"CLEAR r=8": Disc(8), "CLEAR r=16": Disc(16), "CLEAR r=32": Disc(32)}
    patterns |= {"CLEAR r=8, cells of 4": PooledDisc(8, 4), "CLEAR r=16, cells of 4": PooledDisc(16, 4)}
    for name, pattern in patterns.items():
        tiling = tile(pattern, grid)
        pairs = core.kept_pairs(pattern, grid)
        expected = 2 * pairs * PER_PAIR / speed
        seconds = timed(lambda tiling=tiling: tiled(q, k, v, tiling)) if expected <= SECONDS else None
        error = None if seconds is None else difference(tiled(q, k, v, tiling).out, q, k, v, pattern, grid)
        yield row(name, tokens, seconds, dense, grid.length**2 / pairs, error, expected)

    pattern = window("band", grid, KEEP)
    tiling, ratio = tile(pattern, grid), core.kept_pairs(pattern, grid) / grid.length**2
    name = f"Re-ttention 1/{round(1 / KEEP)}"
    full = grid.length**2 * PER_PAIR / speed
    if 2 * full > SECONDS:
        yield row(f"{name}, {PERIOD - 1} of {PERIOD} sparse", tokens, None, dense, 1.0, None, 2 * full)
        return
    out, sums = full_attention(q, k, v)
    sparse = tiled(q, k, v, tiling, with_lse=True)
    rho = kept_share(sparse.lse, sums)
    rest = residual(out, sparse.out, rho)
    error = float((reshaped(tiled(q, k, v, tiling).out, rho, rest) - out).abs().max())  # unchanged q, k, v: exact
    skipping = timed(lambda: reshaped(tiled(q, k, v, tiling).out, rho, rest))
    yield row(f"{name}, sparse evaluation", tokens, skipping, dense, 1 / ratio, error, full)

    def refresh() -> Tensor:
        out, sums = full_attention(q, k, v)
        sparse = tiled(q, k, v, tiling, with_lse=True)
        return residual(out, sparse.out, kept_share(sparse.lse, sums))

    whole = (timed(refresh) + (PERIOD - 1) * skipping) / PERIOD
    yield row(f"{name}, mean of a period of {PERIOD}", tokens, whole, dense, PERIOD / (1 + PERIOD * ratio), error, full)


def difference(out: Tensor, q: Tensor, k: Tensor, v: Tensor, pattern: core.Pattern, grid: Grid) -> float:
    """The largest one from softmax over the keys that each of some picture tokens sees."""
    asked = torch.randperm(grid.picture, generator=torch.Generator().manual_seed(0))[:CHECKED]
    y, x = core.token_positions(pattern, grid)
    near = pattern.keeps(y[asked, None] - y, x[asked, None] - x)  # [asked, picture]
    k, v, _ = core.with_pooled(k, v, None, pattern, grid, None)
    seen = torch.ones(len(asked), k.shape[2], dtype=torch.bool)
    seen[:, grid.before : grid.before + grid.picture] = near
    expected = core.dense(q[:, :, asked + grid.before], k, v, allowed=seen).out
    return float((out[:, :, asked + grid.before] - expected).abs().max())


def row(
    method: str,
    tokens: int,
    seconds: float | None,
    dense: float | None,
    bound: float,
    error: float | None,
    expected: float,
) -> Row:
    note = "" if seconds is not None else f"skipped: about {expected:.0f} s a call"
    return {
        "method": method,
        "peer": "dense",
        "tokens": tokens,
        "seconds": seconds,
        "speedup": None if seconds is None or dense is None else dense / seconds,
        "bound": bound,
        "difference": error,
        "note": note,
    }


def rate(q: Tensor, k: Tensor, v: Tensor) -> float:
    """Operations a second of dense attention here, from a part of it."""
    part = [x[:, :, :1024] for x in (q, k, v)]
    return 1024 * 1024 * PER_PAIR / timed(lambda: core.dense(*part))


def timed(call: Callable[[], Any]) -> float:
    """Median seconds of a call, in the processor's time: other programs on the machine do not count."""
    call()
    taken = []
    for _ in range(ROUNDS):
        start = time.process_time()
        call()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


class single_thread:
    """One thread, so that the processor's time is the time that passes."""

    def __enter__(self):
        self.before = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *error):
        torch.set_num_threads(self.before)


def table(found: list[Row]) -> str:
    """Markdown, one row per method and number of tokens."""
    lines = ["| tokens | method | seconds | speed-up | bound | difference |", "|---:|---|---:|---:|---:|---:|"]
    for entry in found:
        seconds = entry["note"] if entry["seconds"] is None else f"{entry['seconds']:.3f}"
        speedup = "" if entry["speedup"] is None else f"{entry['speedup']:.2f}x"
        error = "" if entry["difference"] is None else f"{entry['difference']:.0e}"
        lines.append(
            f"| {entry['tokens']} | {entry['method']} | {seconds} | {speedup} | {entry['bound']:.1f}x | {error} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of sparse attention against dense attention on the CPU.")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), help="picture tokens, square numbers")
    parser.add_argument("--no-save", action="store_true", help="print only")
    asked = parser.parse_args()
    found = rows(tuple(asked.tokens))
    print(f"{HEADS} heads of {HEAD}, {TEXT} text tokens, float32, one CPU thread; seconds per attention call")
    print(table(found))
    if not asked.no_save:
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / f"attention-{datetime.date.today().isoformat()}-cpu.json"
        path.write_text("[\n" + ",\n".join(f"  {json.dumps(entry)}" for entry in found) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
