"""Step caches on every family and sampler, judged by loops that a reader of the papers would write."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import comfy.samplers
import pytest
import torch
from comfy.ldm.flux.layers import timestep_embedding
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from dit_toolkit.host.accelerate import step_cache_run
from dit_toolkit.host.accelerate.step_cache_taps import LastBlockTap, SpanTap, block_hooks
from dit_toolkit.host.part_of_run import PartOfRun
from dit_toolkit.models.accelerate.cg_taylor import FirstBlockGate
from dit_toolkit.models.accelerate.delta_dit import Stages
from dit_toolkit.models.accelerate.input_change import InputChange
from dit_toolkit.models.accelerate.policies import Guard, Interval, Listed, Spread
from dit_toolkit.models.accelerate.schedules import Damping, spread
from dit_toolkit.models.accelerate.taylorseer import FORECASTS, Forecaster
from dit_toolkit.tests.host import tiny
from dit_toolkit.tests.host.accelerate.caching import cached, calls, last_run, strip
from dit_toolkit.tests.host.families import FAMILIES, sample
from dit_toolkit.tests.models.accelerate.test_taylorseer import forecast_by_recursion

pytestmark = [pytest.mark.comfy, pytest.mark.sweep(together=True)]

WITH_BLOCKS = tuple(name for name, family in FAMILIES.items() if family.answers.kinds)
BLOCK_TAPS = ("last block", "gated", "gated residual", "span")


def names_and_taps(families) -> list[tuple[str, str]]:
    """Every tap that a family offers, as the README's table has it."""
    pairs = [(name, "prediction") for name in families]
    pairs += [(name, tap) for name, family in families.items() if family.answers.kinds for tap in BLOCK_TAPS]
    return pairs + [(name, "every module") for name, family in families.items() if family.of == "FLUX.1"]


family_and_tap = pytest.mark.parametrize(("name", "tap"), names_and_taps(FAMILIES))
family_with_blocks = pytest.mark.parametrize("name", WITH_BLOCKS)


def test_only_models_with_block_hooks_have_blocks():
    assert tuple(name for name, family in FAMILIES.items() if block_hooks(family.load())) == WITH_BLOCKS


# neutral values, with the cache attached: the nodes themselves leave it out


@pytest.mark.parametrize("name", FAMILIES)
def test_a_forecast_prediction_runs_nothing_of_the_model(name):
    family = FAMILIES[name]
    model = cached(family.load(), Interval(3, 2), order=1)
    with calls(transformer=family.load().model.diffusion_model) as count:
        sample(family, model, 8)
    assert strip(model) == "##..#..#"
    assert count["transformer"] == 4


@family_with_blocks
@pytest.mark.parametrize("tap", ["last block", "gated"])
def test_a_forecast_last_block_runs_no_block_but_the_probed_one(name, tap):
    family = FAMILIES[name]
    model = cached(family.load(), Interval(3, 2), tap, order=1)
    transformer = family.load().model.diffusion_model
    with calls(**blocks_by_name(family.load())) as count, calls(transformer=transformer) as whole:
        sample(family, model, 8)
    assert whole["transformer"] == 8
    numbers = list(count.values())
    assert numbers == [8 if tap == "gated" else 4] + [4] * (len(numbers) - 1)


def blocks_by_name(model) -> dict[str, torch.nn.Module]:
    """The modules of the blocks, in the order they run."""
    family, keys = block_hooks(model)
    lists = {kind.kind: getattr(model.model.diffusion_model, kind.modules) for kind in family.kinds}
    return {f"{kind} {index}": lists[kind][index] for kind, index in keys}


