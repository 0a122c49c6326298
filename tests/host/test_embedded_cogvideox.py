"""The embedded video model and its poses, through ComfyUI's own classes.

Thresholds stand well away from what weights/README.md measured, and well away from what a broken model reaches.
"""

from __future__ import annotations

from copy import copy

import comfy.sd
import comfy.utils
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dit_toolkit.host import embedded
from dit_toolkit.training import checkpoints, data, dynamictrl, video_vae, world
from dit_toolkit.training.measure import dynamictrl as measure

pytestmark = pytest.mark.comfy

FILES = embedded.FILES["CogVideoX"]


@pytest.fixture(scope="module")
def animation() -> measure.Animation:
    return measure.Animation()


def test_comfyui_recognises_the_transformer_as_cogvideox_15_image_to_video(animation):
    model = animation.model.model
    assert type(model.model_config).__name__ == "CogVideoX_I2V"
    assert model.diffusion_model.patch_size_t == 2
    assert model.diffusion_model.ofs_proj_dim == 64


def test_comfyuis_own_loaders_take_the_files():
    weights = load_file(checkpoints.WEIGHTS / FILES.model)
    base = {key: value for key, value in weights.items() if "control_norm1" not in key}
    model = comfy.sd.load_diffusion_model_state_dict(dict(base))
    assert model is not None
    assert set(base) == set(model.model.diffusion_model.state_dict())
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(checkpoints.WEIGHTS / FILES.vae)))
    assert type(vae.first_stage_model).__name__ == "WanVAE"
    assert vae.encode(torch.rand(21, 96, 96, 3)).shape == (1, 16, 6, 12, 12)


def test_the_nodes_compute_what_the_trainer_does(animation):
    """One evaluation: picture and poses through the autoencoder, prompt through the encoder, all through the model."""
    case = measure.cases(1)[0]
    trained = dynamictrl.VideoModel(dynamictrl.VideoRecipe(), posed=True)
    weights = {key: value.float() for key, value in load_file(checkpoints.WEIGHTS / FILES.model).items()}
    norms = {key: weights.pop(key) for key in list(weights) if "control_norm1" in key}
    trained.transformer.load_state_dict(weights)
    trained.norms.load_state_dict(
        {key.removeprefix("blocks.").replace("control_norm1.", ""): value for key, value in norms.items()}
    )
    words = load_file(checkpoints.WEIGHTS / FILES.clip)
    trained.text.load_state_dict({key: value.float() for key, value in words.items()})
    x = torch.randn((1, 16, 6, 12, 12), generator=torch.Generator().manual_seed(1))
    step = 600
    kept, lost = dynamictrl.levels()
    with torch.inference_mode():
        clip = torch.stack([torch.from_numpy(world.render(frame, 96).image) for frame in case.frames]) / 255
        pose = animation.vae.encode(animation.drawn(case.poses)) * video_vae.UNIT
        picture = torch.zeros_like(x)
        picture[:, :, :1] = animation.vae.encode(clip[:1])
        ids = torch.tensor([data.padded_ids(case.text)])
        t = torch.tensor([float(step)])
        wanted = trained(x, picture, t, ids, pose, torch.ones(1))
        plain = trained(x, picture, t, ids)
        theirs = evaluated(animation, x, step, case)
    a, b = kept[step], lost[step]
    torch.testing.assert_close(theirs, (a * x - b * wanted) / video_vae.UNIT, rtol=0, atol=5e-3)  # float16 files
    assert (wanted - plain).abs().mean() > 0.02


def evaluated(animation: measure.Animation, x: torch.Tensor, step: int, case: measure.Case) -> torch.Tensor:
    """What ComfyUI's sampling takes the clip to be at one noise level, as a latent of the VAE."""
    import comfy.sample
    import comfy.samplers

    prompt = animation.host.nodes.CLIPTextEncode().encode(animation.clip, case.text)[0]
    positive, negative, latent, _ = animation.conditioning.execute(
        positive=prompt, negative=prompt, vae=animation.vae, reference=torch.from_numpy(case.picture)[None] / 255,
        width=96, height=96, length=21, crop="center", pose_strength=1.0, start_percent=0.0, end_percent=1.0,
        ref_latent_scale=1.0, pose=animation.drawn(case.poses),
    ).result  # fmt: skip
    levels = animation.model.get_model_object("model_sampling").sigmas
    sigma, found = levels[step], []

    def take(model_fn, noise, schedule, extra_args=None, callback=None, disable=None):
        found.append(model_fn(x * (sigma**2 + 1) ** 0.5, schedule[:1], **(extra_args or {})))
        return found[0]

    sampler, sigmas = comfy.samplers.KSAMPLER(take), torch.tensor([sigma, 0.0])
    return comfy.sample.sample_custom(
        animation.model, torch.zeros_like(x), 1.0, sampler, sigmas, positive, negative, latent["samples"],
        disable_pbar=True, seed=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def still(animation):
    """A doll in few steps, and what becomes of it without poses."""
    case = measure.cases(2, seed=77)[0]
    few = copy(animation)
    few.steps = 6
    return case, few, few(case.picture, None, case.text)


def test_the_doll_takes_the_poses_it_is_given(still):
    """Nearer to its own poses than without any, and than with somebody else's."""
    case, few, without = still
    other = measure.cases(2, seed=77)[1]
    clips = {
        "own": few(case.picture, case.poses, case.text),
        "none": without,
        "swapped": few(case.picture, other.poses, case.text),
    }
    found = {name: measure.judged(clip, case, every=8) for name, clip in clips.items()}
    assert found["own"]["pose error"] < 0.75 * found["none"]["pose error"]
    assert found["own"]["pose error"] < 0.75 * found["swapped"]["pose error"]
    assert found["own"]["same doll"] > 0.4


def test_strength_0_is_the_model_without_poses(still):
    case, few, without = still
    assert np.array_equal(few(case.picture, case.poses, case.text, strength=0.0), without)
