"""The second base of the embedded default and its DiT4SR patch, through ComfyUI's own classes.

Thresholds stand well below what weights/README.md measured, and well above what a broken model reaches.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dit_toolkit.host import embedded
from dit_toolkit.training import checkpoints, data, photographs, world
from dit_toolkit.training.dit4sr import Restored
from dit_toolkit.training.measure import dit4sr as measure
from dit_toolkit.training.measure import shipped
from dit_toolkit.training.sd3 import SD3Base, SD3Recipe

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def upscaler() -> measure.Upscaler:
    return measure.Upscaler(steps=8)


def shipped_base() -> SD3Base:
    """The shipped weights as the trainer's module."""
    model, files = SD3Base(SD3Recipe()), embedded.FILES["SD3.5"]
    for module, name in ((model.transformer, files.model), (model.text, files.clip)):
        module.load_state_dict({k: v.float() for k, v in load_file(checkpoints.WEIGHTS / name).items()})
    return model.requires_grad_(False).eval()


def test_comfyui_recognises_the_transformer_as_sd35(upscaler):
    assert type(upscaler.model.model.model_config).__name__ == "SD3"
    blocks = upscaler.model.model.diffusion_model.joint_blocks
    assert [block.x_block.x_block_self_attn for block in blocks] == [True, True, False]


def test_the_node_computes_what_the_trainer_does(upscaler):
    """One evaluation of the patched model, the small picture through the VAE included."""
    case = measure.scenes(1)[0]
    small = torch.from_numpy(case.small[:32, :32])[None] / 255
    given = {"upscale_by": 4.0, "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "cross_stream_scale": 1.0}
    with torch.inference_mode():
        model, latent, reference, *_ = upscaler.apply.execute(
            model=upscaler.model, dit4sr=upscaler.patch, vae=upscaler.vae, image=small, **given, **measure.TILES
        ).result
        encoded = model.model.process_latent_in(upscaler.vae.encode(reference))
        base = shipped_base()
        trained = Restored(base, SD3Recipe())
        patch = load_file(checkpoints.WEIGHTS / "dit4sr" / measure.PATCH)
        trained.control.load_state_dict({k: v.float() for k, v in patch.items()})
        x = torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(1))
        ids = torch.tensor([data.padded_ids(case.text)])
        wanted = trained(x, encoded.float(), torch.tensor([0.7]), ids)
        theirs = evaluated(model, x, 0.7, upscaler.words([case.text]))
    torch.testing.assert_close(theirs, wanted, rtol=0, atol=2e-3)  # the files are float16
    assert (wanted - base(x, torch.tensor([0.7]), ids)).abs().mean() > 0.02


def evaluated(model, x: torch.Tensor, sigma: float, words: list) -> torch.Tensor:
    """The velocity at one noise level, by ComfyUI's sampling."""
    import comfy.sample
    import comfy.samplers

    sigmas, found = torch.tensor([sigma, 0.0]), []

    def take(model_fn, noise, schedule, extra_args=None, callback=None, disable=None):
        denoised = model_fn(noise, schedule[:1], **(extra_args or {}))
        found.append((noise - denoised) / sigma)
        return denoised

    sampler = comfy.samplers.KSAMPLER(take)
    start = torch.zeros_like(x)
    comfy.sample.sample_custom(model, x / sigma, 1.0, sampler, sigmas, words, words, start, disable_pbar=True, seed=0)
    return found[0]


def psnr(vae, pictures: np.ndarray) -> float:
    image = torch.from_numpy(pictures) / 255
    with torch.inference_mode():
        return float(-10 * torch.log10((vae.decode(vae.encode(image)) - image).square().mean()))


def test_the_autoencoder_returns_scenes_and_photographs(upscaler):
    scenes = np.stack([world.render(scene, 128).image for scene in shipped.some(24, data.LEVELS)])
    held = photographs.photographs(held_out=True)
    photos = np.stack([photo[64:192, 64:192] for photo in held])
    assert psnr(upscaler.vae, scenes) > 28
    assert psnr(upscaler.vae, photos) > 26


@pytest.mark.long
def test_it_draws_what_the_words_say(upscaler):
    assert measure.drawn(upscaler, 24, cfg=2.5)["all"] > 0.5


def test_dit4sr_is_nearer_to_the_truth_than_interpolation(upscaler):
    cases = measure.scenes(4)
    found = measure.restored(cases, upscaler)
    ours, others = found.pop("DiT4SR"), found.pop("somebody else's")
    found.pop("autoencoder")
    for plain in found.values():
        assert ours["PSNR, dB"] > plain["PSNR, dB"]
        assert ours["SSIM"] > plain["SSIM"] + 0.05
        assert ours["edge distance, px"] < plain["edge distance, px"] / 1.5
    assert others["PSNR, dB"] < ours["PSNR, dB"] - 5
