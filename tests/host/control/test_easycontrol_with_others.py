"""EasyControl beside what else users put on a MODEL: LoRAs, fp8, caches, guidance, masks, windows, compilation."""

from __future__ import annotations

import comfy.hooks
import comfy.samplers
import pytest
import torch
from comfy.ldm.flux.math import apply_rope
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_custom_sampler import Guider_DualModel
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from comfy_extras.nodes_flux import FluxKVCache
from comfy_extras.nodes_rope import ScaleROPE
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

from dit_toolkit.host.control import conditions_run
from dit_toolkit.host.families import flux
from dit_toolkit.host.part_of_run import PartOfRun
from dit_toolkit.tests.host.tiny import (
    HIDDEN,
    close,
    controlled,
    flux_state,
    latent,
    load_flux,
    lora_file,
    prompt,
    sample,
)

pytestmark = pytest.mark.comfy

QKV = "diffusion_model.double_blocks.0.img_attn.qkv"
LINEAR1 = "diffusion_model.single_blocks.1.linear1"


def small(*shape, seed=0):
    return 0.03 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_lora_on_the_base_acts_on_picture_and_condition(tiny_flux, file):
    """Patched weights and weights that were trained so are the same model, for the condition too."""
    changes = {QKV: small(3 * HIDDEN, HIDDEN), LINEAR1: small(7 * HIDDEN, HIDDEN, seed=1)}
    patched = tiny_flux.clone()
    patched.add_patches({f"{name}.weight": ("diff", (change,)) for name, change in changes.items()}, 0.7)
    state = flux_state()
    for name, change in changes.items():
        state[f"{name.removeprefix('diffusion_model.')}.weight"] += 0.7 * change
    close(sample(controlled(patched, file=file)), sample(controlled(load_flux(state), file=file)))
    assert (sample(controlled(patched, file=file)) - sample(controlled(tiny_flux, file=file))).abs().mean() > 0.01
    before = sample(controlled(tiny_flux, file=file))
    after = controlled(tiny_flux, file=file)
    after.add_patches({f"{QKV}.weight": ("diff", (changes[QKV],))}, 1.0)  # a LoRA node behind ours
    assert not torch.equal(sample(after), before)


def test_a_lora_that_is_scheduled_per_prompt_refreshes_the_keys(tiny_flux, file, encodings):
    """Hook weights change during the run: at the first keyframe and at the second."""
    results = []
    for cache in ("on GPU", "off"):
        hooks = comfy.hooks.create_hook_lora({f"{QKV}.diff": small(3 * HIDDEN, HIDDEN)}, 1.0, 0.0)
        frames = comfy.hooks.HookKeyframeGroup()
        frames.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.0))
        frames.add(comfy.hooks.HookKeyframe(strength=0.2, start_percent=0.5))
        hooks.set_keyframes_on_hooks(frames)
        encodings.clear()
        positive = prompt(hooks=hooks)
        results.append(sample(controlled(tiny_flux, file=file, cache=cache), 4, positive=positive))
        assert len(encodings) == (2 if cache == "on GPU" else 4)
    assert torch.equal(*results)
    assert (results[0] - sample(controlled(tiny_flux, file=file), 4)).abs().mean() > 0.001


def test_fp8_weights_are_read_through_core(tiny_state, file):
    """As UNETLoader's weight_dtype does: the same picture as from the same numbers, rounded to fp8, in float32."""
    model = load_flux(tiny_state, dtype=torch.float8_e4m3fn)
    assert model.model.diffusion_model.double_blocks[0].img_attn.qkv.weight.dtype == torch.float8_e4m3fn
    rounded = {name: weight.to(torch.float8_e4m3fn).float() for name, weight in tiny_state.items()}
    out = sample(controlled(model, file=file))
    close(out, sample(controlled(load_flux(rounded), file=file)), atol=1e-4)
    assert (out - sample(model)).abs().mean() > 0.01


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("node", [EasyCacheNode, LazyCacheNode])
def test_step_caches_of_core_go_on_working(tiny_flux, file, caplog, node, ours_first):
    def cached(model):
        return node.execute(model, 0.9, 0.15, 0.95, False).args[0]

    model = cached(controlled(tiny_flux, file=file)) if ours_first else controlled(cached(tiny_flux), file=file)
    with caplog.at_level("INFO"):
        out = sample(model, 12)
    skipped = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert len(skipped) == 1
    assert "skipped 0/" not in skipped[0]
    assert torch.isfinite(out).all()
    assert (out - sample(cached(tiny_flux), 12)).abs().mean() > 0.01


def test_the_picture_keeps_its_number_of_tokens(tiny_flux, file):
    """ControlNets add to it, caches and masks count on it."""
    counts, seen = [], []

    def count(inputs):
        counts.append(inputs["img"].shape[1])
        return inputs

    def wrapped(args, extra):
        seen.append(args["img"].shape[1])
        return extra["original_block"](args)

    model = controlled(tiny_flux, file=file)
    model.set_model_patch(count, "post_input")
    model.set_model_patch_replace(wrapped, "dit", "double_block", 0)
    sample(model, 2)
    assert counts == seen == [16, 16]


