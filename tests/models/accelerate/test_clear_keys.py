"""CLEAR's files: five published layouts, made small, against what their layers compute."""

import pytest
import torch
from torch.nn.functional import linear

from dit_toolkit.models.accelerate.clear_keys import parse

DIM = 12
LAYERS = {
    "transformer_blocks": ("to_q", "to_k", "to_v", "to_out.0"),
    "single_transformer_blocks": ("to_q", "to_k", "to_v"),
}


def published(double=2, single=3, factor=0, dim=DIM) -> dict[str, torch.Tensor]:
    """A random file in the published layout."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for kind, count in (("transformer_blocks", double), ("single_transformer_blocks", single)):
        for i in range(count):
            for layer in LAYERS[kind]:
                state[f"{kind}.{i}.attn.{layer}.weight"] = torch.randn(dim, dim, generator=generator)
                state[f"{kind}.{i}.attn.{layer}.bias"] = torch.randn(dim, generator=generator)
            if factor:
                key = f"{kind}.{i}.attn.processor.spatial_weight"
                state[key] = torch.rand(1, 1, 1, factor, 1, factor, 1, generator=generator)
    return state


def applied(weights, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`base` with every patch written over its rows."""
    result = {key: value.clone() for key, value in base.items()}
    for patch in weights.patches:
        result[patch.key][patch.start : patch.start + patch.value.shape[0]] = patch.value
    return result


def comfy_layout(double=2, single=3, dim=DIM) -> dict[str, torch.Tensor]:
    state = {}
    for i in range(double):
        for layer, rows in (("qkv", 3 * dim), ("proj", dim)):
            state[f"double_blocks.{i}.img_attn.{layer}.weight"] = torch.full((rows, dim), 9.0)
            state[f"double_blocks.{i}.img_attn.{layer}.bias"] = torch.full((rows,), 9.0)
    for i in range(single):
        state[f"single_blocks.{i}.linear1.weight"] = torch.full((7 * dim, dim), 9.0)
        state[f"single_blocks.{i}.linear1.bias"] = torch.full((7 * dim,), 9.0)
    return state


@pytest.mark.parametrize("factor", [0, 4])
def test_both_layouts_compute_the_same(factor):
    state = published(factor=factor)
    after = applied(parse(state, "file"), comfy_layout())
    x = torch.randn(5, DIM, generator=torch.Generator().manual_seed(1))

    def published_layer(name):
        return linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    for i in range(2):
        name = f"transformer_blocks.{i}.attn"
        qkv = linear(x, *(after[f"double_blocks.{i}.img_attn.qkv.{end}"] for end in ("weight", "bias")))
        expected = torch.cat([published_layer(f"{name}.{part}") for part in ("to_q", "to_k", "to_v")], dim=1)
        torch.testing.assert_close(qkv, expected, rtol=1e-6, atol=1e-6)
        out = linear(x, *(after[f"double_blocks.{i}.img_attn.proj.{end}"] for end in ("weight", "bias")))
        torch.testing.assert_close(out, published_layer(f"{name}.to_out.0"), rtol=1e-6, atol=1e-6)
    for i in range(3):
        name = f"single_transformer_blocks.{i}.attn"
        both = linear(x, *(after[f"single_blocks.{i}.linear1.{end}"] for end in ("weight", "bias")))
        expected = torch.cat([published_layer(f"{name}.{part}") for part in ("to_q", "to_k", "to_v")], dim=1)
        torch.testing.assert_close(both[:, : 3 * DIM], expected, rtol=1e-6, atol=1e-6)
        assert (after[f"single_blocks.{i}.linear1.weight"][3 * DIM :] == 9).all()  # the MLP's rows


def test_a_whole_file_is_used_up():
    """The published size: 190 weights and as many biases, and 57 cells."""
    weights = parse(published(19, 38, factor=4, dim=2), "file")
    assert len(weights.patches) == 2 * 190
    assert len(weights.cells) == 57
    assert (weights.double, weights.single, weights.dim, weights.factor) == (19, 38, 2, 4)
    assert weights.summary == "19+38 blocks, hidden size 2, 380 tensors, pooled cells of 4"


