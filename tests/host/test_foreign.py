"""Beside other packs: what they take from us is said in a sentence, and what they leave us goes on to work."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from comfy.ldm.flux.model import Flux
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

from dit_toolkit.host import attention, embedded, offers
from dit_toolkit.host.accelerate import re_ttention
from dit_toolkit.host.accelerate.accelerate import QUALITIES, accelerated, family_name, is_embedded, preset, tune
from dit_toolkit.host.accelerate.foreign_caches import foreign_cache, named
from dit_toolkit.host.accelerate.own_attention import require_known_tokens
from dit_toolkit.host.accelerate.sparse_attention import SparseAttention, report
from dit_toolkit.host.accelerate.sparse_attention import attach as attach_sparse
from dit_toolkit.host.accelerate.step_cache_report import StepCacheReport
from dit_toolkit.host.accelerate.step_cache_taps import LastBlockTap, PredictionTap, block_hooks, tap_for
from dit_toolkit.host.control import freecus, training
from dit_toolkit.host.families import flux
from dit_toolkit.host.part_of_run import PartOfRun
from dit_toolkit.host.transformer import class_of, pack_of, stranger
from dit_toolkit.models.accelerate.cg_taylor import FirstBlockGate
from dit_toolkit.models.accelerate.policies import Interval
from dit_toolkit.models.accelerate.re_ttention import Schedule
from dit_toolkit.models.accelerate.sparse_attention import Disc
from dit_toolkit.tests.host import foreign
from dit_toolkit.tests.host.accelerate.caching import TAPS, cached, calls, strip
from dit_toolkit.tests.host.control.test_try_on import dressed, file_of
from dit_toolkit.tests.host.families import FAMILIES
from dit_toolkit.tests.host.tiny import WIDE, close, controlled, flux_state, load_flux, lora_file, sample

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def vae():
    return embedded.load_vae()


@pytest.fixture(scope="module")
def features(vae):
    """By the title that a sentence names: a function that puts the feature on a MODEL."""
    mask = torch.zeros(1, 64, 64)
    mask[:, 16:48, 16:48] = 1
    picture = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(20))
    file, clothes = lora_file(), file_of()

    def easycontrol(model, **part):
        return controlled(model, file=file, **part)

    def free(model, **part):
        return freecus.attach(model, picture, mask, vae, layers="all", **part)

    def clear(model, min_tokens=0, **part):
        return attach_sparse(model, SparseAttention("CLEAR", Disc(2), min_tokens, **part))

    def re(model, min_tokens=0):
        settings = re_ttention.ReTtention(0.3, Schedule(1, 2), min_tokens=min_tokens, max_bytes=1 << 30)
        return re_ttention.attach(model, settings)

    def try_on(model, **part):
        return dressed(model, clothes, **part)

    made = (easycontrol, try_on, free, clear, re)
    return dict(zip(NAMES, made, strict=True))


NAMES = ("Apply EasyControl", "Apply Try-On", "Apply FreeCus", "CLEAR", "Apply Re-ttention")
EVERY = pytest.mark.parametrize("name", NAMES)
IN_THE_WAY = {  # who, and how it is told
    "ComfyUI-IPAdapter-Flux": (foreign.without_options, "forward pass"),
    "RES4LYF": (foreign.re_flux, r"class of model \(ReFlux\)"),
    "ComfyUI-TeaCache": (
        lambda model: foreign.around_the_model(model, "ComfyUI-TeaCache", "TeaCache.apply.<locals>.unet_wrapper"),
        "forward pass",
    ),
}


@pytest.fixture
def watched(monkeypatch):
    """Calls of the model in which the blocks are watched."""
    seen, running = [], offers.running_blocks
    monkeypatch.setattr(offers, "running_blocks", lambda base: seen.append(base) or running(base))
    return seen


# 1. what somebody else's blocks do not ask for


CASES = [(name, pack, (i + j) % 2 == 0) for i, name in enumerate(NAMES) for j, pack in enumerate(IN_THE_WAY)]


@pytest.mark.parametrize(("name", "pack", "ours_first"), CASES)
def test_a_feature_that_no_block_asks_for_says_who_is_in_its_way(tiny_flux, features, name, pack, ours_first):
    take, part = IN_THE_WAY[pack]
    told = rf"^{name} has no effect: {pack} has put its own {part} into the model, .* Remove one of the two\."
    with pytest.raises(ValueError, match=told):  # a node may see it, or the first call of the model
        sample(take(features[name](tiny_flux)) if ours_first else features[name](take(tiny_flux)), 1)


def test_it_is_said_in_the_first_call_of_the_model(tiny_flux, features):
    """And in the first that is handed something: half of the steps are drawn without the condition."""
    model = foreign.without_options(tiny_flux)
    for part, expected in (({}, 1), ({"part": PartOfRun(start=0.4)}, 3)):
        with calls(model=tiny_flux.model.diffusion_model.img_in) as count, pytest.raises(ValueError, match="no effect"):
            sample(features["Apply EasyControl"](model, **part), 4)
        assert count["model"] == expected + 1  # the condition goes through the same layer


def test_a_compiled_model_says_so_at_its_end(tiny_flux):
    """Under torch.compile nobody hangs hooks on blocks: they would become part of what is compiled."""
    model = foreign.without_options(controlled(tiny_flux))
    set_torch_compile_wrapper(model=model, backend="eager")
    head, told = (
        tiny_flux.model.diffusion_model.final_layer,
        r"^Apply EasyControl has no effect: ComfyUI-IPAdapter-Flux",
    )
    with torch.compiler.set_stance("force_eager"), calls(head=head) as count, pytest.raises(ValueError, match=told):
        sample(model, 2)
    assert count["head"] == 2


def test_blocks_that_do_not_say_where_the_text_ends(tiny_flux, features, monkeypatch):
    """Blocks of 2025 call the attention patch without `img_slice`."""
    patch = attention.append_extra_keys

    def old(q, k, v, pe=None, attn_mask=None, extra_options=None):
        known = {name: value for name, value in extra_options.items() if name != "img_slice"}
        return patch(q, k, v, pe=pe, attn_mask=attn_mask, extra_options=known)

    monkeypatch.setattr(attention, "append_extra_keys", old)
    with pytest.raises(ValueError, match=r"^Apply FreeCus needs to know which tokens are the prompt's, .*another node"):
        sample(features["Apply FreeCus"](tiny_flux), 1)


@pytest.mark.parametrize("first", [1, 2])  # which call of the model is answered from the cache
def test_a_cache_in_the_module_that_answers_the_reference_is_named(tiny_flux, features, first):
    told = r"^Apply FreeCus runs the model for its reference too, .* left out: ComfyUI-CacheDiT has put its own forward"
    model = features["Apply FreeCus"](tiny_flux)
    with foreign.cache_dit(tiny_flux, first=first), pytest.raises(ValueError, match=told):
        sample(model, 6)


# 2. no false alarm


@EVERY
def test_code_of_others_that_asks_is_not_in_the_way(tiny_flux, features, name):
    """A forward pass of somebody else's that passes on what it is given."""
    good = foreign.without_options(tiny_flux, "ComfyUI-Good", foreign.considerate_forward_orig)
    close(sample(features[name](good), 3), sample(features[name](tiny_flux), 3), atol=1e-4)


