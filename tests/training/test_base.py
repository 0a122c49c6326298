"""The base's stage: what its captions leave unsaid, and that it goes on where it was stopped."""

import numpy as np
import pytest
import torch

from dit_toolkit.models.tiny_text import PAD, VOCABULARY
from dit_toolkit.training import base, checkpoints, data, loop, optim
from dit_toolkit.training.embedded import Base
from dit_toolkit.training.flux import Size


def test_a_brief_caption_keeps_what_is_shown():
    rng = np.random.default_rng(0)
    ids = data.padded_ids(
        "a doll with long brown hair, a red striped shirt and a blue skirt, arms up, on a grey ground"
    )
    things = {VOCABULARY.index(w) for w in ("doll", "arms", "up")}
    seen = set()
    for _ in range(50):
        short = base.brief(ids, rng)
        words = [w for w in short if w != PAD]
        assert len(short) == len(ids)
        assert things <= set(words)
        for noun, adjectives in (("hair", ("long", "brown")), ("shirt", ("red", "striped")), ("ground", ("grey",))):
            kept = VOCABULARY.index(noun) in words
            assert all((VOCABULARY.index(a) in words) == kept for a in adjectives)
        seen.add(tuple(words))
    assert len(seen) > 4


@pytest.fixture
def one_thread():
    """So that sums have one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_training_resumes_where_it_stopped(tmp_path, monkeypatch, one_thread):
    """Six steps at once, and three and three: the same weights."""
    monkeypatch.setattr(checkpoints, "WORK", tmp_path)
    monkeypatch.setattr(loop, "device_of", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch, "compile", lambda model: model)
    recipe = checkpoints.Recipe(batch=4)
    latents, ids = torch.randn(32, 8, 4, 4).half(), torch.randint(1, 60, (32, 20)).to(torch.uint8)
    groups = [np.arange(32)] * 3

    def loss_of(model, step):
        x0, noise, t, words, guidance = base.batch_of(recipe, latents, ids, groups, step, "cpu")
        return torch.nn.functional.mse_loss(
            model(torch.lerp(x0, noise, t[:, None, None, None]), t, words, guidance), noise - x0
        )

    def fresh():
        torch.manual_seed(0)
        return Base(Size(live=8, double=1, single=1))

    whole = base.run_stage(tmp_path / "whole.pt", recipe, 6, fresh(), loss_of, every=6)
    monkeypatch.setattr(base, "schedule", lambda step, total: optim.schedule(step, 6))
    base.run_stage(tmp_path / "parts.pt", recipe, 3, fresh(), loss_of, every=3)
    parts = base.run_stage(tmp_path / "parts.pt", recipe, 6, fresh(), loss_of, every=3)
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name
