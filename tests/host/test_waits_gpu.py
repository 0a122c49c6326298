"""The rule of `test_waits.py` on a real card: torch says of each call whether it waited.

`pytest -m gpu` runs these alone, because ComfyUI chooses its device once per process.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from dit_toolkit.host.run import Run
from dit_toolkit.tests.host import families
from dit_toolkit.tests.host.card import Wait, nearest
from dit_toolkit.tests.host.families import ALL
from dit_toolkit.tests.host.promises import STEPS, prompts_of
from dit_toolkit.tests.host.test_waits import INSIDE, ON_ITS_FAMILY, allowed, keeps_the_rule

pytestmark = [pytest.mark.comfy, pytest.mark.gpu]


class Watch:
    """What torch warns of, with the code of the pack that made it wait."""

    def __init__(self) -> None:
        self.waits: list[Wait] = []
        self.pinned: set[int] = set()
        self.evaluation = -1

    def note(self, message: Any, *rest: Any, **more: Any) -> None:
        where, inside = nearest()
        if where and "synchronizing" in str(message):
            self.waits.append(Wait(str(message), where, self.evaluation, inside))

    def of(self, evaluation: int) -> list[Wait]:
        return [wait for wait in self.waits if wait.evaluation == evaluation]


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    watch, begin = Watch(), Run.begin_evaluation

    def begins(self, *args, **kwargs):
        watch.evaluation += 1
        return begin(self, *args, **kwargs)

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("always")
        patch.setattr(Run, "begin_evaluation", begins)
        patch.setattr(warnings, "showwarning", watch.note)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield watch
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(autouse=True)
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA")


def test_the_watch_sees_a_wait(monkeypatch):
    x = torch.ones(1, device="cuda")
    with watched(monkeypatch) as watch:
        run = Run()
        run.begin_evaluation(x, x)
        assert run.sigma == 1
    assert [wait.evaluation for wait in watch.waits] == [0]


@pytest.mark.parametrize(("feature", "values"), ON_ITS_FAMILY, ids=str)
def test_a_feature_waits_for_nothing_but_its_own_decisions(feature, values, monkeypatch):
    family = ALL[feature.families[0]]
    model = feature.put(family.load(), **values)
    positive, negative = prompts_of(model, family.prompt(3), family.prompt(4))
    given = {"cfg": 2.0, "positive": positive, "negative": negative}
    with torch.no_grad(), watched(monkeypatch) as watch:
        families.sample(family, model, STEPS, **given)
    keeps_the_rule(watch, allowed(feature, values), INSIDE.get(feature.name, 0))  # type: ignore[arg-type]