@pytest.mark.parametrize("name", ["Apply EasyControl", "Apply FreeCus", "CLEAR"])
@pytest.mark.parametrize("tap", TAPS)
def test_a_feature_that_starts_in_a_forecast(tiny_flux, features, name, tap):
    """Evaluations 1 and 2 of every three are forecast; the first that is handed something is one of them."""
    policy = FirstBlockGate(2.0, 2, 2) if tap.startswith("gated") else Interval(3, 2)
    model = cached(features[name](tiny_flux, part=PartOfRun(start=0.5)), policy, tap)
    assert torch.isfinite(sample(model, 6)).all()
    assert "." in strip(model)


@EVERY
@pytest.mark.parametrize("node", [EasyCacheNode, LazyCacheNode])
def test_caches_of_core_beside_a_feature(tiny_flux, features, name, node, caplog):
    (model,) = node.execute(features[name](tiny_flux), 0.9, 0.15, 0.95, False).args
    with caplog.at_level("INFO"):
        assert torch.isfinite(sample(model, 8)).all()
    assert "skipped 0/" not in caplog.text


@pytest.mark.parametrize("name", ["Apply EasyControl", "CLEAR"])
def test_a_cache_in_the_module_beside_a_feature_that_starts_in_what_it_skips(tiny_flux, features, name, watched):
    """It answers the third and fifth call, and the feature begins with the third: no block runs, and nobody can ask."""
    with foreign.cache_dit(tiny_flux) as state:
        assert torch.isfinite(sample(features[name](tiny_flux, part=PartOfRun(start=0.2)), 6)).all()
    assert (state["calls"], state["skipped"]) == (6, 2)
    assert len(watched) == 2


