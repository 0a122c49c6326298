"""CogVideoX's sampling against its own schedulers' formulas, and LoRAs under their published names."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import comfy.samplers
import folder_paths
import numpy as np
import pytest
import torch
from comfy.model_sampling import V_PREDICTION, V_PREDICTION_DDPM
from safetensors.torch import save_file

pytestmark = pytest.mark.comfy

from dit_toolkit.host.animate import cogvideox_lora  # noqa: E402
from dit_toolkit.host.animate.cogvideox_sampling import mended, sampling  # noqa: E402
from dit_toolkit.tests.host import families  # noqa: E402
from dit_toolkit.tests.host.animate.tiny_dynamictrl import close, latent, loaded, prompt, sample  # noqa: E402

PLAIN = families.ALL["cogvideox"]


def official_alphas() -> np.ndarray:
    """`alphas_cumprod` of CogVideoX's schedulers: scaled-linear betas, then zero terminal SNR, in double precision."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    roots = np.sqrt(np.cumprod(1 - betas))
    first, last = roots[0], roots[-1]
    return ((roots - last) * first / (first - last)) ** 2


def official_timesteps(steps: int) -> np.ndarray:
    """ "trailing"."""
    return np.round(np.arange(1000, 0, -1000 / steps)).astype(int) - 1


@pytest.mark.parametrize("name", ["DPM", "DDIM"])
@pytest.mark.parametrize("steps", [1, 2, 7, 25, 30, 50, 200])
def test_noise_levels_and_timesteps_are_the_official_ones(name, steps):
    found = sampling(PLAIN.load(), name, steps)
    model_sampling = found.model.get_model_object("model_sampling")
    expected = official_timesteps(steps)
    assert len(found.sigmas) == len(expected) + 1
    assert found.sigmas[-1] == 0
    assert np.array_equal(model_sampling.timestep(found.sigmas[:-1]).numpy(), expected)
    assert found.sigmas[0] > 4000  # official: infinite. ComfyUI keeps it finite
    alphas = official_alphas()[expected[1:]]
    levels = np.sqrt((1 - alphas) / alphas)
    np.testing.assert_allclose(found.sigmas[1:-1].double().numpy(), levels, rtol=1e-6)


@pytest.mark.parametrize("steps", [25, 50, 10])
def test_the_named_scheduler_has_the_same_steps(steps):
    found = sampling(PLAIN.load(), "DPM", steps)
    simple = comfy.samplers.calculate_sigmas(found.model.get_model_object("model_sampling"), found.scheduler, steps)
    assert torch.equal(simple, found.sigmas)
    assert found.sampler_name in comfy.samplers.KSampler.SAMPLERS
    assert found.scheduler in comfy.samplers.KSampler.SCHEDULERS


def test_a_step_is_that_of_ddim():
    """v-prediction: x_0 = a x - b v, and the next x = a' x_0 + b' e. ComfyUI's x is 1/a times that."""
    found = sampling(PLAIN.load(), "DDIM", 10)
    model_sampling, sigmas = found.model.get_model_object("model_sampling"), found.sigmas
    v, x = latent(1), latent(2)
    for now, after in pairwise(sigmas[1:-1]):
        a, a2 = 1 / (1 + now**2).sqrt(), 1 / (1 + after**2).sqrt()
        clean = a * x - now * a * v
        expected = a2 * clean + after * a2 * (x - a * clean) / (now * a)
        given = model_sampling.calculate_input(now[None], x / a)
        torch.testing.assert_close(given, x, rtol=1e-5, atol=1e-5)
        denoised = model_sampling.calculate_denoised(now[None], v, x / a)
        torch.testing.assert_close(denoised, clean, rtol=1e-4, atol=1e-4)
        stepped = x / a + (x / a - denoised) / now * (after - now)
        torch.testing.assert_close(a2 * stepped, expected, rtol=1e-3, atol=1e-3)


def test_core_still_samples_cogvideox_wrongly():
    """TELLS US WHEN COMFYUI MENDS IT: then a MODEL of Load DynamiCtrl needs no sampling of ours."""
    own = PLAIN.load().get_model_object("model_sampling")
    assert isinstance(own, V_PREDICTION_DDPM)
    sigma, x = own.sigmas[-1:], latent(1)
    started = own.noise_scaling(sigma, x.clone(), torch.zeros_like(x), max_denoise=True)
    assert own.calculate_input(sigma, started).std() > 4000  # the model was trained on 1
    right = mended(PLAIN.load()).get_model_object("model_sampling")
    assert isinstance(right, V_PREDICTION)
    assert 0.9 < right.calculate_input(sigma, right.noise_scaling(sigma, x.clone(), 0 * x, True)).std() < 1.1


