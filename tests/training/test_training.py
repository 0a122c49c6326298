"""The trainer's own parts: its transformer is ComfyUI's, its optimiser does what its paper says."""

import numpy as np
import pytest
import torch
from torch import nn

from dit_toolkit.models.tiny_vae import CHANNELS, SCALES, TinyVAE, fit_components
from dit_toolkit.training import checkpoints, optim
from dit_toolkit.training.flux import Flux, Size, export, patchify, trim, unpatchify

SCALE, SHIFT = SCALES["FLUX.1"]


def test_export_and_trim_are_inverse_and_dead_channels_are_silent():
    torch.manual_seed(0)
    model = Flux(Size(live=3, double=1, single=1))
    for p in model.parameters():
        nn.init.normal_(p, std=0.05)
    whole = export(model.state_dict(), 3)
    assert whole["img_in.weight"].shape == (128, CHANNELS * 4)
    assert not whole["final_layer.linear.weight"][12:].any()
    back = trim(whole, 3)
    assert all(torch.equal(back[k], v) for k, v in model.state_dict().items())


def test_patches_go_there_and_back():
    x = torch.randn(2, 5, 6, 8)
    assert torch.equal(unpatchify(patchify(x), 3, 4), x)


def test_newton_schulz_makes_all_singular_values_alike():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(optim.orthogonalise(torch.randn(3, 40, 24)))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_the_schedule_warms_up_holds_and_falls():
    rates = [optim.schedule(step, 1000) for step in range(1000)]
    assert rates[0] < 0.05
    assert rates[200] == rates[390] == 1.0
    assert rates[-1] == pytest.approx(0.02, abs=1e-3)


def test_components_are_a_principal_component_analysis():
    """Against numpy: the linear round trip leaves exactly the variance of the components that were dropped."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((12, 192)) * np.linspace(3, 0.2, 12)[:, None]
    flat = rng.standard_normal((4000, 12)) @ mixing + 0.1 * rng.standard_normal((4000, 192)) + 0.3
    patches = torch.from_numpy(flat).float().reshape(-1, 3, 8, 8)
    fitted = fit_components(patches, live=5)
    values = np.linalg.eigvalsh(np.cov(flat.T))[::-1]
    np.testing.assert_allclose(fitted["eigenvalues"][:12], values[:12], rtol=1e-3)
    vae = TinyVAE(5, (8, 8, 8), operations=nn)
    vae.load_state_dict({k: v for k, v in fitted.items() if k != "eigenvalues"}, strict=False)
    with torch.no_grad():
        z = vae.patch_in(patches)
        back = vae.linear(z)
    assert z.flatten(1).var(0).mean() == pytest.approx(1, abs=0.01)
    assert z.mean(0).abs().max() < 1e-3
    left = (back - patches).flatten(1).pow(2).sum(1).mean()
    assert float(left) == pytest.approx(values[5:].sum(), rel=0.01)


def test_latents_have_flux_scale_and_silent_dead_channels():
    torch.manual_seed(0)
    vae = TinyVAE(5, (8, 8, 8), operations=nn).requires_grad_(False)
    latents = vae.encode(torch.rand(1, 3, 16, 24) * 2 - 1)
    assert latents.shape == (1, CHANNELS, 2, 3)
    assert torch.equal(latents[:, 5:], torch.full_like(latents[:, 5:], SHIFT))
    again = vae.decode_live((latents[:, :5] - SHIFT) * SCALE)
    assert torch.allclose(vae.decode(latents), again)


def test_files_in_weights_can_be_read_by_anyone(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoints, "WEIGHTS", tmp_path)
    path = checkpoints.write("one.safetensors", {"a": torch.zeros(1)}, {})
    assert path.stat().st_mode & 0o777 == 0o644
