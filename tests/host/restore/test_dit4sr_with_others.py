"""DiT4SR beside step caches, guidance that skips layers, other features and other ways to load a model."""

from __future__ import annotations

import comfy.sd
import comfy_extras.nodes_custom_sampler as custom
import pytest
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_easycache import LazyCacheNode
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

pytestmark = [pytest.mark.comfy, pytest.mark.sweep(together=True)]

from dit_toolkit.host.restore import dit4sr_run  # noqa: E402
from dit_toolkit.models.accelerate.policies import Interval  # noqa: E402
from dit_toolkit.nodes.accelerate import AccelerateDiT  # noqa: E402
from dit_toolkit.nodes.step_cache import ConfidenceGatedTaylor, TaylorSeer  # noqa: E402
from dit_toolkit.tests.host.accelerate import caching  # noqa: E402
from dit_toolkit.tests.host.restore.tiny_dit4sr import base, close, latent, prompt, published, restored, sample  # noqa: E402
from dit_toolkit.tests.nodes.calling import run_node  # noqa: E402
from dit_toolkit.tests.nodes.test_inputs import good  # noqa: E402

SIZE = (12, 12)  # 4 windows
LR = latent(12, SIZE)


def cached(model, node=TaylorSeer, **settings):
    """`model` as a node of ours accelerates it."""
    return run_node(node, **{**good(node, {"MODEL": model}), **settings})[0]


def all_computed(model, tap):
    """`model` with a step cache that stores all and forecasts nothing; the node itself leaves it out."""
    return caching.cached(model, Interval(1, 1), tap, 1)


@pytest.fixture
def work(monkeypatch):
    """What runs: blocks of the base without the stream ("base"), blocks with it ("both"), and the tokens it begins
    with ("tokens")."""
    done = []
    run, tokens = dit4sr_run.Stream.run, dit4sr_run.sd3.tokens

    def both(self, i, args):
        out = run(self, i, args)
        done.append("both")
        return out

    def embedded(*args):
        done.append("tokens")
        return tokens(*args)

    monkeypatch.setattr(dit4sr_run.Stream, "run", both)
    monkeypatch.setattr(dit4sr_run.sd3, "tokens", embedded)
    blocks = [block for model in (base(), base(1)) for block in model.model.diffusion_model.joint_blocks]
    hooks = [block.register_forward_hook(lambda *_: done.append("base")) for block in blocks]
    yield done
    for hook in hooks:
        hook.remove()


TAPS = ("prediction", "last block")


@pytest.mark.parametrize("tap", TAPS)
def test_a_step_cache_that_computes_all_changes_nothing_in_tiles(tap):
    plain = sample(restored(lr=LR), 4, size=SIZE, cfg=3.0)
    for model in (all_computed(restored(lr=LR), tap), restored(all_computed(base(), tap), lr=LR)):
        assert torch.equal(sample(model, 4, size=SIZE, cfg=3.0), plain)
        assert caching.strip(model) == "####"


@pytest.mark.parametrize("tap", TAPS)
@pytest.mark.parametrize(("tile", "windows"), [(0, 1), (8, 4)])
def test_a_forecast_costs_neither_the_base_nor_the_stream(work, tap, tile, windows):
    settings = {"tap": tap, "interval": 3, "first_full": 1, "last_full": 0}
    sample(cached(base(), **settings), 6, size=SIZE, cfg=3.0)
    computed = work.count("base") // 3
    assert computed == 2  # of 6 evaluations
    work.clear()
    sample(cached(restored(lr=LR, tile=tile), **settings), 6, size=SIZE, cfg=3.0)
    assert work == ["tokens", "both", "both", "both"] * windows * computed


@pytest.mark.parametrize("tap", TAPS)
def test_each_window_is_forecast_from_its_own_past(tap):
    """Windows that have no overlap are pictures of their own, cached or not."""
    settings = {"tap": tap, "interval": 2, "first_full": 1, "last_full": 0}
    lr, noise = latent(12, (8, 16)), latent(7, (8, 16))
    whole = sample(cached(restored(lr=lr, overlap=0), **settings), 6, noise=noise, cfg=3.0)
    for left in (0, 8):
        part = (..., slice(left, left + 8))
        close(sample(cached(restored(lr=lr[part]), **settings), 6, noise=noise[part], cfg=3.0), whole[part])


@pytest.mark.parametrize("tile_batch", [1, 3])
def test_forecasts_do_not_depend_on_how_many_windows_go_side_by_side(tile_batch):
    settings = {"tap": "last block", "interval": 2, "first_full": 1, "last_full": 0}
    one = sample(cached(restored(lr=LR), **settings), 6, size=SIZE, cfg=3.0)
    close(sample(cached(restored(lr=LR, tile_batch=tile_batch), **settings), 6, size=SIZE, cfg=3.0), one, 1e-4)


def test_a_gate_looks_at_the_first_block_with_its_stream(work):
    model = cached(restored(lr=LR, tile=0), ConfidenceGatedTaylor, threshold=1.0, warm_up=2, last_full=0)
    out = sample(model, 6, size=SIZE)
    assert out.isfinite().all()
    assert work.count("base") == 0
    assert 6 <= work.count("both") < 18  # the first block of all evaluations
    assert (
        out - sample(cached(base(), ConfidenceGatedTaylor, threshold=1.0, warm_up=2), 6, size=SIZE)
    ).abs().mean() > 0.01


def test_accelerate_dit_goes_with_it(work):
    model = cached(restored(lr=LR, tile=0), AccelerateDiT, quality="fast")
    assert sample(model, 12, size=SIZE).isfinite().all()
    assert work.count("both") < 3 * 12


