"""The embedded default through ComfyUI's own classes: it loads, agrees with the trainer, and does what the card says.

Pictures are judged by the world's scorer, which knows what was asked for and nothing of the model. Thresholds stand
well below what weights/README.md measured, and well above what a broken model reaches.
"""

import logging
from dataclasses import dataclass

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.sd
import numpy as np
import pytest
import torch
from comfy import latent_formats

from dit_toolkit.host import embedded
from dit_toolkit.host.control.easycontrol_files import load as load_lora
from dit_toolkit.models.tiny_text import SLOTS
from dit_toolkit.models.tiny_vae import SCALES
from dit_toolkit.nodes.easycontrol import ApplyEasyControl
from dit_toolkit.tests.nodes.calling import run_node
from dit_toolkit.training import data, world
from dit_toolkit.training.easycontrol import caption_for, condition_picture
from dit_toolkit.training.embedded import load_shipped
from dit_toolkit.training.measure import shipped
from dit_toolkit.training.score import edge_distance, score, silhouette_agreement

pytestmark = pytest.mark.comfy

SCALE, SHIFT = SCALES["FLUX.1"]
SIDE, STEPS, CFG = 96, 12, 2.5  # the example workflows take 20 steps


@dataclass
class Stack:
    """The three objects that Load Embedded Model gives."""

    model: object
    clip: object
    vae: object

    def words(self, *texts: str):
        """CONDITIONING with a row per text."""
        rows = [self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))[0] for text in texts]
        pooled = torch.cat([about["pooled_output"] for _, about in rows])
        return [[torch.cat([context for context, _ in rows]), {**rows[0][1], "pooled_output": pooled}]]

    @torch.inference_mode()
    def latents(
        self, model, *texts, seed=1, cfg=CFG, steps=STEPS, size=(SIDE, SIDE), batch=1, sampler="euler"
    ):  # fmt: skip
        """A picture for each text, or `batch` for one."""
        empty = torch.zeros(max(batch, len(texts)), 16, size[0] // 8, size[1] // 8)
        noise = comfy.sample.prepare_noise(empty, seed)
        return comfy.sample.sample(
            model, noise, steps, cfg, sampler, "simple", self.words(*texts), self.words(""), empty, seed=seed,
            disable_pbar=True,
        )  # fmt: skip

    @torch.inference_mode()
    def pictures(self, model, texts, seed) -> np.ndarray:
        """One for each text, drawn together. uint8 RGB `[N, 96, 96, 3]`."""
        shown = self.vae.decode(self.latents(model, *texts, seed=seed))
        return (shown * 255).round().byte().numpy()


@pytest.fixture(scope="module")
def stack() -> Stack:
    return Stack(embedded.load_model(), embedded.load_clip(), embedded.load_vae())


@pytest.fixture(scope="module")
def apply(stack):
    """Apply EasyControl as the node does, with a tiny adapter and a picture `[N, S, S, 3]` uint8."""

    @torch.inference_mode()
    def applied(pictures, adapter="edge", kind="spatial", model=None):
        image = torch.from_numpy(np.asarray(pictures)).float() / 255
        image = image if image.ndim == 4 else image[None]
        return run_node(
            ApplyEasyControl, model=model or stack.model, easycontrol=load_lora(f"tiny_{adapter}.safetensors"),
            kind=kind, condition_size=SIDE, image=image, vae=stack.vae,
        )[0]  # fmt: skip

    return applied


# It loads, and is what the trainer made


def test_comfyui_recognises_the_transformer_as_flux(stack):
    assert type(stack.model.model.model_config).__name__ == "Flux"
    assert stack.model.cached_patcher_init is not None  # compiling, hooks and several GPUs need it


def test_latents_are_in_the_scale_of_comfyuis_own_formats():
    formats = {"FLUX.1": latent_formats.Flux(), "SD3": latent_formats.SD3()}
    assert {base: (each.scale_factor, each.shift_factor) for base, each in formats.items()} == SCALES


def test_the_transformer_computes_what_the_trainers_does(stack):
    base, _ = load_shipped()
    live = base.flux.size.live
    x = torch.randn(2, 16, 12, 12, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([data.padded_ids(t) for t in ("a red ball, on a white ground", "a doll, waving")])
    t, guidance = torch.tensor([0.8, 0.3]), torch.tensor([3.5, 3.5])
    with torch.inference_mode():
        context, pooled = base.text(ids)
        ours = base.flux(x[:, :live], t, context, pooled, guidance)
        theirs = stack.model.model.diffusion_model(x, t, context, pooled, guidance)
    assert torch.allclose(theirs[:, :live], ours, atol=2e-5)
    assert not theirs[:, live:].any()


def test_the_text_encoder_computes_what_the_trainers_does(stack):
    base, _ = load_shipped()
    text = "a doll with short black hair, a red shirt and a blue skirt"
    with torch.inference_mode():
        context, pooled = base.text(torch.tensor([data.padded_ids(text)]))
    cond, about = stack.words(text)[0]
    assert torch.allclose(cond, context, atol=1e-5)
    assert torch.allclose(about["pooled_output"], pooled, atol=1e-5)


def test_the_autoencoder_computes_what_the_trainers_does(stack):
    _, vae = load_shipped()
    shown = np.stack([world.render(s, SIDE).image for s in shipped.some(4, (0, 1.0, 1.0))])
    image = torch.from_numpy(shown).float() / 255
    with torch.inference_mode():
        latents = stack.vae.encode(image)
        live = vae.patch_in(image.movedim(-1, 1) * 2 - 1)
        assert torch.allclose((latents[:, : vae.live] - SHIFT) * SCALE, live, atol=1e-4)
        back = stack.vae.decode(latents)
        expected = ((vae.decode_live(live) + 1) / 2).clamp(0, 1).movedim(1, -1)
    assert torch.allclose(back, expected, atol=1e-4)


def test_the_round_trip_through_the_autoencoder_is_close(stack):
    shown = np.stack([world.render(s, SIDE).image for s in shipped.some(64, data.LEVELS)])
    image = torch.from_numpy(shown).float() / 255
    with torch.inference_mode():
        back = stack.vae.decode(stack.vae.encode(image))
    assert -10 * torch.log10((back - image).square().mean()) > 29


def test_tiled_decoding_agrees(stack):
    latents = stack.latents(stack.model, "a red ball, on a white ground", steps=2, size=(384, 384))
    with torch.inference_mode():
        whole, tiled = stack.vae.decode(latents), stack.vae.decode_tiled(latents, tile_x=32, tile_y=32, overlap=8)
    assert (whole - tiled).abs().mean() < 0.01


def test_a_missing_file_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "WEIGHTS", tmp_path)
    for load, name in (
        (embedded.load_model, "tiny_flux"),
        (embedded.load_clip, "tiny_text"),
        (embedded.load_vae, "tiny_vae"),
    ):
        with pytest.raises(FileNotFoundError, match=f"{name}.* is missing from the pack's 'weights' folder"):
            load()


# The prompt box


def test_prompt_weights_act_and_weight_one_does_not(stack):
    plain, same, more = (stack.words(t)[0][0] for t in ("a red ball", "a (red:1.0) ball", "a (red:1.4) ball"))
    assert torch.equal(plain, same)
    assert not torch.allclose(plain, more)


def test_synonyms_mean_the_same_and_unknown_words_are_logged(stack, caplog):
    with caplog.at_level(logging.INFO):
        strange = stack.words("A scarlet sphere, photorealistic, on white background")[0][0]
    assert torch.equal(strange, stack.words("a red ball on a white ground")[0][0])
    assert "does not know: photorealistic" in caplog.text


def test_an_empty_and_an_endless_prompt_have_the_same_shape(stack, caplog):
    assert stack.words("")[0][0].shape == (1, SLOTS, 128)
    with caplog.at_level(logging.INFO):
        assert stack.words("a red ball " * 30)[0][0].shape == (1, SLOTS, 128)
    assert "cut off" in caplog.text


# It draws what is asked for


def test_prompts_are_followed(stack):
    """Object, colour, position and ground all right, on held-out prompts."""
    scenes = shipped.some(32, data.LEVELS, seed=21)
    images = stack.pictures(stack.model, [world.caption(s) for s in scenes], seed=100)
    right = [score(i, s) for i, s in zip(images, scenes, strict=True)]
    assert np.mean([r.all for r in right]) >= 0.8
    shuffled = [score(i, s).all for i, s in zip(images, scenes[1:] + scenes[:1], strict=True)]
    assert np.mean(shuffled) <= 0.1


def test_the_same_seed_gives_the_same_picture(stack):
    text = "a blue star, on a grey ground"
    first, again = (stack.latents(embedded.load_model(), text, seed=4) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, stack.latents(stack.model, text, seed=5))


# EasyControl on it: what the condition does


@pytest.fixture(scope="module")
def edges(stack, apply):
    """24 held-out scenes drawn with their edges, without, and with somebody else's; the same prompts and noise.

    The prompts name things and colours, not places and poses: those are the condition's to give.
    """
    scenes = shipped.some(24, shipped.CONTROLLED["edge"], seed=31)
    rng = np.random.default_rng(0)
    maps = [condition_picture("edge", s, SIDE, rng) for s in scenes]
    truth = [world.canny(world.render(s, SIDE)) for s in scenes]
    captions = [shipped.prompt_for("edge", s) for s in scenes]
    models = {"with": apply(maps), "without": stack.model, "other": apply(maps[-1:] + maps[:-1])}
    images = {name: stack.pictures(model, captions, seed=200) for name, model in models.items()}
    return scenes, truth, images


def test_edges_are_followed(edges):
    """How far the picture's edges are from the true ones, in pixels: adherence itself, blind to colour and kind."""
    _, truth, images = edges
    apart = {
        name: np.mean([edge_distance(i, e) for i, e in zip(shown, truth, strict=True)])
        for name, shown in images.items()
    }
    assert 2 * apart["with"] <= min(apart["without"], apart["other"]), apart
    assert apart["with"] <= 3.0, apart


def test_edges_place_the_silhouette(edges):
    scenes, _, images = edges
    iou = {
        name: np.mean([silhouette_agreement(i, s) for i, s in zip(shown, scenes, strict=True)])
        for name, shown in images.items()
    }
    assert iou["with"] >= iou["without"] + 0.2, iou
    assert iou["with"] >= iou["other"] + 0.2, iou


def test_the_prompt_is_still_followed_under_edges(edges):
    scenes, _, images = edges
    assert (
        np.mean([score(i, s).colours and score(i, s).ground for i, s in zip(images["with"], scenes, strict=True)])
        >= 0.6
    )


# EasyControl on it: what a user may do with it


@pytest.fixture(scope="module")
def one(stack):
    scene = shipped.some(1, (0, 0, 1.0), seed=41)[0]
    return world.caption(scene), world.edge_map(world.render(scene, SIDE), 2)


def test_a_batch_of_conditions_is_as_one_for_all(stack, apply, one):
    text, edge = one
    pair = stack.latents(apply(np.stack([edge, edge])), text, batch=2, cfg=3.0)
    assert pair.shape[0] == 2
    assert torch.isfinite(pair).all()
    broadcast = stack.latents(apply(edge), text, batch=2, cfg=3.0)
    live = load_shipped()[0].flux.size.live
    assert torch.allclose(pair[:, :live], broadcast[:, :live], atol=1e-3)


def test_two_conditions_act_together(stack, apply):
    """The outline gives the pose, the reference the colours, and the prompt names neither."""
    scenes = shipped.some(16, (0, 0, 1.0), seed=51)
    rng = np.random.default_rng(1)
    texts = [caption_for("subject", scene) for scene in scenes]
    edged = apply([world.edge_map(world.render(scene, SIDE), 2) for scene in scenes])
    subjects = [condition_picture("subject", scene, SIDE, rng) for scene in scenes]
    models = {"edge and subject": apply(subjects, "subject", "subject", model=edged), "edge alone": edged}
    images = {name: stack.pictures(model, texts, seed=300) for name, model in models.items()}
    right = {
        name: [score(image, scene).colours for image, scene in zip(shown, scenes, strict=True)]
        for name, shown in images.items()
    }
    overlap = [silhouette_agreement(i, s) for i, s in zip(images["edge and subject"], scenes, strict=True)]
    share = {name: np.mean(values) for name, values in right.items()}
    assert share["edge and subject"] >= share["edge alone"] + 0.4, share
    assert np.mean(overlap) >= 0.8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_example_pictures_lie_where_load_image_puts_its_own(monkeypatch, dtype):
    """--gpu-only and --fp16-intermediates. No other device can be had here but one that holds no numbers."""
    name = embedded.example_names()[0]
    plain = embedded.load_example(name)
    monkeypatch.setattr(comfy.model_management, "intermediate_dtype", lambda: dtype)
    assert torch.equal(embedded.load_example(name), plain.to(dtype))
    monkeypatch.setattr(comfy.model_management, "intermediate_device", lambda: torch.device("meta"))
    assert embedded.load_example(name).device.type == "meta"
