"""Step caches on tiny models, without the nodes: what is attached, what it reports, what of the model still runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from dit_toolkit.host.accelerate.step_cache import attach
from dit_toolkit.host.accelerate.step_cache_report import StepCacheRunReport
from dit_toolkit.host.accelerate.step_cache_settings import StepCache, Tap
from dit_toolkit.host.accelerate.step_cache_taps import LastBlockTap, ModuleTap, PredictionTap, SpanTap, block_hooks
from dit_toolkit.host.run import attached
from dit_toolkit.models.accelerate.delta_dit import Stages
from dit_toolkit.models.accelerate.policies import Policy
from dit_toolkit.models.accelerate.taylorseer import Forecaster

PLENTY = 2**30

TAPS: dict[str, Callable[[Any], Tap]] = {
    "prediction": lambda blocks: PredictionTap(),
    "last block": lambda blocks: LastBlockTap(*blocks),
    "gated": lambda blocks: LastBlockTap(*blocks, gated=True),
    "gated residual": lambda blocks: LastBlockTap(*blocks, gated=True, residual=True),
    "span": lambda blocks: SpanTap(*blocks, stages=Stages(0.75, 0.5)),
    "every module": lambda blocks: ModuleTap(*blocks, PLENTY),
}


def cached(
    model: ModelPatcher, policy: Policy, tap: str | Tap = "prediction", order=0, **settings: Any
) -> ModelPatcher:
    """`model` with a step cache, also one that computes everything: the nodes leave those out."""
    if isinstance(tap, str):
        tap = TAPS[tap](block_hooks(model))
    forecaster = order if isinstance(order, Forecaster) else Forecaster(order)
    return attach(model, StepCache("Test", policy, tap, forecaster, **settings))


def settings_of(model: ModelPatcher) -> StepCache:
    return next(each for each in attached(model) if isinstance(each, StepCache))


def last_run(model: ModelPatcher) -> StepCacheRunReport:
    return settings_of(model).report.runs[-1]


def strip(model: ModelPatcher) -> str:
    """The latest run as the report shows it: # computed, . forecast."""
    return "".join("#" if entry.computed else "." for entry in last_run(model).entries)


@contextmanager
def calls(**modules: torch.nn.Module) -> Iterator[Counter]:
    """How often each module runs."""
    count: Counter = Counter()

    def counter(name: str):
        def add(*_):
            count[name] += 1

        return add

    hooks = [module.register_forward_pre_hook(counter(name)) for name, module in modules.items()]
    try:
        yield count
    finally:
        for hook in hooks:
            hook.remove()
