"""DiT4SR on a tiny SD3.5: the real transformer of ComfyUI against the definition."""

from __future__ import annotations

import math

import comfy.latent_formats
import comfy.model_management
import numpy as np
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.comfy

from dit_toolkit.host.part_of_run import PartOfRun  # noqa: E402
from dit_toolkit.host.restore import dit4sr, dit4sr_files, dit4sr_run  # noqa: E402
from dit_toolkit.host.restore.dit4sr import Plan, enlarged, plan  # noqa: E402
from dit_toolkit.host.restore.dit4sr_settings import DiT4SR  # noqa: E402
from dit_toolkit.tests.host import families  # noqa: E402
from dit_toolkit.tests.host.restore.tiny_dit4sr import (  # noqa: E402
    VARIANTS,
    base,
    close,
    file,
    latent,
    prompt,
    published,
    restored,
    sample,
)
from dit_toolkit.tests.models.restore import dit4sr_reference as reference  # noqa: E402

SD3 = comfy.latent_formats.SD3()


class Denoised:
    """The denoised latent of each call of the model while ComfyUI samples, with what it was asked for."""

    def __init__(self, model):
        self.calls = []
        self.source, self.model = model, model.clone()
        self.model.add_wrapper_with_key("apply_model", "watch", self.watch)

    def watch(self, executor, x, t, *args, **kwargs):
        out = executor(x, t, *args, **kwargs)
        self.calls.append((x, t, args, kwargs, out))
        return out


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(8, 8), (6, 10), (12, 4)])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_whole_transformer_is_the_one_of_the_definition(variant, size, batch):
    """Through ComfyUI's loader, its conversion of names, its transformer and its sampler."""
    lr = latent(12, size, batch)
    watched = Denoised(restored(variant=variant, lr=lr, tile=0))
    sample(watched.model, 2, size=size, batch=batch)
    assert len(watched.calls) == 2
    (text, values) = prompt()[0]
    for x, sigma, _, _, denoised in watched.calls:
        velocity = reference.transformer(
            published(variant), variant, x, SD3.process_in(lr), 1000 * sigma, text.expand(batch, -1, -1),
            values["pooled_output"].expand(batch, -1),
        )  # fmt: skip
        close(denoised, x - sigma[:, None, None, None] * velocity, 1e-5)


@pytest.mark.parametrize("strength", [0.3, 0.9])
def test_strength_and_scale_reach_the_blocks(strength):
    watched = Denoised(restored(strength=strength, cross_stream_scale=0.5))
    sample(watched.model, 1)
    (text, values) = prompt()[0]
    x, sigma, _, _, denoised = watched.calls[0]
    velocity = reference.transformer(
        published(), "r1", x, SD3.process_in(latent(12)), 1000 * sigma, text, values["pooled_output"], 0.5, strength
    )
    close(denoised, x - sigma[:, None, None, None] * velocity, 1e-5)


def test_both_ends_of_strength_are_reached_without_a_jump():
    plain, full = sample(base()), sample(restored())
    close(sample(restored(strength=1e-7)), plain, 1e-4)
    close(sample(restored(strength=1 - 1e-7)), full, 1e-4)
    away = [float((sample(restored(strength=s)) - plain).norm()) for s in (0.25, 0.5, 0.75, 1.0)]
    assert away == sorted(away)


def test_the_wrong_variant_shows():
    other = dit4sr_files.from_state(published("r1"), "wrong", "v1")
    wrong = dit4sr.attach(base(), other.patcher, other.made_for, DiT4SR(None, "wrong", latent(12)))
    assert (sample(wrong) - sample(restored())).abs().mean() > 0.005


def test_the_part_of_the_run_is_where_the_stream_runs(monkeypatch):
    seen, run = [], dit4sr_run.Stream.run

    def counted(self, i, args):
        seen.append(i)
        return run(self, i, args)

    monkeypatch.setattr(dit4sr_run.Stream, "run", counted)
    for part, steps in ((PartOfRun(), 4), (PartOfRun(0.0, 0.5), 2), (PartOfRun(0.5, 1.0), 2)):
        seen.clear()
        sample(restored(part=part), 4)
        assert seen == [0, 1, 2] * steps, part


