"""The panel nodes as a workflow meets them: through ComfyUI's own VAE, sampler, server and trainer."""

from __future__ import annotations

import io
from types import SimpleNamespace

import comfy.sample
import comfy.sampler_helpers
import comfy.sd
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.comfy

from comfy_api.latest import io as schema_io  # noqa: E402

from dit_toolkit.models.control.panel_layout import PRESETS  # noqa: E402
from dit_toolkit.models.control.panel_pictures import panels_of  # noqa: E402
from dit_toolkit.nodes.in_context_lora import (  # noqa: E402
    PanelLatent,
    PanelLayout,
    PanelSets,
    PrepareTraining,
    SplitPanels,
    pictures,
)
from dit_toolkit.tests.nodes.calling import defaults, run_node  # noqa: E402

LAYOUT = defaults(PanelLayout)


def layout(**values):
    """The outputs of Panel Layout: small panels, unless something else is asked."""
    return run_node(PanelLayout, **{"panel_width": 96, "panel_height": 96, **values})


def latent(panels, vae, *images, fit="crop", encode="per panel", start="neutral", batch_size=1):
    named = {f"image_{place}": image for place, image in enumerate(images, 1)}
    return PanelLatent.execute(vae, fit, encode, start, batch_size, panels, named).args


def split(panels, image=None, inset=0, **others):
    (parts,) = SplitPanels.execute(inset, panels, image, **others).args
    return parts


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def default():
    """The embedded default."""
    from dit_toolkit.host import embedded

    return SimpleNamespace(model=embedded.load_model(), clip=embedded.load_clip(), vae=embedded.load_vae())


@pytest.fixture(scope="module")
def drawings():
    """Pictures of the world that the embedded default knows, `[4, 96, 96, 3]`."""
    from dit_toolkit.training import world

    images = [world.render(scene, 96).image for scene, _ in zip(world.scenes(3, (0, 0, 1, 0)), range(4), strict=False)]
    return torch.stack([torch.from_numpy(each).float() / 255 for each in images])


# Schemas


def test_widgets_keep_their_names_and_places():
    ids = [[entry.id for entry in node.define_schema().inputs] for node in (PanelLayout, PanelLatent, SplitPanels)]
    assert ids == [
        ["preset", "rows", "columns", "panel_width", "panel_height", "tags", "prefix", "summary", "panel_prompts",
         "given"],
        ["panels", "vae", "images", "fit", "encode", "start", "batch_size"],
        ["image", "panels", "inset", "canvas", "latent", "vae"],
    ]  # fmt: skip
    assert [entry.id for entry in PanelSets.define_schema().inputs] == ["folder", "panels", "fit"]
    options = PanelLayout.define_schema().inputs[0]
    assert isinstance(options, schema_io.Combo.Input)
    assert options.options == ["custom", *PRESETS]


# Panel Layout


