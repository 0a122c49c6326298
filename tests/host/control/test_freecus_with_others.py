"""FreeCus beside step caches, EasyControl, ControlNet, another subject, and what else users put on a MODEL."""

from __future__ import annotations

import gc
import weakref

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_custom_sampler import CFGGuider, DualCFGGuider, DualModelGuider
from comfy_extras.nodes_easycache import EasyCacheNode
from comfy_extras.nodes_perpneg import PerpNeg, PerpNegGuider
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

from dit_toolkit.host import embedded, token_grid
from dit_toolkit.host.accelerate.re_ttention import attach as attach_re_ttention
from dit_toolkit.host.accelerate.re_ttention_settings import ReTtention
from dit_toolkit.host.accelerate.sparse_attention import SparseAttention
from dit_toolkit.host.accelerate.sparse_attention import attach as attach_sparse
from dit_toolkit.host.accelerate.step_cache_run import StepCacheRun
from dit_toolkit.host.attention import TEXT_SCALES
from dit_toolkit.host.control import freecus
from dit_toolkit.host.control.freecus_run import ReferencePass, ReferenceRun
from dit_toolkit.host.families import flux
from dit_toolkit.host.part_of_run import PartOfRun
from dit_toolkit.host.run import Chunk, Condition, Run
from dit_toolkit.models.accelerate.cg_taylor import FirstBlockGate
from dit_toolkit.models.accelerate.policies import Interval
from dit_toolkit.models.accelerate.re_ttention import Schedule
from dit_toolkit.models.accelerate.sparse_attention import Disc
from dit_toolkit.tests.host.accelerate.caching import cached, calls, strip
from dit_toolkit.tests.host.tiny import HIDDEN, close, controlled, flux_state, latent, load_flux, prompt, sample

pytestmark = pytest.mark.comfy

SIZE = (8, 8)


def picture(seed):
    return torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(seed))


def middle():
    mask = torch.zeros(1, 64, 64)
    mask[:, 16:48, 16:48] = 1
    return mask


@pytest.fixture(scope="session")
def vae():
    return embedded.load_vae()


@pytest.fixture
def freed(tiny_flux, vae):
    def make(model=tiny_flux, seed=20, **settings):
        return freecus.attach(model, picture(seed), middle(), vae, **{"layers": "all", **settings})

    return make


@pytest.fixture
def recorded(monkeypatch):
    """Keys and values of every pass of the reference, in order."""
    seen, compute = [], ReferencePass.compute

    def kept(self):
        seen.append(compute(self))
        return seen[-1]

    monkeypatch.setattr(ReferencePass, "compute", kept)
    return seen


def same_keys(a, b):
    return all(torch.equal(x, y) for block in a for x, y in zip(a[block], b[block], strict=True))


# life cycle


def test_nothing_is_left_after_the_run(freed, monkeypatch):
    kept, compute, runs, bind = [], ReferencePass.compute, [], ReferenceRun.__init__

    def watched(self):
        keys = compute(self)
        kept.extend(weakref.ref(x) for pair in keys.values() for x in pair)
        return keys

    monkeypatch.setattr(ReferencePass, "compute", watched)
    monkeypatch.setattr(ReferenceRun, "__init__", lambda self, *args: (bind(self, *args), runs.append(self))[0])
    sample(freed(), 2)
    gc.collect()
    assert len(kept) == 2 * 4 * 2
    assert all(ref() is None for ref in kept)
    assert runs[0].noise.numel() == runs[0].latent.numel() == runs[0].tokens.numel() == 0


def test_core_is_asked_for_room(tiny_flux, freed, monkeypatch):
    asked, load = [], comfy.model_management.load_models_gpu

    def spy(models, memory_required=0, **kwargs):
        asked.append(memory_required)
        return load(models, memory_required=memory_required, **kwargs)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", spy)
    sample(tiny_flux, 1)
    plain = max(asked)
    asked.clear()
    sample(freed(), 1)
    assert max(asked) > plain


# step caches


def test_the_reference_is_drawn_once_an_evaluation(freed, recorded):
    """Of which heun has seven in four steps."""
    sample(freed(), 4, sampler="heun")
    assert len(recorded) == 7


@pytest.mark.parametrize("tap", ["prediction", "last block", "every module"])
def test_an_evaluation_that_is_forecast_costs_no_reference(freed, recorded, tap):
    model = cached(freed(), Interval(2, 2), tap, 1)
    out = sample(model, 8)
    assert strip(model).count(".") >= 2
    assert len(recorded) == strip(model).count("#")
    assert torch.isfinite(out).all()