@EVERY
def test_layers_that_are_skipped_in_an_extra_pass(tiny_flux, features, name):
    (model,) = SkipLayerGuidanceDiT.execute(features[name](tiny_flux), 3.0, 0.0, 1.0, "0, 1", "0, 1", 0.0).args
    assert torch.isfinite(sample(model, 2, cfg=2.0)).all()


@pytest.mark.parametrize("name", ["CLEAR", "Apply Re-ttention"])
def test_too_few_tokens_are_a_reason_and_not_silence(tiny_flux, features, name):
    assert torch.equal(sample(features[name](tiny_flux, min_tokens=4096), 2), sample(tiny_flux, 2))


def test_a_feature_is_watched_until_a_block_has_asked(tiny_flux, features, watched):
    """Hooks on blocks cost little, and are there for one call of the model."""
    sample(features["Apply EasyControl"](features["CLEAR"](tiny_flux)), 4, cfg=2.0)
    assert len(watched) == 1
    assert not any(block._forward_pre_hooks for block in tiny_flux.model.diffusion_model.double_blocks)


# 3. step caches on blocks that are out of reach


@pytest.mark.parametrize("tap", ["last block", "gated", "span", "every module"])
@pytest.mark.parametrize("pack", ["ComfyUI-IPAdapter-Flux", "RES4LYF"])
def test_a_tap_on_blocks_that_ask_for_nothing_says_so(tiny_flux, tap, pack):
    policy = FirstBlockGate(2.0, 2) if tap == "gated" else Interval(2, 1)
    model = IN_THE_WAY[pack][0](cached(tiny_flux, policy, tap))
    with pytest.raises(ValueError, match=rf"{pack} has put its own .*tap 'prediction'.* works on every model"):
        sample(model, 3)


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("pack", ["ComfyUI-IPAdapter-Flux", "RES4LYF"])
def test_tap_auto_takes_the_prediction_where_blocks_are_out_of_reach(tiny_flux, pack, ours_first):
    take = IN_THE_WAY[pack][0]
    automatic = tap_for(tiny_flux if ours_first else take(tiny_flux), "auto", "Test")
    assert isinstance(automatic, LastBlockTap if ours_first else PredictionTap)
    model = cached(tiny_flux, Interval(2, 1), automatic) if ours_first else take(tiny_flux)
    model = take(model) if ours_first else cached(model, Interval(2, 1), automatic)
    expected = cached(take(tiny_flux), Interval(2, 1), "prediction")
    assert torch.equal(sample(model, 5), sample(expected, 5))
    assert "." in strip(model)


@pytest.mark.parametrize("quality", QUALITIES)
@pytest.mark.parametrize("schnell", [False, True])
def test_accelerate_takes_a_method_that_needs_no_blocks(quality, schnell):
    state = flux_state(hidden=WIDE)
    if schnell:  # its presets need blocks
        state = {name: weight for name, weight in state.items() if not name.startswith("guidance_in")}
        assert preset(load_flux(state), quality).method in ("none", "Delta-DiT")
    theirs = foreign.without_options(load_flux(state))
    setting = preset(theirs, quality)
    if schnell and quality == "quality":
        assert setting.method == "none"
        return
    assert setting.method == "TaylorSeer"
    fast = accelerated(theirs, setting, StepCacheReport("Test"))
    assert torch.isfinite(sample(fast, 8)).all()
    assert "." in strip(fast)


