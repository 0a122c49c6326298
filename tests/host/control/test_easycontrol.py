"""EasyControl on a tiny FLUX.1, sampled by ComfyUI itself: its keys, their cache, and what it says."""

from __future__ import annotations

import gc
import logging
import weakref

import comfy.ldm.chroma.model
import comfy.ldm.flux.model
import comfy.model_management
import comfy.ops
import comfy.supported_models
import pytest
import torch
from comfy.model_patcher import ModelPatcher

from dit_toolkit.host.control import easycontrol
from dit_toolkit.host.control.conditions_run import Encoder, size_of_keys
from dit_toolkit.host.families import flux
from dit_toolkit.host.part_of_run import PartOfRun
from dit_toolkit.tests.host.tiny import (
    DOUBLE,
    FLUX1,
    HIDDEN,
    SINGLE,
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


def test_where_the_condition_lies_matters(tiny_flux, file):
    spatial, subject = (sample(controlled(tiny_flux, file=file, kind=kind)) for kind in ("spatial", "subject"))
    assert (spatial - subject).abs().mean() > 0.001


@pytest.mark.parametrize("cache", ["offload to CPU", "off"])
def test_how_keys_are_kept_does_not_show(tiny_flux, file, cache):
    """Condition keys do not depend on the noise level, so computing them once is exact."""
    kept = sample(controlled(tiny_flux, file=file), cfg=3.0)
    assert torch.equal(sample(controlled(tiny_flux, file=file, cache=cache), cfg=3.0), kept)


@pytest.mark.parametrize(("cache", "times"), [("on GPU", 1), ("offload to CPU", 1), ("off", 4)])
def test_a_condition_is_encoded_once_per_prompt_and_run(tiny_flux, file, encodings, cache, times):
    model = controlled(tiny_flux, file=file, cache=cache)
    sample(model, 4)
    assert len(encodings) == times
    encodings.clear()
    sample(model, 4, cfg=3.0)  # two prompts
    assert len(encodings) == 2 * times
    if cache == "on GPU":
        sample(model, 4, sampler="heun")  # asks seven times
        assert len(encodings) == 3 * times
    assert not torch.equal(encodings[0].pooled, encodings[1].pooled)


def test_keys_are_gone_after_the_run(tiny_flux, file, monkeypatch):
    kept, encode = [], Encoder.encode

    def watched(self, *given):
        keys = encode(self, *given)
        kept.extend(weakref.ref(x) for pair in keys.values() for x in pair)
        return keys

    monkeypatch.setattr(Encoder, "encode", watched)
    sample(controlled(tiny_flux, file=file))
    gc.collect()
    assert len(kept) == 2 * (DOUBLE + SINGLE)
    assert all(ref() is None for ref in kept)


def test_a_batch_of_pictures_shares_one_condition(tiny_flux, file, encodings):
    noise = latent(7, (8, 8), 3)
    together = sample(controlled(tiny_flux, file=file), noise=noise)
    assert len(encodings) == 1
    assert encodings[0].rows == 1
    alone = [sample(controlled(tiny_flux, file=file), noise=noise[[i]]) for i in range(3)]
    close(together, torch.cat(alone))


def test_a_batch_of_conditions_goes_with_a_batch_of_pictures(tiny_flux, file):
    noise, conditions = latent(7, (8, 8), 2), latent(8, (6, 6), 2)
    together = sample(controlled(tiny_flux, file=file, condition=conditions), noise=noise, cfg=2.0)
    alone = [
        sample(controlled(tiny_flux, file=file, condition=conditions[[i]]), noise=noise[[i]], cfg=2.0) for i in range(2)
    ]
    close(together, torch.cat(alone), atol=1e-4)
    assert (together[0] - together[1]).abs().mean() > 0.01


def test_another_number_of_conditions_is_refused(tiny_flux, file):
    model = controlled(tiny_flux, file=file, condition=latent(8, (6, 6), 2))
    with pytest.raises(ValueError, match=r"2 condition images for a batch of 3 pictures\. Give one image for all"):
        sample(model, batch=3)


def test_pictures_of_one_batch_may_have_texts_of_their_own(tiny_flux, file, encodings):
    """Pooled text per row: nothing is shared then."""
    noise = latent(7, (8, 8), 2)
    texts = [prompt(3), prompt(4)]
    both = [[torch.cat([t[0][0] for t in texts]), {**texts[0][0][1]}]]
    both[0][1]["pooled_output"] = torch.cat([t[0][1]["pooled_output"] for t in texts])
    together = sample(controlled(tiny_flux, file=file), noise=noise, positive=both)
    assert [source.rows for source in encodings] == [2]
    alone = [sample(controlled(tiny_flux, file=file), noise=noise[[i]], positive=texts[i]) for i in range(2)]
    close(together, torch.cat(alone))


@pytest.mark.parametrize("length", [5, 9])  # as long as the positive prompt: one batch; longer: a call of its own
def test_guidance_mixes_a_controlled_positive_and_a_controlled_negative(tiny_flux, file, length):
    """One step to sigma 0 returns the guided prediction, which is affine in the two."""
    model = controlled(tiny_flux, file=file)
    negative = prompt(4, length=length, guidance=1.5)
    with_negative = sample(model, 1, cfg=3.0, negative=negative)
    on_positive, on_negative = sample(model, 1), sample(model, 1, positive=negative)
    close(with_negative, on_negative + 3.0 * (on_positive - on_negative), atol=1e-4)


def test_keys_follow_guidance_and_pooled_text(tiny_flux, file, encodings):
    model = controlled(tiny_flux, file=file)
    results = [sample(model, 1, positive=prompt(3, guidance=g)) for g in (3.5, 1.0)]
    plain = [sample(tiny_flux, 1, positive=prompt(3, guidance=g)) for g in (3.5, 1.0)]
    assert encodings[0].guidance != encodings[1].guidance
    shift = (results[0] - plain[0]) - (results[1] - plain[1])
    assert shift.abs().mean() > 1e-3


def test_a_prompt_that_changes_during_the_run_is_encoded_again(tiny_flux, file, encodings):
    """Stale keys are the classic failure: here the pooled text jumps at the third evaluation."""
    from comfy.patcher_extension import WrappersMP

    def jump(executor, *args, **kwargs):
        jumps = args[1][0] < 0.6
        return executor(*args, **{**kwargs, "y": kwargs["y"] + 1.0 * jumps})

    outcomes = []
    for cache in ("on GPU", "off"):
        model = tiny_flux.clone()
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", jump)
        outcomes.append(sample(controlled(model, file=file, cache=cache), 4))
    assert len(encodings) == 2 + 4
    assert torch.equal(*outcomes)


def test_ranges_that_meet_are_one_range(tiny_flux, file):
    first, second = PartOfRun(end=0.5), PartOfRun(start=0.5)
    whole = sample(controlled(tiny_flux, file=file), 4)
    both = controlled(controlled(tiny_flux, file=file, part=first), file=file, part=second)
    assert torch.equal(sample(both, 4), whole)
    halves = [sample(controlled(tiny_flux, file=file, part=part), 4) for part in (first, second)]
    assert len({x.sum().item() for x in (whole, *halves, sample(tiny_flux, 4))}) == 4


def keys_of(monkeypatch, model, **options):
    """The keys and values each condition got in a run of one step."""
    found, encode = [], Encoder.encode

    def watched(self, *given):
        found.append(encode(self, *given))
        return found[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "encode", watched)
        out = sample(model, 1, **options)
    return found, out


def test_conditions_do_not_see_each_other(tiny_flux, monkeypatch):
    first, second = {"seed": 1, "kind": "subject"}, {"seed": 2, "kind": "spatial", "strength": 0.7}
    (one,), _ = keys_of(monkeypatch, controlled(tiny_flux, **first))
    (two,), _ = keys_of(monkeypatch, controlled(tiny_flux, **second))
    both, result = keys_of(monkeypatch, controlled(controlled(tiny_flux, **first), **second))
    for alone, together in zip((one, two), both, strict=True):
        assert all(torch.equal(a, b) for block in alone for a, b in zip(alone[block], together[block], strict=True))
    swapped = sample(controlled(controlled(tiny_flux, **second), **first), 1)
    close(swapped, result)
    assert (result - sample(controlled(tiny_flux, **first), 1)).abs().mean() > 0.005


def test_influence_fades_the_condition_out(tiny_flux, file):
    plain, full = sample(tiny_flux, 1), sample(controlled(tiny_flux, file=file), 1)
    distances = [
        (sample(controlled(tiny_flux, file=file, influence=influence), 1) - plain).abs().mean().item()
        for influence in (1e-7, 0.1, 0.5, 1.0)
    ]
    assert distances == sorted(distances)
    assert distances[0] < 1e-5
    assert distances[-1] == pytest.approx((full - plain).abs().mean().item(), rel=0)


def test_a_channel_that_images_do_not_have_is_zero(caplog, monkeypatch):
    """Fill and control models read 32 channels or more; the condition is padded, and one line says so."""
    wide = load_flux(flux_state(channels=32))
    model = controlled(wide)
    with caplog.at_level(logging.INFO):
        out = sample(model)
    (line,) = [record.getMessage() for record in caplog.records if "EasyControl random1" in record.getMessage()]
    assert "the model takes 32 channels, the condition has 16" in line
    assert (out - sample(wide)).abs().mean() > 0.01
    narrow = dict(flux_state(channels=32))
    narrow["img_in.weight"] = narrow["img_in.weight"][:, :64]
    (padded,), _ = keys_of(monkeypatch, model)
    (plain,), _ = keys_of(monkeypatch, controlled(load_flux(narrow)))
    for block in plain:
        close(padded[block], plain[block])


def test_one_line_per_run_says_what_is_kept(tiny_flux, file, caplog):
    with caplog.at_level(logging.INFO):
        sample(controlled(tiny_flux, file=file), cfg=3.0)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("EasyControl")]
    size = 2 * (DOUBLE + SINGLE) * 9 * HIDDEN * 4 / 2**20
    assert lines == [
        f"EasyControl random1.safetensors: spatial, 9 tokens, {size:.1f} MiB of keys and values per prompt"
    ]


