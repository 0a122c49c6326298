"""Step caches: the settings that hang on the MODEL, and what a tap promises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from ...models.accelerate.policies import Guard, Policy
from ...models.accelerate.taylorseer import Forecaster
from ..part_of_run import WHOLE_RUN, PartOfRun
from .step_cache_report import StepCacheReport

NO_GUARD = Guard()


class Tap(Protocol):
    """Where a step cache stores and forecasts, see `step_cache_taps.py`, which also has the exact types."""

    name: str  # as people see it
    wraps_blocks: bool  # needs blocks that ask for their replacement
    skips_middle_blocks: bool  # skips blocks and runs others behind them

    def install(self, cache: Any, model_options: dict) -> None:
        """Add hooks below APPLY_MODEL, for this run."""

    def parts(self, cache: Any) -> tuple[str, ...]:
        """The names of the histories for a forecast of this evaluation."""
        ...

    def denoise(self, visit: Any, call: Callable[[], Tensor], base: Any, x: Tensor, sigma: Tensor) -> Tensor:
        """The denoised latent of one chunk: forecast, or computed while filling `visit.captured`."""
        ...


@dataclass(frozen=True, eq=False)
class StepCache:
    """Compute what `policy` and `guard` say, forecast the rest at `tap`.

    part: the part of the run that may have forecasts.
    offload: store in the computer's memory instead of the GPU's.
    """

    method: str  # for people and errors
    policy: Policy
    tap: Tap
    forecaster: Forecaster
    guard: Guard = NO_GUARD
    part: PartOfRun = WHOLE_RUN
    offload: bool = False
    report: StepCacheReport = field(default_factory=lambda: StepCacheReport("step cache"))

    outermost = True  # decides before others prepare for the call

    @property
    def skips_middle_blocks(self) -> bool:  # see `blocks.skips_middle_blocks`
        return self.tap.skips_middle_blocks
