"""Sparse attention on ComfyUI's models: off is absent, on is dense attention under a mask, and others keep acting."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch._inductor.exc import TritonMissing

pytestmark = [pytest.mark.comfy, pytest.mark.sweep(together=True)]

import comfy.model_management  # noqa: E402
from comfy_extras.nodes_flux import FluxKVCache  # noqa: E402

from dit_toolkit.host import token_grid  # noqa: E402
from dit_toolkit.host.accelerate import sparse_attention as host  # noqa: E402
from dit_toolkit.host.accelerate import sparse_backends  # noqa: E402
from dit_toolkit.host.accelerate.own_attention import (  # noqa: E402
    OVERRIDE,
    OwnAttention,
    key_bias,
    own_attention,
    require_known_tokens,
    take_over,
)
from dit_toolkit.host.accelerate.sparse_attention import SparseAttention, attach  # noqa: E402
from dit_toolkit.host.part_of_run import PartOfRun  # noqa: E402
from dit_toolkit.host.run import attach as attach_description  # noqa: E402
from dit_toolkit.models.accelerate import sparse_attention as core  # noqa: E402
from dit_toolkit.models.accelerate.sparse_attention import Band, Disc, FrameBand, Grid, PooledDisc  # noqa: E402
from dit_toolkit.models.accelerate.sparse_attention_tiles import tile  # noqa: E402
from dit_toolkit.tests.host import tiny  # noqa: E402
from dit_toolkit.tests.host.families import FAMILIES, RELATIVES, sample  # noqa: E402

KNOWN = [name for name, family in FAMILIES.items() if family.grid is not None]


def sparse(model, pattern, **settings):
    return attach(model, SparseAttention("test", pattern, **{"min_tokens": 0, **settings}))


@dataclass(frozen=True, eq=False)
class Masked:
    """The definition: dense attention under the whole mask, `[L, L + extra + pooled]`, by torch alone."""

    pattern: object
    weights: dict = field(default_factory=dict)
    scale: float | None = None
    calls: list = field(default_factory=list)

    def bind(self, run, model_options):
        take_over(model_options, self.attend)

    def attend(self, call):
        self.calls.append(call)
        k, v, seen = call.k, call.v, core.mask(self.pattern, call.grid, call.extra)
        bias = torch.zeros(1, 1, 1, k.shape[2]) if call.bias is None else call.bias
        if self.pattern.pool:
            f, grid = self.pattern.pool, call.grid
            weight = self.weights.get(call.layer[:2], torch.full((f, f), 1 / f**2))
            down = [x[:, :, grid.before :][:, :, : grid.picture] for x in (k, v)]
            down = [x.unflatten(2, (grid.height // f, f, grid.width // f, f)) for x in down]
            down = [(x * weight[:, None, :, None]).sum((3, 5)).flatten(2, 3) for x in down]
            k, v = torch.cat([k, down[0]], 2), torch.cat([v, down[1]], 2)
            bias = torch.nn.functional.pad(bias, (0, down[0].shape[2]))
        logits = call.q @ k.mT * (call.q.shape[-1] ** -0.5 if self.scale is None else self.scale) + bias
        return logits.masked_fill(~seen, float("-inf")).softmax(-1) @ v


@pytest.fixture(params=["tiles", "mask"])
def backend(request, monkeypatch):
    """Both backends that a CPU has; small pictures would only ever see the second."""
    monkeypatch.setattr(sparse_backends, "worth_tiles", lambda tiling, extra: request.param == "tiles")
    return request.param


@pytest.mark.parametrize("name", KNOWN)
def test_a_pattern_is_dense_attention_under_its_mask(name, backend):
    family = FAMILIES[name]
    pattern = FrameBand(2) if len(family.latent_shape) == 4 else Disc(2)
    masked = Masked(pattern)
    found = sample(family, sparse(family.load(), pattern), 2, cfg=3.0, batch=2)
    expected = sample(family, attach_description(family.load(), masked, Masked.bind), 2, cfg=3.0, batch=2)
    assert masked.calls
    assert (found - expected).norm() <= 2e-5 * expected.norm()
    plain = sample(family, None, 2, cfg=3.0, batch=2)
    assert (found - plain).norm() > 1e-4 * plain.norm()


FLUX = {"size": (16, 12), "steps": 2}


@pytest.mark.parametrize("pattern", [Disc(3), PooledDisc(2, 2), Band(5)], ids=str)
@pytest.mark.parametrize("settings", [{}, {"cfg": 3.0}, {"batch": 2}, {"cfg": 3.0, "batch": 2}], ids=str)
def test_flux_with_guidance_and_batches(tiny_flux, pattern, settings, backend):
    found = tiny.sample(sparse(tiny_flux, pattern), **FLUX, **settings)
    tiny.close(found, tiny.sample(attach_description(tiny_flux, Masked(pattern), Masked.bind), **FLUX, **settings))


def test_weights_of_the_cells_go_to_their_blocks(tiny_flux, backend):
    generator = torch.Generator().manual_seed(0)
    blocks = [(kind, i) for kind in ("double", "single") for i in range(2)]
    cells = {block: torch.rand(2, 2, generator=generator) for block in blocks}
    found = tiny.sample(sparse(tiny_flux, PooledDisc(2, 2), cells=cells), **FLUX)
    tiny.close(found, tiny.sample(attach_description(tiny_flux, Masked(PooledDisc(2, 2), cells), Masked.bind), **FLUX))
    swapped = dict(zip(blocks, reversed(cells.values()), strict=True))
    other = tiny.sample(sparse(tiny_flux, PooledDisc(2, 2), cells=swapped), **FLUX)
    assert not torch.allclose(found, other, atol=1e-4)


def test_the_proportional_scale(tiny_flux, backend):
    scale = math.sqrt(math.log(48 + 5, 4608) / 128)
    found = tiny.sample(sparse(tiny_flux, Disc(3), scale="log-proportional"), **FLUX)
    tiny.close(found, tiny.sample(attach_description(tiny_flux, Masked(Disc(3), scale=scale), Masked.bind), **FLUX))


@pytest.mark.parametrize("pattern", [Disc(9), PooledDisc(9, 2)], ids=str)
def test_what_is_beside_the_window_stays_where_it_covers_the_picture(tiny_flux, pattern, backend):
    """The scale above the training's size, and pooled keys."""
    scale = math.sqrt(math.log((48 + 5) * (10 if pattern.pool else 1), 4608) / 128)
    found = tiny.sample(sparse(tiny_flux, pattern, scale="log-proportional"), **FLUX)
    tiny.close(found, tiny.sample(attach_description(tiny_flux, Masked(pattern, scale=scale), Masked.bind), **FLUX))
    assert not torch.allclose(found, tiny.sample(tiny_flux, **FLUX), atol=1e-3)