def test_lazy_cache_goes_with_it():
    node = LazyCacheNode.execute(
        restored(lr=LR), reuse_threshold=0.0, start_percent=0.15, end_percent=0.95, verbose=False
    )
    assert torch.equal(sample(node.args[0], 4, size=SIZE), sample(restored(lr=LR), 4, size=SIZE))


@pytest.mark.parametrize("tile", [0, 8])
def test_guidance_that_skips_layers_skips_both_streams(work, tile):
    """Its own pass has all blocks but one, and the stream has as many."""
    guided = SkipLayerGuidanceDiT.execute(restored(lr=LR, tile=tile), 3.0, 0.0, 1.0, "1").args[0]
    out = sample(guided, 1, size=SIZE, cfg=3.0)
    windows = 4 if tile else 1
    assert work == ["tokens", "both", "both", "both"] * windows + ["tokens", "both", "both"] * windows
    assert (out - sample(restored(lr=LR, tile=tile), 1, size=SIZE, cfg=3.0)).abs().mean() > 0.01


def test_guidance_that_skips_layers_keeps_step_caches_apart():
    """Its passes have lanes of their own: an interval of 1 computes all of them, and nothing is mixed."""
    guided = SkipLayerGuidanceDiT.execute(restored(lr=LR), 3.0, 0.0, 1.0, "1").args[0]
    plain = sample(guided, 3, size=SIZE, cfg=3.0)
    assert torch.equal(sample(all_computed(guided, "last block"), 3, size=SIZE, cfg=3.0), plain)


def test_another_replacement_that_calls_the_block_stays_around_ours():
    """As other packs look at blocks."""
    seen = []

    def look(args, extra):
        out = extra["original_block"](args)
        seen.append(out["img"].clone())
        return out

    looked = base().clone()
    looked.set_model_patch_replace(look, "dit", "double_block", 1)
    assert torch.equal(sample(restored(looked)), sample(restored()))
    assert len(seen) == 3
    first = seen[0].clone()
    seen.clear()
    sample(looked)
    assert (seen[0] - first).abs().mean() > 0.01


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float16])
def test_a_base_in_fewer_bits_is_restored_as_well(dtype):
    """fp8 weights are cast layer by layer; the picture is near that of float32."""
    model = comfy.sd.load_diffusion_model_state_dict(
        {k: v.clone() for k, v in published().items()}, model_options={"dtype": dtype}
    )
    assert model is not None
    out, full = sample(restored(model, lr=LR), size=SIZE), sample(restored(lr=LR), size=SIZE)
    error = float((out - full).norm() / full.norm())
    assert 0 < error < (0.2 if dtype.itemsize == 1 else 0.05)
    assert error < float((full - sample(base(), size=SIZE)).norm() / full.norm())


def test_a_guider_of_two_models_restores_the_one_that_it_hangs_on(work):
    made = custom.DualModelGuider.execute(restored(lr=LR), prompt(), 3.0, base(1), prompt(4))
    noise = latent(7, SIZE)
    sampler = custom.KSamplerSelect.execute("euler").args[0]
    out = made.args[0].sample(noise, torch.zeros_like(noise), sampler, torch.tensor([1.0, 0.5, 0.0]), disable_pbar=True)
    assert out.isfinite().all()
    assert work.count("both") == work.count("base") == 2 * 3 * 4  # evaluations, blocks, windows


def test_windows_over_a_batch_see_their_own_pictures():
    """Core's context windows: two windows of two pictures each, without overlap, are two runs."""
    lr, noise = latent(30, SIZE, 4), latent(7, SIZE, 4)
    schedule = {"context_schedule": "standard_static", "context_stride": 1, "closed_loop": False, "fuse_method": "flat"}
    (model,) = ContextWindowsManualNode.execute(restored(lr=lr), 2, 0, **schedule, dim=0, freenoise=False).args
    together = sample(model, 2, noise=noise)
    halves = [sample(restored(lr=lr[i : i + 2]), 2, noise=noise[i : i + 2]) for i in (0, 2)]
    close(together, torch.cat(halves))


@pytest.mark.long
@pytest.mark.parametrize("tile", [0, 8])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_sees_the_picture_of_each_call(tile, backend):
    """TorchCompileModel drops its checks on what is in transformer_options, and would repeat the first stream."""
    model = restored(lr=LR, tile=tile)
    options = model.model_options["transformer_options"]
    options["optimized_attention_override"] = lambda func, *args, **kwargs: attention_pytorch(*args, **kwargs)
    expected = sample(model, 3, size=SIZE, cfg=3.0)
    compiled = model.clone()
    set_torch_compile_wrapper(compiled, backend=backend, options={"guard_filter_fn": skip_torch_compile_dict})
    torch.compiler.reset()
    for _ in range(2):
        close(sample(compiled, 3, size=SIZE, cfg=3.0), expected, 1e-4)


def test_blocks_that_nobody_asks_through_are_an_error():
    """Another pack's forward pass that leaves block replacements out."""
    model = restored(lr=LR)
    transformer = model.model.diffusion_model
    forward = transformer.forward

    def theirs(x, t, transformer_options=None, **rest):
        kept = {key: value for key, value in (transformer_options or {}).items() if key != "patches_replace"}
        return forward(x, t, transformer_options=kept, **rest)

    transformer.forward = theirs
    try:
        with pytest.raises(ValueError, match="Apply DiT4SR has no effect: "):
            sample(model, 1, size=SIZE)
    finally:
        del transformer.forward