def test_odd_condition_sizes_are_padded_as_the_model_pads(tiny_flux, file, encodings):
    out = sample(controlled(tiny_flux, file=file, condition=latent(3, (5, 7))))
    assert torch.isfinite(out).all()
    assert flux.grid_size(tiny_flux.model.diffusion_model, 5, 7) == (3, 4)


def test_too_large_a_condition_is_refused_before_it_is_computed(tiny_flux, file, monkeypatch):
    condition = latent(size=(8, 8))
    model = controlled(tiny_flux, file=file, condition=condition)
    needed = size_of_keys(tiny_flux.model, condition, 1)
    assert needed == 2 * (DOUBLE + SINGLE) * 16 * HIDDEN * 4
    free = ModelPatcher.get_free_memory
    lora = {id(patcher.model) for patcher in file.patchers}
    monkeypatch.setattr(
        ModelPatcher, "get_free_memory", lambda self, dev: needed - 1 if id(self.model) not in lora else free(self, dev)
    )
    with pytest.raises(ValueError, match=r"need 0\.1 MiB, 0\.1 MiB are free\. Set kv_cache to 'offload to CPU' or"):
        sample(model)
    monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, dev: needed)
    assert torch.isfinite(sample(model)).all()


def test_keys_on_the_cpu_are_measured_by_the_memory_of_the_cpu(tiny_flux, file, monkeypatch):
    """A patcher counts video memory that core would give back, which is no help there."""
    model = controlled(tiny_flux, file=file, cache="offload to CPU")
    needed = size_of_keys(tiny_flux.model, latent(size=(6, 6)), 1)
    monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, dev: 2**40)
    free = [needed - 1]
    core = comfy.model_management.get_free_memory
    monkeypatch.setattr(  # attention asks for two numbers, to choose the size of its chunks
        comfy.model_management, "get_free_memory", lambda dev=None, both=False: core(dev, both) if both else free[0]
    )
    with pytest.raises(ValueError, match=r"are free\. Lower condition_size"):
        sample(model)
    free[0] = needed
    assert torch.isfinite(sample(model)).all()


