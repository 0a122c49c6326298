"""EasyControl's maths, judged by one long sequence with a mask, as the paper defines it."""

from __future__ import annotations

import re
from math import prod

import pytest
import torch
from torch.nn import functional as F

from dit_toolkit.models.control.conditions import encode_condition
from dit_toolkit.models.control.easycontrol import ConditionLora, published_state
from dit_toolkit.models.control.easycontrol_keys import Checkpoint, Slot, parse, write
from dit_toolkit.models.control.low_rank import LowRank
from dit_toolkit.models.control.positions import spatial_ids, subject_ids

Linear, Module, ModuleList, LayerNorm = torch.nn.Linear, torch.nn.Module, torch.nn.ModuleList, torch.nn.LayerNorm

DIM, HEADS, DOUBLE, SINGLE, RANK, CHANNELS = 32, 2, 2, 2, 4, 12
AXES = (4, 6, 6)
PICTURE = (3, 4)
TEXT = 5


class Norm(Module):
    """QK norm: RMS over the head, own weights for queries and keys."""

    def __init__(self):
        super().__init__()
        self.query, self.key = (torch.nn.Parameter(torch.ones(DIM // HEADS)) for _ in range(2))

    def forward(self, q, k, v):
        return rms(q, self.query).to(v), rms(k, self.key).to(v)


class Modulation(Module):
    def __init__(self, sets):
        super().__init__()
        self.sets, self.lin = sets, Linear(DIM, 3 * sets * DIM)

    def forward(self, vec):
        out = self.lin(F.silu(vec))[:, None].chunk(3 * self.sets, -1)
        mods = [Mod(*out[3 * i : 3 * i + 3]) for i in range(self.sets)]
        return mods[0], mods[1] if self.sets == 2 else None


class Mod:
    def __init__(self, shift, scale, gate):
        self.shift, self.scale, self.gate = shift, scale, gate


class Attention(Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.norm, self.proj = Linear(DIM, 3 * DIM), Norm(), Linear(DIM, DIM)


class DoubleBlock(Module):
    num_heads = HEADS

    def __init__(self):
        super().__init__()
        for stream in ("img", "txt"):
            setattr(self, f"{stream}_mod", Modulation(2))
            setattr(self, f"{stream}_norm1", LayerNorm(DIM, elementwise_affine=False, eps=1e-6))
            setattr(self, f"{stream}_norm2", LayerNorm(DIM, elementwise_affine=False, eps=1e-6))
            setattr(self, f"{stream}_attn", Attention())
            mlp = (Linear(DIM, 2 * DIM), torch.nn.GELU(approximate="tanh"), Linear(2 * DIM, DIM))
            setattr(self, f"{stream}_mlp", torch.nn.Sequential(*mlp))


class SingleBlock(Module):
    num_heads = HEADS

    def __init__(self):
        super().__init__()
        self.modulation, self.norm = Modulation(1), Norm()
        self.pre_norm = LayerNorm(DIM, elementwise_affine=False, eps=1e-6)
        self.linear1, self.linear2 = Linear(DIM, 5 * DIM), Linear(3 * DIM, DIM)
        self.mlp_act = torch.nn.GELU(approximate="tanh")


class TinyFlux(Module):
    """The parts of FLUX.1 that conditions touch, with ComfyUI's names and fused projections."""

    def __init__(self):
        super().__init__()
        self.img_in = Linear(CHANNELS, DIM)
        self.double_blocks = ModuleList(DoubleBlock() for _ in range(DOUBLE))
        self.single_blocks = ModuleList(SingleBlock() for _ in range(SINGLE))


def rms(x, weight):
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def angles(ids):
    """Rotation angle of each channel pair, `[T, d/2]` in float64: position * 10000^(-2i/axis width)."""
    parts = []
    for axis, width in enumerate(AXES):
        parts.append(ids[:, axis, None].double() * 10000.0 ** (-torch.arange(0, width, 2) / width).double())
    return torch.cat(parts, -1)


def rotate(x, ids):
    """RoPE as a multiplication of complex pairs."""
    turned = torch.polar(torch.ones(1).double(), angles(ids)) * torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(turned).flatten(-2).to(x)


def rotations(ids):
    """The same angles as the 2 x 2 matrices that FLUX.1 code passes around, `[1, 1, T, d/2, 2, 2]`."""
    a = angles(ids).float()
    return torch.stack([a.cos(), -a.sin(), a.sin(), a.cos()], -1).unflatten(-1, (2, 2))[None, None]


def apply_rope(x, pe):
    pairs = x.float().unflatten(-1, (-1, 1, 2))
    return (pe[..., 0] * pairs[..., 0] + pe[..., 1] * pairs[..., 1]).flatten(-2).to(x)


def attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def grid_ids(rows, columns):
    return torch.tensor([[0.0, r, c] for r in range(rows) for c in range(columns)])


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = TinyFlux()
    for weight in model.parameters():
        weight.data = weight.data + 0.1 * torch.randn_like(weight)
    return model.requires_grad_(False)


def make_lora(seed, scales=None):
    lora = ConditionLora(DIM, DOUBLE, SINGLE, RANK, scales, operations=torch.nn)
    generator = torch.Generator().manual_seed(seed)
    for weight in lora.parameters():
        weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    return lora.requires_grad_(False)


def condition(seed, grid=(2, 3), batch=1):
    return torch.randn(batch, prod(grid), CHANNELS, generator=torch.Generator().manual_seed(seed))


def delta(lora, name, x):
    """What the LoRA adds, from the definition: x A^T B^T."""
    stream, block, part = name.split(".")
    layer = getattr(lora, stream)[int(block)][part]
    return x @ layer.down.weight.T @ layer.up.weight.T * layer.scale


def linear(x, weight, bias):
    return x @ weight.T + bias


def heads(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class Condition:
    def __init__(self, tokens, ids, lora, strength=1.0):
        self.tokens, self.ids, self.lora, self.strength = tokens, ids, lora, strength


def joint_forward(model, txt, img, vec, vec0, conditions, ids):
    """The paper's form: [text ; picture ; conditions] in one sequence under an additive mask, q, k, v separate.

    Text and picture see everything; condition j sees condition j only. Returns the picture's tokens.
    """
    lengths = [txt.shape[1] + img.shape[1], *[c.tokens.shape[1] for c in conditions]]
    mask = torch.full((sum(lengths), sum(lengths)), float("-inf"))
    mask[: lengths[0]] = 0
    for j in range(1, len(lengths)):
        start, end = sum(lengths[:j]), sum(lengths[: j + 1])
        mask[start:end, start:end] = 0
    mask = mask.to(txt)
    all_ids = torch.cat([torch.zeros(txt.shape[1], 3), ids, *[c.ids for c in conditions]])
    states = [c.tokens @ model.img_in.weight.T + model.img_in.bias for c in conditions]

    def attend(q, k, v):
        q, k = rotate(q, all_ids), rotate(k, all_ids)
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + mask).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2).split(lengths, dim=1)

    def project(x, weight, bias, name=None, c=None):
        thirds = [linear(x, w, b) for w, b in zip(weight.chunk(3), bias.chunk(3), strict=True)]
        if c is not None:
            thirds = [
                y + c.strength * delta(c.lora, f"{name}.{part}", x) for y, part in zip(thirds, "qkv", strict=True)
            ]
        return [heads(y) for y in thirds]

    def mod(x, m):
        return F.layer_norm(x, (DIM,), eps=1e-6) * (1 + m.scale) + m.shift

    for i, block in enumerate(model.double_blocks):
        mods = {"txt": block.txt_mod(vec), "img": block.img_mod(vec)}
        streams, normed = {"txt": txt, "img": img}, []
        for name in ("txt", "img"):
            attn = getattr(block, f"{name}_attn")
            q, k, v = project(mod(streams[name], mods[name][0]), attn.qkv.weight, attn.qkv.bias)
            normed.append((rms(q, attn.norm.query), rms(k, attn.norm.key), v))
        (mod1, mod2), attn = block.img_mod(vec0), block.img_attn
        for c, state in zip(conditions, states, strict=True):
            q, k, v = project(mod(state, mod1), attn.qkv.weight, attn.qkv.bias, f"double_blocks.{i}", c)
            normed.append((rms(q, attn.norm.query), rms(k, attn.norm.key), v))
        main, *outs = attend(*[torch.cat(parts, 2) for parts in zip(*normed, strict=True)])
        for name, out in (("txt", main[:, : txt.shape[1]]), ("img", main[:, txt.shape[1] :])):
            first, second = mods[name]
            x = streams[name] + first.gate * getattr(block, f"{name}_attn").proj(out)
            streams[name] = x + second.gate * getattr(block, f"{name}_mlp")(mod(x, second))
        for j, (c, out) in enumerate(zip(conditions, outs, strict=True)):
            y = attn.proj(out)
            y = y + c.strength * delta(c.lora, f"double_blocks.{i}.proj", y)
            x = states[j] + mod1.gate * y
            states[j] = x + mod2.gate * block.img_mlp(mod(x, mod2))
        txt, img = streams["txt"], streams["img"]

    joined = torch.cat([txt, img], 1)
    for i, block in enumerate(model.single_blocks):
        sequences = [(joined, block.modulation(vec)[0], None)]
        sequences += [(s, block.modulation(vec0)[0], c) for s, c in zip(states, conditions, strict=True)]
        parts, mlps = [], []
        for x, m, c in sequences:
            x = mod(x, m)
            weight, bias = block.linear1.weight, block.linear1.bias
            q, k, v = project(x, weight[: 3 * DIM], bias[: 3 * DIM], f"single_blocks.{i}", c)
            parts.append((rms(q, block.norm.query), rms(k, block.norm.key), v))
            mlps.append(F.gelu(linear(x, weight[3 * DIM :], bias[3 * DIM :]), approximate="tanh"))
        outs = attend(*[torch.cat(group, 2) for group in zip(*parts, strict=True)])
        joined, *states = [
            x + m.gate * block.linear2(torch.cat([out, mlp], -1))
            for (x, m, _), out, mlp in zip(sequences, outs, mlps, strict=True)
        ]
    return joined[:, txt.shape[1] :]


def cached_forward(model, txt, img, vec, extra, ids):
    """Text and picture only; each block appends the keys and values it is given."""
    pe = rotations(torch.cat([torch.zeros(txt.shape[1], 3), ids]))
    extra = iter(extra)

    def attend(q, k, v):
        found = next(extra)
        k = torch.cat([apply_rope(k, pe), *[pair[0].expand(k.shape[0], -1, -1, -1) for pair in found]], 2)
        v = torch.cat([v, *[pair[1].expand(v.shape[0], -1, -1, -1) for pair in found]], 2)
        return attention(apply_rope(q, pe), k, v)

    def split(attn, x):
        q, k, v = attn.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return (*attn.norm(q, k, v), v)

    def mod(norm, x, m):
        return norm(x) * (1 + m.scale) + m.shift

    for block in model.double_blocks:
        (t1, t2), (i1, i2) = block.txt_mod(vec), block.img_mod(vec)
        both = (
            split(block.txt_attn, mod(block.txt_norm1, txt, t1)),
            split(block.img_attn, mod(block.img_norm1, img, i1)),
        )
        out = attend(*[torch.cat(pair, 2) for pair in zip(*both, strict=True)])
        txt = txt + t1.gate * block.txt_attn.proj(out[:, : txt.shape[1]])
        txt = txt + t2.gate * block.txt_mlp(mod(block.txt_norm2, txt, t2))
        img = img + i1.gate * block.img_attn.proj(out[:, txt.shape[1] :])
        img = img + i2.gate * block.img_mlp(mod(block.img_norm2, img, i2))
    x = torch.cat([txt, img], 1)
    for block in model.single_blocks:
        m, _ = block.modulation(vec)
        qkv, mlp = block.linear1(mod(block.pre_norm, x, m)).split([3 * DIM, 2 * DIM], -1)
        q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k = block.norm(q, k, v)
        x = x + m.gate * block.linear2(torch.cat([attend(q, k, v), block.mlp_act(mlp)], -1))
    return x[:, txt.shape[1] :]


def encode(model, c, vec0, **options):
    pe = rotations(c.ids)
    return encode_condition(
        model, c.lora, c.tokens, vec0, pe, attention=attention, apply_rope=apply_rope, strength=c.strength, **options
    )


def inputs(batch=1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    txt = torch.randn(batch, TEXT, DIM, generator=generator)
    img = torch.randn(batch, prod(PICTURE), DIM, generator=generator)
    vec, vec0 = torch.randn(2, batch, DIM, generator=generator)
    return txt, img, vec, vec0


def two_conditions(first=1.0, second=0.7):
    return [
        Condition(condition(3), subject_ids((2, 3), PICTURE), make_lora(5), first),
        Condition(condition(4, (2, 2)), spatial_ids((2, 2), PICTURE), make_lora(6), second),
    ]


def both_forms(model, conditions, batch=1):
    txt, img, vec, vec0 = (x.to(model.img_in.weight) for x in inputs(batch))
    joint = joint_forward(model, txt, img, vec, vec0, conditions, grid_ids(*PICTURE))
    encoded = [encode(model, c, vec0) for c in conditions]
    cached = cached_forward(model, txt, img, vec, zip(*encoded, strict=True), grid_ids(*PICTURE))
    return joint, cached


def test_keys_computed_beside_the_model_equal_one_masked_sequence(model):
    joint, cached = both_forms(model, two_conditions())
    assert joint.std() > 0.5
    torch.testing.assert_close(cached, joint, rtol=1e-4, atol=2e-5)  # 4 blocks of float32, sums of up to 96 terms


def test_a_batch_of_pictures_shares_one_condition_or_has_its_own(model):
    shared = [Condition(condition(3), subject_ids((2, 3), PICTURE), make_lora(5))]
    own = [Condition(condition(3, batch=2), subject_ids((2, 3), PICTURE), make_lora(5))]
    for conditions in (shared, own):
        txt, img, vec, vec0 = inputs(batch=2)
        rows = [
            joint_forward(
                model,
                txt[[b]],
                img[[b]],
                vec[[b]],
                vec0[[b]],
                [Condition(c.tokens[[b % len(c.tokens)]], c.ids, c.lora) for c in conditions],
                grid_ids(*PICTURE),
            )
            for b in range(2)
        ]
        encoded = [encode(model, c, vec0) for c in conditions]
        cached = cached_forward(model, txt, img, vec, zip(*encoded, strict=True), grid_ids(*PICTURE))
        torch.testing.assert_close(cached, torch.cat(rows), rtol=1e-4, atol=2e-5)


def test_in_bfloat16_both_forms_are_equally_far_from_float32(model):
    """Rounding differs between the forms; neither may be worse than bfloat16 itself."""
    exact, _ = both_forms(model, two_conditions())
    model = model.to(torch.bfloat16)
    conditions = two_conditions()
    for c in conditions:
        c.tokens, c.lora = c.tokens.bfloat16(), c.lora.to(torch.bfloat16)
    joint, cached = both_forms(model, conditions)
    assert cached.dtype == torch.bfloat16
    rounding = (joint.float() - exact).square().mean().sqrt()
    assert 0 < rounding < 0.05 * exact.std()
    assert (cached.float() - exact).square().mean().sqrt() < 1.5 * rounding


def test_the_condition_acts(model):
    conditions = two_conditions()
    txt, img, vec, vec0 = inputs()
    none = joint_forward(model, txt, img, vec, vec0, [], grid_ids(*PICTURE))
    one, _ = both_forms(model, conditions[:1])
    both, _ = both_forms(model, conditions)
    swapped, _ = both_forms(model, conditions[::-1])
    assert (none - one).abs().mean() > 0.02
    assert (both - one).abs().mean() > 0.02
    torch.testing.assert_close(swapped, both, rtol=1e-4, atol=2e-5)  # the order of conditions is a matter of rounding


def test_lora_adds_to_each_third_of_the_fused_projections(model):
    """First block of either kind: K and V equal W x + b + s B A x with W cut out of the fused weight."""
    c = two_conditions()[1]
    vec0 = inputs()[3]
    c.strength = 0.7
    state = linear(c.tokens, model.img_in.weight, model.img_in.bias)
    block = model.double_blocks[0]
    m, _ = block.img_mod(vec0)
    x = F.layer_norm(state, (DIM,), eps=1e-6) * (1 + m.scale) + m.shift
    _, w_k, w_v = block.img_attn.qkv.weight.chunk(3)
    _, b_k, b_v = block.img_attn.qkv.bias.chunk(3)
    k = heads(linear(x, w_k, b_k) + 0.7 * delta(c.lora, "double_blocks.0.k", x))
    v = heads(linear(x, w_v, b_v) + 0.7 * delta(c.lora, "double_blocks.0.v", x))
    got_k, got_v = encode(model, c, vec0)[0]
    torch.testing.assert_close(got_k, rotate(rms(k, block.img_attn.norm.key), c.ids), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got_v, v, rtol=1e-4, atol=1e-5)


def test_lora_adds_to_the_first_three_slices_of_linear1(model):
    model.double_blocks = ModuleList()
    c = two_conditions()[1]
    c.lora.double_blocks = ModuleList()
    vec0 = inputs()[3]
    block = model.single_blocks[0]
    m, _ = block.modulation(vec0)
    x = linear(c.tokens, model.img_in.weight, model.img_in.bias)
    x = F.layer_norm(x, (DIM,), eps=1e-6) * (1 + m.scale) + m.shift
    rows, bias = block.linear1.weight[2 * DIM : 3 * DIM], block.linear1.bias[2 * DIM : 3 * DIM]
    v = heads(linear(x, rows, bias) + 0.7 * delta(c.lora, "single_blocks.0.v", x))
    torch.testing.assert_close(encode(model, c, vec0)[0][1], v, rtol=1e-4, atol=1e-5)


def test_proj_lora_reads_the_output_of_the_projection(model):
    """The form every LoRA loader assumes, y = proj(x) + B A x, gives other keys: the difference is not a detail."""
    c = two_conditions()[0]
    vec0 = inputs()[3]
    right = encode(model, c, vec0)

    class Ordinary(Module):
        """A projection with its LoRA merged as if it were an ordinary one."""

        def __init__(self, proj, low):
            super().__init__()
            self.proj, self.low = proj, low

        def forward(self, x):
            return self.proj(x) + self.low(x)

    lora = make_lora(5)
    for block, low in zip(model.double_blocks, lora.double_blocks, strict=True):
        block.img_attn.proj = Ordinary(block.img_attn.proj, low["proj"])
        zero = LowRank(DIM, RANK, 0.0, operations=torch.nn)
        low["proj"] = zero
    wrong = encode(model, Condition(c.tokens, c.ids, lora), vec0)
    torch.testing.assert_close(wrong[0], right[0])  # the first block's keys come before any projection
    assert (wrong[-1][0] - right[-1][0]).abs().mean() > 0.05


def test_a_merged_weight_of_the_right_form_gives_the_same_keys(model):
    """(I + s B A) W and (I + s B A) b is what the proj LoRA amounts to."""
    c = two_conditions()[0]
    vec0 = inputs()[3]
    right = encode(model, c, vec0)
    lora = make_lora(5)
    for block, low in zip(model.double_blocks, lora.double_blocks, strict=True):
        factor = torch.eye(DIM) + low["proj"].up.weight @ low["proj"].down.weight
        proj = block.img_attn.proj
        proj.weight.data, proj.bias.data = factor @ proj.weight, factor @ proj.bias
        low["proj"].scale = 0.0
    merged = encode(model, Condition(c.tokens, c.ids, lora), vec0)
    for got, expected in zip(merged, right, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


def test_strength_scales_the_lora_and_nothing_else(model):
    tokens, ids, vec0 = condition(3), subject_ids((2, 3), PICTURE), inputs()[3]
    off = encode(model, Condition(tokens, ids, make_lora(5), 0.0), vec0)
    other = encode(model, Condition(tokens, ids, make_lora(99), 0.0), vec0)
    on = encode(model, Condition(tokens, ids, make_lora(5), 1.0), vec0)
    halved = {
        name: 0.5 for name in ("double_blocks.0.q", "double_blocks.0.k", "double_blocks.0.v", "double_blocks.0.proj")
    }
    scaled = encode(model, Condition(tokens, ids, make_lora(5, halved), 1.0), vec0)
    half = encode(model, Condition(tokens, ids, make_lora(5), 0.5), vec0)
    for a, b in zip(off, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert (on[0][0] - off[0][0]).abs().mean() > 0.05
    torch.testing.assert_close(scaled[0], half[0])  # alpha / rank of block 0 acts like strength there
    assert not torch.allclose(scaled[-1][0], half[-1][0], atol=1e-3)


def test_a_condition_differentiates_and_leaves_its_inputs_alone(model):
    lora = make_lora(5).requires_grad_(True)
    tokens, ids, vec0 = condition(3), subject_ids((2, 3), PICTURE), inputs()[3]
    before = tokens.clone(), vec0.clone()
    kept = encode(model, Condition(tokens, ids, lora), vec0)
    sum(k.square().sum() + v.square().sum() for k, v in kept).backward()
    assert torch.equal(tokens, before[0])
    assert torch.equal(vec0, before[1])
    reached = {name for name, weight in lora.named_parameters() if weight.grad is not None and weight.grad.any()}
    unread = {
        f"single_blocks.{SINGLE - 1}.q.{leaf}.weight" for leaf in ("down", "up")
    }  # the last block only gives K and V
    assert reached == {name for name, _ in lora.named_parameters()} - unread


def test_gradient_equals_finite_differences(model):
    model = model.double()
    lora = make_lora(5).double().requires_grad_(True)
    tokens, ids, vec0 = condition(3).double(), subject_ids((2, 3), PICTURE), inputs()[3].double()

    def value():
        exact = encode_condition(model, lora, tokens, vec0, ids, attention=attention, apply_rope=rotate)
        return sum(k.sin().sum() + v.cos().sum() for k, v in exact)

    value().backward()
    weight = lora.double_blocks[0]["proj"].up.weight
    with torch.no_grad():
        weight[1, 2] += 1e-5
        above = value()
        weight[1, 2] -= 2e-5
        below = value()
    assert float(weight.grad[1, 2]) == pytest.approx(float(above - below) / 2e-5, rel=1e-5)


def test_what_is_kept_is_what_keep_returns(model):
    c, vec0 = two_conditions()[0], inputs()[3]
    seen = []
    kept = encode(model, c, vec0, store=lambda x: seen.append(x.shape) or x.double())
    assert len(kept) == DOUBLE + SINGLE
    assert seen == [(1, HEADS, 6, DIM // HEADS)] * 2 * len(kept)
    assert {x.dtype for pair in kept for x in pair} == {torch.float64}


def test_float16_states_stay_within_range(model):
    """A state beyond 65504 would be infinite, and its layer norm no number."""
    c, vec0 = two_conditions()[0], inputs()[3].half()
    for block in model.double_blocks:
        block.img_mlp[2].bias.data = torch.full((DIM,), 6e4)
        block.img_mod.lin.bias.data[5 * DIM :] = 8.0
    half = model.half()
    kept = encode(half, Condition(c.tokens.half(), c.ids, c.lora.half()), vec0)
    assert all(torch.isfinite(x).all() for pair in kept for x in pair)


def test_a_lora_for_another_number_of_blocks_does_not_run(model):
    short = ConditionLora(DIM, DOUBLE - 1, SINGLE, RANK, operations=torch.nn)
    with pytest.raises(ValueError, match="shorter"):
        encode(model, Condition(condition(3), subject_ids((2, 3), PICTURE), short), inputs()[3])


@pytest.mark.parametrize("grid", [(32, 32), (2, 5)])
@pytest.mark.parametrize("picture", [(64, 64), (45, 80), (1, 3)])
def test_spatial_positions_spread_over_the_picture(grid, picture):
    ids = spatial_ids(grid, picture)
    assert ids.dtype == torch.float32
    assert ids.shape == (prod(grid), 3)
    for i, j in ((0, 0), (1, 1), (grid[0] - 1, grid[1] - 1)):
        expected = [0.0, i * picture[0] / grid[0], j * picture[1] / grid[1]]
        assert ids[i * grid[1] + j].tolist() == pytest.approx(expected, rel=1e-6)


def test_spatial_positions_of_an_equal_grid_are_the_pictures_own():
    assert torch.equal(spatial_ids(PICTURE, PICTURE), grid_ids(*PICTURE))


@pytest.mark.parametrize(("rows", "offset"), [(16, 64), (64, 64), (90, 90)])
def test_subject_positions_lie_below_the_picture(rows, offset):
    ids = subject_ids((2, 3), (rows, 64))
    assert torch.equal(ids, grid_ids(2, 3) + torch.tensor([0.0, offset, 0.0]))


def published(slots=1, double=2, single=3, dim=8, rank=2, prefix="", alpha=None, dtype=torch.float32):
    """A file as the authors' training script writes it, key by key."""
    state = {}
    for n in range(slots):
        for folder, blocks, parts in (
            ("transformer_blocks", double, ("q", "k", "v", "proj")),
            ("single_transformer_blocks", single, ("q", "k", "v")),
        ):
            for i in range(blocks):
                for part in parts:
                    base = f"{prefix}{folder}.{i}.attn.processor.{part}_loras.{n}"
                    state[f"{base}.down.weight"] = torch.randn(rank, dim, dtype=dtype)
                    state[f"{base}.up.weight"] = torch.randn(dim, rank, dtype=dtype)
                    if alpha:
                        state[f"{base}.{alpha}"] = torch.tensor(3.0)
    return state


@pytest.mark.parametrize("prefix", ["", "transformer.", "diffusion_model."])
@pytest.mark.parametrize("alpha", [None, "alpha", "network_alpha"])
@pytest.mark.parametrize(
    ("slots", "rank", "dtype"), [(1, 1, torch.float32), (2, 4, torch.bfloat16), (3, 2, torch.float16)]
)
def test_every_layout_survives_a_round_trip(prefix, alpha, slots, rank, dtype):
    state = published(slots=slots, rank=rank, prefix=prefix, alpha=alpha, dtype=dtype)
    checkpoint = parse(state)
    assert (len(checkpoint.slots), checkpoint.double, checkpoint.single, checkpoint.dim) == (slots, 2, 3, 8)
    again = write(checkpoint)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) and again[key].dtype == dtype for key in state if "alpha" not in key)
    assert all(torch.equal(again[key], state[key]) for key in state)
    scales = checkpoint.slots[0].scales
    assert scales == ({} if alpha is None else dict.fromkeys(scales, 3.0 / rank))
    assert len(scales) == (0 if alpha is None else 2 * 4 + 3 * 3)


def test_the_shipped_recipe_has_380_tensors():
    state = published(double=19, single=38)
    assert len(state) == 2 * (19 * 4 + 38 * 3)
    assert parse(state).summary == "rank 2, slots 1, blocks 19+38, hidden size 8"


def test_ranks_may_differ_between_layers():
    state = published()
    state["transformer_blocks.1.attn.processor.proj_loras.0.down.weight"] = torch.zeros(5, 8)
    state["transformer_blocks.1.attn.processor.proj_loras.0.up.weight"] = torch.zeros(8, 5)
    checkpoint = parse(state)
    assert checkpoint.summary.startswith("rank 2 to 5,")
    slot = checkpoint.slots[0]
    lora = ConditionLora(
        checkpoint.dim, checkpoint.double, checkpoint.single, slot.ranks, slot.scales, operations=torch.nn
    )
    lora.load_state_dict(slot.weights)
    assert torch.equal(lora.double_blocks[1]["proj"].down.weight, torch.zeros(5, 8))


def test_slot_n_of_the_file_is_slot_n_of_the_checkpoint():
    state = published(slots=2)
    checkpoint = parse(state)
    for n in range(2):
        expected = state[f"single_transformer_blocks.2.attn.processor.k_loras.{n}.up.weight"]
        assert checkpoint.slots[n].weights["single_blocks.2.k.up.weight"] is expected


def test_a_trained_lora_is_saved_in_the_published_layout():
    loras = [make_lora(1), make_lora(2)]
    checkpoint = parse(published_state(loras))
    assert isinstance(checkpoint, Checkpoint)
    assert isinstance(checkpoint.slots[1], Slot)
    for lora, slot in zip(loras, checkpoint.slots, strict=True):
        assert all(torch.equal(weight, slot.weights[key]) for key, weight in lora.state_dict().items())
    with pytest.raises(ValueError, match="no alpha"):
        published_state([make_lora(1, {"double_blocks.0.q": 0.5})])


def test_training_starts_at_the_base_model(model):
    lora = ConditionLora(DIM, DOUBLE, SINGLE, RANK, operations=torch.nn)
    lora.init_for_training(torch.Generator().manual_seed(0))
    assert lora.double_blocks[0]["q"].down.weight.std().item() == pytest.approx(1 / RANK, rel=0.3)
    tokens, ids, vec0 = condition(3), subject_ids((2, 3), PICTURE), inputs()[3]
    new = encode(model, Condition(tokens, ids, lora), vec0)
    plain = encode(model, Condition(tokens, ids, make_lora(5), 0.0), vec0)
    assert all(torch.equal(a, b) for x, y in zip(new, plain, strict=True) for a, b in zip(x, y, strict=True))


SINGLE_PROJ = "single_transformer_blocks.0.attn.processor.proj_loras.0"
BAD = "transformer_blocks.0.attn.processor.q_loras.0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.clear() or s.update({"lora_unet_x.lora_down.weight": torch.zeros(1)}), "is no EasyControl LoRA"),
        (lambda s: s.clear(), "is no EasyControl LoRA: none of its 0 keys"),
        (lambda s: s.update({"extra.weight": torch.zeros(1)}), "has the key 'extra.weight', which no EasyControl"),
        (
            lambda s: s.update({f"{SINGLE_PROJ}.up.weight": torch.zeros(8, 2)}),
            "proj_loras.0.up.weight', which no EasyControl",
        ),
        (lambda s: s.pop(f"{BAD}.up.weight"), f"'{BAD}.up.weight' missing"),
        (lambda s: s.pop(f"{BAD}.down.weight"), f"'{BAD}.down.weight' missing"),
        (lambda s: [s.pop(k) for k in list(s) if "_blocks.1." in k and "proj" not in k], "and 11 more missing"),
        (lambda s: s.update({f"{BAD}.up.weight": torch.zeros(8, 3)}), "has rank 2 in 'down' and 3 in 'up'"),
        (
            lambda s: s.update({f"{BAD}.up.weight": torch.zeros(7, 2), f"{BAD}.down.weight": torch.zeros(2, 7)}),
            "must map",
        ),
        (lambda s: s.update({f"{BAD}.up.weight": torch.zeros(8)}), "must be a floating-point matrix, got (8,) float32"),
        (lambda s: s.update({f"{BAD}.up.weight": torch.zeros(8, 2, dtype=torch.int8)}), "got (8, 2) int8"),
        (
            lambda s: s.update({f"{BAD}.up.weight": torch.tensor(1.0)}),
            "must be a floating-point matrix, got () float32",
        ),
        (
            lambda s: s.update({f"{BAD}.up.weight": torch.zeros(8, 0), f"{BAD}.down.weight": torch.zeros(0, 8)}),
            "must be a floating-point matrix, got (0, 8) float32",
        ),
        (lambda s: s.update({f"{BAD}.alpha": torch.tensor(float("nan"))}), "must be one finite number"),
        (lambda s: s.update({f"{BAD}.alpha": torch.zeros(2)}), "must be one finite number, got (2,) float32"),
        (lambda s: s.update({f"{BAD}.alpha": torch.tensor(True)}), "must be one finite number, got () bool"),
        (lambda s: s.update({f"{BAD}.alpha": torch.tensor(float("inf"))}), "must be one finite number, got inf"),
        (lambda s: s.update({f"{BAD}.alpha": torch.tensor(1j)}), "must be one finite number, got () complex64"),
        (
            lambda s: s.update({f"{BAD}.alpha": torch.ones(1), f"{BAD}.network_alpha": torch.ones(1)}),
            "network_alpha' and another key for the same tensor",
        ),
        (
            lambda s: s.update(
                {f"{BAD}.alpha": torch.ones(1), f"{BAD.replace('q_', 'k_')}.network_alpha": torch.ones(1)}
            ),
            "mixes '.alpha' and '.network_alpha'",
        ),
        (lambda s: s.update({"transformer_blocks.0.attn.processor.q_loras.2.alpha": torch.ones(1)}), "missing"),
        (lambda s: s.update({f"{BAD.replace('0', '9999', 1)}.up.weight": torch.zeros(8, 2)}), "more missing"),
        (lambda s: s.update({f"{BAD.replace('0', '2', 1)}.alpha": torch.ones(1)}), "and 7 more missing"),
        (lambda s: s.update({f"{BAD.replace('0', '9' * 18, 1)}.up.weight": torch.zeros(8, 2)}), "which no EasyControl"),
        (lambda s: s.update({f"{BAD.replace('0', '00', 1)}.up.weight": torch.zeros(8, 2)}), "which no EasyControl"),
        (lambda s: s.update({BAD.replace("0", "\u0660", 1) + ".up.weight": torch.zeros(8, 2)}), "which no EasyControl"),
        (lambda s: s.update({f"{BAD}.up.weight": torch.full((8, 2), float("nan"))}), "holds NaN or infinite values"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_a_reason(change, message):
    state = published()
    change(state)
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(state, "canny.safetensors")
    with pytest.raises(ValueError, match=r"^canny\.safetensors"):
        parse(state, "canny.safetensors")
