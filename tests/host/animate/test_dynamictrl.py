"""DynamiCtrl on ComfyUI's CogVideoX: against the reference, and what becomes of poses on their way."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.comfy

from dit_toolkit.host.animate.dynamictrl_settings import Pose  # noqa: E402
from dit_toolkit.host.transformer import transformer_of  # noqa: E402
from dit_toolkit.tests.host.animate.tiny_dynamictrl import FRAMES, SIZE, latent, loaded, prompt, published, sample  # noqa: E402
from dit_toolkit.tests.models.animate import dynamictrl_reference as reference  # noqa: E402

WITH_TABLE = {"table": True, "heads": 3, "blocks": 2}  # ComfyUI divides the width by three there


class Predictions:
    """What the model is asked and answers in a run."""

    def __init__(self, transformer, monkeypatch):
        self.calls = []
        forward = transformer._forward

        def watched(x, timestep, context, *args, **kwargs):
            out = forward(x, timestep, context, *args, **kwargs)
            self.calls.append((x.clone(), timestep.clone(), context.clone(), out.clone()))
            return out

        monkeypatch.setattr(transformer, "_forward", watched)


def angles_of(transformer, frames, height, width):
    """The rotary positions of ComfyUI's 1.0."""
    if not transformer.use_rotary_positional_embeddings:
        return None
    cos, sin = transformer._get_rotary_emb(height, width, frames, "cpu")
    return torch.atan2(sin, cos)[:, ::2]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize(
    ("version", "sizes"), [("1.5", {}), ("1.0", {}), ("1.0", {"table": True, "heads": 3, "blocks": 2})]
)
def test_the_model_is_that_of_the_definition(monkeypatch, version, sizes, strength, batch):
    """Both guidance branches side by side, in every call of a run."""
    model, weights = loaded(version, **sizes), published(version, **sizes)
    transformer, pose = transformer_of(model), latent(20)
    seen = Predictions(transformer, monkeypatch)
    given = Pose(pose, strength)
    sample(model, 2, positive=prompt(3, pose=given), negative=prompt(4, pose=given), cfg=2.0, batch=batch)
    assert len(seen.calls) == 2
    rotary = angles_of(transformer, FRAMES, *(side // 2 for side in SIZE)) if version == "1.0" else None
    scale = model.model.latent_format.scale_factor
    for x, timestep, context, out in seen.calls:
        assert len(x) == 2 * batch
        poses = (pose * scale).expand(len(x), -1, -1, -1, -1)
        expected = reference.forward(weights, x, context, timestep, poses, strength=strength, angles=rotary)
        without = reference.forward(weights, x, context, timestep, angles=rotary)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
        assert (expected - without).abs().mean() > 0.01
