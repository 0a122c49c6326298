"""Re-ttention's full evaluations under a scale of the model's own, in both ways in which they are computed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as attention

from dit_toolkit.host.accelerate.re_ttention_run import ReTtentionRun
from dit_toolkit.tests.host.tiny import close

pytestmark = pytest.mark.comfy


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("scale", [None, 0.9])
def test_output_and_log_sum_exp_are_those_of_the_scores_as_the_model_scales_them(alone, scale):
    q, k, v = torch.randn(3, 1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    own = SimpleNamespace(q=q, k=k, v=v, scale=scale, bias=None)
    run = SimpleNamespace(alone=alone, report=SimpleNamespace(pairs=0), _flex=lambda own: None)
    call = SimpleNamespace(own=own, pairs=100, full=lambda: attention(q, k, v, scale=scale))
    out, lse = ReTtentionRun._full_and_log_sum_exp(run, call)
    scores = q @ k.mT * (8**-0.5 if scale is None else scale)
    close(out, scores.softmax(-1) @ v)
    close(lse, scores.logsumexp(-1))
    assert run.report.pairs == (0 if alone else 50)
