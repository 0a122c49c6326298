"""The nodes of DynamiCtrl: sizes, frames, masks, what is said, and a whole run through core's nodes."""

from __future__ import annotations

import comfy_extras.nodes_custom_sampler as custom
import pytest
import torch

pytestmark = pytest.mark.comfy

from dit_toolkit.host.animate.dynamictrl_conditions import POSES  # noqa: E402
from dit_toolkit.nodes.dynamictrl import CogVideoXSampling, DynamiCtrlConditioning, LoadDynamiCtrl  # noqa: E402
from dit_toolkit.tests.host import families  # noqa: E402
from dit_toolkit.tests.host.animate import tiny_dynamictrl as tiny  # noqa: E402
from dit_toolkit.tests.nodes.calling import run_node  # noqa: E402
from dit_toolkit.tests.nodes.test_inputs import Vae  # noqa: E402


def pictures(count: int, height: int = 48, width: int = 64, channels: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.rand(count, height, width, channels, generator=torch.Generator().manual_seed(seed))


def conditioned(**values):
    given = {"positive": tiny.prompt(3), "negative": tiny.prompt(4), "vae": tiny.VideoVae(), "reference": pictures(1)}
    return run_node(DynamiCtrlConditioning, **{**given, "width": 64, "height": 48, "length": 13, **values})


def pose_of(conditioning):
    (_, values), *_ = conditioning
    found = values.get("model_conds", {}).get(POSES)
    return None if found is None else found.cond


@pytest.mark.parametrize(
    ("values", "shape", "words"),
    [
        ({}, (4, 6, 8), "64 x 48 pixels, 13 frames, 4 latent frames"),
        ({"length": 9}, (4, 6, 8), "4 latent frames; length 9 was rounded to 13, the nearest length 8k + 5"),
        ({"length": 81}, (22, 6, 8), "length 81 was rounded to 85"),
        (
            {"width": 60, "height": 50},
            (4, 6, 8),
            "width 60 was rounded to 64, the nearest multiple of 16; height 50",
        ),
        ({"pose": pictures(13)}, (4, 6, 8), "4 latent frames"),
        ({"pose": pictures(5)}, (4, 6, 8), "'pose' has 5 frames, so its last is held for 8 more"),
        ({"pose": pictures(20)}, (4, 6, 8), "of 20 frames of 'pose' the first 13 are used"),
        ({"reference": pictures(3)}, (4, 6, 8), "of 3 reference pictures the first is used"),
        ({"positive": tiny.prompt(3, length=227)}, (4, 6, 8), "a prompt of 227 tokens is longer than the 226 that"),
    ],
)
def test_sizes_go_together_and_what_is_changed_is_said_once(caplog, values, shape, words):
    with caplog.at_level("INFO"):
        positive, negative, latent, report = conditioned(**values)
    assert latent["samples"].shape == (1, 16, *shape)
    assert not latent["samples"].any()
    assert words in report
    assert [each.getMessage() for each in caplog.records].count(f"DynamiCtrl Conditioning: {report}") == 1
    for each in (positive, negative):
        assert each[0][1]["noise_concat"].shape == (1, 16, *shape)
        pose = pose_of(each)
        assert (pose is None) == ("pose" not in values)
        assert pose is None or pose.latent.shape == (1, 16, *shape)


def test_the_picture_is_the_first_latent_frame_in_the_vaes_own_scale():
    picture = pictures(1)
    for scale in (1.0, 0.7, 1.4286):
        shown = conditioned(reference=picture, ref_latent_scale=scale)[0][0][1]["noise_concat"]
        assert torch.equal(shown[:, :, :1], tiny.VideoVae().encode(picture) * scale)
        assert not shown[:, :, 1:].any()


@pytest.mark.parametrize("table", [tiny.loaded, families.ALL["cogvideox_i2v"].load])
def test_the_scale_is_that_which_the_model_sees(monkeypatch, table):
    """Whatever the latent format of the model: ComfyUI scales `concat_latent_image`, and leaves this as it is."""
    model, seen = table(), []
    transformer = model.model.diffusion_model
    forward = transformer._forward
    monkeypatch.setattr(transformer, "_forward", lambda x, *args, **more: seen.append(x) or forward(x, *args, **more))
    picture, text = pictures(1), {tiny.loaded: tiny.prompt}.get(table, families.text)
    positive = conditioned(reference=picture, positive=text(3), ref_latent_scale=0.7)[0]
    tiny.sample(model, 1, positive=positive, negative=text(4))
    torch.testing.assert_close(seen[0][:, 16:, :1], tiny.VideoVae().encode(picture) * 0.7)


def test_both_prompts_share_the_poses():
    positive, negative, *_ = conditioned(pose=pictures(13))
    assert pose_of(positive).latent is pose_of(negative).latent
    assert torch.equal(pose_of(positive).latent, tiny.VideoVae().encode(pictures(13)))


def test_strength_0_leaves_the_poses_out():
    assert pose_of(conditioned(pose=pictures(13), pose_strength=0.0)[0]) is None


def test_pictures_of_another_shape_are_cut_or_pressed():
    wide = torch.zeros(1, 48, 128, 3)
    wide[:, :, 32:96] = 1
    assert torch.equal(conditioned(reference=wide)[0][0][1]["noise_concat"][:, :, 0], torch.full((1, 16, 6, 8), 0.5))
    pressed = conditioned(reference=wide, crop="stretch")[0][0][1]["noise_concat"][0, 0, 0]
    assert pressed[:, 0].lt(-0.4).all()
    assert pressed[:, 4].gt(0.4).all()


def test_grey_pictures_and_those_with_alpha_are_taken():
    for channels in (1, 4):
        positive, *_ = conditioned(reference=pictures(1, channels=channels), pose=pictures(13, channels=channels))
        assert pose_of(positive).latent.isfinite().all()


def test_a_vae_of_pictures_is_refused():
    with pytest.raises(ValueError, match=r"'vae' makes a latent of shape \[1, 16, 6, 8\] of 'reference', and"):
        conditioned(vae=Vae())


# A background that is held


def person() -> torch.Tensor:
    mask = torch.zeros(1, 48, 64)
    mask[:, 8:40, 16:41] = 1
    return mask


def test_the_background_is_the_still_pictures():
    picture = pictures(1)
    positive, negative, latent, _ = conditioned(reference=picture, pose=pictures(13), background_mask=person())
    still = tiny.VideoVae().encode(picture.expand(13, -1, -1, -1))
    assert torch.equal(latent["samples"], still)
    mask = latent["noise_mask"]
    assert mask.shape == (1, 1, 4, 6, 8)
    assert torch.equal(mask[0, 0, 0].nonzero().amin(0), torch.tensor([1, 2]))
    assert torch.equal(mask[0, 0, 0].nonzero().amax(0), torch.tensor([4, 5]))
    out = tiny.sample(tiny.loaded(), 3, positive=positive, negative=negative, cfg=2.0, start=still, mask=mask)
    outside = (mask == 0).expand_as(out)
    torch.testing.assert_close(out[outside], still[outside], rtol=0, atol=1e-5)
    assert (out - still)[~outside].abs().mean() > 0.1


def test_a_mask_may_move():
    masks = torch.zeros(13, 48, 64)
    masks[5:, :8, :8] = 1
    found = conditioned(background_mask=masks)[2]["noise_mask"][0, 0, :, 0, 0]
    assert found.tolist() == [0, 0, 1, 1]
    assert "'background_mask' has 6 frames, so its last is held for 7 more" in conditioned(background_mask=masks[:6])[3]
    assert conditioned(background_mask=masks[12])[2]["noise_mask"][0, 0, :, 0, 0].tolist() == [1, 1, 1, 1]


# Whole runs


def test_a_run_through_cores_nodes():
    tiny.write_files()
    model, report = run_node(LoadDynamiCtrl, file="a_dynamictrl.safetensors")
    assert "3 blocks, width 128" in report
    model, sampler, sigmas, sampler_name, scheduler = run_node(CogVideoXSampling, model=model, steps=3)
    assert (sampler_name, scheduler, len(sigmas)) == ("dpmpp_2m_sde", "simple", 4)
    positive, negative, latent, _ = conditioned(pose=pictures(13))
    out = custom.SamplerCustom.execute(model, True, 1, 3.0, positive, negative, sampler, sigmas, latent).args[0]
    assert out["samples"].shape == (1, 16, 4, 6, 8)
    assert out["samples"].isfinite().all()
    assert 0.1 < out["samples"].std() < 30


def test_a_latent_of_another_size_is_refused_in_a_sentence():
    positive, *_ = conditioned(pose=pictures(13))
    with pytest.raises(ValueError, match="the reference has a latent of 8 x 6 and 4 frames, and the sampler asks for"):
        tiny.sample(tiny.loaded(), 1, positive=positive, noise=tiny.latent(7, frames=6))
