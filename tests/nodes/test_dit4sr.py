"""The nodes of DiT4SR: sizes, sampling, what they refuse, and a whole run through core's nodes."""

from __future__ import annotations

import comfy_extras.nodes_custom_sampler as custom
import pytest
import torch

pytestmark = pytest.mark.comfy

from dit_toolkit.host.run import attached  # noqa: E402
from dit_toolkit.nodes.dit4sr import ApplyDiT4SR, DiT4SRPrompt, DiT4SRSampling  # noqa: E402
from dit_toolkit.tests.host import families  # noqa: E402
from dit_toolkit.tests.host.restore import tiny_dit4sr as tiny  # noqa: E402
from dit_toolkit.tests.nodes.calling import run_node  # noqa: E402
from dit_toolkit.tests.nodes.test_inputs import NAN, Vae, good  # noqa: E402

SMALL = {"min_side": 64, "tile": 8, "overlap": 4}


def photo(height=16, width=24, channels=3, batch=1):
    return torch.rand(batch, height, width, channels, generator=torch.Generator().manual_seed(height * width))


def applied(**values):
    given = {"MODEL of SD3": tiny.base(), "VAE": Vae(), "IMAGE": photo(), "DIT_DIT4SR": tiny.file()}
    return run_node(ApplyDiT4SR, **{**good(ApplyDiT4SR, given), **SMALL, "upscale_by": 4.0, **values})


@pytest.mark.parametrize(
    ("picture", "values", "sampled", "asked"),
    [
        (photo(), {}, (64, 96), (64, 96)),
        (photo(17, 25), {}, (64, 96), (68, 100)),
        (photo(1, 1), {}, (64, 64), (4, 4)),
        (photo(8, 16), {"upscale_by": 2.0}, (64, 128), (16, 32)),
        (photo(16, 24, channels=1, batch=2), {}, (64, 96), (64, 96)),
    ],
)
def test_sizes_go_together(picture, values, sampled, asked):
    model, latent, reference, width, height = applied(image=picture, **values)
    height_of, width_of = sampled
    assert latent["samples"].shape == (len(picture), 16, height_of // 8, width_of // 8)
    assert not latent["samples"].any()
    assert reference.shape == (len(picture), *sampled, 3)
    assert (height, width) == asked
    (settings,) = attached(model)
    assert torch.equal(settings.latent, Vae().encode(reference))
    out = tiny.sample(model, 1, size=(height_of // 8, width_of // 8), batch=len(picture))
    assert out.isfinite().all()


def test_strength_0_hands_the_model_on():
    model, latent, *_ = applied(strength=0.0)
    assert model is tiny.base()
    assert latent["samples"].shape == (1, 16, 8, 12)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"image": photo(channels=4)}, "Apply DiT4SR: 'image' has an alpha channel, and a photo has none. Put Split"),
        ({"image": photo() * NAN}, "Apply DiT4SR: 'image' has pixels that are no numbers"),
        ({"image": [photo(), photo(8, 8)]}, "Apply DiT4SR: 'image' must be pictures"),
        ({"image": photo(3000, 8), "upscale_by": 8.0}, "8 x 3000 pixels would come out 24000 pixels long. The most is"),
        ({"upscale_by": 1e9}, "Apply DiT4SR: 'upscale_by' must be a number from 1.0 to 8.0, got 1000000000.0"),
        ({"tile": 7}, "tile must be an even number of cells of the latent"),
        ({"overlap": 8}, r"overlap \(8\) must be smaller than tile \(8\)"),
        ({"start_percent": 0.6, "end_percent": 0.5}, "start_percent"),
        ({"dit4sr": None}, "Apply DiT4SR: 'dit4sr' is missing. Connect Load DiT4SR Patch"),
        ({"image": photo(80, 16), "tile": 0}, "in one piece are more than the model has positions for"),
    ],
)
def test_what_does_not_go_is_refused_in_a_sentence(values, words):
    with pytest.raises(ValueError, match=words) as refused:
        applied(**values)
    assert len(str(refused.value)) < 300


