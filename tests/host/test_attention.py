"""The one place where extra keys and masks meet, against attention written out."""

from __future__ import annotations

import comfy.ldm.modules.attention as core
import pytest
import torch

from dit_toolkit.host.attention import (
    EXTRA_KEYS,
    ExtraKeys,
    TextScale,
    append_extra_keys,
    install,
    widen_mask,
    with_keys,
    with_recorder,
    with_text_scale,
)

pytestmark = pytest.mark.comfy

HEADS, DIM, LENGTH = 2, 8, 5
BLOCK = ("single", 3)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def queries(rows=2):
    return [random(rows, HEADS, LENGTH, DIM, seed=i) for i in range(3)]


def extra(seed, rows=1, count=3):
    return {BLOCK: (random(rows, HEADS, count, DIM, seed=seed), random(rows, HEADS, count, DIM, seed=seed + 1))}


def options(*keys):
    found = {"block_type": BLOCK[0], "block_index": BLOCK[1]}
    for each in keys:
        found = with_keys(found, each)
    return found


def attention_by_definition(q, k, v, logits=0.0):
    return (q @ k.transpose(-1, -2) * DIM**-0.5 + logits).softmax(-1) @ v


def attend(q, k, v, mask):
    """Through the function ComfyUI uses on a CPU."""
    out = core.attention_sub_quad(q, k, v, HEADS, mask=mask, skip_reshape=True, skip_output_reshape=True)
    other = core.attention_pytorch(q, k, v, HEADS, mask=mask, skip_reshape=True, skip_output_reshape=True)
    torch.testing.assert_close(out, other)
    return out


def test_without_extra_keys_the_patch_says_nothing():
    q, k, v = queries()
    assert append_extra_keys(q, k, v, pe=None, attn_mask=None, extra_options=options()) == {}
    assert append_extra_keys(q, k, v, extra_options={}) == {}


def test_a_block_that_was_given_nothing_is_left_alone():
    q, k, v = queries()
    other = {**options(ExtraKeys([extra(9)])), "block_index": 4}
    assert append_extra_keys(q, k, v, extra_options=other) == {}


def test_each_condition_of_the_batch_gets_its_own_keys():
    """Rows: two pictures of the first condition, two of the second."""
    q, k, v = queries(rows=4)
    first, second = extra(10), extra(20, rows=2)
    out = append_extra_keys(q, k, v, extra_options=options(ExtraKeys([first, second])))
    result = attend(out["q"], out["k"], out["v"], out["attn_mask"])
    assert out["attn_mask"] is None
    owners = [(first, 0), (first, 0), (second, 0), (second, 1)]
    for row, (owner, i) in enumerate(owners):
        own_k, own_v = owner[BLOCK][0][[i]], owner[BLOCK][1][[i]]
        expected = attention_by_definition(q[[row]], torch.cat([k[[row]], own_k], 2), torch.cat([v[[row]], own_v], 2))
        torch.testing.assert_close(result[[row]], expected)


