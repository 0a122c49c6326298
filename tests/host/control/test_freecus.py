"""FreeCus on tiny random models, against the method written out: first the reference, all of it, then the picture."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import comfy.model_management
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.ldm.flux.math import apply_rope

from dit_toolkit.host import embedded
from dit_toolkit.host.control import freecus
from dit_toolkit.host.control.freecus_run import ReferencePass, ReferenceRun
from dit_toolkit.host.control.freecus_settings import Reference, resize_picture
from dit_toolkit.host.part_of_run import PartOfRun
from dit_toolkit.host.run import attached
from dit_toolkit.models.control.freecus import VITAL_LAYERS
from dit_toolkit.tests.host.tiny import WIDE, close, flux_state, latent, load_flux, prompt, sample

pytestmark = pytest.mark.comfy

SIZE = (8, 8)  # of the latent: 4 x 4 tokens, 64 x 64 pixels
SUBJECT = [5, 6, 9, 10]  # the four tokens in the middle


@pytest.fixture(scope="session")
def vae():
    return embedded.load_vae()


@pytest.fixture(scope="session")
def image():
    return torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(20))


@pytest.fixture(scope="session")
def mask():
    middle = torch.zeros(1, 64, 64)
    middle[:, 16:48, 16:48] = 1
    return middle


@pytest.fixture
def freed(tiny_flux, vae, image, mask):
    """`tiny_flux` with one reference."""

    def make(model=tiny_flux, *, image=image, mask=mask, layers="all", **settings):
        return freecus.attach(model, image, mask, vae, layers=layers, **settings)

    return make


@pytest.fixture
def passes(monkeypatch):
    """Every pass of the reference: how many conditions saw it."""
    seen, compute = [], ReferencePass.compute

    def counted(self):
        kept = compute(self)
        seen.append(len(self.which))
        return kept

    monkeypatch.setattr(ReferencePass, "compute", counted)
    return seen


def two_runs(model, z, text, *, layers, steps=3, scale=1.1, text_scale=1.1, mu_ref=0.459375, size=SIZE, tokens=SUBJECT):
    """FreeCus by definition, on the transformer itself: euler, no CFG. Two whole runs, the first one kept."""
    transformer, sampling = model.model.diffusion_model, model.get_model_object("model_sampling")
    comfy.model_management.load_models_gpu([model])
    sigmas = [float(s) for s in comfy.samplers.calculate_sigmas(sampling, "simple", steps)]
    noise, count = latent(seed=7, size=size), text[0][0].shape[1]
    depth, stored = len(transformer.double_blocks), {}

    def layer(options):
        return options["block_index"] + (depth if options["block_type"] == "single" else 0)

    def run(x, sigma, patch):
        options = {"patches": {"attn1_patch": [patch]}}
        return transformer(
            x, torch.tensor([sigma]), text[0][0], text[0][1]["pooled_output"], torch.tensor([3.5]),
            transformer_options=options,
        )  # fmt: skip

    for step, sigma in enumerate(sigmas[:-1]):
        t = 1 / (1 + math.exp(sampling.shift) * (1 / sigma - 1))  # the linear schedule
        level = math.exp(-mu_ref) / (math.exp(-mu_ref) + 1 / t - 1)

        def save(q, k, v, pe=None, attn_mask=None, extra_options=None, step=step):
            k = apply_rope(q, k, pe)[1][:, :, count:]
            stored[step, layer(extra_options)] = scale * k[:, :, tokens], v[:, :, count:][:, :, tokens].clone()
            return {}

        run(level * noise + (1 - level) * z, sigma, save)

    x = noise
    for step, (sigma, following) in enumerate(pairwise(sigmas)):

        def use(q, k, v, pe=None, attn_mask=None, extra_options=None, step=step):
            if layer(extra_options) not in layers:
                return {}
            k_ref, v_ref = stored[step, layer(extra_options)]
            q, k = apply_rope(q, k, pe)
            k = torch.cat([k_ref, text_scale * k[:, :, :count], k[:, :, count:]], 2)
            return {"q": q, "k": k, "v": torch.cat([v_ref, v], 2), "pe": None}

        x = x + (following - sigma) * run(x, sigma, use)
    return model.model.process_latent_out(x)


@pytest.fixture(scope="module")
def wide():
    return load_flux(flux_state(hidden=WIDE))


@pytest.mark.parametrize("layers", ["all", "0, 3", "1-2"])
def test_it_is_the_method_run_in_two_goes(wide, freed, vae, image, layers):
    z = wide.model.process_latent_in(vae.encode(image))
    which = {"all": range(4), "0, 3": (0, 3), "1-2": (1, 2)}[layers]
    with torch.no_grad():
        expected = two_runs(wide, z, prompt(), layers=which)
    found = sample(freed(wide, layers=layers), 3)
    assert (found - sample(wide, 3)).abs().mean() > 0.01
    close(found, expected, atol=1e-5)


def test_other_scales_and_shifts_are_the_method_too(tiny_flux, freed, vae, image):
    z = tiny_flux.model.process_latent_in(vae.encode(image))
    with torch.no_grad():
        expected = two_runs(tiny_flux, z, prompt(), layers=range(4), scale=1.4, text_scale=0.9, mu_ref=1.0)
    found = sample(freed(key_scale=1.4, text_key_scale=0.9, reference_shift=0.5, shift_mode="twice"), 3)
    close(found, expected, atol=1e-5)


def test_the_published_layers_of_a_model_as_deep_as_flux(vae, image, mask):
    """19 + 38 blocks: the ten layers by number, in both kinds of blocks."""
    model = load_flux(flux_state(double=19, single=38))
    patched = freecus.attach(model, image, mask, vae, layers="published")
    z = model.model.process_latent_in(vae.encode(image))
    with torch.no_grad():
        expected = two_runs(model, z, prompt(), layers=VITAL_LAYERS, steps=2)
    found = sample(patched, 2)
    scale = found.abs().mean()
    assert (found - sample(model, 2)).abs().mean() / scale > 0.01
    close(found / scale, expected / scale, atol=1e-5)


def test_a_range_of_steps(tiny_flux, freed, passes):
    """Simple, 4 steps: outside the range the model is as it was."""
    late = freed(part=PartOfRun(start=0.5))
    sample(late, 4)
    assert len(passes) == 2
    passes.clear()
    sample(freed(part=PartOfRun(end=0.5)), 4)
    assert len(passes) == 2
    only_first = sample(freed(part=PartOfRun(end=0.01)), 1, sampler="euler")
    assert (only_first - sample(tiny_flux, 1)).abs().mean() > 0.001


def test_no_pass_without_a_block_that_asks(tiny_flux, freed, passes):
    """Another node skips the only vital block: nothing of the reference is computed."""
    model = freed(layers="1")
    model.set_model_patch_replace(
        lambda args, extra: {"img": args["img"], "txt": args["txt"]}, "dit", "double_block", 1
    )
    skipped = tiny_flux.clone()
    skipped.set_model_patch_replace(lambda args, _: {"img": args["img"], "txt": args["txt"]}, "dit", "double_block", 1)
    assert torch.equal(sample(model, 2), sample(skipped, 2))
    assert passes == []


# prompts and batches


def apart(monkeypatch):
    """Core has room for one condition at a time."""
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda *_: 0)


@pytest.mark.parametrize("prompts", ["positive only", "positive and negative"])
def test_prompts_in_one_batch_or_apart(freed, passes, monkeypatch, prompts):
    model = freed(prompts=prompts)
    together = sample(model, 3, cfg=2.0)
    both = prompts != "positive only"
    assert passes == [2 if both else 1] * 3
    passes.clear()
    apart(monkeypatch)
    close(sample(model, 3, cfg=2.0), together)
    assert passes == [1] * (6 if both else 3)


def test_the_negative_prompt_sees_nothing_unless_it_is_asked_to(tiny_flux, freed):
    """One step to 0 is negative + 2 (positive - negative)."""
    positive = sample(freed(), 1)
    out = sample(freed(), 1, cfg=2.0)
    negative = sample(tiny_flux, 1, positive=prompt(4))
    close(out, negative + 2 * (positive - negative), atol=1e-4)
    out = sample(freed(prompts="positive and negative"), 1, cfg=2.0)
    negative = sample(freed(), 1, positive=prompt(4))
    close(out, negative + 2 * (positive - negative), atol=1e-4)


def test_each_call_of_the_pass_is_told_of_its_own_conditions_only(freed, monkeypatch):
    """CFG, positive only, one batch: lists with an entry per condition are as long as the batch of the pass."""
    seen, compute = [], ReferencePass.compute

    def watched(self):
        plain = self.plain
        self.plain = lambda x, t, c, text, control, options, **conds: (
            seen.append((self.x, x, t, text, options)) or plain(x, t, c, text, control, options, **conds)
        )
        return compute(self)

    monkeypatch.setattr(ReferencePass, "compute", watched)
    sample(freed(), 2, cfg=2.0, batch=3)
    assert len(seen) == 2
    for picture, x, t, text, options in seen:
        assert picture.shape[0] == 6
        assert x.shape[0] == t.shape[0] == text.shape[0] == 3
        assert len(options["cond_or_uncond"]) * 3 == len(options["uuids"]) * 3 == x.shape[0]
        assert options["cond_or_uncond"] == [0]
        torch.testing.assert_close(text, prompt()[0][0].expand(3, -1, -1))


def test_noise_of_its_own(freed):
    same, own = sample(freed(), 2), sample(freed(seed=1), 2)
    assert not torch.equal(same, own)
    assert torch.equal(own, sample(freed(seed=1), 2))
    assert not torch.equal(own, sample(freed(seed=2), 2))


def test_a_run_that_starts_without_noise_has_noise_for_the_reference(freed, monkeypatch, caplog):
    """The second half of a run in two samplers."""
    seen, level = [], ReferenceRun.noise_of

    def spy(self, *args):
        seen.append(level(self, *args))
        return seen[-1]

    monkeypatch.setattr(ReferenceRun, "noise_of", spy)
    state = torch.get_rng_state()
    with caplog.at_level("INFO"):
        sample(freed(), 1, noise=torch.zeros(1, 16, *SIZE))
    assert "starts without noise" in caplog.text
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(seen[0], comfy.sample.prepare_noise(torch.zeros(1, 16, *SIZE), 0))
    caplog.clear()
    with caplog.at_level("INFO"):
        sample(freed(), 1)
        sample(freed(seed=3), 1, noise=torch.zeros(1, 16, *SIZE))
    assert "starts without noise" not in caplog.text
    assert torch.equal(seen[-1], comfy.sample.prepare_noise(torch.zeros(1, 16, *SIZE), 3))


@pytest.mark.parametrize("size", [(7, 9), (10, 6)])
def test_odd_and_oblong_sizes(tiny_flux, freed, size):
    out = sample(freed(), 2, size=size)
    assert out.shape == (1, 16, *size)
    assert (out - sample(tiny_flux, 2, size=size)).abs().mean() > 1e-3


def test_an_odd_size_is_the_method_too(tiny_flux, freed, vae, image):
    """Tokens at the right and lower edge are half outside of the picture."""
    z = tiny_flux.model.process_latent_in(vae.encode(resize_picture(image.movedim(-1, 1), 56, 72).movedim(1, -1)))
    tokens = [6, 7, 11, 12]  # rows 14 to 42, columns 18 to 54, in 4 x 5 tokens of 16 pixels: by their middles
    with torch.no_grad():
        expected = two_runs(tiny_flux, z, prompt(), layers=range(4), size=(7, 9), tokens=tokens)
    close(sample(freed(fit="stretch"), 3, size=(7, 9)), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tiny_state, freed, dtype):
    model = load_flux(tiny_state, dtype=dtype)
    out = sample(freed(model), 2)
    assert torch.isfinite(out).all()
    change = (sample(freed(), 2) - sample(load_flux(tiny_state), 2)).abs().mean()
    assert (out - sample(freed(), 2)).abs().mean() < 0.5 * change


# the reference


def test_a_mask_of_another_size_is_laid_over_the_picture(freed):
    small = torch.zeros(1, 8, 8)
    small[:, 2:6, 2:6] = 1
    (settings,) = attached(freed(mask=small))
    assert settings.reference.tokens(*SIZE, (4, 4)).tolist() == pytest.approx([5, 6, 9, 10])


def test_a_probability_is_a_mask_where_it_is_a_byte_or_more(freed, mask):
    """Core's background removal gives a sigmoid, which is nowhere 0."""
    soft = (18 * mask - 9).sigmoid()
    assert soft.min() > 0
    assert torch.equal(sample(freed(mask=soft), 2), sample(freed(), 2))
    with pytest.raises(ValueError, match="mask is empty"):
        freed(mask=torch.full((1, 64, 64), 0.5 / 255))