@family_with_blocks
def test_rear_blocks_are_skipped_early_and_front_blocks_late(name):
    """Exact calls of each block: n_full * depth + n_delta * (depth - skipped), and the span moves at the boundary."""
    family = FAMILIES[name]
    depth = len(blocks_by_name(family.load()))
    skipped = round(0.75 * depth)
    model = cached(family.load(), Interval(2, 1), "span")
    ran = {"rear": [], "front": []}
    blocks = list(blocks_by_name(family.load()).values())
    with calls(front=blocks[0], rear=blocks[-1], **blocks_by_name(family.load())) as count:

        def each(executor, *args, **kwargs):
            before = dict(count)
            out = executor(*args, **kwargs)
            for place, seen in ran.items():
                seen.append(count[place] - before.get(place, 0))
            return out

        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "each", each)
        sample(family, model, 12)
    full = [entry.computed for entry in last_run(model).entries]
    sampling = family.load().get_model_object("model_sampling")
    early = [entry.sigma > sampling.percent_to_sigma(0.5) * (1 + 1e-6) for entry in last_run(model).entries]
    switch = early.index(False)
    assert 0 < switch < 12
    assert full[:switch] == [i % 2 == 0 for i in range(switch)]
    assert full[switch]  # the residual of the new span does not exist yet
    assert full[switch:] == [i % 2 == 0 for i in range(12 - switch)]
    assert ran["front"] == [int(f or e) for f, e in zip(full, early, strict=True)]
    assert ran["rear"] == [int(f or not e) for f, e in zip(full, early, strict=True)]
    total = sum(number for name, number in count.items() if name not in ran)
    assert total == sum(full) * depth + (12 - sum(full)) * (depth - skipped)


# FLUX.1 by hand


