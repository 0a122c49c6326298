"""Re-ttention on tiny models of every family, judged by full attention and by the method with dense masks."""

from __future__ import annotations

import gc
import json
import weakref
from functools import cache
from types import SimpleNamespace

import comfy.hooks
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_flux import FluxKVCache
from torch import Tensor
from torch._inductor.exc import SubgraphLoweringException
from torch.nn.attention.flex_attention import flex_attention

from dit_toolkit.host.accelerate.re_ttention import attach
from dit_toolkit.host.accelerate.re_ttention_report import ReTtentionReport, ReTtentionRunReport, in_words
from dit_toolkit.host.accelerate.re_ttention_run import Call, Lane, Layer, ReTtentionRun
from dit_toolkit.host.accelerate.re_ttention_settings import ReTtention
from dit_toolkit.host.accelerate.sparse_attention import SparseAttention
from dit_toolkit.host.accelerate.sparse_attention import attach as attach_sparse
from dit_toolkit.host.accelerate.sparse_backends import UNABLE
from dit_toolkit.host.run import Chunk, Condition, Run
from dit_toolkit.models.accelerate.policies import Interval
from dit_toolkit.models.accelerate.re_ttention import Schedule
from dit_toolkit.models.accelerate.sparse_attention import Band, Disc, FrameBand, Grid, mask
from dit_toolkit.tests.host import tiny
from dit_toolkit.tests.host.accelerate.caching import cached
from dit_toolkit.tests.host.families import FAMILIES, RELATIVES, sample

pytestmark = [pytest.mark.comfy, pytest.mark.sweep(together=True)]

REACHED = [name for name, family in FAMILIES.items() if family.grid is not None]
VIDEO = [name for name in REACHED if FAMILIES[name].grid.frames > 1]
every_family = pytest.mark.parametrize("name", REACHED)


def sparse(model, first=1, period=5, *, keep=0.3, **settings):
    """`model` with Re-ttention, and its report."""
    report = ReTtentionReport()
    schedule = Schedule(first, period, settings.pop("sigma_ratio", 0.0))
    settings = {"drift": 0.0, "min_tokens": 0, "max_bytes": 1 << 30, **settings}
    return attach(model, ReTtention(keep, schedule, report=report, **settings)), report


def outputs_at_one_place(name, model, times=4, cfg=1.0, sigma=0.7, batch=1) -> list[Tensor]:
    """What the model makes of the same latent at the same noise level, `times` times in one run."""
    seen = []

    def stay(model, x, sigmas, extra_args, callback, disable):
        for _ in range(times):
            seen.append(model(x, sigmas[0] * x.new_ones(x.shape[0]), **extra_args))
        return x

    family = FAMILIES[name]
    noise = torch.randn(batch, *family.latent_shape, generator=torch.Generator().manual_seed(7))
    comfy.sample.sample_custom(
        model,
        noise,
        cfg,
        comfy.samplers.KSAMPLER(stay),
        torch.tensor([sigma, 0.0]),
        family.prompt(3),
        family.prompt(4),
        torch.zeros_like(noise),
        disable_pbar=True,
        seed=0,
    )
    return seen


@cache
def plain(name: str, steps=4, cfg=2.0) -> Tensor:
    """The picture without us."""
    return sample(FAMILIES[name], steps=steps, cfg=cfg)


def near(a: Tensor, b: Tensor) -> None:
    """Equal up to rounding, relative to the largest value: latents of some families are of order 10."""
    tiny.close(a, b, atol=1e-4 * max(1.0, float(b.abs().max())))


def differ(a: Tensor, b: Tensor) -> bool:
    return not torch.allclose(a, b, rtol=0, atol=1e-3)


# ---- full attention, and as good as full


@every_family
def test_a_refresh_in_every_evaluation_is_full_attention(name):
    model, report = sparse(FAMILIES[name].load(), first=0, period=1)
    near(sample(FAMILIES[name], model, steps=4, cfg=2.0), plain(name))
    assert report.runs[-1].evaluations == "RRRR"


@every_family
def test_sparse_evaluations_of_the_same_input_are_full_ones(name):
    """The method's identity: queries, keys and values unchanged, nothing drifts."""
    model, report = sparse(FAMILIES[name].load(), keep=0.1)
    first, *others = outputs_at_one_place(name, model)
    assert report.runs[-1].evaluations == "#R.."
    for other in others:
        near(other, first)