@pytest.mark.parametrize("influence", [1.0, 0.5])
@pytest.mark.parametrize("first", ["sparse", "easycontrol"])
def test_keys_of_easycontrol_are_seen_by_every_token(tiny_flux, influence, first, backend):
    condition = tiny.latent(11, size=(4, 6))
    found = tiny_flux
    for node in ("sparse", "easycontrol") if first == "sparse" else ("easycontrol", "sparse"):
        if node == "sparse":
            found = sparse(found, Disc(2))
        else:
            found = tiny.controlled(found, condition=condition, influence=influence)
    masked = Masked(Disc(2))
    controlled = tiny.controlled(tiny_flux, condition=condition, influence=influence)
    expected = tiny.sample(attach_description(controlled, masked, Masked.bind), **FLUX, cfg=3.0)
    assert {call.extra for call in masked.calls} == {6}
    tiny.close(tiny.sample(found, **FLUX, cfg=3.0), expected)
    assert not torch.allclose(expected, tiny.sample(sparse(tiny_flux, Disc(2)), **FLUX, cfg=3.0), atol=1e-3)


def with_override(model, override):
    patched = model.clone()
    patched.model_options["transformer_options"][OVERRIDE] = override
    return patched


def test_an_earlier_override_gets_what_stays_dense_and_only_that(tiny_flux):
    lengths = []

    def earlier(func, *args, **kwargs):
        lengths.append(args[0].shape[2])
        return func(*args, **kwargs)

    model = with_override(tiny_flux, earlier)
    tiny.sample(sparse(model, Disc(3)), **FLUX)
    assert lengths == []
    dense = tiny.sample(sparse(model, Disc(3), min_tokens=54), **FLUX)
    assert lengths == [53] * 8
    assert torch.equal(dense, tiny.sample(tiny_flux, **FLUX))

    lengths.clear()
    tiny.sample(sparse(model, Disc(3), layers=frozenset({("double", 1)})), **FLUX)
    assert len(lengths) == 6