def test_controlnet_residuals_are_added_to_the_picture(tiny_flux, file):
    def with_residual(model):
        def add(executor, x, t, c_concat, c_crossattn, control, options, **kwargs):
            residual = small(1, 16, HIDDEN) * 20
            return executor(x, t, c_concat, c_crossattn, {"input": [residual], "output": [residual]}, options, **kwargs)

        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", add)
        return model

    both = sample(with_residual(controlled(tiny_flux, file=file)))
    assert torch.isfinite(both).all()
    for one in (with_residual(tiny_flux), controlled(tiny_flux, file=file)):
        assert (both - sample(one)).abs().mean() > 0.01


def test_skip_layer_guidance_evaluates_the_condition_in_its_extra_pass(tiny_flux, file, encodings):
    """The extra pass has a lane of its own, and no pass is answered with the keys of another."""
    results = []
    for cache in ("on GPU", "off"):
        encodings.clear()
        model = controlled(tiny_flux, file=file, cache=cache)
        (model,) = SkipLayerGuidanceDiT.execute(model, 2.0, 0.0, 1.0, double_layers="1").args
        results.append(sample(model, 3, cfg=2.0))
        assert len(encodings) == (3 if cache == "on GPU" else 9)
    assert torch.equal(*results)


def test_prompts_for_an_area_see_the_condition_there(tiny_flux, file, encodings):
    area = prompt(5, area=(4, 4, 0, 4), strength=1.0)
    results = []
    for cache in ("on GPU", "off"):
        encodings.clear()
        model = controlled(tiny_flux, file=file, cache=cache)
        results.append(sample(model, 3, cfg=2.0, positive=prompt() + area))
        grids = {source.rest[0] for source in encodings}
        assert grids == {(4, 4), (2, 2)}
    assert torch.equal(*results)
    assert torch.isfinite(results[0]).all()


def windowed(model):
    """Core's node: windows of two pictures of the batch."""
    schedule = {"context_schedule": "standard_static", "context_stride": 1, "closed_loop": False, "fuse_method": "flat"}
    return ContextWindowsManualNode.execute(model, 2, 0, **schedule, dim=0, freenoise=False).args[0]


@pytest.mark.parametrize("pictures", [1, 4])
def test_context_windows_over_a_batch_take_the_conditions_along(tiny_flux, file, pictures):
    """Two windows of two pictures each, without overlap: the same as two runs."""
    conditions, noise = latent(8, (6, 6), pictures), latent(7, (8, 8), 4)
    together = sample(windowed(controlled(tiny_flux, file=file, condition=conditions)), noise=noise)
    halves = []
    for start in (0, 2):
        part = conditions if pictures == 1 else conditions[start : start + 2]
        halves.append(sample(controlled(tiny_flux, file=file, condition=part), noise=noise[start : start + 2]))
    close(together, torch.cat(halves))


def test_context_windows_share_the_keys_of_one_condition(tiny_flux, file, encodings, monkeypatch):
    """Once per prompt, as without windows; not once per window. Core was asked for that much room."""
    asked, size_of_keys = [], conditions_run.size_of_keys
    monkeypatch.setattr(
        conditions_run,
        "size_of_keys",
        lambda base, latent, rows: asked.append(rows) or size_of_keys(base, latent, rows),
    )
    sample(windowed(controlled(tiny_flux, file=file)), noise=latent(7, (8, 8), 6), cfg=2.0)
    assert [source.rows for source in encodings] == [1, 1]
    assert asked[0] == 2  # before anything is encoded


def test_context_windows_keep_apart_what_differs(tiny_flux, file, encodings):
    """A condition or a text for each picture: every window has keys of its own, made once."""
    noise, texts = latent(7, (8, 8), 4), [prompt(seed) for seed in (3, 4, 5, 6)]
    each = [[torch.cat([text[0][0] for text in texts]), {**texts[0][0][1]}]]
    each[0][1]["pooled_output"] = torch.cat([text[0][1]["pooled_output"] for text in texts])
    for positive, conditions in ((prompt(), latent(8, (6, 6), 4)), (each, latent(8, (6, 6)))):
        encodings.clear()
        model = controlled(tiny_flux, file=file, condition=conditions)
        together = sample(windowed(model), noise=noise, positive=positive)
        assert [source.rows for source in encodings] == [2, 3]  # core lets a picture before the second window join it
        close(together, sample(model, noise=noise, positive=positive))