def test_the_reference_is_computed_in_full_where_the_picture_skips_blocks(tiny_flux, freed, recorded):
    """Delta-DiT runs some blocks in a forecast, which ask: the pass that answers skips none."""
    transformer = tiny_flux.model.diffusion_model
    blocks = {f"double {i}": block for i, block in enumerate(transformer.double_blocks)}
    blocks |= {f"single {i}": block for i, block in enumerate(transformer.single_blocks)}
    counts = []
    for model in (freed(), tiny_flux):
        with calls(**blocks) as count:
            sample(cached(model, Interval(2, 2), "span", 0), 8)
        counts.append(dict(count))
    assert min(counts[1].values()) < 8
    assert counts[0] == {name: count + len(recorded) for name, count in counts[1].items()}


def test_a_gate_that_forecasts(freed, recorded):
    """The probe runs the first block. With the reference in later layers only, a forecast costs none."""
    gate = FirstBlockGate(threshold=1e6, warm_up=2)
    late = cached(freed(layers="2-3"), gate, "gated", 1)
    sample(late, 8)
    assert len(recorded) == strip(late).count("#") < 8
    recorded.clear()
    sample(cached(freed(), gate, "gated", 1), 8)
    assert len(recorded) == 8


def test_the_reference_is_the_same_under_a_step_cache(freed, recorded):
    sample(freed(), 1)
    sample(cached(freed(), Interval(1, 1), "last block", 1), 1)
    assert same_keys(*recorded)


def test_what_a_block_gave_is_told_from_what_it_gave_the_reference(tiny_flux):
    """The reference runs from inside the attention of a block that is being recorded, so before its own parts."""
    block = tiny_flux.model.diffusion_model.double_blocks[0]
    seen = [torch.full((1, 2, HIDDEN), value) for value in (1.0, 2.0)]
    with torch.no_grad(), flux.recorded_outputs(block) as outputs:
        for x in seen:
            for part in flux.parts_of(block):
                last = part(x)
    assert len(outputs) == 4
    assert torch.equal(outputs[-1], last)
    with torch.no_grad():
        assert torch.equal(outputs[0], block.img_attn.proj(seen[1]))


def test_easycache_of_core_sees_the_picture_only(tiny_flux, freed, recorded, caplog):
    (model,) = EasyCacheNode.execute(freed(), 0.9, 0.15, 0.95, False).args
    with caplog.at_level("INFO"):
        out = sample(model, 12)
    assert torch.isfinite(out).all()
    skipped = next(r.getMessage() for r in caplog.records if "skipped" in r.getMessage())
    assert "skipped 0/" not in skipped
    assert len(recorded) < 12


def test_wrappers_around_the_transformer_meet_the_picture_only(freed):
    """EasyCache's is one: it would take the reference for the picture, and keep its output."""
    seen = []

    def watch(executor, x, *args, **kwargs):
        seen.append(x)
        return executor(x, *args, **kwargs)

    model = freed()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", watch)
    sample(model, 3)
    assert len(seen) == 3


# guiders