def test_core_is_asked_for_room_for_the_keys(tiny_flux, file, monkeypatch):
    asked = []
    load = comfy.model_management.load_models_gpu

    def watched(models, memory_required=0, **kwargs):
        asked.append((memory_required, models))
        return load(models, memory_required=memory_required, **kwargs)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", watched)
    model = controlled(tiny_flux, file=file, condition=latent(3, (32, 32)))
    sample(tiny_flux, 1, cfg=2.0)
    sample(model, 1, cfg=2.0)
    sample(controlled(tiny_flux, file=file, condition=latent(3, (32, 32)), cache="offload to CPU"), 1, cfg=2.0)
    plain, kept, offloaded = (memory for memory, _ in asked)
    prompts = 2  # positive and negative
    assert kept - plain >= prompts * size_of_keys(tiny_flux.model, latent(size=(32, 32)), 1)
    assert offloaded == plain
    assert file.patchers[0].model in [m.model for m in asked[1][1]]  # the adapter is in core's memory plan


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_half_precision_runs_and_keeps_its_cache_exact(tiny_flux, file, encodings, precision):
    model = tiny_flux.clone()
    model.set_model_compute_dtype(precision)
    kept = sample(controlled(model, file=file), 2)
    assert {x.dtype for source in encodings for moved in source.moved.values() for x in moved} == {precision}
    assert torch.isfinite(kept).all()
    assert torch.equal(kept, sample(controlled(model, file=file, cache="off"), 2))
    exact = sample(controlled(tiny_flux, file=file), 2)
    assert 0 < (kept - exact).abs().mean() < 0.1 * exact.abs().mean()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strength": float("nan")}, "strength must be a finite number, got nan"),
        ({"strength": float("inf")}, "strength must be a finite number"),
        ({"influence": float("nan")}, "influence must be between 0 and 1, got nan"),
        ({"influence": 1.5}, "influence must be between 0 and 1"),
        ({"kind": "canny"}, "kind must be one of spatial, subject, got 'canny'"),
        ({"cache": "maybe"}, "kv_cache must be one of on GPU, offload to CPU, off"),
        ({"condition": torch.full((1, 16, 4, 4), float("nan"))}, "holds NaN or infinite values"),
        ({"condition": torch.zeros(1, 4, 4, 4)}, r"must be \[N, 16, h, w\], got \(1, 4, 4, 4\)"),
        ({"condition": torch.zeros(1, 16, 1, 4, 4)}, r"must be \[N, 16, h, w\]"),
        ({"slot": 1}, r"random1\.safetensors has no slot 1, its last one is 0\. Set 'slot' to at most 0"),
        ({"slot": -1}, "has no slot -1"),
    ],
)
def test_what_means_nothing_is_refused_with_a_sentence(tiny_flux, file, change, message):
    with pytest.raises(ValueError, match=message):
        controlled(tiny_flux, file=file, **change)


