"""Sets of one doll in two scenes: they are what they say, can be read back, and train through ComfyUI's own nodes."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dit_toolkit.models.tiny_text import SLOTS, word_ids
from dit_toolkit.training import checkpoints, data, in_context, world
from dit_toolkit.training.comfyui import comfyui
from dit_toolkit.training.embedded import load_shipped
from dit_toolkit.training.measure import in_context as measure
from dit_toolkit.training.measure import shipped
from dit_toolkit.training.score import OUTFIT, agreement, read_doll

pytestmark = pytest.mark.long

SIDE = 96


@pytest.fixture(scope="module")
def sets() -> list[in_context.Set]:
    return list(islice(world.sets(3, test=True), 24))


def pictures(sets, panel: int) -> np.ndarray:
    return np.stack([world.render(scenes[panel], SIDE).image for scenes in sets])


def outfits(left, right) -> float:
    """Share of pairs that agree in the whole outfit."""
    common = [agreement(read_doll(a), read_doll(b)) for a, b in zip(left, right, strict=True)]
    return float(np.mean([all(found[part] for part in OUTFIT) for found in common]))


# The sets


def test_a_set_is_one_doll_in_two_scenes(sets):
    for first, second in sets:
        a, b = first.things[0], second.things[0]
        assert replace(a, x=b.x, y=b.y, size=b.size, arms=b.arms, legs=b.legs) == b
        assert first.ground != second.ground
        assert first.pose != second.pose
        assert "dark" not in (first.ground, second.ground) or a.hair != "black"  # would not show


def test_captions_fit_the_encoder_and_the_silent_ones_name_no_clothes(sets):
    for scenes in sets:
        for named in (True, False):
            text = world.set_caption(scenes, named)
            ids, _ = word_ids(text)
            assert len(ids) <= SLOTS
            assert ("shirt" in text, "hair" in text) == (named, named)
            assert text.index("[LEFT]") < text.index("[RIGHT]")


def test_training_sees_neither_held_out_wordings_nor_held_out_scenes(sets):
    trained = list(islice(world.sets(3), 200))
    told = {world.set_caption(scenes, named=False) for scenes in trained}
    assert not told & {world.set_caption(scenes, named=False) for scenes in sets}
    assert not any(world.held_out(scene) for scenes in trained for scene in scenes)


def test_shares_of_captions(sets):
    recipe = in_context.InContextRecipe(named=0.3, empty=0.1)
    told = in_context.captions(sets * 50, recipe)
    assert np.mean([not word_ids(text)[0] for text in told]) == pytest.approx(0.1, abs=0.03)
    assert all(told)  # the node refuses an empty caption
    assert np.mean(["shirt" in text for text in told]) == pytest.approx(0.3, abs=0.04)


# Reading a doll


def test_what_a_doll_wears_is_read_from_the_picture(sets):
    left, right = pictures(sets, 0), pictures(sets, 1)
    assert outfits(left, right) >= 0.95
    for image, scenes in zip(left, sets, strict=True):
        seen, doll = read_doll(image), scenes[0].things[0]
        assert seen is not None
        assert (seen.colour, seen.pattern, seen.bottom_colour, seen.hair, seen.skin) == (
            doll.colour, doll.pattern, doll.bottom_colour, doll.hair, doll.skin,
        )  # fmt: skip


def test_and_after_the_autoencoder(sets):
    _, vae = load_shipped()
    left, right = (shipped.pictures(vae, data.encode(vae, pictures(sets, k))) for k in range(2))
    assert outfits(left, right) >= 0.9


def test_other_dolls_do_not_agree(sets):
    assert outfits(np.roll(pictures(sets, 0), 1, 0), pictures(sets, 1)) <= 0.1


def test_each_part_is_judged_by_itself():
    doll = world.Thing("doll", 0.5, 0.5, 0.9, "red", "striped", "skirt", "blue", "brown", "long")
    changed = {"hair": "black", "colour": "green", "bottom_colour": "pink", "bottom": "trousers",
               "pattern": "plain", "skin": 2, "hairstyle": "short"}  # fmt: skip
    parts = ("hair", "shirt", "bottom", "garment", "pattern", "skin", "hairstyle")
    for (name, value), part in zip(changed.items(), parts, strict=True):
        common = agreement(doll, replace(doll, **{name: value}))
        assert common == {other: other != part for other in parts}
    assert "hairstyle" not in agreement(doll, replace(doll, arms=(150.0, 150.0)))
    assert not any(agreement(doll, None).values())
    assert not agreement(replace(doll, pattern=""), replace(doll, pattern=""))["pattern"]


def test_an_object_or_nothing_is_no_doll():
    ball = world.Scene("grey", (world.Thing("ball", 0.5, 0.5, 0.6, "red"),))
    assert read_doll(world.render(ball, SIDE).image) is None
    assert read_doll(world.render(world.Scene("grey", ()), SIDE).image) is None


def test_the_judge_is_right_on_the_truth_and_chance_is_beside_it(sets):
    sets = sets[:12]
    found = measure.judge(sets)
    assert found["world's own pictures"]["outfit"] >= 0.95
    assert found["after the autoencoder"]["outfit"] >= 0.9
    assert measure.tally(pictures(sets, 0), pictures(sets, 1), sets) == found["world's own pictures"]
    other = measure.chance(pictures(sets, 0), pictures(sets, 1), sets)
    assert other["outfit"] <= 0.1
    assert other["dolls"] == found["world's own pictures"]["dolls"]


# Training by ComfyUI's own nodes


@pytest.fixture
def host():
    return comfyui()


class Differentiate:
    """A sampler in Train LoRA's place: the prediction for a batch with a condition each, and its derivative."""

    def __init__(self, x, sigma, weight):
        self.x, self.sigma, self.weight = x, sigma, weight

    def sample(self, model_wrap, sigmas, extra_args, *others, **more):
        self.x.requires_grad_(True)
        self.denoised = model_wrap(self.x, self.sigma, **extra_args)
        (self.denoised * self.weight).sum().backward()
        return self.x.detach()

    def max_denoise(self, *_):
        return True


