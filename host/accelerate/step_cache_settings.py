"""Step caches: the settings that hang on the MODEL, and what a tap promises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...models.accelerate.policies import Guard, Policy
from ...models.accelerate.taylorseer import Forecaster
from ..memory import Prompt, Shape
from ..part_of_run import WHOLE_RUN, PartOfRun
from .step_cache_report import StepCacheReport

NO_GUARD = Guard()


class Sizes(NamedTuple):
    """Bytes that a tap stores for one prompt in one computed evaluation.

    points: of the point of each history, by name. entry: of what else it keeps while the blocks run.
    """

    points: Mapping[str, int]
    entry: int = 0


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

    def sizes(self, cache: Any, model: ModelPatcher, shape: Shape, prompt: Prompt) -> tuple[Sizes, ...]:
        """What it stores for a latent of this shape, before the run. One for each stage of the run, if they differ."""
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