@pytest.mark.parametrize(
    ("options", "numbers"),
    [({"double": 1}, r"1\+2 blocks"), ({"single": 3}, r"2\+3 blocks"), ({"dim": 256}, "size 256")],
)
def test_a_lora_for_another_model_is_refused(tiny_flux, options, numbers):
    with pytest.raises(ValueError, match=f"is made for .*{numbers}.*the model has 128 and 2\\+2"):
        controlled(tiny_flux, file=lora_file(**options))


def test_another_family_is_refused(file):
    """By the name users know; core's own model class is BaseModel for many."""

    class BaseModel(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.diffusion_model = torch.nn.Identity()
            self.model_config = comfy.supported_models.SD15({})

    other = ModelPatcher(BaseModel(), torch.device("cpu"), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"Apply EasyControl needs a FLUX\.1 model, got SD15\. Connect one"):
        controlled(other, file=file)


@pytest.mark.parametrize(
    "change",
    [
        {"global_modulation": True},  # Flux2
        {"vec_in_dim": None},  # LongCat
        {"yak_mlp": True, "txt_norm": True},  # Ovis
        {"patch_size": 1},
    ],
)
def test_models_that_share_the_code_of_flux_1_are_told_apart(change):
    sizes = dict(in_channels=16, hidden_size=HIDDEN, depth=1, depth_single_blocks=1)
    where = dict(operations=comfy.ops.disable_weight_init, device="meta")
    assert flux.is_flux1(comfy.ldm.flux.model.Flux(**FLUX1, **sizes, **where))
    assert not flux.is_flux1(comfy.ldm.flux.model.Flux(**{**FLUX1, **change}, **sizes, **where))
    assert not issubclass(comfy.ldm.chroma.model.Chroma, comfy.ldm.flux.model.Flux)


def test_spatial_images_are_stretched_and_subjects_padded():
    image = torch.rand(2, 40, 80, 4)
    assert easycontrol.prepare_image(image, "spatial", 64).shape == (2, 64, 64, 3)
    for padding, value in (("grey", 0.5), ("black", 0.0)):
        subject = easycontrol.prepare_image(image, "subject", 64, padding)
        assert subject.shape == (2, 64, 64, 3)
        assert (subject[:, :16] == value).all()
        assert (subject[:, -16:] == value).all()
        assert subject[:, 16:48].std() > 0.05
    exact = torch.rand(1, 64, 64, 3)
    assert torch.equal(easycontrol.prepare_image(exact, "spatial", 64), exact)
    thin = easycontrol.prepare_image(torch.rand(1, 10, 400, 3), "subject", 64)  # never thinner than one token
    assert thin.shape == (1, 64, 64, 3)


@pytest.mark.parametrize("side", [40, 98, 561, 644, 725])
def test_the_long_side_of_a_subject_fills_the_condition(side):
    """512 / side is rarely exact: 98 * (512 / 98) is a little less than 512, and that is a row of tokens."""
    white = torch.ones(1, side, side // 2, 3)
    for image in (white, white.transpose(1, 2)):
        covered = easycontrol.prepare_image(image, "subject", 512, "black")[0, ..., 0] > 0
        height, width = covered.any(1).sum(), covered.any(0).sum()
        assert max(height, width) == 512
        assert min(height, width) in (240, 256)  # half of it, cut down to whole tokens where the side is odd


@pytest.mark.parametrize("kind", ["spatial", "subject"])
def test_a_grey_image_is_one_of_three_equal_channels(kind):
    grey = torch.rand(2, 40, 80, 1)
    prepared = easycontrol.prepare_image(grey, kind, 64)
    assert torch.equal(prepared, easycontrol.prepare_image(grey.expand(-1, -1, -1, 3), kind, 64))
    assert easycontrol.prepare_image(torch.rand(1, 64, 64, 1), kind, 64).shape == (1, 64, 64, 3)