def test_pixart_is_refused():
    """ComfyUI lets no node reach its attention, and a node that cannot act says so."""
    with pytest.raises(ValueError, match=r"^Apply Re-ttention does not know where the picture's tokens are in"):
        sparse(FAMILIES["pixart"].load())


# ---- the method written out


class WrittenOut:
    """Re-ttention as an attention override: whole score matrices, and a count of calls for the state.

    grids: of the calls of one evaluation, in their order; None for one that is not ours.
    """

    def __init__(self, grids, kinds, pattern, drift=0.0, clamp=True, extra=0):
        self.grids, self.kinds, self.pattern = grids, kinds, pattern
        self.drift, self.clamp, self.extra = drift, clamp, extra
        self.calls, self.state = 0, {}

    def __call__(self, func, *args, **kwargs):
        evaluation, place = divmod(self.calls, len(self.grids))
        self.calls += 1
        grid = self.grids[place]
        if grid is None:
            return func(*args, **kwargs)
        q, k, v = args[:3]
        heads = args[3] if len(args) > 3 else kwargs["heads"]
        if not kwargs.get("skip_reshape"):
            q, k, v = (x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2) for x in (q, k, v))
        assert q.shape[2] == grid.length
        assert k.shape[2] == grid.length + self.extra
        z = q @ k.mT / q.shape[-1] ** 0.5
        bias = kwargs.get("mask")
        z = z if bias is None else z + bias
        kept = mask(self.pattern, grid, self.extra)
        full = z.softmax(-1) @ v
        only_kept = z.masked_fill(~kept, float("-inf")).softmax(-1) @ v
        if self.kinds[evaluation] == "R":
            rho = (z.softmax(-1) * kept).sum(-1, keepdim=True)
            self.state[place] = rho, full - rho * only_kept
        if self.kinds[evaluation] == ".":
            rho, rest = self.state[place]
            full = rho * only_kept + rest
            self.state[place] = (rho + self.drift).clamp(max=1.0 if self.clamp else 9.0), rest
        return full.transpose(1, 2).flatten(2)


def written_out(model, *args, **kwargs):
    patched = model.clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = WrittenOut(*args, **kwargs)
    return patched


GRIDS = {  # of the calls of one evaluation
    "flux": [Grid(4, 4, before=5)] * 4,
    "sd35": [Grid(4, 4, before=6), Grid(4, 4), Grid(4, 4, before=6), Grid(4, 4, before=6)],
    "qwen": [Grid(4, 4, before=6)] * 3,
    "wan": [Grid(3, 3, 3), None] * 3,
    "hunyuan_video": [None, None, *[Grid(3, 3, 3, before=6)] * 4],
    "cogvideox": [Grid(3, 3, 3, before=6)] * 3,
}


@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("name", GRIDS)
def test_it_is_the_method_written_out(name, clamp):
    model, report = sparse(FAMILIES[name].load(), pattern="disc", drift=0.1, clamp=clamp)
    got = sample(FAMILIES[name], model, steps=7)
    assert report.runs[-1].evaluations == "#R....R"
    (pattern,) = set(report.runs[-1].patterns.values())
    expected = written_out(FAMILIES[name].load(), GRIDS[name], "#R....R", pattern, 0.1, clamp)
    near(got, sample(FAMILIES[name], expected, steps=7))
    assert differ(got, plain(name, steps=7, cfg=1.0))


@pytest.mark.parametrize("influence", [1.0, 0.5])
def test_keys_of_easycontrol_are_seen_by_every_token(influence):
    controlled = tiny.controlled(FAMILIES["flux"].load(), influence=influence)
    model, report = sparse(controlled, pattern="disc", drift=0.1)
    got = tiny.sample(model, steps=7)
    assert report.runs[-1].evaluations == "#R....R"
    (pattern,) = set(report.runs[-1].patterns.values())
    expected = written_out(controlled, GRIDS["flux"], "#R....R", pattern, 0.1, extra=9)  # a latent of 6 x 6
    near(got, tiny.sample(expected, steps=7))
    assert differ(got, tiny.sample(sparse(FAMILIES["flux"].load(), pattern="disc", drift=0.1)[0], steps=7))


@pytest.mark.parametrize("name", VIDEO)
def test_video_is_kept_in_tubes_and_pictures_in_bands(name):
    _, report = run_of(name)
    assert all("tube" in line for line in report.text().splitlines() if "tokens" in line)
    _, report = run_of("flux")
    assert "band" in report.text()