def test_layout_gives_prompt_and_canvas():
    values = dict(preset="film-storyboard", summary="A storm", panel_prompts="rain\nwind\ncalm", given="2")
    panels, prompt, width, height = layout(**values)
    assert (width, height) == (1024, 1536)
    assert prompt == "[MOVIE-SHOTS] A storm, [SCENE-1] rain, [SCENE-2] wind, [SCENE-3] calm."
    assert panels.given == (1,)
    assert PanelLayout.execute(**{**LAYOUT, **values}).ui.as_dict() == {"text": (prompt,)}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"panel_width": 100}, r"'panel_width' must be a multiple of 16 pixels, got 100\. Take 96 or 112\."),
        ({"rows": 12}, r"Panel Layout: 'rows' must be a whole number from 1 to 8, got 12\."),
        ({"given": "3"}, "panel numbers from 1 to 2"),
        ({"panel_prompts": "a\nb\nc"}, "3 lines for 2 panels"),
    ],
)
def test_numbers_that_come_over_a_link_are_checked(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        layout(**values)


# Panel Latent


def test_without_pictures_it_is_an_empty_latent(default):
    panels, *_ = layout(rows=2, columns=2)
    samples, canvas, mask = latent(panels, default.vae, batch_size=3)
    assert samples.keys() == {"samples", "downscale_ratio_spacial"}
    assert torch.equal(samples["samples"], torch.zeros(3, 16, 24, 24))
    assert torch.equal(canvas, torch.full((1, 192, 192, 3), 0.5))
    assert torch.equal(mask, torch.ones(1, 192, 192))


def test_given_panels_are_encoded_by_themselves_and_masked_on_token_lines(default, drawings):
    panels, *_ = layout(rows=2, columns=3, given="2, 6")
    samples, canvas, _ = latent(panels, default.vae, drawings[:1], drawings[1:2], batch_size=2)
    assert torch.equal(panels_of(panels, canvas)[[1, 5]], drawings[:2])
    grey = default.vae.encode(torch.full((1, 96, 96, 3), 0.5))
    parts = [grey, default.vae.encode(drawings[:1]), grey, grey, grey, default.vae.encode(drawings[1:2])]
    for index, part in enumerate(parts):
        y, x = index // 3 * 12, index % 3 * 12
        for sample in samples["samples"]:
            assert torch.equal(sample[:, y : y + 12, x : x + 12], part[0])

    mask = comfy.sampler_helpers.prepare_mask(samples["noise_mask"], samples["samples"].shape, "cpu")
    assert mask.shape == (2, 16, 24, 36)
    for index in range(6):
        y, x = index // 3 * 12, index % 3 * 12
        assert bool((mask[..., y : y + 12, x : x + 12] == (0.0 if index in (1, 5) else 1.0)).all())


def test_the_whole_canvas_can_be_encoded_at_once(default, drawings):
    panels, *_ = layout(given="1")
    samples, canvas, _ = latent(panels, default.vae, drawings[:1], encode="whole canvas")
    assert torch.equal(samples["samples"], default.vae.encode(canvas))
    assert "noise_mask" in samples


def test_other_panels_can_begin_as_the_first_given_one(default, drawings):
    panels, *_ = layout(rows=1, columns=3, given="2, 3")
    samples, canvas, _ = latent(panels, default.vae, drawings[:1], drawings[1:2], start="first given panel")
    first, second, third = samples["samples"].split(12, -1)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert torch.equal(canvas[:, :, :96], drawings[:1])


def test_canvas_and_mask_fit_comfyuis_own_inpainting(default, drawings):
    """What a model that is made to inpaint is given: the mask, and the canvas without the panels to be generated."""
    from nodes import InpaintModelConditioning

    panels, *_ = layout(rows=2, columns=2, given="1, 4")
    samples, canvas, mask = latent(panels, default.vae, drawings[:1], drawings[1:2], encode="whole canvas",
                                   start="first given panel", batch_size=3)  # fmt: skip
    assert mask.shape == canvas.shape[:3] == (1, 192, 192)
    expected = torch.ones(2, 96, 2, 96)
    expected[0, :, 0] = expected[1, :, 1] = 0
    assert torch.equal(mask, expected.view(1, 192, 192))

    text = [[torch.zeros(1, 20, 128), {}]]
    positive, _, start = InpaintModelConditioning().encode(text, text, canvas, default.vae, mask, True)
    grey = torch.full((1, 96, 96, 3), 0.5)
    blank = torch.cat([torch.cat([drawings[:1], grey], 2), torch.cat([grey, drawings[1:2]], 2)], 1)
    assert torch.equal(positive[0][1]["concat_latent_image"], default.vae.encode(blank))
    assert torch.equal(positive[0][1]["concat_mask"], samples["noise_mask"])
    assert torch.equal(start["samples"], samples["samples"][:1])


def test_inputs_are_taken_by_number_and_batches_one_by_one():
    one, two = noise(1, 20, 30, 3), noise(2, 8, 8, 3)
    taken = pictures({"image_10": one, "image_2": two, "image_1": None})
    assert len(taken) == 3
    assert torch.equal(torch.cat(taken[:2]), two)
    assert torch.equal(taken[2], one)
    assert pictures(None) == pictures({}) == []


@pytest.mark.parametrize(
    ("values", "images", "options", "sentence"),
    [
        ({"given": "1, 2"}, 1, {}, r"marks 2 panels as given \(1, 2\), but 1 pictures are connected"),
        ({}, 1, {}, r"0 panels as given \(none\), but 1 pictures"),
        ({}, 0, {"start": "first given panel"}, "'start' first given panel needs a given panel"),
        ({"given": "1"}, 1, {"encode": "twice"}, "'encode' must be one of 'per panel', 'whole canvas'; got 'twice'"),
    ],
)
def test_pictures_that_do_not_match_the_layout_are_refused(default, values, images, options, sentence):
    panels, *_ = layout(**values)
    with pytest.raises(ValueError, match=sentence):
        latent(panels, default.vae, *[noise(1, 96, 96, 3)] * images, **options)


def test_a_vae_with_coarser_pixels_is_refused_where_it_would_cut():
    panels, *_ = layout(panel_width=80)
    vae = SimpleNamespace(spacial_compression_encode=lambda: 32)
    with pytest.raises(ValueError, match="one latent pixel of 32 x 32, and panels of 80 x 96 do not end on one"):
        latent(panels, vae)


# Sampling


def constant(model, value, seen=None):
    """`model`, which now thinks that every latent pixel is `value`."""

    def answer(_, given):
        if seen is not None:
            seen.append((given["input"].clone(), given["timestep"].clone()))
        return torch.full_like(given["input"], value)

    patched = model.clone()
    patched.set_model_unet_function_wrapper(answer)
    return patched


def sampled(model, samples, steps=4, sampler="euler", scheduler="simple", denoise=1.0, seed=5):
    start = samples["samples"]
    return comfy.sample.sample(
        model,
        comfy.sample.prepare_noise(start, seed),
        steps,
        1.0,
        sampler,
        scheduler,
        [[torch.zeros(1, 20, 128), {"pooled_output": torch.zeros(1, 128)}]],
        [],
        start,
        denoise=denoise,
        noise_mask=samples.get("noise_mask"),
        disable_pbar=True,
        seed=seed,
    )


@pytest.fixture(scope="module")
def one_given(default, drawings):
    panels, *_ = layout(rows=1, columns=3, given="2")
    samples, canvas, _ = latent(panels, default.vae, drawings[:1], batch_size=2)
    return panels, samples, canvas


EXACT = 5e-6  # x + (x - x0) / sigma * (0 - sigma) is x0 up to rounding
SAMPLERS = {"euler": EXACT, "heun": EXACT, "dpmpp_2m": EXACT, "euler_ancestral": EXACT, "res_multistep": EXACT,
            "uni_pc": 0.02}  # ends at noise level 0.001, and leaves that much  # fmt: skip


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_was_given_comes_out_as_it_went_in(default, one_given, sampler):
    """The model's answer is the same everywhere, so whatever differs comes from the mask."""
    _, samples, _ = one_given
    left, known, right = sampled(constant(default.model, 0.3), samples, sampler=sampler).split(12, -1)
    torch.testing.assert_close(known, samples["samples"][..., 12:24], rtol=0, atol=SAMPLERS[sampler])
    answer = default.model.model.process_latent_out(torch.tensor(0.3))
    for unknown in (left, right):
        torch.testing.assert_close(unknown, answer.expand_as(unknown), rtol=0, atol=max(SAMPLERS[sampler], 1e-4))


def test_the_model_sees_given_panels_at_the_noise_level_of_the_step(default, one_given):
    """sigma * eps + (1 - sigma) * z with one eps for the run; the others as the sampler has them."""
    _, samples, _ = one_given
    seen = []
    sampled(constant(default.model, 0.3, seen), samples)
    known = default.model.model.process_latent_in(samples["samples"])[..., 12:24]
    eps = comfy.sample.prepare_noise(samples["samples"], 5)[..., 12:24]
    assert len(seen) == 4
    for x, sigma in seen:
        s = sigma[:, None, None, None]
        torch.testing.assert_close(x[..., 12:24], s * eps + (1 - s) * known, rtol=0, atol=1e-5)


def test_at_denoise_1_nothing_depends_on_what_the_others_begin_as(default, drawings):
    panels, *_ = layout(given="1")
    neutral, *_ = latent(panels, default.vae, drawings[:1])
    copied, *_ = latent(panels, default.vae, drawings[:1], start="first given panel")
    assert not torch.equal(neutral["samples"], copied["samples"])
    assert torch.equal(sampled(default.model, neutral, 3), sampled(default.model, copied, 3))
    assert not torch.equal(sampled(default.model, neutral, 3, denoise=0.6),
                           sampled(default.model, copied, 3, denoise=0.6))  # fmt: skip


def test_panels_see_each_other(default, drawings):
    """One sequence: with another picture given, the panel beside it comes out otherwise."""
    panels, *_ = layout(given="1")
    one, *_ = latent(panels, default.vae, drawings[:1])
    two, *_ = latent(panels, default.vae, drawings[1:2])
    assert not torch.equal(sampled(default.model, one, 3)[..., 12:], sampled(default.model, two, 3)[..., 12:])


def psnr(a, b):
    return float(-10 * torch.log10(((a - b).detach() ** 2).mean()))


def test_with_everything_given_the_panels_come_back_within_the_round_trip_of_the_vae(default, drawings):
    panels, *_ = layout(rows=2, columns=2, given="1, 2, 3, 4")
    samples, canvas, _ = latent(panels, default.vae, *drawings.split(1))
    assert torch.count_nonzero(samples["noise_mask"]) == 0
    out = sampled(default.model, samples)
    alone = torch.cat([default.vae.decode(default.vae.encode(each)) for each in drawings.split(1)])

    one_by_one = split(panels, latent={"samples": out}, vae=default.vae)
    torch.testing.assert_close(one_by_one, alone, rtol=0, atol=1e-4)

    decoded = default.vae.decode(out)
    whole = default.vae.decode(default.vae.encode(canvas))
    torch.testing.assert_close(split(panels, decoded), panels_of(panels, whole), rtol=0, atol=1e-4)
    for part, round_trip, drawing in zip(split(panels, decoded, inset=16), alone, drawings, strict=True):
        inner = slice(16, -16)  # here the decoder no longer sees the neighbours
        assert psnr(part, drawing[inner, inner]) > psnr(round_trip[inner, inner], drawing[inner, inner]) - 0.2

    assert torch.equal(split(panels, decoded, canvas=canvas), drawings)
    assert torch.equal(split(panels, latent={"samples": out}, vae=default.vae, canvas=canvas), drawings)


# Split Panels


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({}, "needs either 'image', or 'latent' and 'vae'"),
        ({"image": 1, "latent": 1, "vae": 1}, "needs either 'image', or 'latent' and 'vae'"),
        ({"latent": 1}, "needs 'vae' to decode 'latent'"),
    ],
)
def test_it_says_what_there_is_to_split(values, sentence):
    panels, *_ = layout()
    stand_ins = {"image": noise(1, 96, 192, 3), "latent": {"samples": noise(1, 16, 12, 24)}}
    with pytest.raises(ValueError, match=sentence):
        split(panels, **{name: stand_ins.get(name, value) for name, value in values.items()})