def test_another_model_is_refused():
    flux = families.FAMILIES["flux"].load()
    with pytest.raises(ValueError, match=r"Apply DiT4SR needs a Stable Diffusion 3\.5 Medium model, got Flux\."):
        applied(model=flux)
    with pytest.raises(ValueError, match=r"DiT4SR Sampling needs a Stable Diffusion 3\.5 Medium model, got Flux\."):
        run_node(DiT4SRSampling, model=flux, steps=40, cfg=8.0, shift=3.0)


def test_a_vae_that_breaks_is_refused():
    class Broken(Vae):
        def encode(self, pixels):
            return super().encode(pixels) * NAN

    class Other(Vae):
        def encode(self, pixels):
            return super().encode(pixels)[:, :4]

    with pytest.raises(ValueError, match="the encoded picture holds NaN or infinite values"):
        applied(vae=Broken())
    with pytest.raises(ValueError, match=r"must have 16 channels, got 4\. Connect the VAE of the model"):
        applied(vae=Other())


def schedule_by_definition(steps: int, shift: float = 3.0) -> torch.Tensor:
    """Diffusers' FlowMatchEulerDiscreteScheduler: even steps from the largest to the smallest, shifted once more."""

    def shifted(sigma):
        return shift * sigma / (1 + (shift - 1) * sigma)

    ends = shifted(torch.tensor([1.0, 0.001], dtype=torch.float64))
    even = torch.linspace(float(ends[0]), float(ends[1]), steps, dtype=torch.float64)
    return torch.cat([shifted(even), torch.zeros(1, dtype=torch.float64)])


@pytest.mark.parametrize("steps", [40, 20, 4])
def test_the_schedule_is_the_authors(steps):
    model, _, sigmas, cfg = run_node(DiT4SRSampling, model=tiny.base(), steps=steps, cfg=8.0, shift=3.0)
    torch.testing.assert_close(sigmas.double(), schedule_by_definition(steps), rtol=0, atol=1e-6)
    assert cfg == 8.0
    assert model.get_model_object("model_sampling").shift == 3.0


def test_the_published_schedule_has_the_noise_levels_of_the_card():
    sigmas = run_node(DiT4SRSampling, **good(DiT4SRSampling, {"MODEL of SD3": tiny.base()}) | {"steps": 40})[2]
    assert [round(float(sigmas[i]), 4) for i in (0, 1, -3, -2, -1)] == [1.0, 0.9913, 0.0810, 0.0089, 0.0]


def test_all_of_it_plugs_into_cores_sampler():
    model, latent, reference, *_ = applied()
    sampled, sampler, sigmas, cfg = run_node(DiT4SRSampling, model=model, steps=3, cfg=4.0, shift=3.0)
    out = custom.SamplerCustom.execute(
        sampled, True, 7, cfg, tiny.prompt(), tiny.prompt(4), sampler, sigmas, latent
    ).args[0]["samples"]
    assert out.shape == latent["samples"].shape
    assert out.isfinite().all()
    again = custom.SamplerCustom.execute(
        sampled, True, 7, cfg, tiny.prompt(), tiny.prompt(4), sampler, sigmas, latent
    ).args[0]["samples"]
    assert torch.equal(out, again)
    plain = custom.SamplerCustom.execute(
        run_node(DiT4SRSampling, model=tiny.base(), steps=3, cfg=4.0, shift=3.0)[0], True, 7, cfg, tiny.prompt(),
        tiny.prompt(4), sampler, sigmas, latent,
    ).args[0]["samples"]  # fmt: skip
    assert (out - plain).abs().mean() > 0.01
    assert reference.min() >= 0
    assert reference.max() <= 1


def test_the_prompt_node_gives_both_prompts():
    positive, negative = run_node(DiT4SRPrompt, caption="A fox. It is blurred.", preset="published", filter=True)
    assert positive.startswith("A fox. Cinematic, ")
    assert negative.startswith("motion blur, noisy")
    assert run_node(DiT4SRPrompt, caption="A fox. It is blurred.", preset="none", filter=False) == (
        "A fox. It is blurred.",
        "",
    )