@cache
def run_of(name):
    model, report = sparse(FAMILIES[name].load())
    return sample(FAMILIES[name], model, steps=4, cfg=2.0), report


# ---- conditions, samplers, runs


def prompts_of_two_lengths(name):
    """Positive and negative that ComfyUI cannot put into one batch."""
    return FAMILIES[name].prompt(3), FAMILIES[name].prompt(4, length=7)


@pytest.mark.parametrize("name", ["flux", "sd35", "wan", "cogvideox"])
def test_conditions_side_by_side_equal_conditions_one_after_the_other(name, monkeypatch):
    model, together = sparse(FAMILIES[name].load(), drift=0.1)
    expected = sample(FAMILIES[name], model, steps=4, cfg=2.0)
    model, apart = sparse(FAMILIES[name].load(), drift=0.1)
    monkeypatch.setattr(type(model.model), "memory_required", lambda *args, **kwargs: 1e18)  # nothing fits together
    near(sample(FAMILIES[name], model, steps=4, cfg=2.0), expected)
    assert json.loads(apart.json())["pairs"] == json.loads(together.json())["pairs"]


def test_prompts_of_different_length_have_states_of_their_own():
    positive, negative = prompts_of_two_lengths("flux")
    model, report = sparse(FAMILIES["flux"].load(), keep=0.1)
    sampled = sample(FAMILIES["flux"], model, steps=4, cfg=2.0, positive=positive, negative=negative)
    assert torch.isfinite(sampled).all()
    assert len(report.runs[-1].patterns) == 2
    assert report.runs[-1].evaluations == "#R.."


def test_a_step_that_takes_sigma_far_asks_for_a_refresh():
    model, report = sparse(FAMILIES["flux"].load(), sigma_ratio=0.6)
    sample(FAMILIES["flux"], model, steps=4)
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", 4).tolist()
    assert sigmas[2] > 0.6 * sigmas[1] > sigmas[3]
    assert report.runs[-1].evaluations == "#R.R"


def test_only_what_a_step_cache_computes_counts():
    family = FAMILIES["flux"]
    model, report = sparse(cached(family.load(), Interval(2, 1), "prediction"), period=3)
    sample(family, model, steps=9)
    assert report.runs[-1].evaluations == "#-R-.-.-R"


@pytest.mark.parametrize("name", ["sd35", "ltx", "qwen"])
def test_a_block_that_somebody_skips_confuses_no_other(name):
    """SD3 and LTX do not say which block asks. From the third evaluation on, the first block repeats what it gave."""
    gave = []

    def skip(args, extra):
        if len(gave) < 2:
            gave.append({stream: x.clone() for stream, x in extra["original_block"](args).items()})
        return {stream: x.clone() for stream, x in gave[-1].items()}

    skipping = FAMILIES[name].load().clone()
    skipping.set_model_patch_replace(skip, "dit", "double_block", 0)
    model, report = sparse(skipping)
    first, *others = outputs_at_one_place(name, model)
    assert report.runs[-1].evaluations == "#R.."
    for other in others:
        near(other, first)


def test_a_lora_that_is_scheduled_asks_for_a_refresh_where_its_strength_changes():
    """What is remembered is of other weights."""
    shape, generator = (3 * tiny.HIDDEN, tiny.HIDDEN), torch.Generator().manual_seed(0)
    name = "diffusion_model.double_blocks.0.img_attn.qkv.diff"
    hooks = comfy.hooks.create_hook_lora({name: torch.randn(shape, generator=generator) * 0.05}, 1.0, 0.0)
    frames = comfy.hooks.HookKeyframeGroup()
    frames.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.0))
    frames.add(comfy.hooks.HookKeyframe(strength=0.2, start_percent=0.5))
    hooks.set_keyframes_on_hooks(frames)
    model, report = sparse(FAMILIES["flux"].load(), period=50)
    sample(FAMILIES["flux"], model, steps=12, positive=tiny.prompt(hooks=hooks))
    assert report.runs[-1].evaluations == "#R....R....."


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (Layer(computed=0), Layer(computed=0), "full"),
        (Layer(computed=2, refreshed=1), Layer(computed=4, refreshed=1), "sparse"),
        (Layer(computed=2, refreshed=1), Layer(computed=0), "refresh"),
        (Layer(computed=6, refreshed=1), Layer(computed=2, refreshed=1), "refresh"),
    ],
)
def test_conditions_that_were_computed_apart_meet_in_one_call(first, second, expected):
    settings = ReTtention(0.3, Schedule(1, 5))
    own = SimpleNamespace(q=torch.zeros(2, 1, 4, 8), options={})
    for layers in ([first, second], [second, first]):
        call = Call(own, Disc(2), Chunk((), rows=1), layers, full=lambda: own.q)
        assert ReTtentionRun(settings, Run())._kind(call) == expected