def test_an_attention_mask_of_the_conditioning_goes_on_to_act(tiny_flux, file):
    """Core passes it on as an additive mask over text and picture."""
    model = controlled(tiny_flux, file=file)
    neutral = torch.zeros(1, 5 + 16, 5 + 16)
    masked = neutral.clone()
    masked[..., 5:, 1:3] = -10.0

    def run(mask):
        def give(executor, *args, **kwargs):
            return executor(*args, **kwargs, attention_mask=mask)

        masks = controlled(tiny_flux, file=file)
        masks.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", give)
        return sample(masks, 2)

    close(run(neutral), sample(model, 2))
    assert (run(masked) - sample(model, 2)).abs().mean() > 1e-3


def test_a_patch_that_rotates_by_itself_comes_first(tiny_flux, file):
    def rotates(q, k, v, pe=None, attn_mask=None, extra_options=None):
        q, k = apply_rope(q, k, pe)
        return {"q": q, "k": k, "v": v, "pe": None}

    for earlier in (True, False):
        model = tiny_flux.clone()
        if earlier:
            model.set_model_attn1_patch(rotates)
        model = controlled(model, file=file)
        if not earlier:
            model.set_model_attn1_patch(rotates)  # a node behind ours; the run puts our patch behind it
        assert torch.equal(sample(model, 2), sample(controlled(tiny_flux, file=file), 2))


def test_reference_latents_and_their_cache_go_together_with_conditions(tiny_flux, file):
    positive = prompt(reference_latents=[latent(30, (4, 6))], reference_latents_method="offset")
    plain = sample(controlled(tiny_flux, file=file), positive=positive)
    (cached,) = FluxKVCache.execute(tiny_flux).args
    out = sample(controlled(cached, file=file), positive=positive)
    # FluxKVCache keeps the references' keys of the first step, an approximation that is its own.
    change = (plain - sample(tiny_flux, positive=positive)).abs().mean()
    assert change > 0.01
    assert (out - sample(cached, positive=positive)).abs().mean() > 0.5 * change


def test_scaled_positions_scale_those_of_the_condition(tiny_flux):
    transformer = tiny_flux.model.diffusion_model
    options = {"rope_options": {"scale_y": 0.5, "scale_x": 2.0, "shift_y": 3.0, "shift_x": -1.0, "shift_t": 4.0}}
    _, ids = transformer.process_img(latent(size=(8, 12)), transformer_options=options)
    _, plain = transformer.process_img(latent(size=(8, 12)))
    assert torch.equal(flux.rotations(transformer, plain[0], options), transformer.pe_embedder(ids[:1]))


def test_a_rope_node_takes_the_condition_along(tiny_flux, file, monkeypatch):
    model = controlled(tiny_flux, file=file)
    (scaled,) = ScaleROPE.execute(model, 0.5, 0.0, 0.5, 0.0, 1.0, 0.0).args
    assert (sample(scaled) - sample(model)).abs().mean() > 1e-3
    seen, rotations = [], flux.rotations
    monkeypatch.setattr(flux, "rotations", lambda *args: seen.append(args[2]["rope_options"]) or rotations(*args))
    sample(scaled, 1)
    assert seen[0]["scale_y"] == 0.5


def test_a_guider_with_two_models_controls_the_one_that_was_asked(tiny_flux, file):
    negative_model = load_flux(flux_state(seed=9))

    def run(model):
        guider = Guider_DualModel(model, negative_model)
        guider.set_conds(prompt(), prompt(4))
        guider.set_cfg(2.0)
        noise = latent(7, (8, 8))
        sampler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.0])
        return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=0)

    # One step to 0: negative + 2 (positive - negative), so a control on the positive side shows twice.
    gained = run(controlled(tiny_flux, file=file)) - run(tiny_flux)
    close(gained, 2 * (sample(controlled(tiny_flux, file=file), 1) - sample(tiny_flux, 1)), atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_follows_the_condition_at_every_step(backend):
    """A patch that is traced once and frozen would answer with the keys of the first step."""
    torch._dynamo.reset()
    size = {"double": 1, "single": 1}  # tracing takes seconds a block
    small, file = load_flux(flux_state(**size)), lora_file(**size)

    def compiled(model):
        model = model.clone()
        options = {"guard_filter_fn": skip_torch_compile_dict}  # as core's TorchCompileModel, which has no such backend
        set_torch_compile_wrapper(model=model, backend=backend, options=options)
        return model

    window = {"part": PartOfRun(0.3, 0.8)}
    plain = controlled(small, file=file, **window)
    expected = sample(plain, 5)
    assert (expected - sample(small, 5)).abs().mean() > 0.01
    close(sample(compiled(plain), 5), expected, atol=1e-4)
    close(sample(controlled(compiled(small), file=file, **window), 5), expected, atol=1e-4)


def test_the_adapters_belong_to_the_model_and_are_copied_with_it(tiny_flux, file):
    model = controlled(controlled(tiny_flux, file=file), seed=2)
    keys = [key for key in model.additional_models if key.startswith("dit_toolkit.easycontrol")]
    assert len(keys) == 2
    clone = model.clone()
    assert torch.equal(sample(clone), sample(model))
    assert not tiny_flux.additional_models
