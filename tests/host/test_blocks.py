"""Blocks are wrapped, skipped and replaced in ComfyUI's own models, and the result is the same to the last bit."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import pytest
import torch
from comfy.controlnet import ControlBase
from comfy.ldm.modules.attention import attention_pytorch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

from dit_toolkit.host.blocks import Wrap, replace_block, wrap_block
from dit_toolkit.host.families.family import BlockKey
from dit_toolkit.host.run import attach
from dit_toolkit.host.transformer import transformer_of
from dit_toolkit.tests.host.families import ALL, FAMILIES, random_latent, sample, with_values
from dit_toolkit.tests.host.tiny import flux_state, load_flux

pytestmark = [pytest.mark.comfy, pytest.mark.sweep(together=True)]

HOOKED = {name: family for name, family in ALL.items() if family.answers.kinds}
every_family = pytest.mark.parametrize("family", HOOKED.values(), ids=HOOKED.keys())
settings = pytest.mark.parametrize("settings", [{}, {"cfg": 3.0, "batch": 2}], ids=["plain", "cfg 3, batch 2"])


@dataclass(frozen=True, eq=False)
class Wrapped:
    """A description that wraps blocks for one run."""

    wraps: dict[BlockKey, Wrap]

    def bind(self, run, model_options):
        for key, wrap in self.wraps.items():
            wrap_block(model_options, key, wrap)


def keys_of(family) -> tuple[BlockKey, ...]:
    return family.answers.block_keys(transformer_of(family.load()))


def copies(streams, names) -> dict:
    return {name: None if streams[name] is None else streams[name].clone() for name in names}


class Recording:
    """Runs a model and keeps, for each block and each call, what it was given and what came of it."""

    def __init__(self, family, model=None, **options):
        self.family = family.answers
        self.keys = keys_of(family)
        self.before, self.after, self.rows = defaultdict(list), defaultdict(list), []
        wraps = {key: self._wrap(key) for key in self.keys}
        self.picture = sample(
            family, attach(family.load() if model is None else model, Wrapped(wraps), Wrapped.bind), **options
        )

    def _wrap(self, key):
        names = self.family.streams(key[0])

        def record(args, run_block):
            self.before[key].append(copies(args, names))
            out = run_block(args)
            self.after[key].append(copies(out, names))
            if key == self.keys[-1]:
                self.rows.append(self.family.picture(args, out))
            return out

        return record


def replayed(family, skipped, outs, model=None, **options):
    """Sampled without the blocks `skipped`, whose last one returns `outs`, one for each call of the model."""
    left, calls = list(outs), []

    def skip(args, run_block):
        calls.append(skipped[0])
        return args

    def inject(args, run_block):
        return {**args, **left.pop(0)}

    wraps = dict.fromkeys(skipped[:-1], skip) | {skipped[-1]: inject}
    out = sample(family, attach(family.load() if model is None else model, Wrapped(wraps), Wrapped.bind), **options)
    assert not left
    assert len(calls) == len(outs) * (len(skipped) - 1)
    return out


@pytest.mark.parametrize("name", sorted(set(ALL) - set(HOOKED)))
@pytest.mark.parametrize("kind", ["double_block", "single_block"])
def test_families_without_kinds_call_no_replacement(name, kind):
    asked, model = [], ALL[name].load().clone()
    model.set_model_patch_replace(lambda args, extra: asked.append(1), "dit", kind, 0)
    sample(ALL[name], model, 1)
    assert not asked


@every_family
def test_keys_are_the_blocks_in_the_order_they_run(family):
    """Each wrap runs around one of the model's own blocks, and no block runs outside."""
    model = family.load()
    transformer, events, handles = transformer_of(model), [], []
    lists = {name: part for name, part in transformer.named_children() if isinstance(part, torch.nn.ModuleList)}
    lists.pop("vace_blocks", None)
    for name, blocks in lists.items():
        for i, block in enumerate(blocks):
            handles.append(block.register_forward_pre_hook(lambda *_, at=(name, i): events.append(at)))

    def around(key):
        def wrap(args, run_block):
            events.append(key)
            options = args["transformer_options"]
            if "block_type" in options:
                assert (f"{options['block_type']}_block", options["block_index"]) == key
            out = run_block(args)
            events.append("end")
            return out

        return wrap

    try:
        sample(family, attach(model, Wrapped({key: around(key) for key in keys_of(family)}), Wrapped.bind), 1)
    finally:
        for handle in handles:
            handle.remove()
    modules = {kind.kind: kind.modules for kind in family.answers.kinds}
    expected = [event for kind, i in keys_of(family) for event in ((kind, i), (modules[kind], i), "end")]
    assert events == expected
    assert set(modules.values()) == set(lists)