def test_cells_keep_rows_and_columns_apart():
    state = published(factor=2)
    cells = parse(state, "file").cells
    raw = state["single_transformer_blocks.1.attn.processor.spatial_weight"]
    assert cells["single", 1][0, 1] == raw[0, 0, 0, 0, 0, 1, 0]
    assert cells["single", 1][1, 0] == raw[0, 0, 0, 1, 0, 0, 0]


def without(state, *names):
    return {key: value for key, value in state.items() if key not in names}


QUERY = "transformer_blocks.0.attn.to_q.weight"
SPATIAL = "transformer_blocks.0.attn.processor.spatial_weight"


def with_key(key, value=None, **sizes):
    return {**published(**sizes), key: torch.zeros(DIM, DIM) if value is None else value}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"lora.up.weight": torch.zeros(1)}, "f is no CLEAR file: none of its 1 keys looks like"),
        (with_key("proj_out.weight"), "has the key 'proj_out.weight', which no CLEAR file has"),
        (
            with_key("single_transformer_blocks.0.attn.to_out.0.weight"),
            "has the key 'single_transformer_blocks.0.attn.to_out.0.weight', which no CLEAR file has",
        ),
        (
            without(published(), "transformer_blocks.1.attn.to_k.bias"),
            "incomplete: 'transformer_blocks.1.attn.to_k.bias' missing",
        ),
        (published(double=0), f"incomplete: '{QUERY}' and 7 more missing"),
        (published(single=0), "incomplete: 'single_transformer_blocks.0.attn.to_q.weight' and 5 more missing"),
        (without(published(factor=4), SPATIAL), f"incomplete: '{SPATIAL}' missing"),
        (with_key(QUERY, torch.zeros(DIM, 3)), r"to_q.weight' must be \(12, 12\), got \(12, 3\)"),
        (with_key(SPATIAL, torch.zeros(4, 4), factor=4), r"tensor of 7 axes, got \(4, 4\) float32"),
        (with_key(SPATIAL, torch.zeros(1, 1, 1, 4, 1, 3, 1), factor=4), r"must be \(1, 1, 1, f, 1, f, 1\), got"),
        (with_key(QUERY, torch.full((DIM, DIM), float("nan"))), f"'{QUERY}' holds NaN or infinite values"),
        (with_key(SPATIAL, torch.full((1, 1, 1, 4, 1, 4, 1), torch.inf), factor=4), "holds NaN or infinite values"),
        (with_key(QUERY, torch.zeros(DIM, DIM).int()), "floating-point matrix, got .* int32"),
        (with_key(QUERY, torch.zeros(DIM, DIM).bool()), "floating-point matrix, got .* bool"),
        (with_key(QUERY, torch.tensor(1.0)), r"floating-point matrix, got \(\) float32"),
        (with_key(QUERY, torch.zeros(0, 0)), "floating-point matrix"),
        (with_key(QUERY.replace("0", "00")), "has the key 'transformer_blocks.00.attn.to_q.weight', which no CLEAR"),
        (with_key(QUERY.replace("0", "\u0660")), "which no CLEAR file has"),
        (with_key(QUERY.replace("0", "999999999")), "which no CLEAR file has"),
        (with_key(QUERY.replace("0", "9" * 5000)), "which no CLEAR file has"),
        (with_key(QUERY.replace("0", "9999")), r"incomplete: .* and \d+ more missing"),
    ],
)
def test_what_is_not_as_published_is_refused_in_one_sentence(state, words):
    with pytest.raises(ValueError, match=words) as refused:
        parse(state, "f")
    assert str(refused.value).startswith("f")
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_weights_of_any_floating_point_kind_are_taken(dtype):
    assert parse({key: value.to(dtype) for key, value in published().items()}, "f").patches[0].value.dtype == dtype