def test_autotune_tries_what_needs_no_blocks(tiny_flux):
    theirs = foreign.without_options(tiny_flux)
    best, tried = tune(theirs, lambda model: sample(model, 6), floor_db=0.0, trials=2)
    assert {trial.setting.method for trial in tried} == {best.method} == {"TaylorSeer"}


def test_a_tap_on_blocks_that_are_told_works(tiny_flux):
    good = foreign.without_options(tiny_flux, "ComfyUI-Good", foreign.considerate_forward_orig)
    for model in (
        theirs := cached(good, Interval(2, 1), "last block"),
        cached(tiny_flux, Interval(2, 1), "last block"),
    ):
        sample(model, 5)
    assert strip(theirs) == strip(model) == "#.#.#"


def test_a_last_block_that_does_not_say_where_the_picture_is(tiny_flux):
    good = foreign.without_options(tiny_flux, "ComfyUI-Good", foreign.half_considerate_forward_orig)
    with pytest.raises(ValueError, match="do not say which of their tokens are the picture's, because another node"):
        sample(cached(good, Interval(2, 1), "last block"), 3)


# 4. a second step cache


def keyed(name):
    def put(model):
        patched = model.clone()
        patched.model_options["transformer_options"][name] = 0.4
        return patched

    return put


def around(pack, name):
    return lambda model: foreign.around_the_model(model, pack, name)


def wrapped(model):
    patched = model.clone()
    outer = foreign.of_pack(
        "fork-of-cache", lambda executor, *args, **kwargs: executor(*args, **kwargs), "_cache_dit_outer"
    )
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "cached", outer)
    return patched


CACHES = {
    "TeaCache by its key": (keyed("rel_l1_thresh"), "TeaCache"),
    "MagCache by its key": (keyed("magcache_thresh"), "MagCache"),
    "CacheDiT by its key": (keyed("cache_dit_turbo"), "CacheDiT"),
    "CacheDiT of LTX": (keyed("ltx2_cache"), "CacheDiT"),
    "CacheDiT of Wan": (keyed("wan_cache"), "CacheDiT"),
    "CacheDiT by its wrapper": (wrapped, "CacheDiT"),
    "TeaCache": (around("ComfyUI-TeaCache", "TeaCache.apply_teacache.<locals>.unet_wrapper_function"), "TeaCache"),
    "MagCache": (around("magcache", "MagCache.apply_magcache.<locals>.unet_wrapper_function"), "MagCache"),
    "TaylorSeer": (around("ComfyUI-TaylorSeer", "wrap.<locals>.unet_wrapper_function"), "ComfyUI-TaylorSeer"),
    "TaylorSeer in another folder": (around("ts", "TaylorSeerLite.apply_taylorseer.<locals>.f"), "ComfyUI-TaylorSeer"),
    "WaveSpeed": (around("Comfy-WaveSpeed", "ApplyFBCacheOnModel.patch.<locals>.wrapper"), "First Block Cache"),
}


@pytest.mark.parametrize("name", CACHES)
def test_every_second_cache_is_refused_whichever_comes_first(tiny_flux, name):
    put, called = CACHES[name]
    told = rf"^Test cannot work on a model that {called} already caches\. Remove one of the two\.$"
    with pytest.raises(ValueError, match=told):
        cached(put(tiny_flux), Interval(2, 1))
    with pytest.raises(ValueError, match=told):
        sample(put(cached(tiny_flux, Interval(2, 1))), 1)


def test_a_cache_whose_node_is_gone_is_refused_with_what_to_do(tiny_flux):
    ours = cached(tiny_flux, Interval(2, 1))
    told = (
        "^Test cannot work on a model that CacheDiT already caches.*If its node is gone already, choose 'Unload Models"
    )
    with foreign.cache_dit(tiny_flux):
        with pytest.raises(ValueError, match=told):
            cached(tiny_flux, Interval(2, 1))
        with pytest.raises(ValueError, match=told):
            sample(ours, 1)
    assert torch.isfinite(sample(ours, 1)).all()