@every_family
@settings
def test_wrapping_every_block_changes_nothing(family, settings):
    model = family.load()
    recording = Recording(family, **settings)
    assert torch.equal(recording.picture, sample(family, **settings))
    assert len(recording.rows) == 4
    assert "patches_replace" not in model.model_options["transformer_options"]


@pytest.mark.parametrize("name", [name for name in HOOKED if name != "wan_vace"])  # there, videos come in between
def test_what_a_block_returns_is_what_the_next_one_gets(name):
    """`joined` where kinds meet."""
    recording = Recording(HOOKED[name], steps=1)
    for (kind_from, i), (kind_to, j) in zip(recording.keys, recording.keys[1:], strict=False):
        streams = recording.family.joined(recording.after[kind_from, i][0], kind_from, kind_to)
        assert streams.keys() == recording.before[kind_to, j][0].keys() == set(recording.family.streams(kind_to))
        for name, stream in streams.items():
            assert torch.equal(stream, recording.before[kind_to, j][0][name])


@every_family
def test_streams_are_all_that_changes_from_block_to_block(family):
    """And they do change: nothing is kept for nothing."""
    seen = []

    def watch(args, run_block):
        kept = {name: value for name, value in args.items() if name != "transformer_options"}
        streams = family.answers.streams(args_kind[len(seen)])
        before = copies(args, streams)
        out = run_block(args)
        seen.append(kept)
        assert set(out) >= set(streams)
        used = streams if len(seen) < len(keys) else ("img",)  # nobody reads the text of the last block
        assert all(out[name] is None or not torch.equal(out[name], before[name]) for name in used)
        return out

    keys = keys_of(family)
    args_kind = [kind for kind, _ in keys]
    sample(family, attach(family.load(), Wrapped(dict.fromkeys(keys, watch)), Wrapped.bind), 1)
    for kind in dict.fromkeys(args_kind):
        streams = family.answers.streams(kind)
        first, *others = [args for args, k in zip(seen, args_kind, strict=True) if k == kind]
        for args in others:
            assert args.keys() == first.keys()
            for name in args.keys() - set(streams) - ({"vec"} if family.name == "chroma" else set()):
                assert args[name] is first[name], name


@every_family
def test_whether_blocks_write_into_their_args(family):
    found = []

    def watch(args, run_block):
        before = args["img"]
        kept = before.clone()
        out = run_block(args)
        found.append((out["img"] is before, not torch.equal(before, kept)))
        return out

    sample(family, attach(family.load(), Wrapped(dict.fromkeys(keys_of(family), watch)), Wrapped.bind), 1)
    in_place = family.answers.in_place
    assert set(found) == {(in_place, in_place)}


def test_sd3_has_no_text_after_its_last_block():
    recording = Recording(FAMILIES["sd35"], steps=1)
    assert [recording.after[key][0]["txt"] is None for key in recording.keys] == [False, False, True]


def only_picture(recording) -> list[dict]:
    """What the last block returned, one for each call, with garbage where the head does not look."""
    outs = []
    for out, rows in zip(recording.after[recording.keys[-1]], recording.rows, strict=True):
        img = torch.full_like(out["img"], float("nan"))
        img[:, rows] = out["img"][:, rows]
        outs.append({"img": img})
    return outs


@every_family
@settings
def test_the_picture_rows_after_the_last_block_are_all_that_the_head_reads(family, settings):
    recording = Recording(family, **settings)
    assert torch.equal(replayed(family, recording.keys, only_picture(recording), **settings), recording.picture)


@every_family
def test_the_head_reads_no_fewer_rows(family):
    """Each end of the slice matters, unless a reference lies there."""
    recording = Recording(family, steps=1)
    (out,) = only_picture(recording)
    rows = recording.rows[0]
    references = family.name in ("kontext", "qwen_edit")
    for row in (rows.start,) if references else (rows.start, rows.stop - 1):
        img = out["img"].clone()
        img[:, row] += 1
        assert not torch.equal(replayed(family, recording.keys, [{"img": img}], steps=1), recording.picture)