def test_a_layer_forgets_pictures_of_another_shape():
    layer = Layer(computed=3, refreshed=2, rho=torch.ones(1, 2, 5))
    layer.forget_unless((1, 2, 5), torch.device("cpu"))
    assert layer.refreshed == 2
    layer.forget_unless((1, 2, 6), torch.device("cpu"))
    assert (layer.refreshed, layer.rho) == (None, None)


# ---- what is kept


@pytest.mark.parametrize("storage", ["full", "bf16", "fp8", "cpu", "none"])
def test_memory_is_as_planned_and_given_back(storage, monkeypatch):
    made = []
    monkeypatch.setattr(ReTtentionRun, "install", spy(ReTtentionRun.install, made))
    model, report = sparse(FAMILIES["flux"].load(), storage=storage)
    sample(FAMILIES["flux"], model, steps=4, cfg=2.0)
    assert report.runs[-1].held == sum(report.runs[-1].planned) > 0
    assert (report.runs[-1].planned[1] > 0) == (storage == "cpu")
    assert len(made) == 1
    gc.collect()
    assert made[0]() is None


def spy(function, made):
    def install(self, *args):
        made.append(weakref.ref(self))
        return function(self, *args)

    return install


@pytest.mark.parametrize(("storage", "atol"), [("cpu", 0.0), ("bf16", 0.03), ("fp8", 0.3)])
def test_what_is_stored_in_fewer_bits_is_nearly_the_same(storage, atol):
    expected = outputs_at_one_place("flux", sparse(FAMILIES["flux"].load())[0])[-1]
    got = outputs_at_one_place("flux", sparse(FAMILIES["flux"].load(), storage=storage)[0])[-1]
    tiny.close(got, expected, atol=atol)
    assert torch.equal(got, expected) == (storage == "cpu")


def test_the_share_alone_is_another_picture():
    first, *_, last = outputs_at_one_place("flux", sparse(FAMILIES["flux"].load(), storage="none")[0])
    assert torch.isfinite(last).all()
    assert differ(first, last)


@pytest.mark.parametrize("first", [0, 3])
def test_too_much_memory_is_refused_before_it_is_kept(first):
    model, report = sparse(FAMILIES["flux"].load(), first=first, max_bytes=1000)
    with pytest.raises(ValueError, match=r"would keep 0 MiB for this size, 0 MiB are allowed\. Set 'storage'"):
        sample(FAMILIES["flux"], model, steps=4)
    assert report.runs[-1].evaluations == ("" if first == 0 else "#")
    assert report.runs[-1].held == 0


def test_without_a_limit_a_quarter_of_free_memory_is_allowed(monkeypatch):
    monkeypatch.setattr(ReTtentionRun, "_free", lambda self, where: 4000)
    model, _ = sparse(FAMILIES["flux"].load(), max_bytes=None)
    with pytest.raises(ValueError, match="would keep"):
        sample(FAMILIES["flux"], model, steps=4)


class Watched(ReTtentionRun):
    """Keeps, for each evaluation, whose turn it is and what is held when it begins."""

    turns: list[set[Condition]]
    held: list[tuple[int, int]]  # bytes, and how many conditions they are of

    def visit(self, chunk, weights):
        super().visit(chunk, weights)
        self.turns[-1].update(chunk.conditions)

    def _let_go(self):
        super()._let_go()
        sizes = [lane.bytes for lane in self.run.lanes_of(self)]
        self.held.append((sum(sizes), sum(size > 0 for size in sizes)))
        self.turns.append(set())


@pytest.fixture
def watched(monkeypatch):
    Watched.turns, Watched.held = [], []
    monkeypatch.setattr("dit_toolkit.host.accelerate.re_ttention.ReTtentionRun", Watched)
    return Watched