def test_two_features_add_up_and_the_order_does_not_matter():
    q, k, v = queries()
    a, b = ExtraKeys([extra(10)]), ExtraKeys([extra(20, count=4)], log_weight=-0.7)
    results = []
    for order in ((a, b), (b, a)):
        out = append_extra_keys(q, k, v, extra_options=options(*order))
        assert out["k"].shape[2] == LENGTH + 7
        results.append(attend(out["q"], out["k"], out["v"], out["attn_mask"]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("weight", [1.0, 0.5, 0.01])
def test_influence_multiplies_the_weight_of_its_keys_before_the_softmax_is_normalised(weight):
    q, k, v = queries(rows=1)
    added = extra(10)
    out = append_extra_keys(q, k, v, extra_options=options(ExtraKeys([added], torch.tensor(weight).log().item())))
    result = attend(out["q"], out["k"], out["v"], out["attn_mask"])
    scores = torch.exp(q @ torch.cat([k, added[BLOCK][0]], 2).transpose(-1, -2) * DIM**-0.5)
    scores[..., LENGTH:] *= weight
    expected = scores / scores.sum(-1, keepdim=True) @ torch.cat([v, added[BLOCK][1]], 2)
    torch.testing.assert_close(result, expected)
    assert (out["attn_mask"] is None) == (weight == 1)


@pytest.mark.parametrize("shape", [(LENGTH, LENGTH), (1, LENGTH), (2, LENGTH, LENGTH), (2, 1, LENGTH, LENGTH)])
@pytest.mark.parametrize("log_weight", [0.0, -1.5])
@pytest.mark.parametrize("kind", ["additive", "bool"])
def test_a_mask_that_is_there_goes_on_to_act(shape, log_weight, kind):
    q, k, v = queries()
    seen = random(*shape, seed=5) > -0.5
    seen[..., 0] = True
    mask = seen if kind == "bool" else torch.zeros(shape).masked_fill(~seen, -3.0)
    added = extra(10)
    keys = ExtraKeys([added], log_weight)
    out = append_extra_keys(q, k, v, attn_mask=mask, extra_options=options(keys))
    result = core.attention_pytorch(
        out["q"], out["k"], out["v"], HEADS, mask=out["attn_mask"], skip_reshape=True, skip_output_reshape=True
    )
    logits = torch.zeros(shape).masked_fill(~seen, -float("inf")) if kind == "bool" else mask
    if logits.ndim == 3:
        logits = logits[:, None]
    logits = torch.cat([logits, torch.full((*logits.shape[:-1], 3), log_weight)], -1)
    both = [torch.cat([own, more.expand(2, -1, -1, -1)], 2) for own, more in zip((k, v), added[BLOCK], strict=True)]
    torch.testing.assert_close(result, attention_by_definition(q, *both, logits))
    if kind == "bool" and log_weight == 0:
        assert out["attn_mask"].dtype == torch.bool


def test_a_mask_is_only_made_where_it_is_needed():
    q = queries()[0]
    assert widen_mask(None, q, LENGTH, [(3, 0.0), (2, 0.0)]) is None
    mask = widen_mask(None, q, LENGTH, [(3, 0.0), (2, -1.0)])
    assert mask.shape == (LENGTH, LENGTH + 5)
    assert mask[0].tolist() == [0] * (LENGTH + 3) + [-1.0] * 2


def test_an_earlier_patch_may_have_rotated_already():
    """With `pe` the patch rotates q and k itself; without, it leaves them as they are."""
    from comfy.ldm.flux.layers import EmbedND
    from comfy.ldm.flux.math import apply_rope

    q, k, v = queries()
    pe = EmbedND(DIM, 10000, [2, 2, 4])(torch.arange(LENGTH)[None, :, None].expand(1, LENGTH, 3))
    keys = options(ExtraKeys([extra(10)]))
    here = append_extra_keys(q, k, v, pe=pe, extra_options=keys)
    before = append_extra_keys(*apply_rope(q, k, pe), v, pe=None, extra_options=keys)
    assert here["pe"] is None
    for name in ("q", "k", "v"):
        torch.testing.assert_close(here[name], before[name], rtol=0, atol=0)
    assert not torch.equal(here["q"], q)


def test_extra_keys_come_from_another_device_and_dtype_as_they_are_needed():
    q, k, v = (x.bfloat16() for x in queries())
    out = append_extra_keys(q, k, v, extra_options=options(ExtraKeys([extra(10)])))
    assert {out[name].dtype for name in ("q", "k", "v")} == {torch.bfloat16}


def test_the_patch_is_installed_once_behind_all_others():
    def earlier(*args, **kwargs):
        return {}

    model_options = {"transformer_options": {"patches": {"attn1_patch": [earlier]}}}
    install(model_options)
    install(model_options)
    assert model_options["transformer_options"]["patches"]["attn1_patch"] == [earlier, append_extra_keys]


def test_handing_over_keys_does_not_touch_the_options_of_other_calls():
    before = options()
    after = with_keys(before, ExtraKeys([extra(1)]))
    assert EXTRA_KEYS not in before
    assert len(with_keys(after, ExtraKeys([extra(2)]))[EXTRA_KEYS]) == 2
    assert len(after[EXTRA_KEYS]) == 1


@pytest.mark.parametrize("log_weight", [0.0, -0.7])
@pytest.mark.parametrize("masked", [None, "2-D", "3-D", "bool"])
def test_conditions_that_are_blind_do_not_see_the_keys(log_weight, masked):
    """Rows: two pictures of a condition that is blind, two of one that sees."""
    q, k, v = queries(rows=4)
    added = extra(10)
    mask = None
    if masked:
        mask = random(*((LENGTH, LENGTH) if masked == "2-D" else (4, LENGTH, LENGTH)), seed=5)
        mask = mask > -1 if masked == "bool" else mask
    keys = options(ExtraKeys([added, added], log_weight, blind=frozenset({0})))
    out = append_extra_keys(q, k, v, attn_mask=mask, extra_options=keys)
    found = attend(out["q"], out["k"], out["v"], out["attn_mask"])
    logits = torch.zeros(LENGTH, LENGTH) if mask is None else mask
    if masked == "bool":
        logits = torch.zeros(mask.shape).masked_fill(~mask, -float("inf"))
    logits = logits.expand(4, LENGTH, LENGTH)[:, None]
    torch.testing.assert_close(found[:2], attention_by_definition(q[:2], k[:2], v[:2], logits[:2]))
    both = [torch.cat([own, more.expand(4, -1, -1, -1)], 2)[2:] for own, more in zip((k, v), added[BLOCK], strict=True)]
    wider = torch.cat([logits, torch.full((4, 1, LENGTH, 3), log_weight)], -1)[2:]
    torch.testing.assert_close(found[2:], attention_by_definition(q[2:], *both, wider))


def text_scaled(k, factors):
    expected = k.clone()
    for i, factor in enumerate(factors):
        expected[i, :, :2] *= factor
    return expected


def test_the_keys_of_the_text_are_scaled():
    q, k, v = queries(rows=2)
    scale = TextScale(frozenset({BLOCK}), [1.0, 1.3])
    given = {**with_text_scale(options(), scale), "img_slice": [2, LENGTH]}
    out = append_extra_keys(q, k, v, extra_options=given)
    torch.testing.assert_close(out["k"], text_scaled(k, [1.0, 1.3]))
    assert torch.equal(out["v"], v)
    assert torch.equal(out["q"], q)
    assert append_extra_keys(q, k, v, extra_options={**given, "block_index": 4}) == {}
    larger = with_text_scale(given, TextScale(frozenset({BLOCK}), [1.1, 1.1]))
    torch.testing.assert_close(append_extra_keys(q, k, v, extra_options=larger)["k"], text_scaled(k, [1.1, 1.3]))


def test_a_text_scale_of_1_changes_nothing():
    q, k, v = queries()
    neutral = with_text_scale(options(), TextScale(frozenset({BLOCK}), [1.0]))
    assert append_extra_keys(q, k, v, extra_options={**neutral, "img_slice": [2, LENGTH]}) == {}


class Listener:
    def __init__(self, *blocks):
        self.blocks, self.heard = blocks, []

    def wants(self, block):
        return block in self.blocks

    def record(self, block, k, v, text):
        self.heard.append((block, k, v, text))


def test_a_listener_hears_and_changes_nothing():
    """It gets rotated keys, and the call it listens to is free of what others were handed."""
    from comfy.ldm.flux.layers import EmbedND
    from comfy.ldm.flux.math import apply_rope

    q, k, v = queries()
    pe = EmbedND(DIM, 10000, [2, 2, 4])(torch.arange(LENGTH)[None, :, None].expand(1, LENGTH, 3))
    listener = Listener(BLOCK)
    given = with_text_scale(options(ExtraKeys([extra(10)])), TextScale(frozenset({BLOCK}), [1.3]))
    given = {**with_recorder(given, listener), "img_slice": [2, LENGTH]}
    assert append_extra_keys(q, k, v, pe=pe, extra_options=given) == {}
    assert append_extra_keys(q, k, v, pe=pe, extra_options={**given, "block_index": 4}) == {}
    ((block, heard_k, heard_v, text),) = listener.heard
    assert (block, text) == (BLOCK, 2)
    torch.testing.assert_close(heard_k, apply_rope(q, k, pe)[1], rtol=0, atol=0)
    assert torch.equal(heard_v, v)


def test_keys_are_made_when_a_block_asks_for_them():
    asked = []

    class Lazy(dict):
        def __getitem__(self, block):
            asked.append(block)
            return extra(10)[block]

    q, k, v = queries()
    keys = options(ExtraKeys([Lazy({BLOCK: None})]))
    append_extra_keys(q, k, v, extra_options={**keys, "block_index": 4})
    assert asked == []
    append_extra_keys(q, k, v, extra_options=keys)
    assert set(asked) == {BLOCK}