def test_of_a_video_each_frame_is_a_canvas():
    """As VAE Decode and Split Panels with its frames would have it, the given panels untouched."""
    panels, *_ = layout(columns=3, given="2", panel_width=32, panel_height=16)
    video = noise(2, 4, 5, 2, 12)  # two videos of five frames
    frames = video[:, :3].movedim(1, -1).repeat_interleave(8, 2).repeat_interleave(8, 3)
    vae = SimpleNamespace(
        decode=lambda z: z[:, :3].movedim(1, -1).repeat_interleave(8, 2).repeat_interleave(8, 3)  # [B, T, H, W, C]
    )
    for canvas in (None, noise(1, 16, 96, 3, seed=1), noise(10, 16, 96, 3, seed=2)):
        parts = split(panels, latent={"samples": video}, vae=vae, canvas=canvas)
        assert parts.shape == (2 * 5 * 3, 16, 32, 3)
        assert torch.equal(parts, split(panels, frames.reshape(10, 16, 96, 3), canvas=canvas))


def test_split_is_exact_for_every_preset():
    for name in PRESETS:
        panels, _, width, height = layout(preset=name)
        small = noise(2, height // 16, width // 16, 3)
        parts = split(panels, small, inset=1)
        h, w = panels.panel_height // 16, panels.panel_width // 16
        for place, part in enumerate(parts):
            picture, index = divmod(place, panels.count)
            y, x = index // panels.columns * h, index % panels.columns * w
            assert torch.equal(part, small[picture, y + 1 : y + h - 1, x + 1 : x + w - 1]), name


# On the server: pictures of different sizes over a growing input. And training


def test_a_given_panel_goes_through_a_workflow(server):
    for name, size, colour in (("wide.png", (200, 50), "red"), ("high.png", (60, 90), "blue")):
        Image.new("RGB", size, colour).save(server.base / "input" / name)
    prompt = {
        "layout": {"class_type": "DiTPanelLayout", "inputs": {
            **LAYOUT, "rows": 1, "columns": 3, "panel_width": 48, "panel_height": 32, "given": "1, 3",
            "panel_prompts": "a red ball\na box\na blue ball"}},
        "default": {"class_type": "DiTLoadEmbedded", "inputs": {}},
        "wide": {"class_type": "LoadImage", "inputs": {"image": "wide.png"}},
        "high": {"class_type": "LoadImage", "inputs": {"image": "high.png"}},
        "latent": {"class_type": "DiTPanelLatent", "inputs": {
            "panels": ["layout", 0], "vae": ["default", 2], "images.image_1": ["wide", 0],
            "images.image_2": ["high", 0], "fit": "crop", "encode": "per panel", "start": "neutral", "batch_size": 2}},
        "text": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["default", 1], "text": ["layout", 1]}},
        "sampler": {"class_type": "KSampler", "inputs": {
            "model": ["default", 0], "seed": 1, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple",
            "positive": ["text", 0], "negative": ["text", 0], "latent_image": ["latent", 0], "denoise": 1.0}},
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["sampler", 0], "vae": ["default", 2]}},
        "split": {"class_type": "DiTPanelSplit", "inputs": {
            "image": ["decode", 0], "panels": ["layout", 0], "inset": 0, "canvas": ["latent", 1]}},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["split", 0], "filename_prefix": "panel"}},
    }  # fmt: skip
    result = server.client.run(prompt)
    assert result.outputs["layout"]["text"] == ["[IMAGE1] a red ball; [IMAGE2] a box; [IMAGE3] a blue ball."]
    saved = [Image.open(io.BytesIO(server.client.fetch(image))).convert("RGB") for image in result.images]
    assert [picture.size for picture in saved] == [(48, 32)] * 6
    for picture in (0, 3):
        assert saved[picture].getcolors() == [(48 * 32, (255, 0, 0))]
        assert saved[picture + 2].getcolors() == [(48 * 32, (0, 0, 255))]