def scheduled_prompts(count=4):
    """Texts that take turns."""
    return [
        part for i in range(count) for part in tiny.prompt(3 + i, start_percent=i / count, end_percent=(i + 1) / count)
    ]


def test_prompts_that_are_over_are_let_go_of(watched):
    """Four prompts of five evaluations each: two are held at most, and the limit is not for those that are over."""
    model, report = sparse(FAMILIES["flux"].load(), first=0)
    sample(FAMILIES["flux"], model, steps=2)
    one = sum(report.runs[-1].planned)
    model, report = sparse(FAMILIES["flux"].load(), first=0, max_bytes=2 * one)
    watched.held = []
    sample(FAMILIES["flux"], model, steps=20, positive=scheduled_prompts())
    assert len(watched.held) == 20
    assert max(watched.held) == (2 * one, 2)
    assert (sum(report.runs[-1].planned), report.runs[-1].held) == (2 * one, one)


def test_windows_that_have_moved_on_are_let_go_of(watched):
    """Windows of 4 of 10 pictures, which move from evaluation to evaluation and come back."""
    schedule = {"context_schedule": "looped_uniform", "context_stride": 1, "closed_loop": False, "fuse_method": "flat"}
    flux = FAMILIES["flux"].load()
    (windows,) = ContextWindowsManualNode.execute(flux, 4, 1, **schedule, dim=0, freenoise=False).args
    model, _ = sparse(windows, first=0)
    tiny.sample(model, 12, noise=tiny.latent(7, (8, 8), 10))
    recent = [set().union(*watched.turns[max(0, i - 3) : i]) for i in range(12)]
    assert [count for _, count in watched.held] == [len(conditions) for conditions in recent]
    assert max(map(len, recent)) < len(set().union(*watched.turns)) == 10


def test_what_a_step_cache_answers_makes_no_condition_older():
    """Four of five evaluations are forecast, and the next one that is computed is still sparse."""
    family = FAMILIES["flux"]
    model, report = sparse(cached(family.load(), Interval(5, 1), "prediction"), period=50)
    sample(family, model, steps=17)
    assert report.runs[-1].evaluations == "#----R----.----."


def test_a_condition_that_comes_back_after_long_is_refreshed():
    run, chunk = Run(), Chunk((condition(),), rows=1)
    state = ReTtentionRun(ReTtention(0.3, Schedule(1, 50)), run)
    other = Chunk((condition(index=1),), rows=1)
    layer = Layer(computed=3, refreshed=2, rho=torch.ones(1, 2, 5))
    for away, expected in ((2, 2), (3, None)):
        run.begin_evaluation()
        state.visit(chunk, ())
        run.lane(state, chunk.conditions[0], Lane).layers["first"] = layer
        state.planned[chunk.conditions[0], "first"] = (8, 0)
        for _ in range(away):
            run.begin_evaluation()
            state.visit(other, ())
            state.visit(other, ())
        run.begin_evaluation()
        state.visit(chunk, ())
        assert layer.refreshed == expected
        assert bool(state.planned) == (layer.rho is not None) == (expected is not None)
    assert layer.computed == 3  # so it is not new: it takes statistics at once


def condition(index=0):
    return Condition("text", index, 0, None, None, torch.device("cpu"))


# ---- others


def test_references_that_somebody_takes_out_are_named():
    """Flux KV Cache: after the first evaluation the model has no tokens of the reference any more."""
    flux2 = RELATIVES["flux2"]
    (without,) = FluxKVCache.execute(flux2.load()).result
    model, report = sparse(without)
    positive = flux2.prompt(3, reference_latents=[torch.randn(1, 128, 6, 4)])
    sample(flux2, model, steps=4, positive=positive)
    assert report.runs[-1].evaluations == "#"
    assert "calls, self-attention of another length than the picture's" in report.text()


