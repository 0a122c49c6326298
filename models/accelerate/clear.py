"""CLEAR: local attention for pre-trained diffusion transformers, and the speed-up it allows.

Source: CLEAR, arXiv:2412.16112; weights Huage001/CLEAR. Picture tokens see a disc around them (`Disc`). In the "down"
variants they also see the whole picture averaged over cells (`PooledDisc`). Text sees all tokens, and all see it. The
patterns and their backends are in `sparse_attention`.

Softmax scale, optional, for pictures larger than those of the training (n tokens in all, d channels per head):

    sqrt(log_4608(n) / d)          4608 = 64^2 + 512, the training's length; there it is the usual 1 / sqrt(d)
    sqrt(log_4608(10 n) / d)       variants with pooled keys, as in the released code

A block's work per token, in multiply-adds: 12 D^2 in its linear layers and 2 n D in dense attention.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from .sparse_attention import Disc, Grid, Pattern, PooledDisc, covers, kept_ratio

TRAINED_TOKENS = 64 * 64 + 512
PIXELS = 16  # pixels per token, FLUX
TEXT = 512  # text tokens in the published counts

PUBLISHED = re.compile(r"clear_local_(\d+)(?:_down_(\d+))?(?!\d)", re.IGNORECASE)


@dataclass(frozen=True)
class Variant:
    """The pattern that weights were trained for: radius, and side of the pooled cells, 0 for none. Unit: tokens."""

    radius: int
    factor: int

    @property
    def pattern(self) -> Disc:
        return PooledDisc(self.radius, self.factor) if self.factor else Disc(self.radius)


def variant_of(name: str) -> Variant | None:
    """The variant in a published file's name: clear_local_16_down_4 is radius 16, cells of 4; None for other names."""
    found = PUBLISHED.search(name)
    return None if found is None else Variant(int(found[1]), int(found[2] or 0))


def proportional_scale(tokens: int, head: int, pooled: bool) -> float:
    """Factor on the logits for `tokens` keys and heads of `head` channels."""
    return math.sqrt(math.log(10 * tokens if pooled else tokens, TRAINED_TOKENS) / head)


def attention_share(tokens: int, width: int) -> float:
    """Dense attention's share of the work of a block of `width` channels."""
    return 2 * tokens / (12 * width + 2 * tokens)


def ceiling(share: float, ratio: float) -> float:
    """Speed-up of the whole model if `ratio` of the pairs cost just `ratio` of the attention."""
    return 1 / (1 - share + share * ratio)


@dataclass(frozen=True)
class Estimate:
    """Kept pairs and speed-up of a pattern on a square picture of `side` pixels."""

    side: int
    ratio: float  # kept pairs
    speedup: float  # of the whole model, at most
    limit: float  # the same if attention were free


def estimate(pattern: Pattern, side: int, width: int, text: int = TEXT) -> Estimate:
    """Kept pairs and speed-up for `side` x `side` pixels and a model of `width` channels."""
    grid = Grid(side // PIXELS, side // PIXELS, before=text)
    ratio = 1.0 if covers(pattern, grid) and not pattern.pool else kept_ratio(pattern, grid)
    share = attention_share(grid.length, width)
    return Estimate(side, ratio, ceiling(share, ratio), ceiling(share, 0.0))