@pytest.mark.parametrize("text", [6, 30])
def test_cross_attention_is_passed_on(text):
    """To a text that is shorter than the video's 27 tokens, and to one that is longer."""
    keys = []

    def earlier(func, *args, **kwargs):
        keys.append(args[1].shape[1])
        return func(*args, **kwargs)

    family = FAMILIES["wan"]
    model = sparse(with_override(family.load(), earlier), Disc(2))
    sample(family, model, 1, positive=family.prompt(3, length=text))
    assert keys == [text] * 3


def test_start_and_end_in_percent_of_the_run(tiny_flux):
    """4 steps, at 0, 25, 50 and 75 %. Ranges that meet do not overlap."""
    options = {"size": (16, 12), "steps": 4}
    both = sparse(tiny_flux, Disc(2), part=PartOfRun(end=0.5))
    with pytest.raises(ValueError, match="sparse already"):
        sparse(both, Disc(2), part=PartOfRun(start=0.5))
    masked = Masked(Disc(2))
    tiny.sample(attach_description(tiny_flux, masked, Masked.bind), **options)
    assert len(masked.calls) == 16
    counted = {}
    for name, part in (("first", PartOfRun(end=0.4)), ("second", PartOfRun(start=0.4)), ("all", PartOfRun())):
        used = []
        model = with_override(tiny_flux, lambda func, *args, used=used, **kw: used.append(1) or func(*args, **kw))
        tiny.sample(sparse(model, Disc(2), part=part), **options)
        counted[name] = 16 - len(used)
    assert counted == {"first": 8, "second": 8, "all": 16}


def test_references_that_somebody_takes_out_are_named(caplog):
    """Flux KV Cache: after the first evaluation the model has no tokens of the reference any more."""
    flux2 = RELATIVES["flux2"]
    (cached,) = FluxKVCache.execute(flux2.load()).result
    positive = flux2.prompt(3, reference_latents=[torch.randn(1, 128, 6, 4)])
    with caplog.at_level(logging.INFO, host.__name__):
        sample(flux2, sparse(cached, Disc(2)), 3, positive=positive)
    assert caplog.messages[0].endswith("stayed dense: self-attention of another length than the picture's")


def test_no_override_and_no_plan_is_left_behind(tiny_flux):
    patched = sparse(tiny_flux, Disc(3))
    tiny.sample(patched, **FLUX)
    assert OVERRIDE not in patched.model_options["transformer_options"]
    assert token_grid.TOKENS not in patched.model_options["transformer_options"]
    assert torch.equal(tiny.sample(patched, **FLUX), tiny.sample(patched, **FLUX))


def test_one_line_says_what_was_done_and_what_was_not(tiny_flux, caplog):
    with caplog.at_level(logging.INFO, host.__name__):
        tiny.sample(sparse(tiny_flux, Disc(3)), **FLUX)
        tiny.sample(sparse(tiny_flux, Disc(3), min_tokens=4096), **FLUX)
        with pytest.raises(ValueError, match=r"^test has no effect: the model's blocks run and do not ask for it"):
            sample(FAMILIES["pixart"], sparse(FAMILIES["pixart"].load(), Disc(3)), 1)
    assert caplog.messages[0].startswith("test: 53 tokens (1 x 8 x 6), ")
    assert "8 calls by dense with a mask" in caplog.messages[0]
    assert caplog.messages[1] == "test: 8 calls stayed dense: 53 tokens are fewer than min_tokens"
    assert caplog.messages[2] == "test: no attention of the picture's tokens was seen"


