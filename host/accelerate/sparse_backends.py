"""Backends that compute a sparse pattern: FlexAttention, tiles, or dense attention under a mask.

State: `Plans`, the tilings and block masks they reuse, by pattern, grid and device. Plans are plain values, so they may
outlive the run: the four used last stay, large ones only until the run ends.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ...models.accelerate.sparse_attention import Attended, Pattern, masked
from ...models.accelerate.sparse_attention_flex import FlexPlan, flex, flex_plan
from ...models.accelerate.sparse_attention_tiles import Tiling, tile, tiled
from .own_attention import OwnAttention

logger = logging.getLogger(__name__)

KEPT_PLANS, KEPT_BYTES = 4, 64 << 20
MASKED_AT_MOST = 4608 * 4608  # most pairs for one whole mask, if tiles save nothing
TILES_WORTH = 0.55  # of the pairs: with more, tiles are slower than dense attention (measured on a CPU)


class Plans:
    """The tilings and block masks used last."""

    def __init__(self, count: int = KEPT_PLANS, size: int = KEPT_BYTES):
        self.count, self.size = count, size
        self._plans: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()  # with several GPUs, conditions run in threads

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        with self._lock:
            plan = self._plans.pop(key, None) or make()
            self._plans[key] = plan
            while len(self._plans) > self.count:
                self._plans.popitem(last=False)
            return plan

    def drop_large(self) -> None:
        """Drop the plans that are too large to hold between runs."""
        with self._lock:
            for key in [key for key, plan in self._plans.items() if plan.size > self.size]:
                del self._plans[key]

    def __len__(self) -> int:
        return len(self._plans)


PLANS = Plans()


@dataclass
class Backend:
    """Computes patterns during one run: by FlexAttention if it works, else in tiles."""

    plans: Plans = field(default_factory=lambda: PLANS)
    failed: str = ""  # why FlexAttention is off
    used: Counter[str] = field(default_factory=Counter)

    def attend(
        self,
        call: OwnAttention,
        pattern: Pattern,
        *,
        scale: float | None = None,
        weight: Tensor | None = None,
        with_lse: bool = False,
    ) -> Attended:
        """Attention of one call under `pattern`.

        Args:
            scale: factor on the logits; None is the model's own.
            weight: of pooled cells, `[f, f]`; None is the mean.
        """
        settings: dict[str, Any] = {
            "scale": call.scale if scale is None else scale,
            "bias": call.bias,
            "weight": weight,
            "with_lse": with_lse,
        }
        device, grid = call.q.device, call.grid
        if has_flex(device) and not self.failed:
            try:
                key = (pattern, grid, device, call.extra)
                plan: FlexPlan = self.plans.get(key, lambda: flex_plan(pattern, grid, call.extra, device))
                result = flex(call.q, call.k, call.v, plan, **settings)
            except comfy.model_management.OOM_EXCEPTION:
                raise
            except Exception as error:  # compilers fail in many ways; the tiles give the same result
                self.failed = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                logger.warning("FlexAttention failed (%s). Sparse attention goes on in tiles, slower.", self.failed)
            else:
                self.used["FlexAttention"] += 1
                return result

        tiling: Tiling = self.plans.get((pattern, grid, device), lambda: tile(pattern, grid, device))
        if not worth_tiles(tiling, call.extra) and grid.length * call.k.shape[2] <= MASKED_AT_MOST:
            self.used["dense with a mask"] += 1
            return masked(call.q, call.k, call.v, pattern, grid, **settings)
        self.used["tiles"] += 1
        return tiled(call.q, call.k, call.v, tiling, **settings)


def has_flex(device: torch.device) -> bool:
    """Whether to try FlexAttention there. On a CPU it compiles too, for longer than the tiles take."""
    return device.type == "cuda"


def worth_tiles(tiling: Tiling, extra: int) -> bool:
    """Whether tiles compute few enough pairs to be faster than dense attention."""
    grid = tiling.grid
    pairs = tiling.pairs + grid.length * (grid.globals + extra) + grid.globals * grid.picture
    return pairs <= TILES_WORTH * grid.length * (grid.length + extra)
