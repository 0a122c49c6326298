"""Delta-DiT: skip a span of blocks, and add the change it made the last time.

Source: Delta-DiT, arXiv:2406.01125. For the blocks [a, b) as one map F, at a full evaluation s0

    D = F(x_s0) - x_s0        and until the next one        F(x_s) ~ x_s + D

The front blocks make outlines, which early evaluations draw, so those skip the rear blocks. The rear blocks make
details, which late evaluations draw, so those skip the front blocks.

Limits: the paper's tables of spans and boundaries are not public. Three quarters of the depth, switched half-way, is
our guess. With an interval of 2 it gives the 1.6 x of the paper's abstract.
"""

from __future__ import annotations

from dataclasses import dataclass

Span = tuple[int, int]  # first block skipped, first block behind the span


@dataclass(frozen=True)
class Stages:
    """Which blocks are skipped when. Neutral value: `share=0`.

    share: the skipped part of the depth, 0 to 1.
    boundary: percent of the model's noise schedule, 0 to 1, at which the span moves from the rear to the front.
    """

    share: float = 0.75
    boundary: float = 0.5

    def __post_init__(self):
        for name, value in (("share", self.share), ("boundary", self.boundary)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {value}.")

    def span(self, depth: int, early: bool) -> Span:
        """The blocks that may be skipped, of `depth`."""
        count = round(self.share * depth)
        return (depth - count, depth) if early else (0, count)
