"""The small video model: its world in motion, its judge of poses, and that what is trained is what ComfyUI runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dit_toolkit.training import dynamictrl, video_vae, world
from dit_toolkit.training.score import pose_error, pose_in
from dit_toolkit.training.world import motion

SMALL = dynamictrl.VideoRecipe(heads=1, depth=2, time_dim=16, text_dim=128)


@pytest.fixture
def scene() -> world.Scene:
    return next(world.scenes(3, (0, 0, 0, 1), test=True))


def test_a_clip_begins_with_its_scene_and_only_the_doll_moves(scene):
    clip = world.moving(scene, 21, np.random.default_rng(0))
    assert len(clip) == 21
    assert clip[0].things == scene.things
    assert all(frame.things[1] == scene.things[1] and frame.ground == scene.ground for frame in clip)
    assert len({frame.things[0].arms for frame in clip}) > 10
    arms = np.array([frame.things[0].arms for frame in clip])
    assert arms.min() >= motion.ARM[0] - 8
    assert arms.max() <= motion.ARM[1]
    assert np.abs(np.diff(arms, axis=0)).max() < 65  # no jumps


def test_the_same_seed_moves_alike(scene):
    one, same, other = (world.moving(scene, 9, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one == same != other


def test_easing_meets_its_keys_and_rests_there():
    values = motion.eased(9, [(0, 1.0), (4, 3.0), (8, 2.0)])
    assert values[[0, 4, 8]].tolist() == [1.0, 3.0, 2.0]
    assert values[2] == pytest.approx(2.0)
    assert values[1] - values[0] < values[2] - values[1]
    assert motion.eased(3, [(0, 5.0)]).tolist() == [5.0] * 3


def test_the_judge_finds_the_pose_of_a_drawn_doll(scene):
    frame = world.moving(scene, 21, np.random.default_rng(4))[12]
    found = pose_in(world.render(frame, 96).image, scene)
    assert pose_error(found, frame.things[0]) < 0.025
    assert pose_error(found, scene.things[0]) > 0.05
    assert pose_error(scene.things[0], scene.things[0]) == 0


def test_noise_levels_are_the_published_ones_with_nothing_left_at_the_end():
    kept, lost = dynamictrl.levels()
    plain, product = [], 1.0
    for k in range(1000):  # scaled-linear betas, one by one
        product *= 1 - (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * k / 999) ** 2
        plain.append(product**0.5)
    rescaled = [(a - plain[-1]) * plain[0] / (plain[0] - plain[-1]) for a in plain]
    torch.testing.assert_close(kept, torch.tensor(rescaled), rtol=0, atol=1e-6)
    assert kept[-1] == 0
    torch.testing.assert_close(kept**2 + lost**2, torch.ones(1000))


@pytest.mark.comfy
def test_the_trained_model_is_the_one_that_comfyui_runs():
    model = dynamictrl.VideoModel(SMALL, posed=True)
    for parameter in model.transformer.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    x, picture, pose = torch.randn(3, 2, 16, 4, 6, 8)
    t, ids = torch.tensor([500.0, 20.0]), torch.randint(1, 9, (2, 20))
    with torch.no_grad():
        context, _ = model.text(ids)
        theirs = model.transformer(torch.cat([x, picture], 1), t, context, ofs=torch.full((2,), dynamictrl.OFS))
        torch.testing.assert_close(model(x, picture, t, ids), theirs, rtol=0, atol=1e-5)
        unused = model(x, picture, t, ids, pose, torch.zeros(2))
        assert torch.equal(unused, model(x, picture, t, ids))
        assert not torch.equal(model(x, picture, t, ids, pose, torch.tensor([0.0, 1.0]))[1], unused[1])


@pytest.mark.comfy
def test_blocks_that_are_skipped_in_training_change_nothing_in_comfyui():
    recipe = video_vae.VideoVAERecipe(width=4)
    vae = video_vae.wan_vae(recipe)
    x = torch.randn(1, 3, 9, 16, 16)
    with torch.no_grad():
        skipped = vae.encode(x)
        for module in vae.modules():
            module.__dict__.pop("forward", None)
        torch.testing.assert_close(vae.encode(x), skipped, rtol=0, atol=1e-6)
    assert skipped.shape == (1, 16, 3, 2, 2)


@pytest.mark.comfy
@pytest.mark.parametrize("length", [1, 3, 6])
def test_the_quick_encoder_and_decoder_are_comfyuis(length):
    vae = video_vae.wan_vae(video_vae.VideoVAERecipe())
    clips = np.random.default_rng(0).integers(0, 256, (4, 4 * length - 3 if length > 1 else 5, 16, 16, 3), np.uint8)
    with torch.no_grad():
        video_vae.begin(vae, np.concatenate([clips] * 2)[:, :5])
        for name, parameter in vae.decoder.named_parameters():
            if name.endswith("residual.6.weight"):
                torch.nn.init.normal_(parameter[:, :, -1], std=0.1)
        x = video_vae.frames(clips)
        torch.testing.assert_close(video_vae.encode(vae, x), vae.encode(x), rtol=0, atol=1e-3)
        z = torch.randn(2, 16, length, 2, 2)
        torch.testing.assert_close(video_vae.decode(vae, z), vae.decode(z), rtol=0, atol=1e-4)


@pytest.mark.comfy
def test_latents_keep_what_a_principal_component_analysis_keeps():
    """The closed-form encoder, read linearly, is within 1 dB of the best linear one of as many numbers."""
    rng = np.random.default_rng(3)
    clips, poses = video_vae._clips(48, 5, 12, 5)
    stock = np.concatenate([clips, poses[::2]])[rng.permutation(18)]
    vae = video_vae.wan_vae(video_vae.VideoVAERecipe())
    with torch.no_grad():
        video_vae.begin(vae, stock)
        x = video_vae.frames(stock)
        z = video_vae.encode(vae, x)[:, :, 1].movedim(1, -1).flatten(0, 2)
        pixels = x[:, :, 1:].unflatten(3, (-1, 8)).unflatten(5, (-1, 8))  # b c t h i w j
        rows = pixels.permute(0, 3, 5, 1, 2, 4, 6).flatten(3).flatten(0, 2).double()
    rows = rows - rows.mean(0)
    ones = torch.cat([z.double(), torch.ones(len(z), 1, dtype=torch.float64)], 1)
    left = (rows - ones @ torch.linalg.lstsq(ones, rows).solution).square().sum()
    best = torch.linalg.svdvals(rows)[16:].square().sum()
    assert 10 * torch.log10(left / best) < 1.0