def test_the_loader_mends_it_for_every_sampler():
    own = loaded().get_model_object("model_sampling")
    assert isinstance(own, V_PREDICTION)
    assert torch.equal(own.sigmas, sampling(loaded(), "DPM", 5).model.get_model_object("model_sampling").sigmas)


def test_other_models_are_refused():
    flux = families.ALL["flux"].load()
    with pytest.raises(ValueError, match="CogVideoX Sampling Preset needs a CogVideoX model, got Flux"):
        sampling(flux, "DPM", 5)
    with pytest.raises(ValueError, match="Load CogVideoX LoRA needs a CogVideoX model, got Flux"):
        cogvideox_lora.load(flux, "any.safetensors", 1.0)


# LoRAs


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    known = {**folder_paths.folder_names_and_paths, "loras": ([str(tmp_path)], {".safetensors"})}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def lora(naming: str, width: int = 128) -> dict[str, torch.Tensor]:
    """Two layers, at an alpha of half the rank where the naming has one."""
    generator, state = torch.Generator().manual_seed(1), {}
    for layer in ("transformer_blocks.0.attn1.to_q", "transformer_blocks.2.attn1.to_out.0"):
        down, up = (torch.randn(size, generator=generator) * 0.2 for size in ((4, width), (width, 4)))
        match naming:
            case "peft":
                found = {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up / 2}
            case "down and up":
                found = {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
                found[f"{layer}.alpha"] = torch.tensor(2.0)
            case _:
                flat = f"lora_unet_{layer.replace('.', '_')}"
                found = {
                    f"{flat}.lora_down.weight": down,
                    f"{flat}.lora_up.weight": up,
                    f"{flat}.alpha": torch.tensor(2.0),
                }
        state |= found
    return state


def test_the_layouts_of_all_trainers_give_one_picture(folder):
    outs = []
    for naming in ("peft", "down and up", "kohya"):
        save_file(lora(naming), folder / f"{naming}.safetensors")
        model, report = cogvideox_lora.load(loaded(), f"{naming}.safetensors", 1.0)
        assert report == f"{naming}.safetensors: 2 weights of the model changed"
        outs.append(sample(model, 2, positive=prompt(3, pose=latent(20))))
    close(outs[0], outs[1])
    close(outs[1], outs[2])
    assert (outs[0] - sample(loaded(), 2, positive=prompt(3, pose=latent(20)))).abs().mean() > 1e-3


def test_core_still_takes_none_of_them():
    """TELLS US WHEN COMFYUI LEARNS THESE NAMES: then its own LoRA loader does, and ours is not needed."""
    patched = comfy.sd.load_lora_for_models(loaded(), None, lora("peft"), 1.0, 0.0)[0]
    assert not patched.patches


def test_two_loras_add_up_and_strength_0_is_none(folder):
    save_file(lora("peft"), folder / "a.safetensors")
    once, _ = cogvideox_lora.load(loaded(), "a.safetensors", 1.0)
    twice, _ = cogvideox_lora.load(once, "a.safetensors", 0.5)
    more, _ = cogvideox_lora.load(loaded(), "a.safetensors", 1.5)
    close(sample(twice, 1), sample(more, 1), atol=1e-2)
    off, _ = cogvideox_lora.load(loaded(), "a.safetensors", 0.0)
    assert torch.equal(sample(off, 1), sample(loaded(), 1))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (
            {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(1)},
            "is no LoRA for CogVideoX",
        ),
        (
            {"transformer.transformer_blocks.7.attn1.to_q.lora_A.weight": torch.ones(1, 1)},
            "none of them is in this",
        ),
    ],
)
def test_a_lora_that_fits_nowhere_is_refused(folder, state, words):
    save_file(state, folder / "x.safetensors")
    with pytest.raises(ValueError, match=words) as refused:
        cogvideox_lora.load(loaded(), "x.safetensors", 1.0)
    assert str(refused.value).startswith("x.safetensors")


def test_what_is_left_out_is_told(folder):
    save_file({**lora("peft"), "text_encoder.q.lora_A.weight": torch.ones(1)}, folder / "x.safetensors")
    _, report = cogvideox_lora.load(loaded(), "x.safetensors", 1.0)
    assert report.endswith(
        "2 weights of the model changed; 1 keys name no layer of it, 'text_encoder.q.lora_A.weight' first"
    )


def test_a_lora_of_another_width_says_so(folder):
    save_file(lora("peft", width=64), folder / "x.safetensors")
    with pytest.raises(ValueError, match=r"does not fit this model: .* is for 64 channels, and the layer has 128"):
        cogvideox_lora.load(loaded(), "x.safetensors", 1.0)


def test_a_missing_or_a_damaged_file_is_said(folder):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors is not in models/loras"):
        cogvideox_lora.load(loaded(), "none.safetensors", 1.0)
    (folder / "x.safetensors").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"x\.safetensors is a web page"):
        cogvideox_lora.load(loaded(), "x.safetensors", 1.0)