def test_prompts_side_by_side_are_those_one_after_the_other():
    """Prompts of one length share a call of the model, prompts of two lengths do not."""
    watched = Denoised(restored())
    sample(watched.model, 1, cfg=4.0)
    (x, _, _, _, together), *others = watched.calls
    assert (x.shape[0], others) == (2, [])
    apart = []
    for seed in (4, 3):  # the negative one comes first in a batch
        one = Denoised(restored())
        sample(one.model, 1, positive=prompt(seed))
        apart.append(one.calls[0][-1])
    close(together, torch.cat(apart), 1e-5)
    watched = Denoised(restored())
    assert sample(watched.model, 1, cfg=4.0, negative=prompt(4, length=9)).isfinite().all()
    assert [x.shape[0] for x, *_ in watched.calls] == [1, 1]


def test_the_stream_begins_anew_with_each_call():
    """Also where somebody runs the model twice within one call."""
    model = restored()
    expected = sample(model, 2)

    def twice(executor, *args, **kwargs):
        executor(*args, **kwargs)
        return executor(*args, **kwargs)

    outside = model.clone()
    outside.add_wrapper_with_key("apply_model", "twice", twice)
    assert torch.equal(sample(outside, 2), expected)

    transformer = model.model.diffusion_model
    forward = transformer.forward

    def again(*args, **kwargs):  # below all wrappers
        forward(*args, **kwargs)
        return forward(*args, **kwargs)

    transformer.forward = again
    try:
        assert torch.equal(sample(model, 2), expected)
    finally:
        del transformer.forward


def test_a_picture_for_each_of_a_batch():
    lr = latent(30, batch=2)
    both = sample(restored(lr=lr), batch=2, cfg=3.0)
    noise = latent(7, batch=2)
    for i in range(2):
        close(sample(restored(lr=lr[i : i + 1]), noise=noise[i : i + 1], cfg=3.0), both[i : i + 1])


def test_a_run_after_an_interrupt_within_a_tile_is_a_fresh_start():
    model = restored(tile=4, overlap=2)
    expected = sample(model)
    block = model.model.diffusion_model.joint_blocks[1].x_block.attn.qkv
    count = [0]

    def stop(*_):
        count[0] += 1
        if count[0] == 2:
            raise comfy.model_management.InterruptProcessingException

    hook = block.register_forward_pre_hook(stop)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(model)
    hook.remove()
    assert torch.equal(sample(model), expected)


def test_a_lora_on_the_base_reaches_the_stream():
    """The stream goes through the base's own layers, so a weight patch on them changes the stream's tokens too."""
    key = "diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"
    change = 0.05 * latent(3, (36, 192)).flatten()[: 576 * 192].view(576, 192)
    patched = base().clone()
    assert patched.add_patches({key: ("diff", (change,))}, 1.0)
    weights = dict(published())
    for row, part in enumerate(("to_q", "to_k", "to_v")):
        name = f"transformer_blocks.0.attn.{part}.weight"
        weights[name] = weights[name] + change[row * 192 : (row + 1) * 192]
    watched = Denoised(restored(patched))
    sample(watched.model, 1)
    (text, values) = prompt()[0]
    x, sigma, _, _, denoised = watched.calls[0]
    velocity = reference.transformer(
        weights, "r1", x, SD3.process_in(latent(12)), 1000 * sigma, text, values["pooled_output"]
    )
    close(denoised, x - sigma[:, None, None, None] * velocity, 2e-5)
    sample(base())  # takes the patch off the shared weights


# What is refused


def test_another_family_is_refused():
    with pytest.raises(ValueError, match=r"Apply DiT4SR needs a Stable Diffusion 3\.5 Medium model, got Flux\."):
        restored(families.FAMILIES["flux"].load())


def test_another_size_is_refused_with_both():
    with pytest.raises(ValueError, match=r"made for hidden size 192, 3 blocks, 2 of them .* the model has .* 1 of"):
        restored(families.FAMILIES["sd35"].load())


def test_a_second_stream_is_refused():
    with pytest.raises(ValueError, match="The model has Apply DiT4SR already"):
        restored(restored())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"strength": math.nan}, "strength must be between 0 and 1, got nan"),
        ({"strength": 1.5}, "strength must be between 0 and 1"),
        ({"cross_stream_scale": math.inf}, "cross_stream_scale must be a finite number"),
        ({"tile": 7}, "tile must be an even number of cells"),
        ({"overlap": 3}, "overlap must be an even number of cells"),
        ({"overlap": 8}, r"overlap \(8\) must be smaller than tile \(8\)"),
        ({"tile_batch": 0}, "tile_batch must be at least 1"),
        ({"lr": torch.full((1, 16, 8, 8), math.nan)}, "holds NaN or infinite values"),
        ({"lr": torch.full((1, 16, 8, 8), 1e9)}, "far larger ones than any VAE gives"),
        ({"lr": torch.zeros(16, 8, 8)}, r"must be \[N, C, h, w\]"),
        ({"lr": torch.zeros(1, 4, 8, 8)}, "must have 16 channels, got 4"),
        ({"lr": torch.zeros(1, 16, 40, 8), "tile": 0}, "64 x 320 pixels in one piece .* 256 along a side"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        restored(**settings)


def test_a_latent_of_another_size_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match=r"prepared 64 x 64 pixels, and the sampler starts from 128 x 64. Connect the"):
        sample(restored(), size=(8, 16))


