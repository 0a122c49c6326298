"""Step caches: settings that hang on the MODEL, and the door through which they get there.

Hooks: PREDICT_NOISE opens and closes an evaluation, APPLY_MODEL visits each chunk of it, and taps in between wrap
blocks (`step_cache_taps.py`). State: `step_cache_run.py`, for one run and each condition of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from comfy.model_patcher import ModelPatcher

from ...models.accelerate.policies import Guard, Policy
from ...models.accelerate.taylorseer import Forecaster
from .. import run as runs
from ..part_of_run import WHOLE_RUN, PartOfRun
from ..run import Run
from .foreign_caches import ForeignCache, foreign_cache
from .report import Report
from .step_cache_run import StepCacheRun
from .step_cache_taps import Tap, tap_in_run

NO_GUARD = Guard()


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
    report: Report = field(default_factory=lambda: Report("step cache"))

    outermost = True  # what is skipped need not be prepared by others

    def bind(self, run: Run, model_options: dict) -> None:
        """Nodes behind ours may have brought another cache, or another class for the model: looked at once more."""
        other = foreign_cache(run.model, model_options)
        if other:
            raise ValueError(conflict(self.method, other))
        settings = self if run.model is None else replace(self, tap=tap_in_run(self.tap, run.model, self.method))
        StepCacheRun(settings, run).install(model_options)


def attach(model: ModelPatcher, cache: StepCache) -> ModelPatcher:
    """A clone of `model` that is sampled with `cache`.

    Raises:
        ValueError: the model has a step cache already, ours or another one.
    """
    ours = next((ForeignCache(each.method) for each in runs.attached(model) if isinstance(each, StepCache)), None)
    earlier = ours or foreign_cache(model, model.model_options)
    if earlier:
        raise ValueError(conflict(cache.method, earlier))
    return runs.attach(model, cache)


def conflict(ours: str, other: ForeignCache) -> str:
    return f"{ours} cannot work on a model that {other.name} already caches. {other.remedy}"