@every_family
@settings
def test_a_span_may_be_replaced_by_what_it_made(family, settings):
    """From the second block to the one before the last: across double and single blocks where there are both."""
    recording = Recording(family, **settings)
    span = recording.keys[1:-1]
    outs = [dict(out) for out in recording.after[span[-1]]]
    out = replayed(family, span, outs, **settings)
    assert torch.equal(out, recording.picture)
    wrong = [{"img": out["img"] + 1} for out in recording.after[span[-1]]]
    assert not torch.equal(replayed(family, span, wrong, **settings), recording.picture)


def test_hunyuan_video_drops_the_rows_of_a_reference_before_the_head():
    """One picture a call: with more, core writes into ids that all of them share, and stops."""
    family = with_values(FAMILIES["hunyuan_video"], "reference", ref_latent=random_latent(16, 1, 6, 6))
    recording = Recording(family, steps=1)
    (out,) = only_picture(recording)
    reference = out["img"][:, recording.rows[0]]
    reference[:, :9] = float("nan")
    assert reference.shape[1] == 9 + 27
    assert torch.equal(replayed(family, recording.keys, [out], steps=1), recording.picture)


@every_family
def test_an_earlier_replacement_is_still_called(family):
    """Of a node that skips a block for good: it is the one that is wrapped."""
    model, calls, plain = family.load().clone(), [], sample(family)
    key = keys_of(family)[1]

    def skip(args, extra):
        calls.append(set(extra))
        return args

    model.set_model_patch_replace(skip, "dit", *key)
    without = sample(family, model)
    assert not torch.equal(without, plain)
    recording = Recording(family, model)
    assert torch.equal(recording.picture, without)
    assert calls == [{"original_block"}] * 8
    assert torch.equal(recording.before[key][0]["img"], recording.after[key][0]["img"])


def test_the_last_wrap_is_the_outermost():
    family, order = FAMILIES["wan"], []

    def named(name):
        def wrap(args, run_block):
            order.append(name)
            return run_block(args)

        return wrap

    model = attach(family.load(), Wrapped({("double_block", 1): named("first")}), Wrapped.bind)
    model = attach(model, Wrapped({("double_block", 1): named("second")}), Wrapped.bind)
    assert torch.equal(sample(family, model, 1), sample(family, steps=1))
    assert order == ["second", "first"]


@pytest.mark.parametrize("name", ["flux", "sd35", "qwen", "wan"])
def test_skip_layer_guidance_goes_over_the_wraps(name):
    """Its extra pass does not call the wraps of the blocks it skips; the result is as without them."""
    family, calls = HOOKED[name], []
    single = "0" if ("single_block", 0) in keys_of(family) else ""
    (model,) = SkipLayerGuidanceDiT.execute(family.load(), 3.0, 0.0, 1.0, double_layers="1", single_layers=single).args

    def wrap(args, run_block):
        calls.append(1)
        return run_block(args)

    wrapped = attach(model, Wrapped(dict.fromkeys(keys_of(family), wrap)), Wrapped.bind)
    assert torch.equal(sample(family, wrapped, 2, cfg=3.0), sample(family, model, 2, cfg=3.0))
    skipped = 1 + len(single)
    assert len(calls) == 2 * (2 * len(keys_of(family)) - skipped)


class Residuals(ControlBase):
    """A ControlNet that adds the same residual after each block, in place as core does it."""

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        tokens = x_noisy.shape[-1] * x_noisy.shape[-2] // 4 * (x_noisy.shape[2] if x_noisy.ndim == 5 else 1)
        width = {"sd35": 192, "qwen": 64}.get(self.name, 128)
        add = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(9)).expand(x_noisy.shape[0], -1, -1)
        return {"input": [add] * 4, "output": [add] * 4}


@pytest.mark.parametrize("name", ["flux", "kontext", "chroma", "sd35", "qwen", "qwen_edit", "hunyuan_video"])
@settings
def test_what_is_added_after_a_block_is_added_to_what_is_injected_too(name, settings):
    """Recorded before the ControlNet adds, injected before it adds again. Clones are not written into."""
    control = Residuals()
    control.name = "qwen" if name == "qwen_edit" else name
    family = with_values(HOOKED[name], name, control=control, control_apply_to_uncond=False)
    recording = Recording(family, **settings)
    assert not torch.equal(recording.picture, sample(HOOKED[name], **settings))
    assert torch.equal(recording.picture, sample(family, **settings))

    outs = [dict(out) for out in recording.after[recording.keys[-1]]]
    given = [{"img": out["img"].clone()} for out in outs]
    assert torch.equal(replayed(family, recording.keys, given, **settings), recording.picture)
    assert not any(torch.equal(a["img"], b["img"]) for a, b in zip(given, outs, strict=True))

    key, following = recording.keys[0], recording.keys[1]
    assert not torch.equal(recording.after[key][0]["img"], recording.before[following][0]["img"])


