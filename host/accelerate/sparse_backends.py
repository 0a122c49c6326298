"""Backends that compute a sparse pattern: FlexAttention, tiles, or dense attention under a mask.

State: the tilings and block masks of a run, by pattern, grid and device; they go with the run. What FlexAttention
cannot do on this machine (`UNABLE`) is known for as long as ComfyUI runs: compiling in vain takes long.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import comfy.model_management as management
import torch
from torch import Tensor

from ...models.accelerate.sparse_attention import Attended, Pattern, masked
from ...models.accelerate.sparse_attention_flex import flex, flex_plan
from ...models.accelerate.sparse_attention_tiles import Tiling, tile, tiled
from ..run import Run
from .own_attention import OwnAttention

logger = logging.getLogger(__name__)

MASKED_AT_MOST = 4608 * 4608  # most pairs for one whole mask, if tiles save nothing
TILES_WORTH = 0.55  # of the pairs: with more, tiles are slower than dense attention (measured on a CPU)


KEPT_PAIRS, REFRESHES = "kept pairs", "refreshes"  # tasks of FlexAttention
COMPILERS = ("torch._dynamo", "torch._inductor", "triton")  # the packages whose errors say that compiling failed
UNABLE: dict[str, str] = {}  # the tasks that FlexAttention does not compile for here, and why

Result = TypeVar("Result")


def by_flex(task: str, instead: str, compute: Callable[[], Result]) -> Result | None:
    """What FlexAttention computes, or None if it does not compile here: then nobody asks it again in this process.

    Args:
        task: what it is for. A failure of one leaves the others on.
        instead: what happens without it, a sentence for the log.
    """
    if task in UNABLE:
        return None
    try:
        return compute()
    except Exception as error:
        if not of_compiling(error):
            raise
        UNABLE[task] = f"{type(error).__name__}: {error}".splitlines()[0]
        logger.warning("FlexAttention does not compile here (%s). %s", UNABLE[task], instead)
        logger.debug("FlexAttention, for %s:", task, exc_info=True)
        return None


def of_compiling(error: Exception) -> bool:
    """Whether an error comes from compiling: also from a torch without FlexAttention, or without its compiler."""
    return isinstance(error, ImportError) or any(
        kind.__module__.startswith(COMPILERS) and not issubclass(kind, management.OOM_EXCEPTION)
        for kind in type(error).__mro__
    )


@dataclass
class Backend:
    """Computes patterns during one run: by FlexAttention if it works, else in tiles."""

    run: Run
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
        if has_flex(device):

            def compute() -> Attended:
                key = ("block mask", pattern, grid, call.extra, device)
                plan = self.run.once(key, lambda: flex_plan(pattern, grid, call.extra, device))
                return flex(call.q, call.k, call.v, plan, **settings)

            result = by_flex(KEPT_PAIRS, "Sparse attention goes on in tiles, slower.", compute)
            if result is not None:
                self.used["FlexAttention"] += 1
                return result

        tiling = self.run.once(("tiling", pattern, grid, device), lambda: tile(pattern, grid, device))
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
