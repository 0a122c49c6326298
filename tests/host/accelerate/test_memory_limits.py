"""How much a step cache, or Re-ttention, may hold where nobody says a limit, and what is said to have been held."""

from __future__ import annotations

import pytest
import torch

from dit_toolkit.host.accelerate import step_cache_taps
from dit_toolkit.host.accelerate.re_ttention_run import ReTtentionRun
from dit_toolkit.host.accelerate.step_cache_run import StepCacheRun
from dit_toolkit.host.accelerate.step_cache_taps import ModuleTap, block_hooks
from dit_toolkit.host.run import Run
from dit_toolkit.models.accelerate.policies import Interval
from dit_toolkit.tests.host import families
from dit_toolkit.tests.host.accelerate.caching import cached, last_run, settings_of
from dit_toolkit.tests.host.accelerate.test_re_ttention import sparse
from dit_toolkit.tests.host.tiny import sample

pytestmark = pytest.mark.comfy


def test_without_a_limit_a_quarter_of_the_free_memory_is_allowed(tiny_flux, monkeypatch):
    def model():
        return cached(tiny_flux, Interval(3, 2), ModuleTap(*block_hooks(tiny_flux)), 1)

    monkeypatch.setattr(step_cache_taps, "free_memory", lambda base, where: float(2**30))
    plenty = model()
    sample(plenty, 4)
    needed = last_run(plenty).bytes_held
    monkeypatch.setattr(step_cache_taps, "free_memory", lambda base, where: 4.0 * needed)
    sample(model(), 4)
    monkeypatch.setattr(step_cache_taps, "free_memory", lambda base, where: 4.0 * needed - 1)
    with pytest.raises(ValueError, match="on every module would hold"):
        sample(model(), 4)


def test_re_ttention_may_keep_a_quarter_of_the_free_memory(monkeypatch):
    family = families.FAMILIES["flux"]

    def run(free: int):
        monkeypatch.setattr(ReTtentionRun, "_free", lambda self, where: free)
        model, report = sparse(family.load(), max_bytes=None)
        families.sample(family, model, steps=3)
        return report.runs[-1]

    needed = sum(run(2**30).planned)
    run(4 * needed)
    with pytest.raises(ValueError, match="Apply Re-ttention would keep"):
        run(4 * needed - 1)


def test_bytes_held_are_the_most_at_any_time_not_the_last(tiny_flux):
    """A prompt that ends gives its memory back; the report still says what was needed."""
    run = Run(tiny_flux, [1.0, 0.5, 0.0])
    cache = StepCacheRun(settings_of(cached(tiny_flux, Interval(3, 1))), run)
    x = torch.zeros(1, 16, 8, 8)
    for uuids in ("ab", "b", "b", "b", "b"):
        run.begin_evaluation()
        cache.begin(1.0)
        for uuid in uuids:
            chunk = run.open_chunk(x, {"uuids": [uuid], "cond_or_uncond": [0]}, None)
            visit = cache.visit(tiny_flux.model, x, None, chunk)
            if not visit.lanes[0].full:
                visit.captured["prediction"] = (x.clone(),)
                visit.record()
        cache.finish(0.0)
    assert sum(lane.bytes for lane in run.lanes_of(cache)) == x.nbytes
    assert cache.report.bytes_held == 2 * x.nbytes