def test_a_compiled_model_runs_the_wraps_each_time():
    """TorchCompileModel drops its guards on transformer_options: what it may trace, it runs once and repeats.

    With PyTorch's attention, as on a GPU: the CPU's default asks for free memory, which stops the tracing anyway.
    """
    family, key = FAMILIES["flux"], ("double_block", 0)
    small = load_flux(flux_state(double=1, single=1))  # tracing takes seconds a block

    class State:
        calls = 0

    def not_the_second(args, run_block):
        state = args["transformer_options"]["test.state"]
        state.calls += 1
        return args if state.calls == 2 else run_block(args)

    def sampled(model):
        model.model_options["transformer_options"]["test.state"] = state = State()
        return sample(family, model, 3), state.calls

    model = small.clone()
    options = model.model_options["transformer_options"]
    options["optimized_attention_override"] = lambda func, *args, **kwargs: attention_pytorch(*args, **kwargs)
    wrapped = attach(model, Wrapped({key: not_the_second}), Wrapped.bind)
    expected, _ = sampled(wrapped)
    assert (sample(family, model, 3) - expected).abs().max() > 1e-3
    compiled = wrapped.clone()
    set_torch_compile_wrapper(compiled, backend="eager", options={"guard_filter_fn": skip_torch_compile_dict})
    torch.compiler.reset()
    for _ in range(2):
        out, calls = sampled(compiled)
        assert calls == 3
        torch.testing.assert_close(out, expected)


@dataclass(frozen=True, eq=False)
class Replaced:
    """A description that takes the place of one block."""

    key: BlockKey
    run: Wrap

    def bind(self, run, model_options):
        replace_block(model_options, self.key, self.run)


@every_family
@pytest.mark.parametrize("first", ["replaced", "wrapped"])
def test_what_takes_the_place_of_a_block_is_inside_of_all_wraps(family, first):
    """Whichever came first: a wrap sees what is made, and decides whether it is made at all."""
    key, order = keys_of(family)[1], []

    def doubled(args, run_block):
        order.append("replaced")
        out = run_block(args)
        return {**out, "img": 2 * out["img"]}

    def looked(args, run_block):
        order.append("wrap")
        before = args["img"].clone()
        out = run_block(args)
        order.append("and on" if not torch.equal(out["img"], before) else "nothing")
        return out

    def skipped(args, run_block):
        return {name: args[name] for name in family.answers.streams(key[0])}

    def both(wrap):
        pair = [(Replaced(key, doubled), Replaced.bind), (Wrapped({key: wrap}), Wrapped.bind)]
        model = family.load()
        for description, bind in pair if first == "replaced" else reversed(pair):
            model = attach(model, description, bind)
        return sample(family, model, 1)

    alone = sample(family, attach(family.load(), Replaced(key, doubled), Replaced.bind), 1)
    assert not torch.equal(alone, sample(family, steps=1))
    order.clear()
    assert torch.equal(both(looked), alone)
    assert order == ["wrap", "replaced", "and on"]
    order.clear()
    assert torch.equal(both(skipped), sample(family, attach(family.load(), Wrapped({key: skipped}), Wrapped.bind), 1))
    assert order == []


def test_mistakes_are_named():
    family = FAMILIES["flux"].answers
    with pytest.raises(ValueError, match="Wan has no single_block, but double_block"):
        FAMILIES["wan"].answers.streams("single_block")
    with pytest.raises(ValueError, match=r"FLUX.1 runs no single_block before a double_block"):
        family.joined({"img": torch.zeros(1, 1, 1)}, "single_block", "double_block")


def test_options_that_others_share_are_not_changed():
    shared = {"patches_replace": {"dit": {("double_block", 0): len}}}
    options = {"transformer_options": shared}
    wrap_block(options, ("double_block", 0), lambda args, run_block: args)
    wrap_block(options, ("single_block", 0), lambda args, run_block: args)
    assert shared == {"patches_replace": {"dit": {("double_block", 0): len}}}
    assert len(options["transformer_options"]["patches_replace"]["dit"]) == 2