@pytest.fixture
def able():
    """What FlexAttention cannot do here is forgotten after the test."""
    yield
    sparse_backends.UNABLE.clear()


@pytest.mark.usefixtures("able")
def test_a_flex_attention_that_does_not_compile_is_reported_and_the_result_stays(tiny_flux, monkeypatch, caplog):
    """The only part of the CUDA path that a CPU can run: the first failure, and what follows, in other runs too."""
    tried = []

    def broken(*args, **kwargs):
        tried.append(1)
        raise TritonMissing(None)

    monkeypatch.setattr(sparse_backends, "flex", broken)
    monkeypatch.setattr(sparse_backends, "has_flex", lambda device: True)
    with caplog.at_level(logging.DEBUG):
        found, again = (tiny.sample(sparse(tiny_flux, Disc(3)), **FLUX) for _ in range(2))
    monkeypatch.undo()
    assert torch.equal(found, again)
    assert len(tried) == 1
    said = [record for record in caplog.records if "FlexAttention" in record.getMessage()]
    assert [record.levelno for record in said if record.exc_info] == [logging.DEBUG]  # the trace
    assert len([record for record in said if record.levelno == logging.WARNING]) == 1
    assert len([text for text in caplog.messages if "FlexAttention does not compile here: TritonMissing" in text]) == 2
    assert torch.equal(found, tiny.sample(sparse(tiny_flux, Disc(3)), **FLUX))


@pytest.mark.parametrize("error", [comfy.model_management.OOM_EXCEPTION, RuntimeError, ValueError])
def test_what_is_no_failure_of_the_compiler_is_an_error(tiny_flux, monkeypatch, error):
    """Memory that runs out, a mistake of ours, a card that fails."""

    def broken(*args, **kwargs):
        raise error("full")

    monkeypatch.setattr(sparse_backends, "flex", broken)
    monkeypatch.setattr(sparse_backends, "has_flex", lambda device: True)
    with pytest.raises(error):
        tiny.sample(sparse(tiny_flux, Disc(3)), **FLUX)


