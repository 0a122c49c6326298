"""Step caches: settings that hang on the MODEL, and the door through which they get there.

Hooks: PREDICT_NOISE opens and closes an evaluation, APPLY_MODEL visits each chunk of it, and taps in between wrap
blocks (`step_cache_taps.py`). State: `step_cache_run.py`, for one run and each condition of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from comfy.model_patcher import ModelPatcher

from ...models.accelerate.step_cache import Guard, Policy
from ...models.accelerate.taylorseer import Forecaster
from .. import run as runs
from ..part_of_run import WHOLE_RUN, PartOfRun
from ..run import Run
from .report import Report
from .step_cache_run import StepCacheRun
from .step_cache_taps import Tap

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
        other = foreign_cache(model_options)
        if other:
            raise ValueError(conflict(self.method, other))
        StepCacheRun(self, run).install(model_options)


def attach(model: ModelPatcher, cache: StepCache) -> ModelPatcher:
    """A clone of `model` that is sampled with `cache`.

    Raises:
        ValueError: the model has a step cache already, ours or another one.
    """
    earlier = next((each.method for each in runs.attached(model) if isinstance(each, StepCache)), None)
    earlier = earlier or foreign_cache(model.model_options)
    if earlier:
        raise ValueError(conflict(cache.method, earlier))
    return runs.attach(model, cache)


def conflict(ours: str, other: str) -> str:
    return f"{ours} cannot work on a model that {other} already caches. Remove one of the two."


def foreign_cache(model_options: dict) -> str | None:
    """The name of a step cache of somebody else on this model, or None."""
    options = model_options.get("transformer_options", {})
    holder = options.get("easycache")  # EasyCache and LazyCache of ComfyUI share the key
    if holder is not None:
        return getattr(holder, "name", "EasyCache")
    return "TeaCache" if "rel_l1_thresh" in options else None