@pytest.fixture
def on_cuda(monkeypatch):
    """The route of CUDA on a CPU, uncompiled; for tests that put something in its place."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr("dit_toolkit.models.accelerate.sparse_attention_flex.compiled", lambda: flex_attention)
    for place in ("sparse_backends", "re_ttention_run"):
        monkeypatch.setattr(f"dit_toolkit.host.accelerate.{place}.has_flex", lambda device: True)
    yield monkeypatch
    UNABLE.clear()


def test_the_route_of_cuda_gives_the_same_picture(on_cuda):
    with pytest.MonkeyPatch.context() as plain_again:
        for place in ("sparse_backends", "re_ttention_run"):
            plain_again.setattr(f"dit_toolkit.host.accelerate.{place}.has_flex", lambda device: False)
        expected = sample(FAMILIES["flux"], sparse(FAMILIES["flux"].load())[0], steps=4, cfg=2.0)
    model, report = sparse(FAMILIES["flux"].load())
    near(sample(FAMILIES["flux"], model, steps=4, cfg=2.0), expected)
    assert list(report.runs[-1].backends) == ["FlexAttention"]
    assert "compile" not in report.text()


def test_a_dense_call_that_fails_leaves_flex_attention_to_the_sparse_ones(on_cuda):
    expected = sample(FAMILIES["flux"], sparse(FAMILIES["flux"].load())[0], steps=4)
    tried = []

    def broken(*args, **kwargs):
        tried.append(1)
        raise SubgraphLoweringException("no shared memory\nlong trace")

    on_cuda.setattr("dit_toolkit.host.accelerate.re_ttention_run.flex_dense", broken)
    model, report = sparse(FAMILIES["flux"].load())
    near(sample(FAMILIES["flux"], model, steps=4), expected)
    assert len(tried) == 1
    assert list(report.runs[-1].backends) == ["FlexAttention"]
    said = "FlexAttention does not compile here for refreshes: SubgraphLoweringException: no shared memory\n"
    assert said in report.text()


def test_short_attention_stays_full():
    model, report = sparse(FAMILIES["flux"].load(), min_tokens=22)
    assert torch.equal(sample(FAMILIES["flux"], model, steps=4, cfg=2.0), plain("flux"))
    assert "left full: 16 calls, 21 tokens are fewer than min_tokens" in report.text()


def test_what_was_there_before_is_called_on():
    """A foreign override: seen in full evaluations and refreshes, and part of what is remembered."""
    seen = []

    def foreign(func, *args, **kwargs):
        seen.append(args)
        return func(*args, **kwargs) * 0.5

    def with_foreign():
        model = FAMILIES["flux"].load().clone()
        model.model_options["transformer_options"]["optimized_attention_override"] = foreign
        return model

    expected, *_ = outputs_at_one_place("flux", with_foreign(), times=1)
    seen.clear()
    model, report = sparse(with_foreign())
    for output in outputs_at_one_place("flux", model):
        near(output, expected)
    assert report.runs[-1].evaluations == "#R.."
    assert len(seen) == 2 * 4


def test_two_sparse_attentions_are_refused():
    model, _ = sparse(FAMILIES["flux"].load())
    with pytest.raises(ValueError, match="sparse already"):
        sparse(model)
    clear = attach_sparse(FAMILIES["flux"].load(), SparseAttention("CLEAR", Disc(2), min_tokens=0))
    with pytest.raises(ValueError, match="sparse already"):
        sparse(clear)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"keep": 1.0}, "keep must"),
        ({"keep": float("nan")}, "keep must"),
        ({"drift": -1.0}, "drift must"),
        ({"drift": float("nan")}, "drift must be a finite number and at least 0, got nan"),
        ({"min_tokens": -1}, "min_tok"),
    ],
)
def test_settings_that_mean_nothing_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        sparse(FAMILIES["flux"].load(), **values)


def test_the_report_tells_the_latest_run():
    model, report = sparse(FAMILIES["cogvideox"].load())
    assert "No sampler has run" in report.text()
    sample(FAMILIES["cogvideox"], model, steps=4)
    sample(FAMILIES["cogvideox"], model, steps=4)
    text = report.text()
    assert (
        "3 x 3 x 3 tokens and 6 others: tube of 1 tokens before and behind in every frame, 9" in text or "tube" in text
    )
    assert "evaluations: #R.." in text
    assert json.loads(report.json())["evaluations"] == "#R.."
    assert "MiB" in text


def test_a_report_of_no_call_claims_no_memory():
    assert ReTtentionRunReport().values()["bytes_planned"] == 0


@pytest.mark.parametrize(
    ("thing", "told"),
    [
        (Grid(4, 5, before=3), "4 x 5 tokens and 3 others"),
        (Band(3), "band of 3 tokens before and behind"),
        (FrameBand(2), "tube of 2 tokens before and behind in every frame"),
        (Disc(4), "disc of radius 4"),
    ],
    ids=str,
)
def test_the_report_speaks_of_patterns_in_words(thing, told):
    assert in_words(thing) == told
