"""Step caches: puts their settings on the MODEL.

Hooks: PREDICT_NOISE opens and closes an evaluation, APPLY_MODEL visits each chunk of it, and taps wrap blocks below it
(`step_cache_taps.py`). State: `step_cache_run.py`, for one run and each condition of it.
"""

from __future__ import annotations

from dataclasses import replace

from comfy.model_patcher import ModelPatcher

from .. import run as runs
from ..run import Run
from .foreign_caches import ForeignCache, foreign_cache
from .step_cache_run import StepCacheRun
from .step_cache_settings import StepCache
from .step_cache_taps import tap_in_run


def bind(cache: StepCache, run: Run, model_options: dict) -> None:
    """Check once more: nodes behind ours may have added another cache, or another class for the model."""
    other = foreign_cache(run.model, model_options)
    if other:
        raise ValueError(conflict(cache.method, other))
    settings = cache if run.model is None else replace(cache, tap=tap_in_run(cache.tap, run.model, cache.method))
    StepCacheRun(settings, run).install(model_options)


def attach(model: ModelPatcher, cache: StepCache) -> ModelPatcher:
    """A clone of `model` that samples with `cache`.

    Raises:
        ValueError: the model has a step cache already, ours or another pack's.
    """
    ours = next((ForeignCache(each.method) for each in runs.attached(model) if isinstance(each, StepCache)), None)
    earlier = ours or foreign_cache(model, model.model_options)
    if earlier:
        raise ValueError(conflict(cache.method, earlier))
    return runs.attach(model, cache, bind)


def conflict(ours: str, other: ForeignCache) -> str:
    return f"{ours} cannot work on a model that {other.name} already caches. {other.remedy}"
