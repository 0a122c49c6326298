"""Which steps of a run a feature acts in. `start_percent` and `end_percent` mean the same for every feature.

Percent counts the noise schedule, as in ComfyUI's own nodes: `model_sampling.percent_to_sigma` gives the noise level. A
part begins exactly where a timestep range of ComfyUI begins, rounding included. ComfyUI's range includes the step at
its end, ours does not. So two parts that meet leave no gap, and no step belongs to both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch


def begun(percent: float, sigma: float, model_sampling: Any) -> bool:
    """Whether a step at `sigma` lies at or behind `percent`, 0 to 1, of the run.

    Both sides are rounded to float32, as ComfyUI compares them.
    """
    return percent <= 0 or _float32(sigma) <= _float32(model_sampling.percent_to_sigma(percent))


@dataclass(frozen=True)
class PartOfRun:
    """From `start` up to, not including, the step at `end`; 0 to 1. Neutral value: 0 to 1, all of it."""

    start: float = 0.0
    end: float = 1.0

    def __post_init__(self):
        for title, value in (("start_percent", self.start), ("end_percent", self.end)):
            if not (math.isfinite(value) and 0 <= value <= 1):
                raise ValueError(f"{title} must be between 0 and 1, got {value:g}.")
        if self.start >= self.end:
            raise ValueError(f"start_percent ({self.start:g}) must be below end_percent ({self.end:g}).")

    def includes(self, sigma: float, model_sampling: Any) -> bool:
        """Whether a step at this noise level belongs to it."""
        over = self.end < 1 and begun(self.end, sigma, model_sampling)
        return begun(self.start, sigma, model_sampling) and not over


WHOLE_RUN = PartOfRun()


def _float32(value: float) -> float:
    return float(torch.tensor(float(value), dtype=torch.float32))