@pytest.mark.parametrize("side", [64, 96, 128])
def test_a_thin_subject_in_a_large_picture_leaves_a_trace(side):
    """A pole, 1/64 of the width of the reference, between the middles of tokens."""
    mask = torch.zeros(1, 2048, 2048)
    mask[:, :, 1024 : 1024 + 32] = 1
    tokens = reference_of(torch.zeros(1, 2048, 2048, 3), mask).tokens(side, side, (side // 2, side // 2))
    assert len(set((tokens // (side // 2)).tolist())) == side // 2
    assert len(tokens) <= 2 * side * side / 2 / 32


def test_a_hatched_mask_is_not_lost_between_the_pixels_of_a_small_picture():
    """Three of eight pixels, none of which bilinear shrinking would look at."""
    mask = torch.zeros(1, 512, 512)
    mask[..., torch.arange(512) % 8 > 4] = 1
    assert reference_of(torch.zeros(1, 512, 512, 3), mask).tokens(*SIZE, (4, 4)).tolist() == list(range(16))


def reference_of(image, mask, fit="crop", vae=None):
    return Reference(image, mask, vae, fit)


def test_one_crop_for_picture_and_mask(vae):
    """A subject at the left end of an oblong picture: cropped away, kept by padding, kept by stretching."""
    image = torch.full((1, 64, 128, 3), 0.5)
    mask = torch.zeros(1, 64, 128)
    mask[:, :, :24] = 1
    with pytest.raises(ValueError, match="'fit' to 'pad'"):
        reference_of(image, mask).tokens(*SIZE, (4, 4))
    assert reference_of(image, mask, "stretch").tokens(*SIZE, (4, 4)).tolist() == [0, 4, 8, 12]
    padded = reference_of(image, mask, "pad").tokens(*SIZE, (4, 4)).tolist()
    assert padded == [4, 8]  # 32 rows of 64, in the middle
    seen = []
    spy = SimpleNamespace(encode=lambda pixels: seen.append(pixels) or vae.encode(pixels))
    marked = image.clone()
    marked[:, :, 32:96] = 1
    for fit in ("crop", "pad", "stretch"):
        assert reference_of(marked, mask, fit, spy).latent(*SIZE).shape == (1, 16, *SIZE)
    crop, pad, stretch = seen
    assert crop.shape == pad.shape == stretch.shape == (1, 64, 64, 3)
    assert crop.min() == 1
    assert pad[0, :, 0].max() < 0.6  # the border goes on
    assert 0.4 < (stretch > 0.9).float().mean() < 0.6


def test_a_reference_without_a_mask_is_the_whole_picture(freed):
    assert torch.equal(sample(freed(mask=None), 2), sample(freed(mask=torch.ones(1, 64, 64)), 2))
    assert not torch.equal(sample(freed(mask=None), 2), sample(freed(), 2))


def test_a_reference_with_an_alpha_channel_or_in_grey(freed, image):
    with_alpha = torch.cat([image, torch.ones(1, 64, 64, 1)], -1)
    assert torch.equal(sample(freed(image=with_alpha), 1), sample(freed(), 1))
    assert torch.isfinite(sample(freed(image=image[..., :1]), 1)).all()


def test_the_reference_is_encoded_once_for_a_size(freed, vae, image, monkeypatch):
    count, encode = [], vae.encode
    monkeypatch.setattr(vae, "encode", lambda pixels: count.append(1) or encode(pixels))
    model = freed()
    sample(model, 1)
    sample(model, 1)
    assert len(count) == 1


# bad input


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"mask": torch.zeros(1, 64, 64)}, "mask is empty"),
        ({"mask": torch.full((1, 64, 64), math.nan)}, "mask holds NaN"),
        ({"mask": torch.ones(2, 64, 64)}, "one mask"),
        ({"image": torch.rand(2, 64, 64, 3)}, "one reference picture"),
        ({"image": torch.full((1, 64, 64, 3), math.nan)}, "NaN"),
        ({"key_scale": 0.0}, "key_scale"),
        ({"text_key_scale": math.nan}, "text_key_scale"),
        ({"reference_shift": math.inf}, "reference_shift"),
        ({"shift_mode": "none"}, "shift_mode"),
        ({"prompts": "negative only"}, "prompts"),
        ({"fit": "squeeze"}, "fit"),
        ({"layers": "4"}, "0 to 3"),
    ],
)
def test_what_means_nothing_is_refused(freed, settings, told):
    with pytest.raises(ValueError, match=told):
        freed(**settings)


def test_a_vae_of_another_model_is_refused_when_the_run_starts(tiny_flux, image, mask):
    for shape, told in (((1, 4, *SIZE), "4 channels"), ((1, 16, 4, 4), "8 x 8")):
        other = SimpleNamespace(encode=lambda pixels, shape=shape: torch.zeros(shape))
        model = freecus.attach(tiny_flux, image, mask, other, layers="all")
        with pytest.raises(ValueError, match=told):
            sample(model, 1)
    assert torch.isfinite(sample(tiny_flux, 1)).all()


@pytest.mark.parametrize("channels", [32, 96])
def test_a_model_that_takes_a_second_picture_is_refused(vae, image, channels):
    """Canny and Depth have 16 channels more, Fill 80: those of the picture that is drawn."""
    with pytest.raises(ValueError, match="models that take one picture"):
        freecus.attach(load_flux(flux_state(channels=channels)), image, None, vae, layers="all")


def test_a_lora_that_makes_a_model_take_a_second_picture_is_refused(tiny_flux, freed, monkeypatch):
    """It may come after the node, and shows when the model is called."""
    monkeypatch.setattr(tiny_flux.model, "concat_cond", lambda noise, **_: noise)
    with pytest.raises(ValueError, match="models that take one picture"):
        sample(freed(), 1)


# what the log says


def test_a_run_in_which_the_subject_never_acted_says_so(freed, caplog):
    sample(freed(), 2)
    assert "never acted" not in caplog.text
    sample(freed(part=PartOfRun(start=0.9999)), 2)
    assert caplog.text.count("never acted") == 1


def test_the_published_layers_of_a_model_of_another_depth_are_told(freed, caplog):
    with caplog.at_level("INFO"):
        freed(layers="all")
        assert "published layers" not in caplog.text
        freed(layers="Published")
    assert "2 double and 2 single blocks, so all of them" in caplog.text
