"""The trainer's own parts: its transformer is ComfyUI's, its optimiser does what its paper says."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dit_toolkit.models.control.easycontrol_keys import parse
from dit_toolkit.models.tiny_text import PAD, VOCABULARY
from dit_toolkit.models.tiny_vae import CHANNELS, SCALE, SHIFT, TinyVAE, fit_components
from dit_toolkit.training import adapters, data, optim, train
from dit_toolkit.training.flux import Flux, Size, export, patchify, trim, unpatchify


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


def test_a_brief_caption_keeps_what_is_shown():
    rng = np.random.default_rng(0)
    ids = data.padded_ids(
        "a doll with long brown hair, a red striped shirt and a blue skirt, arms up, on a grey ground"
    )
    things = {VOCABULARY.index(w) for w in ("doll", "arms", "up")}
    seen = set()
    for _ in range(50):
        short = train.brief(ids, rng)
        words = [w for w in short if w != PAD]
        assert len(short) == len(ids)
        assert things <= set(words)
        for noun, adjectives in (("hair", ("long", "brown")), ("shirt", ("red", "striped")), ("ground", ("grey",))):
            kept = VOCABULARY.index(noun) in words
            assert all((VOCABULARY.index(a) in words) == kept for a in adjectives)
        seen.add(tuple(words))
    assert len(seen) > 4


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


@pytest.fixture
def one_thread():
    """So that sums have one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_training_resumes_where_it_stopped(tmp_path, monkeypatch, one_thread):
    """Six steps at once, and three and three: the same weights."""
    monkeypatch.setattr(train, "WORK", tmp_path)
    monkeypatch.setattr(train, "device_of", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch, "compile", lambda model: model)
    recipe = train.Recipe(batch=4)
    latents, ids = torch.randn(32, 8, 4, 4).half(), torch.randint(1, 60, (32, 20)).to(torch.uint8)
    groups = [np.arange(32)] * 3

    def loss_of(model, step):
        x0, noise, t, words, guidance = train.batch_of(recipe, latents, ids, groups, step, "cpu")
        return torch.nn.functional.mse_loss(
            model(torch.lerp(x0, noise, t[:, None, None, None]), t, words, guidance), noise - x0
        )

    def fresh():
        torch.manual_seed(0)
        return train.Base(Size(live=8, double=1, single=1))

    whole = train.run_stage("whole", recipe, 6, fresh(), loss_of, every=6)
    monkeypatch.setattr(train, "schedule", lambda step, total: optim.schedule(step, 6))
    train.run_stage("parts", recipe, 3, fresh(), loss_of, every=3)
    parts = train.run_stage("parts", recipe, 6, fresh(), loss_of, every=3)
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """Folders of its own, and no compilation."""
    monkeypatch.setattr(train, "WORK", tmp_path / "work")
    monkeypatch.setattr(train, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setattr(train, "device_of", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch, "compile", lambda model: model)
    vae = TinyVAE(8, train.WIDTHS, operations=nn).requires_grad_(False)
    monkeypatch.setattr(train, "load_vae", lambda recipe: vae)
    return tmp_path / "weights"


def keep_base(recipe: train.Recipe, seed: int) -> None:
    """A checkpoint of a base that never learned anything."""
    torch.manual_seed(seed)
    model = train.Base(train.size_of(recipe))
    for weight in model.parameters():  # as made, its last layer is zero and passes no gradient on
        nn.init.normal_(weight, std=0.05)
    train.save(train.work(recipe) / "base.pt", {"ema": model.state_dict()})


@pytest.mark.parametrize("kind", adapters.KINDS)
def test_an_adapter_trains_resumes_and_is_exported_in_the_published_layout(kind, workshop):
    base, recipe = train.Recipe(pixels=32), adapters.AdapterRecipe(pool=500, steps=2, batch=4, rank=4)
    keep_base(base, 0)
    for _ in range(2):  # the second time there is nothing left to do but the export
        adapters.train_adapter(kind, base, recipe)
    checkpoint = parse(load_file(workshop / "easycontrol" / f"tiny_{kind}.safetensors"))
    ups = [weight for key, weight in checkpoint.slots[0].weights.items() if key.endswith("up.weight")]
    assert (checkpoint.dim, checkpoint.double, checkpoint.single) == (128, 2, 6)
    assert sum(bool(weight.any()) for weight in ups) >= len(ups) - 4  # they start at 0; the last block needs no proj


def test_another_base_gets_an_adapter_of_its_own_and_the_first_base_its_own_again(workshop):
    base, recipe = train.Recipe(pixels=32), adapters.AdapterRecipe(pool=500, steps=1, batch=2, rank=2)
    made = []
    for seed in (0, 1, 0):
        keep_base(base, seed)
        adapters.train_adapter("pose", base, recipe)
        made.append(load_file(workshop / "easycontrol" / "tiny_pose.safetensors"))
    first, second, again = made
    assert any(not torch.equal(first[key], second[key]) for key in first)
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_files_in_weights_can_be_read_by_anyone(workshop):
    path = train.write("one.safetensors", {"a": torch.zeros(1)}, {})
    assert path.stat().st_mode & 0o777 == 0o644