@pytest.mark.parametrize("checkpoints", [False, True])
def test_the_example_sets_train_a_lora_with_comfyuis_own_nodes(default, checkpoints):
    """One step of two sets on the prepared model; what comes out, core's loader puts on the plain one."""
    from comfy_extras.nodes_dataset import MakeTrainingDataset
    from comfy_extras.nodes_train import TrainLoraNode

    panels, *_ = layout(panel_width=32, panel_height=32)
    folder = PanelSets.define_schema().inputs[0].options[0]
    with torch.inference_mode():  # as ComfyUI runs every node
        images, texts = PanelSets.execute(folder, "crop", panels).args
        assert len(images) == len(texts) == 20
        assert images[0].shape == (1, 32, 64, 3)
        latents, conditioning = MakeTrainingDataset.execute(images[:2], [default.vae], [default.clip], texts[:2]).args
        assert latents[0]["samples"].shape == (1, 16, 4, 8)
        chosen = {"batch_size": 2, "grad_accumulation_steps": 1, "steps": 1, "learning_rate": 0.001, "rank": 2,
                  "optimizer": "AdamW", "loss_function": "MSE", "seed": 0, "training_dtype": "fp32",
                  "lora_dtype": "bf16", "quantized_backward": False, "algorithm": "LoRA",
                  "gradient_checkpointing": checkpoints, "checkpoint_depth": 2, "offloading": False,
                  "existing_lora": "[None]", "bucket_mode": False, "bypass_mode": False}  # fmt: skip
        trained = TrainLoraNode.execute(
            model=[PrepareTraining.execute(default.model).args[0]],
            latents=latents,
            positive=conditioning,
            **{name: [value] for name, value in chosen.items()},
        )
    lora = trained.args[0]
    patched, _ = comfy.sd.load_lora_for_models(default.model, None, lora, 1.0, 0.0)
    assert len(patched.patches) > 20