def test_another_number_of_pictures_is_refused():
    with pytest.raises(ValueError, match="got 2 images for a batch of 3 pictures"):
        sample(restored(lr=latent(1, batch=2)), batch=3)


# Sizes of pictures


@pytest.mark.parametrize(
    ("picture", "factor", "min_side", "sampled", "final"),
    [
        ((128, 128), 4.0, 512, (512, 512), (512, 512)),
        ((180, 320), 4.0, 512, (720, 1280), (720, 1280)),
        ((181, 319), 4.0, 512, (720, 1264), (724, 1276)),
        ((64, 96), 4.0, 512, (512, 768), (256, 384)),
        ((300, 200), 2.0, 512, (768, 512), (600, 400)),
        ((1, 1), 4.0, 512, (512, 512), (4, 4)),
        ((170, 170), 3.0, 512, (512, 512), (510, 510)),
        ((512, 512), 1.0, 512, (512, 512), (512, 512)),
        ((5, 5), 1.0, 16, (16, 16), (5, 5)),
        ((100, 333), 1.5, 64, (144, 496), (150, 500)),
    ],
)
def test_the_picture_is_brought_to_whole_tokens(picture, factor, min_side, sampled, final):
    assert plan(*picture, factor, min_side) == Plan(sampled, final)


@pytest.mark.parametrize(
    ("picture", "factor", "words"),
    [
        ((5000, 3000), 4.0, "3000 x 5000 pixels would come out 20000 pixels long. The most is 16384. Lower upscale_by"),
        ((1, 4000), 1.0, "would come out 2048000 pixels long, as its shorter side of 1 is brought to 512. .* min_side"),
    ],
)
def test_a_result_that_is_far_too_large_is_refused(picture, factor, words):
    with pytest.raises(ValueError, match=words):
        plan(*picture, factor, 512)


def test_enlarging_is_that_of_pil():
    """What the authors' code calls. It rounds to 8 bits twice, and cuts off in between what lies outside of 0..1."""
    small = (255 * (0.3 + 0.4 * torch.rand(1, 9, 7, 3, generator=torch.Generator().manual_seed(1)))).round()
    image = Image.fromarray(small[0].byte().numpy())
    expected = torch.from_numpy(np.array(image.resize((28, 36), Image.Resampling.BICUBIC))) / 255
    close(enlarged(small / 255, (36, 28))[0], expected, 1.5 / 255)


def test_grey_pictures_become_rgb():
    grey = torch.rand(2, 5, 6, 1)
    out = enlarged(grey, (16, 16))
    assert out.shape == (2, 16, 16, 3)
    assert torch.equal(out[..., 0], out[..., 2])


@pytest.mark.parametrize(
    ("size", "settings", "expected"),
    [
        ((16, 20), {}, (1, 8, 16)),
        ((16, 20), {"tile_batch": 4}, (4, 8, 16)),
        ((16, 20), {"tile_batch": 50}, (12, 8, 16)),
        ((16, 20), {"tile": 0, "overlap": 0}, (1, 16, 40)),
        ((8, 8), {}, (1, 8, 16)),
    ],
)
def test_memory_is_asked_for_what_runs_at_a_time(monkeypatch, size, settings, expected):
    """Rows, height and width of what core is told to make room for: windows with two streams. 4 x 3 windows in all."""
    asked = []
    required = base().model.memory_required

    def watched(shape, **rest):
        asked.append(tuple(shape))
        return required(shape, **rest)

    monkeypatch.setattr(base().model, "memory_required", watched)
    sample(restored(lr=latent(1, size), **settings), 1, size=size)
    rows, height, width = expected
    assert asked[0] == (2 * rows, 16, height, width)  # core reckons with two prompts


def test_the_patch_is_a_model_of_its_own_to_core():
    """So it is moved, counted and offloaded with the model."""
    model = restored()
    (adapter,) = model.get_additional_models()
    assert adapter.model_size() == file("r1").patcher.model_size() > 0
    assert adapter.clone_base_uuid == file("r1").patcher.clone_base_uuid
