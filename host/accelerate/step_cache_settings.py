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
    """Where a step cache stores and forecasts: `step_cache_taps.py` has them, and the types that only a run knows."""

    name: str  # as people see it
    wraps_blocks: bool  # works by what blocks ask for
    skips_middle_blocks: bool  # has blocks run behind others that it skips

    def install(self, run: Any, model_options: dict) -> None:
        """Add hooks below APPLY_MODEL, for this run."""

    def parts(self, run: Any) -> tuple[str, ...]:
        """The names of the histories that this evaluation would be forecast from."""
        ...

    def run(self, visit: Any, call: Callable[[], Tensor], base: Any, x: Tensor, sigma: Tensor) -> Tensor:
        """The denoised latent of one chunk: forecast, or computed with `visit.captured` filled."""
        ...


@dataclass(frozen=True, eq=False)
class StepCache:
    """Compute what `policy` and `guard` say, forecast the rest at `tap`.

    part: of the run in which forecasts are allowed.
    offload: keep what is stored in the computer's memory instead of the GPU's.
    """

    method: str  # as the node is called
    policy: Policy
    tap: Tap
    forecaster: Forecaster
    guard: Guard = NO_GUARD
    part: PartOfRun = WHOLE_RUN
    offload: bool = False
    report: StepCacheReport = field(default_factory=lambda: StepCacheReport("step cache"))

    outermost = True  # what is skipped need not be prepared by others

    @property
    def skips_middle_blocks(self) -> bool:  # see `blocks.skips_middle_blocks`
        return self.tap.skips_middle_blocks
