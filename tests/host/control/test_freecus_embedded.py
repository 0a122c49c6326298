"""FreeCus where it can be seen: dolls of the embedded default keep their colours, told by the world's own scorer."""

from __future__ import annotations

import comfy.sample
import numpy as np
import pytest
import torch

from dit_toolkit.host import embedded
from dit_toolkit.host.control import freecus
from dit_toolkit.training import world
from dit_toolkit.training.easycontrol import caption_for, condition_picture
from dit_toolkit.training.measure import shipped
from dit_toolkit.training.score import score

pytestmark = pytest.mark.comfy

SIDE, STEPS, COUNT = 96, 12, 3
GREY = 127


@pytest.fixture(scope="module")
def models():
    return embedded.load_model(), embedded.load_clip(), embedded.load_vae()


def test_a_doll_keeps_the_colours_and_pattern_that_the_prompt_does_not_name(models):
    """The model card has 32 scenes: one right by the prompt alone, all with FreeCus."""
    model, clip, vae = models
    scenes = shipped.some(COUNT, (0, 0, 1.0, 0), 11)
    rng = np.random.default_rng(4)
    right = {"alone": 0, "with": 0}
    for i, scene in enumerate(scenes):
        shown = condition_picture("subject", scene, SIDE, rng)
        image = torch.from_numpy(shown.astype(np.float32) / 255)[None]
        mask = ((image - GREY / 255).abs().amax(-1) > 0.03).float()
        text = caption_for("subject", scene)
        assert not any(colour in text for colour in world.COLOURS)
        freed = freecus.attach(model, image, mask, vae, layers="all")
        for name, each in (("alone", model), ("with", freed)):
            right[name] += score(draw(each, clip, vae, text, seed=i), scene).colours
    assert right["with"] >= COUNT - 1
    assert right["alone"] == 0


def draw(model, clip, vae, text, seed):
    """uint8 RGB `[96, 96, 3]`."""
    noise = torch.randn(1, 16, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(seed))
    positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(words)) for words in (text, ""))
    out = comfy.sample.sample(
        model, noise, STEPS, 2.5, "euler", "simple", positive, negative, torch.zeros_like(noise),
        disable_pbar=True, seed=seed,
    )  # fmt: skip
    return (vae.decode(out)[0].clamp(0, 1) * 255).round().byte().numpy()