@pytest.fixture
def who(monkeypatch):
    """Which prompts the reference was shown to, by name, in all passes."""
    texts = {name: prompt(seed)[0][0] for name, seed in PROMPTS.items()}
    seen, compute = [], ReferencePass.compute

    def watched(self):
        for i in self.which:
            text = self.text[[i * self.text.shape[0] // len(self.options["uuids"])]].cpu()
            seen.extend(name for name, each in texts.items() if torch.allclose(each, text))
        return compute(self)

    monkeypatch.setattr(ReferencePass, "compute", watched)
    return seen


PROMPTS = {"positive": 3, "middle": 5, "negative": 4, "empty": 6}
P, M, N, E = (prompt(seed) for seed in PROMPTS.values())

# Names as the guiders have them. The order of their calls: negative, middle, positive; one alone; positive, negative,
# empty.
GUIDERS = {
    "CFG": lambda model, other: CFGGuider.execute(model, P, N, 2.0),
    "DualCFG": lambda model, other: DualCFGGuider.execute(model, P, M, N, 2.0, 3.0, "regular"),
    "DualCFG nested": lambda model, other: DualCFGGuider.execute(model, P, M, N, 2.0, 3.0, "nested"),
    "DualModel": lambda model, other: DualModelGuider.execute(model, P, 2.0, model, N),
    "DualModel, another one": lambda model, other: DualModelGuider.execute(model, P, 2.0, other, N),
    "PerpNeg": lambda model, other: PerpNegGuider.execute(model, P, N, E, 2.0, 1.0),
    "PerpNeg, the node": lambda model, other: CFGGuider.execute(PerpNeg.execute(model, E, 1.0).args[0], P, N, 2.0),
    "SAG": lambda model, other: CFGGuider.execute(negative_once_more(model), P, N, 2.0),
    "an area that is all": lambda model, other: CFGGuider.execute(model, P + WHOLE, N, 2.0),
}  # fmt: skip
WHOLE = prompt(3, area=(8, 8, 0, 0))  # core gives the negative prompt a copy, with its uuid


def negative_once_more(model):
    """What core's Self-Attention Guidance, which is for UNets, does after each evaluation."""

    def again(args):
        given = args["model"], [args["uncond"]], args["input"], args["sigma"], args["model_options"]
        comfy.samplers.calc_cond_batch(*given)
        return args["denoised"]

    model = model.clone()
    model.set_model_sampler_post_cfg_function(again)
    return model


def guided(guider, model, other, steps=1):
    noise = latent(7, SIZE)
    (made,) = GUIDERS[guider](model, other).args
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    euler = comfy.samplers.sampler_object("euler")
    return made.sample(noise, torch.zeros_like(noise), euler, sigmas, disable_pbar=True, seed=0)


@pytest.mark.parametrize("guider", GUIDERS)
def test_positive_only_is_the_positive_under_every_guider(tiny_flux, freed, who, guider):
    assert torch.isfinite(guided(guider, freed(), tiny_flux)).all()
    assert set(who) == {"positive"}
    assert len(who) == (2 if guider == "an area that is all" else 1)


@pytest.mark.parametrize("guider", GUIDERS)
def test_names_of_prompts_are_the_guider_s(tiny_flux, guider, monkeypatch):
    told, find = set(), StepCacheRun.visit

    def watched(self, base, x, text, chunk):
        told.update(condition.name for condition in chunk.conditions)
        return find(self, base, x, text, chunk)

    monkeypatch.setattr(StepCacheRun, "visit", watched)
    guided(guider, cached(tiny_flux, FirstBlockGate(1e-12, 1), "gated", 0), tiny_flux, steps=4)
    expected = {
        "DualCFG": {"positive", "middle", "negative"},
        "DualCFG nested": {"positive", "middle", "negative"},
        "PerpNeg": {"positive", "negative", "empty_negative_prompt"},
    }
    assert told == expected.get(guider, told)
    assert "positive" in told


def test_prompts_of_all_names_see_the_subject_if_asked_to(tiny_flux, freed, who):
    guided("DualCFG", freed(prompts="positive and negative"), tiny_flux)
    assert sorted(who) == ["middle", "negative", "positive"]


# other features


def test_the_reference_pass_knows_nothing_of_easycontrol(tiny_flux, freed, file, recorded):
    alone = sample(freed(), 1)
    for model in (controlled(freed(), file=file), freed(controlled(tiny_flux, file=file))):
        both = sample(model, 1)
        assert (both - alone).abs().mean() > 1e-3
        assert (both - sample(controlled(tiny_flux, file=file), 1)).abs().mean() > 1e-3
    assert all(same_keys(recorded[0], other) for other in recorded[1:])


def test_controlnet_is_added_to_the_picture_only(tiny_flux, freed, recorded):
    def add(executor, x, t, c_concat, c_crossattn, control, options, **kwargs):
        residual = 0.6 * torch.randn(1, 16, HIDDEN, generator=torch.Generator().manual_seed(0))
        return executor(x, t, c_concat, c_crossattn, {"input": [residual], "output": [residual]}, options, **kwargs)

    model = freed()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", add)
    changed = sample(model, 1)
    assert (changed - sample(freed(), 1)).abs().mean() > 0.01
    assert same_keys(*recorded)


def test_two_subjects(freed, recorded):
    """Each has a reference pass of its own; the text is scaled once; order does not matter."""
    both = sample(freed(freed(), seed=21), 2)
    assert len(recorded) == 4
    for seed in (20, 21):
        assert (both - sample(freed(seed=seed), 2)).abs().mean() > 1e-3
    close(sample(freed(freed(seed=21)), 2), both)


def test_the_text_is_scaled_by_the_larger_of_two(freed):
    seen = []

    def spy(executor, *args, **kwargs):
        seen.append(args[-1] if isinstance(args[-1], dict) else kwargs["transformer_options"])
        return executor(*args, **kwargs)

    model = freed(freed(text_key_scale=1.3), seed=21)
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", spy)
    one = sample(model, 1)
    assert len(seen[0][TEXT_SCALES]) == 2
    close(one, sample(freed(freed(text_key_scale=1.3), seed=21, text_key_scale=0.5), 1))
    assert (one - sample(freed(freed(), seed=21), 1)).abs().mean() > 1e-4


def test_re_ttention_keeps_reference_and_picture_apart(freed, recorded):
    settings = ReTtention(0.5, Schedule(1, 2, 0.0), min_tokens=0, drift=0.0, max_bytes=1 << 30)
    out = sample(attach_re_ttention(freed(), settings), 6, cfg=2.0)
    assert torch.isfinite(out).all()
    assert len(recorded) == 6
    assert (out - sample(freed(), 6, cfg=2.0)).abs().mean() > 1e-4


def test_the_reference_has_lanes_of_its_own():
    """What another feature keeps for a prompt is not what it keeps for the reference under that prompt."""
    conditions = tuple(Condition(name, i, 0, None, None, torch.device("cpu")) for i, name in enumerate("ab"))
    chunk, run = Chunk(conditions, 3), Run()
    aside = chunk.in_role("reference", [1])
    assert aside.rows == 3
    assert aside.conditions[0].uuid == "b"
    assert aside.conditions == chunk.in_role("reference", [1]).conditions
    owner = object()
    assert run.lane(owner, aside.conditions[0], list) is not run.lane(owner, conditions[1], list)
    assert aside.conditions != chunk.in_role("another", [1]).conditions


def test_skip_layer_guidance_sees_the_reference_too(freed, recorded):
    (model,) = SkipLayerGuidanceDiT.execute(freed(), 2.0, 0.0, 1.0, double_layers="1").args
    out = sample(model, 2, cfg=2.0)
    assert torch.isfinite(out).all()
    assert len(recorded) == 4


def test_an_area_of_the_picture_is_drawn_without_the_reference(freed, recorded):
    """Its latent is of another size, and nobody says where it lies."""
    out = sample(freed(), 2, positive=prompt() + prompt(5, area=(4, 4, 0, 4), strength=1.0))
    assert torch.isfinite(out).all()
    assert len(recorded) == 2


def test_windows_over_a_batch_take_their_own_noise(freed):
    schedule = {"context_schedule": "standard_static", "context_stride": 1, "closed_loop": False, "fuse_method": "flat"}
    (model,) = ContextWindowsManualNode.execute(freed(), 2, 0, **schedule, dim=0, freenoise=False).args
    noise = latent(7, SIZE, 4)
    together = sample(model, 2, noise=noise)
    close(together, torch.cat([sample(freed(), 2, noise=noise[i : i + 2]) for i in (0, 2)]))


def test_sparse_attention_is_told_where_the_tokens_of_the_pass_are(freed, monkeypatch):
    """An edit model's references lie behind the picture, and are not there in the pass."""
    lengths, compute = [], ReferencePass.compute

    def watched(self):
        plain = self.plain

        def call(x, t, concat, text, control, options, **conds):
            for each in (self.options, options):
                lengths.append([grid.length for grid in each[token_grid.TOKENS].grids])
            return plain(x, t, concat, text, control, options, **conds)

        self.plain = call
        return compute(self)

    positive = prompt(reference_latents=[latent(30, (4, 6))], reference_latents_method="offset")
    plain = sample(freed(), 1, positive=positive)
    monkeypatch.setattr(ReferencePass, "compute", watched)
    model = attach_sparse(freed(), SparseAttention("test", Disc(1.0), min_tokens=0))
    out = sample(model, 1, positive=positive)
    assert lengths == [[5 + 16 + 6], [5 + 16]]
    assert (out - plain).abs().mean() > 1e-3


def test_reference_latents_of_an_edit_model_stay_out_of_the_pass(freed, recorded):
    positive = prompt(reference_latents=[latent(30, (4, 6))], reference_latents_method="offset")
    out = sample(freed(), 1, positive=positive)
    assert (out - sample(freed(), 1)).abs().mean() > 1e-3
    assert same_keys(*recorded)


def test_a_lora_acts_on_the_reference_too(freed, recorded):
    name = "diffusion_model.double_blocks.0.img_attn.qkv.weight"
    change = 0.03 * torch.randn(3 * HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(0))
    model = freed()
    model.add_patches({name: ("diff", (change,))}, 1.0)
    sample(model, 1)
    sample(freed(), 1)
    assert not same_keys(*recorded)


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_follows_the_reference_at_every_step(freed, backend):
    torch._dynamo.reset()
    small = load_flux(flux_state(double=1, single=0))  # tracing takes seconds a block

    def compiled(model):
        model = model.clone()
        options = {"guard_filter_fn": skip_torch_compile_dict}
        set_torch_compile_wrapper(model=model, backend=backend, options=options)
        return model

    plain = freed(small, part=PartOfRun(start=0.3))
    expected = sample(plain, 3)
    assert (expected - sample(small, 3)).abs().mean() > 1e-3
    close(sample(compiled(plain), 3), expected, atol=1e-4)
