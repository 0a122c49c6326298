"""The bench of Autotune: what is judged was not tuned on."""

from __future__ import annotations

import pytest
import torch

pytestmark = [pytest.mark.long, pytest.mark.comfy]


def test_what_was_picked_is_judged_on_other_pictures(monkeypatch):
    from dit_toolkit.benchmarks import autotune
    from dit_toolkit.benchmarks.race.arena import Arena

    monkeypatch.setattr(autotune, "STEPS", 8)
    monkeypatch.setattr(autotune, "TRIALS", 2)
    drawn, sample = [], Arena.sample

    def watched(self, model, heat, *args):
        drawn.append(heat.noise)
        return sample(self, model, heat, *args)

    monkeypatch.setattr(Arena, "sample", watched)
    with torch.inference_mode():
        (row,) = autotune.rows_of(autotune.Case("FLUX.1", "euler", 1.0), [10.0], [2], 1)
    assert row["picked"].startswith("TaylorSeer, interval ")
    assert row["computed"] < 0.6
    assert row["tuned_db"] >= 10.0
    assert row["judged_db"] != row["tuned_db"]
    assert row["default_db"] == row["judged_db"]  # the first two trials are of the default spacing
    judged, *tuned, again, _ = drawn
    assert torch.equal(judged, again)
    assert [len(noise) for noise in tuned] == [2, 2, 2]
    assert not (tuned[0] == judged).flatten(1).all(1).any()