def test_nunchaku_caches_where_its_threshold_is_above_0(tiny_flux):
    class Wrapper(torch.nn.Module):
        def __init__(self, threshold):
            super().__init__()
            self.model = torch.nn.Module()
            self.model.residual_diff_threshold_multi = threshold

    def load(threshold):
        model = tiny_flux.clone()
        model.add_object_patch("diffusion_model", Wrapper(threshold))
        return model

    assert foreign_cache(load(0), {}) is None
    assert foreign_cache(load(0.12), {}).name == "nunchaku"


def test_what_is_no_cache_is_not_refused(tiny_flux):
    """Traces of a cache that is gone, a folder of that name above all packs, and functions that do other things."""
    model = tiny_flux.clone()
    model.set_model_unet_function_wrapper(
        foreign.of_pack("ComfyUI-Other", lambda run, given: run(given["input"], given["timestep"], **given["c"]))
    )
    transformer = tiny_flux.model.diffusion_model
    transformer.teacache_state = transformer.cache_dic = {}
    try:
        ours = cached(model, Interval(2, 1))
        sample(ours, 3)
    finally:
        del transformer.teacache_state, transformer.cache_dic
    assert strip(ours) == "#.#"
    above = foreign.of_pack("x", wrapped)
    above.__globals__["__name__"] = "/srv/teacache/ComfyUI/custom_nodes/Other.nodes"
    assert named(above) == ""


# 5. what a node decides is of its MODEL


@pytest.fixture
def sibling(tiny_flux):
    """Another branch of the workflow was sampled last, and its classes are still in the shared module."""
    sample(foreign.re_flux(tiny_flux), 1)
    assert type(tiny_flux.model.diffusion_model) is foreign.ReFlux
    yield tiny_flux
    sample(tiny_flux, 1)
    assert type(tiny_flux.model.diffusion_model) is Flux


def test_no_decision_goes_by_what_was_sampled_before(sibling):
    assert class_of(sibling) is Flux
    assert stranger(sibling) is None
    assert isinstance(tap_for(sibling, "auto", "Test"), LastBlockTap)
    assert block_hooks(sibling) is not None
    assert flux.is_flux1(sibling)
    assert flux.FLUX1.require(sibling, "Test") is sibling.model.diffusion_model
    assert (family_name(sibling), is_embedded(sibling)) == ("FLUX.1", True)
    require_known_tokens(sibling, "Test")
    assert "px:" in report(sibling, SparseAttention("CLEAR", Disc(8)))
    assert training.attach(sibling) is not sibling


def test_the_branch_that_has_it_says_so_before_and_after_the_other(tiny_flux):
    theirs = foreign.re_flux(tiny_flux)
    for _ in range(2):
        assert class_of(theirs) is foreign.ReFlux
        assert stranger(theirs).pack == "RES4LYF"
        assert block_hooks(theirs) is None
        with pytest.raises(ValueError, match=r"^Test has no effect: RES4LYF"):
            require_known_tokens(theirs, "Test")
        sample(tiny_flux, 1)


def test_a_run_is_that_of_its_own_branch(sibling, features):
    """Nothing of the sibling's is in the way of a run, and its own comes out as ever."""
    for name in ("Apply EasyControl", "CLEAR"):
        expected = sample(features[name](sibling), 1)
        sample(foreign.re_flux(sibling), 1)
        assert torch.equal(sample(features[name](sibling), 1), expected)


def test_pack_names():
    assert pack_of(foreign.ReFlux) == "RES4LYF"
    assert (
        pack_of(foreign.of_pack("was_x_1", test_pack_names)) == "was.1"
    )  # ComfyUI has no dots in the names of folders
    assert pack_of(torch.no_grad()(foreign.of_pack("Graded", test_pack_names))) == "Graded"
    assert pack_of(partial(foreign.of_pack("Partly", test_pack_names))) == "Partly"
    assert not any(map(pack_of, (Flux, Flux.forward, torch.nn.Linear, stranger)))


@pytest.mark.parametrize("name", FAMILIES)
def test_models_as_they_come_have_no_strangers(name):
    assert stranger(FAMILIES[name].load()) is None