def test_flex_attention_gives_the_same_picture(tiny_flux, monkeypatch):
    """The route of CUDA, uncompiled, on a CPU."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(
        "dit_toolkit.models.accelerate.sparse_attention_flex.compiled",
        lambda: torch.nn.attention.flex_attention.flex_attention,
    )
    expected = tiny.sample(sparse(tiny_flux, PooledDisc(2, 2)), **FLUX, batch=2)
    monkeypatch.setattr(sparse_backends, "has_flex", lambda device: True)
    tiny.close(tiny.sample(sparse(tiny_flux, PooledDisc(2, 2)), **FLUX, batch=2), expected)


Q = torch.zeros(2, 3, 7, 4)


@pytest.mark.parametrize(
    "mask",
    [
        torch.arange(9.0),
        torch.arange(9.0)[None].expand(7, 9),
        torch.arange(9.0).expand(1, 7, 9),
        torch.arange(18.0).view(2, 1, 9),
        torch.arange(18.0).view(2, 1, 1, 9).expand(2, 1, 7, 9),
        torch.arange(54.0).view(2, 3, 1, 9),
    ],
    ids=lambda mask: str(tuple(mask.shape)),
)
def test_a_mask_that_is_a_bias_per_key_is_kept(mask):
    if mask.ndim == 1:
        mask = mask[None]
    found = key_bias(mask, Q, 9)
    assert isinstance(found, torch.Tensor)
    whole = mask[None] if mask.ndim == 2 else mask
    whole = whole[:, None] if whole.ndim == 3 else whole
    assert torch.equal(found.expand(2, 3, 7, 9), whole.expand(2, 3, 7, 9))


def test_a_bool_mask_becomes_minus_infinity_where_it_hides():
    hidden = torch.arange(9)[None] > 3
    found = key_bias(~hidden, Q, 9)
    assert torch.equal(found.isinf()[0, 0], hidden)
    assert found[0, 0, 0, 0] == 0


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.zeros(7, 9), "differs from query to query"),
        (torch.zeros(2, 1, 7, 9), "differs from query to query"),
        (torch.zeros(1, 1, 1, 8), "unknown shape"),
        (torch.zeros(5, 1, 1, 9), "unknown shape"),
        (torch.zeros(2, 2, 1, 9), "unknown shape"),
    ],
)
def test_other_masks_are_not(mask, words):
    assert words in key_bias(mask, Q, 9)


def test_a_mask_that_differs_from_query_to_query_goes_to_the_model_itself(tiny_flux, caplog):
    def regional(q, k, v, pe=None, attn_mask=None, extra_options=None):
        length = q.shape[2]
        return {"attn_mask": torch.zeros(length, length).index_fill(0, torch.tensor([5]), -3.0)}

    model = tiny_flux.clone()
    model.set_model_attn1_patch(regional)
    with caplog.at_level(logging.INFO, host.__name__):
        found = tiny.sample(sparse(model, Disc(2)), **FLUX)
    assert "stayed dense: an attention mask differs from query to query" in caplog.messages[0]
    assert torch.equal(found, tiny.sample(model, **FLUX))


def test_grouped_keys_and_every_layout():
    """Lumina shares keys between heads and SD3 gives its values by head; both are among the families above."""
    grid = Grid(3, 3, before=1)
    options = {token_grid.TOKENS: token_grid.Tokens((grid,))}
    q = torch.randn(2, 10, 4 * 8)
    kv = torch.randn(2, 10, 2 * 8)
    by_head = q.unflatten(2, (4, 8)).transpose(1, 2)
    grouped = kv.unflatten(2, (2, 8)).transpose(1, 2)

    flat = own_attention((q, q, q.unflatten(2, (4, 8))), {"heads": 4, "transformer_options": options})
    assert isinstance(flat, OwnAttention)
    for x in (flat.q, flat.k, flat.v):
        assert torch.equal(x, by_head)
    shared = own_attention((by_head, grouped, grouped, 4), {"skip_reshape": True, "transformer_options": options})
    assert isinstance(shared, OwnAttention)
    assert torch.equal(shared.k, grouped.repeat_interleave(2, dim=1))


def test_a_plan_is_made_once_for_a_run_whatever_else_it_needs(tiny_flux, monkeypatch):
    made = []
    monkeypatch.setattr(sparse_backends, "tile", lambda *plan: made.append(plan) or tile(*plan))
    model = sparse(tiny_flux, Disc(1))
    for size in ((8, 8), (8, 10)):
        tiny.sample(model, **{**FLUX, "size": size})
    assert len(made) == len(set(made)) == 2
    tiny.sample(model, **{**FLUX, "size": (8, 8)})
    assert len(made) == 3  # nothing of a run outlives it


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"min_tokens": -1}, "min_tokens must be at least 0, got -1"),
        ({"scale": "loud"}, "scale must be one of as trained, log-proportional, got 'loud'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        SparseAttention("test", Disc(2), **settings)


def test_the_report_prints_kept_pairs_and_the_ceiling(tiny_flux):
    text = host.report(tiny_flux, SparseAttention("test", Disc(16), min_tokens=5000))
    assert "1024 px: dense, 4608 tokens are fewer than min_tokens" in text
    assert "2048 px: 10.1% of the pairs kept" in text
    other = host.report(FAMILIES["wan"].load(), SparseAttention("test", Disc(16)))
    assert "The log says after each run" in other


def test_models_whose_tokens_are_not_known_are_refused_by_name():
    with pytest.raises(ValueError, match="Apply CLEAR does not know where the picture's tokens are in a PixArtSigma"):
        require_known_tokens(FAMILIES["pixart"].load(), "Apply CLEAR")


def test_a_description_is_a_value():
    settings = SparseAttention("test", Disc(2))
    with pytest.raises(AttributeError):
        settings.min_tokens = 3  # type: ignore[misc]
    assert replace(settings, min_tokens=3).min_tokens == 3
