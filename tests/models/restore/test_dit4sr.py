"""The block against its definition, on plain torch layers under ComfyUI's attribute names."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dit_toolkit.models.restore.dit4sr import ControlBranch, joint_block
from dit_toolkit.models.restore.dit4sr_keys import parse
from dit_toolkit.tests.models.restore import dit4sr_reference as reference

BLOCKS, DIM = 3, 192
DUAL = (0, 1)


class Norm(nn.Module):
    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, 1e-6)


class Attention(nn.Module):
    num_heads = DIM // 64

    def __init__(self, w: dict, name: str, q: str, k: str, v: str, out: str, norm: str):
        super().__init__()
        self.qkv = fused(w, *(f"{name}.{part}" for part in (q, k, v)))
        self.ln_q, self.ln_k = (Norm(w[f"{name}.{norm}_{part}.weight"]) for part in "qk")
        self.proj = linear(w, f"{name}.{out}") if f"{name}.{out}.weight" in w else None

    def post_attention(self, x: Tensor) -> Tensor:
        assert self.proj is not None
        return self.proj(x)

    def pre_attention(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As ComfyUI's: queries and keys flat, values by head."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, 64)).unbind(2)
        return self.ln_q(q).flatten(2), self.ln_k(k).flatten(2), v


class Mlp(nn.Module):
    def __init__(self, w: dict, name: str):
        super().__init__()
        self.fc1, self.fc2 = linear(w, f"{name}.net.0.proj"), linear(w, f"{name}.net.2")
        self.act = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Stream(nn.Module):
    """A DismantledBlock: that of the picture, or that of the text."""

    def __init__(self, w: dict, name: str, of_text: bool):
        super().__init__()
        parts = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added")
        self.attn = Attention(w, f"{name}.attn", *(parts if of_text else OWN))
        self.x_block_self_attn = not of_text and f"{name}.attn2.to_q.weight" in w
        if self.x_block_self_attn:
            self.attn2 = Attention(w, f"{name}.attn2", *OWN)
        self.norm1 = self.norm2 = nn.LayerNorm(DIM, eps=1e-6, elementwise_affine=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), linear(w, f"{name}.norm1{'_context' * of_text}.linear"))
        self.pre_only = f"{name}.ff{'_context' * of_text}.net.2.weight" not in w
        if not self.pre_only:
            self.mlp = Mlp(w, f"{name}.ff{'_context' * of_text}")

    def pre_attention(self, x: Tensor, vec: Tensor):
        parts = self.adaLN_modulation(vec)[:, None].split(DIM, -1)
        shift, scale = (parts[1], parts[0]) if self.pre_only else parts[:2]  # diffusers has them the other way there
        return self.attn.pre_attention(self.norm1(x) * (1 + scale) + shift), (x, *parts[2:])

    def post_attention(self, attended: Tensor, x: Tensor, gate, shift_mlp, scale_mlp, gate_mlp) -> Tensor:
        x = x + gate * self.attn.post_attention(attended)
        return x + gate_mlp * self.mlp(self.norm2(x) * (1 + scale_mlp) + shift_mlp)


OWN = ("to_q", "to_k", "to_v", "to_out.0", "norm")


class Joint(nn.Module):
    def __init__(self, w: dict, name: str):
        super().__init__()
        self.x_block, self.context_block = Stream(w, name, False), Stream(w, name, True)


def linear(w: dict, name: str) -> nn.Linear:
    return fused(w, name)


def fused(w: dict, *names: str) -> nn.Linear:
    weight, bias = (torch.cat([w[f"{name}.{leaf}"] for name in names]) for leaf in ("weight", "bias"))
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Torch's own, over all heads."""
    q, k, v = (x.unflatten(2, (-1, 64)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


def branch_of(w: dict, variant: str) -> ControlBranch:
    checkpoint = parse(w)
    branch = ControlBranch(checkpoint.dim, checkpoint.blocks, checkpoint.dual, variant, operations=nn)  # pyright: ignore[reportArgumentType]
    branch.load_state_dict(checkpoint.used_as(variant))  # pyright: ignore[reportArgumentType]
    return branch


@pytest.fixture(scope="module")
def weights():
    return reference.random_weights(BLOCKS, DUAL)


@pytest.fixture(scope="module")
def blocks(weights):
    return [Joint(weights, f"transformer_blocks.{i}") for i in range(BLOCKS)]


def streams(rows: int, columns: int, batch: int = 2, text: int = 7):
    generator = torch.Generator().manual_seed(rows * columns)
    tokens = rows * columns
    shapes = ((batch, tokens, DIM), (batch, tokens, DIM), (batch, text, DIM), (batch, DIM))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def run(blocks, weights, i, variant, inputs, grid, **settings):
    control = branch_of(weights, variant).transformer_blocks[i]
    with torch.no_grad():
        return joint_block(blocks[i], control, *inputs, grid, attention=attention, **settings)


@pytest.mark.parametrize("variant", ["v1", "r1"])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (6, 2), (1, 1), (1, 7)])
@pytest.mark.parametrize("i", range(BLOCKS))
def test_a_block_is_the_one_of_its_definition(weights, blocks, i, variant, grid):
    """Block 1 has a second attention, block 2 has none and is the last."""
    inputs = streams(*grid)
    expected = reference.block(weights, f"transformer_blocks.{i}", variant, *inputs, grid)
    for ours, theirs in zip(run(blocks, weights, i, variant, inputs, grid), expected, strict=True):
        assert (ours is None) == (theirs is None) == (i == 2 and ours is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("strength", [0.7, 0.1, 1e-6])
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
def test_strength_and_scale_are_those_of_their_definition(weights, blocks, strength, scale):
    inputs, grid = streams(3, 4), (3, 4)
    expected = reference.block(weights, "transformer_blocks.1", "r1", *inputs, grid, scale, strength)
    ours = run(blocks, weights, 1, "r1", inputs, grid, strength=strength, cross_stream_scale=scale)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def plain(block, img, txt, vec):
    """The base model's block."""
    own, n = block.x_block, img.shape[1]
    parts = own.adaLN_modulation(vec)[:, None].split(DIM, -1)
    text_qkv, rest = block.context_block.pre_attention(txt, vec)
    normed = own.norm1(img)
    joint = [
        torch.cat([a.reshape(*a.shape[:2], -1), b.reshape(*b.shape[:2], -1)], 1)
        for a, b in zip(own.attn.pre_attention(normed * (1 + parts[1]) + parts[0]), text_qkv, strict=True)
    ]
    out = attention(*joint, None)
    second = own.attn2.pre_attention(normed * (1 + parts[7]) + parts[6])
    changed = img + parts[2] * own.attn.proj(out[:, :n])
    changed = changed + parts[8] * own.attn2.proj(attention(*(x.reshape(*x.shape[:2], -1) for x in second), None))
    changed = changed + parts[5] * own.mlp(own.norm2(changed) * (1 + parts[4]) + parts[3])
    return changed, block.context_block.post_attention(out[:, n:], *rest)


@pytest.mark.parametrize("variant", ["v1", "r1"])
def test_strength_leads_from_the_base_model_to_the_published_one_without_a_jump(weights, blocks, variant):
    inputs, grid = streams(4, 4), (4, 4)
    img, _, txt, vec = inputs
    with torch.no_grad():
        base = plain(blocks[1], img, txt, vec)
    full = run(blocks, weights, 1, variant, inputs, grid)
    strengths = [1e-9, 1e-3, 0.25, 0.5, 0.75, 1 - 1e-6]
    weaker = [run(blocks, weights, 1, variant, inputs, grid, strength=s) for s in strengths]
    for first, base_of in ((0, base[0]), (2, base[1])):  # picture and text
        torch.testing.assert_close(weaker[0][first], base_of, rtol=0, atol=2e-6)
        torch.testing.assert_close(weaker[-1][first], full[first], rtol=0, atol=2e-5)
        away = [float((w[first] - base_of).norm()) for w in weaker] + [float((full[first] - base_of).norm())]
        assert away == sorted(away)
        assert away[-1] > 0.05 * float(base_of.norm())
    for w in weaker:  # the stream itself runs as published, whatever the strength
        torch.testing.assert_close(w[1], full[1], rtol=0, atol=1e-5)


def test_the_wrong_variant_shows(weights, blocks):
    inputs = streams(4, 4)
    v1, r1 = (run(blocks, weights, 0, variant, inputs, (4, 4))[0] for variant in ("v1", "r1"))
    assert (v1 - r1).abs().max() > 0.1


def test_v1_never_reads_the_projection_of_keys(weights):
    names = branch_of(weights, "v1").state_dict()
    assert not [name for name in names if "to_k_control" in name]
    assert len(names) < len(branch_of(weights, "r1").state_dict())


def test_the_grid_matters_to_the_convolution_alone(weights, blocks):
    """The same tokens on another grid have other neighbours."""
    inputs = streams(4, 6)
    one, other = (run(blocks, weights, 0, "r1", inputs, grid) for grid in ((4, 6), (6, 4)))
    assert (one[0] - other[0]).abs().max() > 0.01
    torch.testing.assert_close(one[1], other[1], rtol=0, atol=0)
    flat = [run(blocks, weights, 0, "r1", inputs, grid, cross_stream_scale=0.0) for grid in ((4, 6), (6, 4))]
    torch.testing.assert_close(flat[0][0], flat[1][0], rtol=0, atol=0)


def test_it_writes_into_nothing_that_it_is_given(weights, blocks):
    inputs = streams(4, 4)
    before = [x.clone() for x in inputs]
    run(blocks, weights, 0, "r1", inputs, (4, 4))
    for x, was in zip(inputs, before, strict=True):
        assert torch.equal(x, was)


def test_half_precision_stays_near_float32(weights, blocks):
    """bfloat16 keeps 8 bits: a sum over one block is off by some hundredths at most."""
    inputs = streams(4, 4)
    full = run(blocks, weights, 1, "r1", inputs, (4, 4))
    half_blocks = [Joint({k: v.bfloat16() for k, v in weights.items()}, f"transformer_blocks.{i}") for i in range(3)]
    for block in half_blocks:
        block.bfloat16()
    control = branch_of(weights, "r1").bfloat16().transformer_blocks[1]
    with torch.no_grad():
        half = joint_block(
            half_blocks[1], control, *(x.bfloat16() for x in inputs), (4, 4), attention=attention, strength=0.5
        )
    weaker = run(blocks, weights, 1, "r1", inputs, (4, 4), strength=0.5)
    for one, other in zip(half, weaker, strict=True):
        assert one.dtype == torch.bfloat16
        assert float((one.float() - other).norm() / other.norm()) < 0.03
    assert not math.isclose(float(weaker[0].norm()), float(full[0].norm()), rel_tol=1e-3)
