"""The picture of the race."""

from __future__ import annotations

import pytest
from PIL import Image

from dit_toolkit.benchmarks.race import curves, report

pytestmark = pytest.mark.long


def test_a_panel_for_each_run_and_a_line_for_each_method(tmp_path):
    at = {"half": 40.0, "third": 33.0, "quarter": None, "fifth": 20.0, "seventh": None}
    nothing = dict.fromkeys(at)
    own = {"method": "TaylorSeer", "peer": None, "choice": "documented", "sampler": "euler", "steps": 28, "cfg": 1.0}
    lines = [{**own, "at": at}, {**own, "method": "MagCache", "peer": "diffusers", "choice": "tuned", "at": nothing}]
    lines += [{**line, "cfg": 2.5} for line in lines]
    one = report.plot(lines, [curves.Run("euler", 28, 1.0)], tmp_path / "one.png")
    two = report.plot(lines, [curves.Run("euler", 28, cfg) for cfg in (1.0, 2.5)], tmp_path / "two.png")
    assert Image.open(two).width > Image.open(one).width + 400
    assert len(Image.open(one).convert("RGB").getcolors(2**20)) > 20