class FluxByHand:
    """The transformer's parts, called one by one. The stream is one tensor `[1, T, D]`, text first."""

    def __init__(self, model, conditioning):
        self.net = model.model.diffusion_model
        self.model = model
        self.text, self.extra = conditioning[0]
        self.count = self.text.shape[1]
        self.blocks = [*self.net.double_blocks, *self.net.single_blocks]

    def open(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Embed; keeps what modulates and rotates."""
        net = self.net
        tokens, ids = net.process_img(x)
        guidance = torch.tensor([self.extra["guidance"]])
        vec = net.time_in(timestep_embedding(sigma[None], 256)) + net.guidance_in(timestep_embedding(guidance, 256))
        self.vec = vec + net.vector_in(self.extra["pooled_output"])
        self.pe = net.pe_embedder(torch.cat((torch.zeros(1, self.count, 3), ids), 1))
        self.shape = x.shape
        return torch.cat((net.txt_in(self.text), net.img_in(tokens)), 1)

    def block(self, i: int, h: Tensor) -> Tensor:
        h = h.clone()
        if i >= len(self.net.double_blocks):
            return self.blocks[i](h, vec=self.vec, pe=self.pe)
        txt, img = h[:, : self.count].clone(), h[:, self.count :].clone()
        img, txt = self.blocks[i](img=img, txt=txt, vec=self.vec, pe=self.pe)
        return torch.cat((txt, img), 1)

    def through(self, h: Tensor, start=0, stop=None) -> Tensor:
        for i in range(start, len(self.blocks) if stop is None else stop):
            h = self.block(i, h)
        return h

    def head(self, h: Tensor) -> Tensor:
        """The model's output, in the shape of the latent."""
        tokens = self.net.final_layer(h[:, self.count :], self.vec)
        _, channels, height, width = self.shape
        tokens = tokens.view(1, height // 2, width // 2, channels, 2, 2)
        return tokens.permute(0, 3, 1, 4, 2, 5).reshape(self.shape)

    def euler(self, evaluate, steps=12) -> Tensor:
        """`evaluate(n, x, sigma)` gives the model's output."""
        sigmas = comfy.samplers.calculate_sigmas(self.model.get_model_object("model_sampling"), "simple", steps)
        x = tiny.latent(seed=7, size=(8, 8)) * sigmas[0]
        for n in range(steps):
            denoised = x - sigmas[n] * evaluate(n, x, sigmas[n])
            x = x + (x - denoised) / sigmas[n] * (sigmas[n + 1] - sigmas[n])
        return self.model.model.process_latent_out(x)


@pytest.fixture
def by_hand(tiny_flux) -> FluxByHand:
    comfy.model_management.load_models_gpu([tiny_flux])  # takes off what other clones have put on the weights
    return FluxByHand(tiny_flux, tiny.prompt())


def same(a: Tensor, b: Tensor) -> None:
    """Equal up to the rounding of float32, of which forecasts by several weights add some ulps."""
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * float(b.abs().max()))


def is_full(n: int, every: int, first: int) -> bool:
    return n < first or (n - first + 1) % every == 0


def test_the_loop_by_hand_is_the_model(by_hand, tiny_flux):
    out = by_hand.euler(lambda n, x, sigma: by_hand.head(by_hand.through(by_hand.open(x, sigma))))
    same(out, tiny.sample(tiny_flux, 12))


@pytest.mark.parametrize("first_enhance", [1, 3])
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("tap", ["prediction", "last block"])
def test_taylorseer_is_the_loop_written_by_hand(by_hand, tiny_flux, tap, order, first_enhance):
    stored = {}

    def evaluate(n, x, sigma):
        h = by_hand.open(x, sigma)
        if is_full(n, 3, 3):
            h = by_hand.through(h)
            stored[n] = by_hand.head(h) if tap == "prediction" else h
            return by_hand.head(h)
        guess = forecast_by_recursion(stored, n, order, first_enhance)
        return guess if tap == "prediction" else by_hand.head(guess)

    forecaster = Forecaster(order, derivatives_from=first_enhance - 1)
    model = cached(tiny_flux, Interval(3, 3), tap, forecaster)
    same(tiny.sample(model, 12), by_hand.euler(evaluate))
    assert strip(model) == "###..#..#..#"


@pytest.mark.parametrize("order", [0, 1, 2])
def test_taylorseer_on_every_module_is_the_loop_written_by_hand(by_hand, tiny_flux, order):
    """taylorseer.md 3: outputs of attention and MLP before their gates, gates of the current noise level."""
    stored: dict[tuple, dict[int, Tensor]] = {}

    def parts(block) -> dict:
        if hasattr(block, "linear2"):
            return {"all": block.linear2}
        return {
            ("img", "attn"): block.img_attn.proj,
            ("img", "mlp"): block.img_mlp,
            ("txt", "attn"): block.txt_attn.proj,
            ("txt", "mlp"): block.txt_mlp,
        }

    def compute(n: int, i: int, h: Tensor) -> Tensor:
        hooks = [
            part.register_forward_hook(
                lambda _, __, out, key=(i, name): stored.setdefault(key, {}).update({n: out.clone()})
            )
            for name, part in parts(by_hand.blocks[i]).items()
        ]
        h = by_hand.block(i, h)
        for hook in hooks:
            hook.remove()
        return h

    def guess(n: int, i: int, h: Tensor) -> Tensor:
        block, vec = by_hand.blocks[i], by_hand.vec
        told = {name: forecast_by_recursion(stored[i, name], n, order) for name in parts(block)}
        if "all" in told:
            return h + block.modulation(vec)[0].gate * told["all"]
        txt, img = h[:, : by_hand.count], h[:, by_hand.count :]
        for_img, for_txt = block.img_mod(vec), block.txt_mod(vec)
        img = img + for_img[0].gate * told["img", "attn"] + for_img[1].gate * told["img", "mlp"]
        txt = txt + for_txt[0].gate * told["txt", "attn"] + for_txt[1].gate * told["txt", "mlp"]
        return torch.cat((txt, img), 1)

    def evaluate(n, x, sigma):
        h = by_hand.open(x, sigma)
        for i in range(len(by_hand.blocks)):
            h = (compute if is_full(n, 3, 3) else guess)(n, i, h)
        return by_hand.head(h)

    model = cached(tiny_flux, Interval(3, 3), "every module", order)
    same(tiny.sample(model, 12), by_hand.euler(evaluate))
    assert last_run(model).bytes_held == sum(
        x.nbytes for one in stored.values() for x in list(one.values())[: order + 1]
    )


def median_error(model, gate: FirstBlockGate, tap: str, order: int, steps=12) -> float:
    """Of a gate that stays shut: a threshold at which some evaluations pass and some do not."""
    shut = cached(model, gate, tap, order)
    tiny.sample(shut, steps)
    errors = sorted(last_run(shut).errors)
    return errors[len(errors) // 2]


@pytest.mark.parametrize(("first_order", "last_order"), [(1, 1), (0, 0), (2, 1)])
@pytest.mark.parametrize("compare", ["output", "residual"])
def test_the_gate_is_the_loop_written_by_hand(by_hand, tiny_flux, compare, first_order, last_order):
    """cg_taylor.md 2, and its neighbour that compares the change block 0 makes and forecasts that of the others."""
    tap = "gated residual" if compare == "residual" else "gated"
    shut = FirstBlockGate(1e-12, 3, first_order, compare)
    threshold = median_error(tiny_flux, shut, tap, last_order)
    first, rest, decisions, errors = {}, {}, [], []

    def evaluate(n, x, sigma):
        door = by_hand.open(x, sigma)
        h = by_hand.block(0, door)
        picture = h[:, by_hand.count :] - (door[:, by_hand.count :] if compare == "residual" else 0)
        error = inf
        if 3 <= n < 11:
            told = forecast_by_recursion(first, n, 0 if compare == "residual" else first_order)
            error = float((told - picture).abs().mean() / picture.abs().mean())
            errors.append(error)
        full = not error < threshold
        decisions.append(full)
        base = h if compare == "residual" else 0
        if full:
            y = by_hand.through(h, 1)
            first[n], rest[n] = picture, y - base
        else:
            y = base + forecast_by_recursion(rest, n, last_order)
        return by_hand.head(y)

    model = cached(tiny_flux, FirstBlockGate(threshold, 3, first_order, compare), tap, last_order, guard=Guard(1))
    same(tiny.sample(model, 12), by_hand.euler(evaluate))
    assert [entry.computed for entry in last_run(model).entries] == decisions
    assert 2 <= decisions.count(False) <= 7
    assert decisions[3:11].count(True) >= 1
    assert last_run(model).errors == pytest.approx(errors, rel=1e-3)


@pytest.mark.parametrize(("share", "boundary", "order"), [(0.75, 0.5, 0), (0.5, 0.3, 0), (1.0, 0.5, 1), (0.75, 0.0, 1)])
def test_delta_dit_is_the_loop_written_by_hand(by_hand, tiny_flux, share, boundary, order):
    """Spans of every position, those too that reach over the joint of double and single blocks."""
    edge = tiny_flux.get_model_object("model_sampling").percent_to_sigma(boundary)
    depth, stored, last, skipped = len(by_hand.blocks), {}, [-9], []

    def evaluate(n, x, sigma):
        count = round(share * depth)
        a, b = (depth - count, depth) if sigma > edge else (0, count)
        h = by_hand.through(by_hand.open(x, sigma), 0, a)
        if n - last[0] >= 3 or (a, b) not in stored:
            if (a, b) not in stored:
                stored.clear()
            last[0] = n
            after = by_hand.through(h, a, b)
            stored.setdefault((a, b), {})[n] = after - h
        else:
            skipped.append((a, b))
            after = h + forecast_by_recursion(stored[a, b], n, order)
        return by_hand.head(by_hand.through(after, b))

    tap = SpanTap(*block_hooks(tiny_flux), stages=Stages(share, boundary))
    model = cached(tiny_flux, Interval(3, 1), tap, order)
    same(tiny.sample(model, 12), by_hand.euler(evaluate))
    assert strip(model).count(".") == len(skipped) >= 7
    assert len(set(skipped)) == (2 if boundary > 0 and share < 1 else 1)


@pytest.mark.parametrize("threshold", [0.3, 0.6])
def test_input_change_is_the_loop_written_by_hand(by_hand, tiny_flux, threshold):
    stored, before, sums, decisions = {}, [], [0.0], []

    def evaluate(n, x, sigma):
        full, seen = sorted(stored), [*before, x]
        before.append(x)
        if n >= 3:
            (x1, v1), (x2, v2) = stored[full[-1]], stored[full[-2]]
            ratio = (v1 - v2).abs().mean() / (x1 - x2).abs().mean()
            sums[0] += float(ratio * (x - seen[-2]).abs().mean() / v1.abs().mean())
        if n >= 3 and sums[0] < threshold:
            decisions.append(False)
            return stored[full[-1]][1]
        decisions.append(True)
        sums[0] = 0.0
        raw = by_hand.head(by_hand.through(by_hand.open(x, sigma)))
        stored[n] = (x, raw)
        return raw

    model = cached(tiny_flux, InputChange(threshold, 3))
    same(tiny.sample(model, 12), by_hand.euler(evaluate))
    assert [entry.computed for entry in last_run(model).entries] == decisions
    assert False in decisions[3:]


# every family with block hooks, by a replacement of its blocks that anybody could write


def with_plain_replacement(model, every: int, order: int, span: tuple[int, int], residual: bool):
    """The same cache for one prompt without guidance: a counter, a dictionary, and one function for each block."""
    _, keys = block_hooks(model)
    start, stop = span
    state: dict = {"n": -1, "stored": {}}

    def counted(executor, *args, **kwargs):
        state["n"] += 1
        return executor(*args, **kwargs)

    def replacement(i: int):
        def replace(args, extra):
            n, run = state["n"], extra["original_block"]
            if not start <= i < stop:
                return run(args)
            if i == start:
                state["door"] = {k: args[k].clone() for k in ("img", "txt") if k in args}
            full = n % every == 0
            out = dict(run(args)) if full else {k: args[k] for k in ("img", "txt") if k in args}
            if i < stop - 1:
                return out
            door = state["door"]
            if out["img"].shape[1] > door["img"].shape[1]:
                door = {"img": torch.cat((door["txt"], door["img"]), 1)}
            if full:  # some families have no text there, or none that changes
                state["names"] = [k for k in ("img", "txt") if out.get(k) is not None]
            for name in state["names"]:
                past, base = state["stored"].setdefault(name, {}), door[name] if residual else 0
                if full:
                    past[n] = (out[name] - base).clone()
                else:
                    out[name] = base + forecast_by_recursion(past, n, order)
            return out

        return replace

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "counted", counted)
    for i, key in enumerate(keys):
        model.set_model_patch_replace(replacement(i), "dit", *key)
    return model


@family_with_blocks
@pytest.mark.parametrize("kind", ["last block", "early span", "late span"])
def test_it_is_what_a_plain_replacement_of_the_blocks_does(name, kind):
    family, order = FAMILIES[name], 1
    blocks = block_hooks(family.load())
    depth = len(blocks[1])
    count = round(0.75 * depth)
    span = {"last block": (0, depth), "early span": (depth - count, depth), "late span": (0, count)}[kind]
    tap = {
        "last block": LastBlockTap(*blocks),
        "early span": SpanTap(*blocks, stages=Stages(0.75, 1.0)),
        "late span": SpanTap(*blocks, stages=Stages(0.75, 0.0)),
    }[kind]
    expected = sample(family, with_plain_replacement(family.load(), 3, order, span, kind != "last block"), 6)
    model = cached(family.load(), Interval(3, 1), tap, order)
    out = sample(family, model, 6)
    assert strip(model) == "#..#.."
    same(out, expected)


# when is computed


# heun, dpm_2 and others evaluate twice a step, but for the last one.
SAMPLERS = {"euler": 8, "heun": 15, "dpm_2": 15, "dpmpp_2s_ancestral": 15, "dpmpp_2m": 8, "res_multistep": 8, "lcm": 8}
SAMPLERS |= {"uni_pc": 8, "dpmpp_sde": 15, "seeds_3": 22}


@pytest.mark.parametrize(("sampler", "evaluations"), SAMPLERS.items())
@pytest.mark.parametrize("form", ["taylor", "newton"])
def test_every_kind_of_sampler_gets_through(tiny_flux, sampler, evaluations, form):
    """Evaluations are not steps. Newton's form follows log sigma, which some samplers repeat."""
    model = cached(tiny_flux, Interval(3, 3), order=Forecaster(2, form, "log sigma"))
    with calls(transformer=tiny_flux.model.diffusion_model) as count:
        out = tiny.sample(model, 8, sampler=sampler)
    assert torch.isfinite(out).all()
    assert len(last_run(model).entries) == evaluations
    expected = [is_full(n, 3, 3) for n in range(evaluations)]
    assert [entry.computed for entry in last_run(model).entries] == expected
    assert count["transformer"] == sum(expected)


@pytest.mark.parametrize("sampler", comfy.samplers.SAMPLER_NAMES)
def test_the_number_of_evaluations_is_known_of_every_sampler_of_comfyui(tiny_flux, sampler):
    """Or said to be unknown. A schedule that ends with a computed evaluation and the page's strip live on it."""
    model = cached(tiny_flux, Interval(2, 1))
    assert torch.isfinite(tiny.sample(model, 4, sampler=sampler)).all()
    run = last_run(model)
    assert run.planned in ((None,) if sampler in ("heunpp2", "dpm_adaptive") else (len(run.entries),))
    assert "." in strip(model)


@pytest.mark.parametrize("sampler", ["euler", "heun", "seeds_3"])
def test_a_schedule_to_the_end_computes_the_last_evaluation(tiny_flux, sampler):
    model = cached(tiny_flux, Interval(4, 2, to_end=True), order=1)
    tiny.sample(model, 8, sampler=sampler)
    marks = strip(model)
    assert marks.endswith("#")
    gaps = [len(gap) + 1 for gap in marks.strip("#").split("#")]
    assert set(gaps) <= {3, 4, 5}
    assert max(gaps) - min(gaps) <= 1


def test_a_sampler_that_looks_ahead_computes_what_it_cannot_tell(tiny_flux):
    """heunpp2 evaluates at sigmas that rise again within each step. Nothing is forecast over a rise."""
    model = cached(tiny_flux, Interval(3, 3), order=1)
    assert torch.equal(tiny.sample(model, 8, sampler="heunpp2"), tiny.sample(tiny_flux, 8, sampler="heunpp2"))
    assert "." not in strip(model)
    assert last_run(model).notes == ["Started anew 6 times, last at evaluation 18: sigma rose."]


@pytest.mark.parametrize(
    ("policy", "steps", "full"),
    [
        (Interval(6, 3), 50, [0, 1, 2, 8, 14, 20, 26, 32, 38, 44]),
        (Interval(5, 1), 50, list(range(0, 50, 5))),
        (Interval(5, 1), 40, list(range(0, 40, 5))),
        (Listed.parse("0-2, 5, 11"), 14, [0, 1, 2, 5, 11]),
        (Listed.parse("1100"), 11, [0, 1, 4, 5, 8, 9]),
    ],
)
def test_schedules_on_a_real_run(tiny_flux, policy, steps, full):
    model = cached(tiny_flux, policy, order=0)
    tiny.sample(model, steps)
    assert [i for i, entry in enumerate(last_run(model).entries) if entry.computed] == full


@pytest.mark.parametrize(("sampler", "cfg", "every"), [("euler", 1.0, 3), ("euler", 2.5, 5), ("heun", 1.0, 3)])
def test_a_plan_comes_from_the_noise_levels_of_the_run(tiny_flux, sampler, cfg, every):
    model = cached(tiny_flux, Spread(every), order=1)
    tiny.sample(model, 14, sampler=sampler, cfg=cfg)
    entries = last_run(model).entries
    levels = [entry.sigma for entry in entries]
    assert levels == pytest.approx(step_cache_run.sigmas_of([*dict.fromkeys(levels), 0.0], f"sample_{sampler}"))
    assert [i for i, entry in enumerate(entries) if entry.computed] == list(
        spread(levels, round(len(entries) / every), cfg)
    )
    assert {entry.reason for entry in entries[1:]} == {"planned"}


@pytest.mark.parametrize("sampler", sorted(step_cache_run.PER_STEP))
def test_the_noise_level_of_every_evaluation_is_known(sampler):
    """To half a step: where it lies within its step decides nothing."""
    sigmas = [1.0, 0.75, 0.5, 0.25, 0.0]
    levels = step_cache_run.sigmas_of(sigmas, sampler)
    assert len(levels) == step_cache_run.evaluations_of(sigmas[:-1], sampler)
    assert levels == sorted(levels, reverse=True)
    assert levels[0] == 1.0
    assert set(levels) >= set(sigmas[:-1])


def test_samplers_that_remember_are_known_by_the_names_of_their_functions():
    names = ("euler", "heun", "dpmpp_2m", "dpmpp_3m_sde_gpu", "res_multistep", "ipndm_v", "deis", "uni_pc", "sa_solver")
    functions = {name: comfy.samplers.sampler_object(name).sampler_function.__name__ for name in names}
    found = {name for name, function in functions.items() if step_cache_run.is_multistep(function)}
    assert found == set(names) - {"euler", "heun"}


@pytest.mark.parametrize(("family", "shares"), [("flux", (1.0, 0.5, 0.1)), ("pixart", (0.5, 1 / 3, 1 / 11))])
def test_noise_levels_are_shares_of_noise(family, shares):
    """Sigma itself is one with flow models; with EPS it goes up to some 14 or more."""
    sampling = FAMILIES[family].load().get_model_object("model_sampling")
    assert step_cache_run.noise_shares(sampling, (1.0, 0.5, 0.1)) == pytest.approx(shares)


@pytest.mark.parametrize(("cfg", "slope"), [(1.0, 1.0), (2.5, (0.85 - 2.5**1.3 / 4) / 0.3)])
def test_guidance_damps_the_forecast_of_a_run(tiny_flux, cfg, slope):
    """Over four computed evaluations of twelve: the forecast by hand, with the prediction tap."""
    damped = replace(FORECASTS["Newton, damped"], order=1)
    model = cached(tiny_flux, Spread(3), order=damped)
    by_hand = replace(damped, damped=False, damping=Damping(slope, 0.0))
    other = cached(tiny_flux, Spread(3), order=by_hand)
    assert torch.equal(tiny.sample(model, 12, cfg=cfg), tiny.sample(other, 12, cfg=cfg))
    assert not torch.equal(
        tiny.sample(model, 12, cfg=cfg), tiny.sample(cached(tiny_flux, Spread(3), order=0), 12, cfg=cfg)
    )


def test_where_evaluations_cannot_be_counted_the_interval_stands_in_for_the_plan(tiny_flux):
    """heunpp2 goes back up within each step: no schedule can be planned, and nothing is forecast over a rise."""
    model = cached(tiny_flux, Spread(3), order=1)
    assert torch.isfinite(tiny.sample(model, 8, sampler="heunpp2")).all()
    assert "planned" not in {entry.reason for entry in last_run(model).entries}


def test_guards_on_a_real_run(tiny_flux):
    model = cached(tiny_flux, Listed((True,) + (False,) * 99), guard=Guard(2, 3))
    tiny.sample(model, 12)
    assert strip(model) == "#...#...#.##"
    assert [entry.reason for entry in last_run(model).entries if entry.computed] == [
        "listed",
        "gap",
        "gap",
        "last",
        "last",
    ]


def test_forecasts_stay_within_their_part_of_the_run(tiny_flux):
    model = cached(tiny_flux, Listed((True,) + (False,) * 99), part=PartOfRun(0.25, 0.75))
    tiny.sample(model, 12)
    sampling = tiny_flux.get_model_object("model_sampling")
    low, high = sampling.percent_to_sigma(0.75), sampling.percent_to_sigma(0.25)
    for entry in last_run(model).entries[1:]:
        assert entry.computed == (not low < entry.sigma <= high)
    assert ".." in strip(model)


def test_a_run_too_short_for_a_forecast_is_computed_and_says_so(tiny_flux):
    model = cached(tiny_flux, Interval(2, 3), order=1)
    assert torch.equal(tiny.sample(model, 4), tiny.sample(tiny_flux, 4))
    assert strip(model) == "####"
    assert last_run(model).notes == ["Too few steps for a forecast: everything is computed."]


@pytest.mark.parametrize("k", [1, 5, 10, 13, 19])
def test_parts_of_the_run_that_meet_share_no_step_and_leave_none_out(tiny_flux, k):
    always = Listed((True,) + (False,) * 99)
    late, soon = (cached(tiny_flux, always, part=part) for part in (PartOfRun(k / 20, 1.0), PartOfRun(0.0, k / 20)))
    for model in (late, soon):
        tiny.sample(model, 20)
    first = strip(late).index(".")
    assert first in (k, k + 1)  # as ComfyUI rounds the boundary
    assert strip(late) == "#" * first + "." * (20 - first)
    assert strip(soon) == ("#" + "." * (first - 1)) + "#" * (20 - first)


@pytest.mark.parametrize("k", [1, 5, 10, 13, 19])
def test_the_span_moves_where_a_part_of_the_run_would_begin(tiny_flux, k):
    always = Listed((True,) + (False,) * 99)
    model = cached(tiny_flux, always, SpanTap(*block_hooks(tiny_flux), stages=Stages(0.75, k / 20)))
    part = cached(tiny_flux, always, part=PartOfRun(k / 20, 1.0))
    for each in (model, part):
        tiny.sample(each, 20)
    first = strip(part).index(".")
    assert strip(model) == "#" + "." * (first - 1) + "#" + "." * (19 - first)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_the_last_step_is_kept_by_the_schedule_not_by_a_count(tiny_flux, sampler):
    """heun evaluates twice at the noise level where the last step begins: both times are guarded."""
    model = cached(tiny_flux, Listed((True,) + (False,) * 99), guard=Guard(1))
    tiny.sample(model, 6, sampler=sampler)
    assert strip(model) == ("#....#" if sampler == "euler" else "#........##")


def test_order_0_hands_the_head_what_it_was_handed_before(tiny_flux):
    """Bit for bit: what is injected is what was stored."""
    heads = []
    head = tiny_flux.model.diffusion_model.final_layer
    hook = head.register_forward_pre_hook(lambda _, args: heads.append(args[0].clone()))
    try:
        tiny.sample(cached(tiny_flux, Interval(3, 1), "last block"), 6)
    finally:
        hook.remove()
    assert all(torch.equal(heads[i], heads[i - i % 3]) for i in range(6))
    assert not torch.equal(heads[0], heads[3])


def test_a_jump_shuts_the_gate_where_it_happens(tiny_flux):
    """Block 0 is pushed at evaluation 8 of 14; a gate that let all others pass computes there, and anew."""
    gate = FirstBlockGate(0.6, warm_up=3)
    model = cached(tiny_flux, gate, "gated", order=1)
    tiny.sample(model, 14)
    assert strip(model) == "###" + "." * 11
    evaluation = [-1]

    def counted(executor, *args, **kwargs):
        evaluation[0] += 1
        return executor(*args, **kwargs)

    def pushed(args, extra):
        out = extra["original_block"](args)
        return {**out, "img": out["img"] + 30.0 if evaluation[0] >= 8 else out["img"]}

    jumping = tiny_flux.clone()
    jumping.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "counted", counted)
    jumping.set_model_patch_replace(pushed, "dit", "double_block", 0)
    jumping = cached(jumping, gate, "gated", order=1)
    tiny.sample(jumping, 14)
    assert strip(jumping)[:9] == "###.....#"
    entry = last_run(jumping).entries[8]
    assert (entry.reason, entry.error > 0.6) == ("gate", True)