def differentiated(host, model, texts, x, sigma, weight):
    from comfy_extras.nodes_train import TrainGuider

    clip = host.embedded.load_clip()
    rows = [clip.encode_from_tokens_scheduled(clip.tokenize(text))[0] for text in texts]
    guider, sampler = TrainGuider(model), Differentiate(x.clone(), sigma, weight)
    guider.set_conds([[context, about] for context, about in rows])
    guider.sample(torch.zeros_like(x), torch.zeros_like(x), sampler, sigma, seed=0)
    return sampler.denoised.detach(), sampler.x.grad


@pytest.mark.comfy
def test_the_model_trains_with_the_derivative_of_the_trainers_own_on_each_pictures_caption(host, monkeypatch):
    """Against the plain-torch twin: prediction and derivative, each picture with its own caption."""
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "in_training", True)  # as Train LoRA does
    texts = ["a doll waving, on a grey ground", "a red ball, on a white ground", "a doll, arms up, on a dark ground"]
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(3, 16, 12, 24, generator=generator) for _ in range(2))
    sigma = torch.tensor([0.9, 0.5, 0.2])
    twin, _ = load_shipped()
    live = twin.flux.size.live
    own = x[:, :live].clone().requires_grad_(True)
    ids = torch.tensor([data.padded_ids(text) for text in texts])
    expected = own - sigma[:, None, None, None] * twin(own, sigma, ids, torch.full((3,), 3.5))
    (expected * weight[:, :live]).sum().backward()

    model = host.embedded.load_model().clone(force_deepcopy=True)
    model.model.requires_grad_(False)
    denoised, slope = differentiated(host, in_context.trainable(model, live), texts, x, sigma, weight)
    torch.testing.assert_close(denoised[:, :live], expected.detach(), rtol=0, atol=1e-4)
    torch.testing.assert_close(slope[:, :live], own.grad, rtol=0, atol=2e-4)
    assert not denoised[:, live:].any()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # what it puts right
        differentiated(host, model, texts, x, sigma, weight)


@pytest.mark.comfy
def test_sets_go_through_comfyuis_nodes_into_a_lora_that_its_loader_takes(host, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(checkpoints, "WEIGHTS", tmp_path)
    monkeypatch.setattr(checkpoints, "WORK", tmp_path)
    recipe = in_context.InContextRecipe(sets=3, steps=2, batch=2, rank=4)
    losses = in_context.train_in_context(recipe)
    assert len(losses) == 2
    weights = load_file(tmp_path / in_context.NAME)
    assert {w.dtype for w in weights.values()} == {torch.float16}
    assert weights["diffusion_model.single_blocks.0.linear1.lora_down.weight"].shape == (4, 128)

    import comfy.sd

    base = host.embedded.load_model()
    caplog.clear()
    patched, _ = comfy.sd.load_lora_for_models(base, None, weights, 1.0, 0)
    assert "not loaded" not in caplog.text
    assert len(patched.patches) == len(
        [name for name in weights if name.endswith(("lora_up.weight", ".diff", ".diff_b"))]
    )
