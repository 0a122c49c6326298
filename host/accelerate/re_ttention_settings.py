"""Re-ttention: the settings that hang on the MODEL."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ...models.accelerate.re_ttention import DRIFT, Schedule, Storage, Window
from .re_ttention_report import ReTtentionReport

STORAGE: dict[str, Storage] = {
    "full precision": "full",
    "16 bits": "bf16",
    "8 bits": "fp8",
    "offload to CPU": "cpu",
    "share only": "none",
}


@dataclass(frozen=True, eq=False)
class ReTtention:
    """Keep a share `keep` of the keys in the evaluations that `schedule` makes sparse.

    min_tokens: attention over fewer tokens stays full.
    max_bytes: most memory between evaluations. None: a quarter of the memory that is free when sampling starts.
    """

    keep: float
    schedule: Schedule
    pattern: Window = "auto"
    drift: float = DRIFT
    clamp: bool = True
    storage: Storage = "full"
    min_tokens: int = 4096
    max_bytes: int | None = None
    report: ReTtentionReport = field(default_factory=ReTtentionReport)

    sparse_attention = True  # see `attention.makes_sparse`

    def __post_init__(self):
        if not 0 < self.keep < 1:
            raise ValueError(f"keep must be above 0 and below 1, got {self.keep}.")
        if not 0 <= self.drift < math.inf:
            raise ValueError(f"drift must be a finite number and at least 0, got {self.drift}.")
        if self.min_tokens < 0:
            raise ValueError(f"min_tokens must be at least 0, got {self.min_tokens}.")
