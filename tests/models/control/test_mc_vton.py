"""Branch LoRAs: judged by a model whose own weights they are merged into, and by FLUX.1's names of its layers."""

from __future__ import annotations

import json
from math import prod

import pytest
import torch
from torch.nn import functional as F

from dit_toolkit.models.control.conditions import encode_condition
from dit_toolkit.models.control.mc_vton import BranchLora, layers
from dit_toolkit.models.control.mc_vton_keys import (
    PARTS,
    Branch,
    Checkpoint,
    Settings,
    file_name,
    parse,
    widths,
    write,
    write_metadata,
)
from dit_toolkit.models.control.positions import beside_ids, spatial_ids

nn = torch.nn
DIM, HIDDEN, HEADS, DOUBLE, SINGLE, CHANNELS = 32, 48, 2, 2, 2, 12
GRID, PICTURE = (2, 3), (4, 5)
TOKENS = prod(GRID)


class Modulation(nn.Module):
    """Shift, scale and gate, once or twice, from one projection of silu(vec)."""

    def __init__(self, sets):
        super().__init__()
        self.sets, self.lin = sets, nn.Linear(DIM, 3 * sets * DIM)

    def forward(self, vec):
        parts = self.lin(F.silu(vec))[:, None].chunk(3 * self.sets, -1)
        mods = [Mod(*parts[3 * i : 3 * i + 3]) for i in range(self.sets)]
        return mods[0], mods[1] if self.sets == 2 else None


class Mod:
    def __init__(self, shift, scale, gate):
        self.shift, self.scale, self.gate = shift, scale, gate


class Norm(nn.Module):
    def forward(self, q, k, v):
        return F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:])


def plain_norm():
    return nn.LayerNorm(DIM, elementwise_affine=False, eps=1e-6)


class Double(nn.Module):
    num_heads = HEADS

    def __init__(self):
        super().__init__()
        self.img_mod, self.img_norm1, self.img_norm2 = Modulation(2), plain_norm(), plain_norm()
        self.img_attn = nn.Module()
        self.img_attn.qkv, self.img_attn.norm, self.img_attn.proj = nn.Linear(DIM, 3 * DIM), Norm(), nn.Linear(DIM, DIM)
        self.img_mlp = nn.Sequential(nn.Linear(DIM, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, DIM))


class Single(nn.Module):
    num_heads = HEADS

    def __init__(self):
        super().__init__()
        self.modulation, self.norm, self.pre_norm, self.mlp_act = Modulation(1), Norm(), plain_norm(), nn.GELU()
        self.linear1, self.linear2 = nn.Linear(DIM, 3 * DIM + HIDDEN), nn.Linear(DIM + HIDDEN, DIM)


class Model(nn.Module):
    """The image stream of FLUX.1, with ComfyUI's names and fused projections."""

    def __init__(self):
        super().__init__()
        self.img_in = nn.Linear(CHANNELS, DIM)
        self.double_blocks = nn.ModuleList(Double() for _ in range(DOUBLE))
        self.single_blocks = nn.ModuleList(Single() for _ in range(SINGLE))


# Where each part lies in the model's own weights: layer, and first row.
PLACES = {
    "double_blocks": {
        "q": ("img_attn.qkv", 0), "k": ("img_attn.qkv", DIM), "v": ("img_attn.qkv", 2 * DIM),
        "proj": ("img_attn.proj", 0), "mlp_in": ("img_mlp.0", 0), "mlp_out": ("img_mlp.2", 0),
        "mod": ("img_mod.lin", 0),
    },
    "single_blocks": {
        "q": ("linear1", 0), "k": ("linear1", DIM), "v": ("linear1", 2 * DIM), "mlp": ("linear1", 3 * DIM),
        "out": ("linear2", 0), "mod": ("modulation.lin", 0),
    },
}  # fmt: skip


def model():
    torch.manual_seed(0)
    return Model().requires_grad_(False)


def lora_of(names, seed=1, scales=None):
    ranks = {name: 2 + i % 3 for i, name in enumerate(names)}
    lora = BranchLora(DIM, DOUBLE, SINGLE, ranks, scales, hidden=HIDDEN, operations=nn)
    generator = torch.Generator().manual_seed(seed)
    for weight in lora.parameters():
        weight.data = 0.25 * torch.randn(weight.shape, generator=generator)
    return lora.requires_grad_(False)


def merged(base, lora, strength):
    """The model with W + strength * scale * B A in place of W, layer by layer."""
    for stream, parts in PLACES.items():
        for i, block in enumerate(getattr(base, stream)):
            for part, (layer, row) in parts.items():
                low = getattr(lora, stream)[i]
                if part in low:
                    change = strength * low[part].scale * low[part].up.weight @ low[part].down.weight
                    weight = block.get_submodule(layer).weight
                    weight.data[row : row + change.shape[0]] += change
    return base


def apply_rope(x, pe):
    pairs = x.unflatten(-1, (-1, 1, 2))
    return (pe[..., 0] * pairs[..., 0] + pe[..., 1] * pairs[..., 1]).flatten(-2)


def encode(model, lora, strength=1.0, batch=2, apart=True):
    generator = torch.Generator().manual_seed(7)
    tokens, vec = (torch.randn(batch, *shape, generator=generator) for shape in ((TOKENS, CHANNELS), (DIM,)))
    angle = torch.rand(1, 1, TOKENS, DIM // HEADS // 2, generator=generator) * 6
    pe = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).unflatten(-1, (2, 2))

    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    return encode_condition(model, lora, tokens, vec, pe, attention=attention, apply_rope=apply_rope, strength=strength)


def distance(a, b):
    return max(
        float((x - y).abs().max()) for pair, other in zip(a, b, strict=True) for x, y in zip(pair, other, strict=True)
    )


ALL = layers(DOUBLE, SINGLE)


@pytest.mark.parametrize("strength", [1.0, 0.4, -0.7])
def test_a_branch_equals_a_model_with_its_lora_merged(strength):
    lora = lora_of(ALL, scales={"double_blocks.0.mlp_in": 0.5, "single_blocks.0.out": 2.0, "double_blocks.1.mod": 0.3})
    expected = encode(merged(model(), lora, strength), None)
    assert distance(encode(model(), lora, strength), expected) < 2e-5  # float32, 4 blocks
    assert distance(encode(model(), None), expected) > 0.1


@pytest.mark.parametrize("name", [n for n in ALL if not n.startswith(f"single_blocks.{SINGLE - 1}.")])
def test_every_layer_alone_acts_where_its_name_says(name):
    lora = lora_of([name])
    assert distance(encode(model(), lora), encode(merged(model(), lora, 1.0), None)) < 1e-5
    assert distance(encode(model(), lora), encode(model(), None)) > 1e-3


def test_of_the_last_block_only_what_makes_keys_and_values_is_read():
    read = {"k", "v", "mod"}
    for part in PARTS["single_blocks"]:
        lora = lora_of([f"single_blocks.{SINGLE - 1}.{part}"])
        assert (distance(encode(model(), lora), encode(model(), None)) > 1e-3) == (part in read)


def test_strength_0_a_zero_lora_an_empty_one_and_none_are_plain_tokens():
    plain = encode(model(), None)
    zero = lora_of(ALL)
    for name, weight in zero.named_parameters():
        weight.data *= "up" not in name
    for lora, strength in ((lora_of(ALL), 0.0), (zero, 1.0), (lora_of([]), 1.0)):
        assert distance(encode(model(), lora, strength), plain) < 1e-6  # other strides, other sums


def test_training_starts_at_the_base_model():
    lora = lora_of(ALL)
    lora.init_for_training(torch.Generator().manual_seed(0))
    assert distance(encode(model(), lora), encode(model(), None)) < 1e-6
    assert all(weight.any() for name, weight in lora.named_parameters() if "down" in name)


def test_a_branch_differentiates():
    lora = lora_of(ALL).requires_grad_(True)
    sum(k.square().sum() + v.square().sum() for k, v in encode(model(), lora)).backward()
    unread = {f"single_blocks.{SINGLE - 1}.{part}" for part in ("q", "mlp", "out")}
    reached = {name.rsplit(".", 2)[0] for name, w in lora.named_parameters() if w.grad is not None and w.grad.any()}
    assert reached == set(ALL) - unread


def test_a_layer_that_the_model_lacks_is_refused():
    with pytest.raises(ValueError, match=r"2\+2 blocks has no layer 'double_blocks.2.q'"):
        lora_of(["double_blocks.0.q", "double_blocks.2.q"])


def test_beside_the_picture_means_to_the_right_of_its_last_column():
    ids = beside_ids(GRID, PICTURE)
    assert ids.dtype == torch.float32
    assert ids.tolist() == [[0, r, c + PICTURE[1]] for r in range(GRID[0]) for c in range(GRID[1])]
    taken = {tuple(place) for place in spatial_ids(PICTURE, PICTURE).tolist()}
    assert not taken & {tuple(place) for place in ids.tolist()}


# ------------------------------------------------------------------------------------------------------ file layout


def checkpoint(names=ALL, only=None, **settings):
    branches = {b: lora_of(names, seed).branch() for seed, b in enumerate(("person", "garment")) if only in (None, b)}
    return Checkpoint(branches, DIM, HIDDEN, DOUBLE, SINGLE, Settings(**settings))


def test_a_file_survives_a_round_trip():
    made = checkpoint(position="below", fill="black", steps=8, prompt="a doll")
    made.branches["person"].alphas["double_blocks.0.q"] = torch.tensor(1.5)
    state, metadata = write(made), write_metadata(made)
    again = parse(state, "file", metadata)
    assert (again.dim, again.hidden, again.double, again.single) == (DIM, HIDDEN, DOUBLE, SINGLE)
    assert again.settings == made.settings
    assert again.branches.keys() == made.branches.keys()
    for name, branch in again.branches.items():
        assert branch.weights.keys() == made.branches[name].weights.keys()
        assert all(torch.equal(w, made.branches[name].weights[key]) for key, w in branch.weights.items())
    assert again.branches["person"].scales == {"double_blocks.0.q": 1.5 / 2}
    assert write(again).keys() == state.keys()


def test_names_are_those_of_diffusers():
    assert file_name("person", "double_blocks.3.mlp_in", "lora_A.weight") == (
        "person.transformer_blocks.3.ff.net.0.proj.lora_A.weight"
    )
    assert file_name("garment", "single_blocks.7.out", "alpha") == "garment.single_transformer_blocks.7.proj_out.alpha"
    assert len(set(write(checkpoint()))) == 2 * 2 * len(ALL)


def test_a_loaded_branch_is_the_written_one():
    lora = lora_of(ALL, scales={"single_blocks.1.k": 0.25})
    made = Checkpoint({"garment": lora.branch()}, DIM, HIDDEN, DOUBLE, SINGLE)
    branch = parse(write(made)).branches["garment"]
    loaded = BranchLora(DIM, DOUBLE, SINGLE, branch.ranks, branch.scales, hidden=HIDDEN, operations=nn)
    loaded.load_state_dict(branch.weights)
    assert distance(encode(model(), loaded.requires_grad_(False)), encode(model(), lora)) == 0


def test_sizes_are_read_from_whichever_layers_are_there():
    for name in ALL:
        made = parse(write(checkpoint([name])))
        tells = name.rsplit(".", 1)[1] in ("mlp_in", "mlp_out", "mlp", "out")
        assert (made.dim, made.hidden) == (DIM, HIDDEN if tells else 4 * DIM), name


def test_blocks_are_the_files_word_or_reach_to_the_last_that_it_touches():
    state = write(checkpoint(["double_blocks.0.q", "single_blocks.1.v"]))
    assert (parse(state).double, parse(state).single) == (1, 2)
    said = {"dit_toolkit": json.dumps({"mc_vton": {"double_blocks": 19, "single_blocks": 38}})}
    assert (parse(state, metadata=said).double, parse(state, metadata=said).single) == (19, 38)


@pytest.mark.parametrize("only", ["person", "garment"])
def test_either_branch_may_be_missing(only):
    made = parse(write(checkpoint(only=only)))
    assert list(made.branches) == [only]
    assert made.summary.count("plain") == 1


def test_the_summary_says_what_each_branch_touches():
    names = ["double_blocks.0.q", "double_blocks.1.q", "double_blocks.1.mod", "single_blocks.0.out"]
    ranks = {"person": lora_of(names).branch(), "garment": lora_of(names[:1]).branch()}
    assert Checkpoint(ranks, DIM, HIDDEN, DOUBLE, SINGLE).summary == (
        "person rank 2 to 4: 2 double blocks (q, mod in 1), 1 single block (out); garment rank 2: 1 double block (q); "
        "garment beside the picture, hidden size 32"
    )


def test_metadata_of_other_programs_is_not_read():
    made = parse(write(checkpoint()), metadata={"format": "pt", "steps": "3", "dit_toolkit": '{"other": 1}'})
    assert made.settings == Settings()


def changed(key=None, value=None, drop=None):
    state = write(checkpoint())
    if key is not None:
        state[key] = value
    if drop is not None:
        del state[drop]
    return state


Q = "person.transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    ("state", "metadata", "message"),
    [
        ({}, None, "is no try-on LoRA: none of its 0 keys"),
        ({"transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(2, 4)}, None, "is no try-on LoRA.*LoRA loader"),
        (changed("cloth.transformer_blocks.0.attn.to_q.alpha", torch.ones(())), None, "which no try-on LoRA"),
        (changed("person.transformer_blocks.0.proj_out.alpha", torch.ones(())), None, "which no try-on LoRA"),
        (changed("person.transformer_blocks.0.ff_context.net.2.alpha", torch.ones(())), None, "text stream"),
        (changed(drop=f"{Q}.lora_B.weight"), None, "incomplete: 'person.transformer_blocks.0.attn.to_q.lora_B.weight'"),
        ({f"{Q}.alpha": torch.ones(())}, None, "incomplete: 'person.*attn.to_q.lora_A.weight' and 1 more"),
        (
            {f"{Q.replace('attn.to_q', 'norm1.linear')}.lora_A.weight": torch.zeros(2, 4)},
            None,
            "incomplete: .*norm1.linear.lora_B.weight' missing",
        ),
        (
            {
                "person.single_transformer_blocks.0.proj_out.lora_A.weight": torch.zeros(2, 4),
                "person.single_transformer_blocks.0.proj_out.lora_B.weight": torch.zeros(4, 2),
            },
            None,
            "leave no channel to the MLP",
        ),
        ({**changed(), "garment.transformer_blocks.9.attn.to_q.alpha": torch.ones(())}, None, "and 1 more missing"),
        (changed("person.transformer_blocks.00.attn.to_q.alpha", torch.ones(())), None, "which no try-on LoRA"),
        (changed("person.transformer_blocks.\u0661.attn.to_q.alpha", torch.ones(())), None, "which no try-on LoRA"),
        (changed(f"{Q}.lora_A.weight", torch.full((2, DIM), float("nan"))), None, "holds NaN or infinite values"),
        (changed(f"{Q}.lora_A.weight", torch.zeros(5)), None, "floating-point matrix"),
        (changed(f"{Q}.lora_A.weight", torch.zeros(2, DIM).int()), None, "floating-point matrix"),
        (changed(f"{Q}.lora_A.weight", torch.zeros(5, DIM)), None, "rank 5 and .* 2"),
        (changed("garment.single_transformer_blocks.0.proj_out.lora_B.weight", torch.zeros(3, 2)), None, "must map"),
        (changed(f"{Q}.alpha", torch.tensor(float("nan"))), None, "one finite number"),
        (changed(f"{Q}.alpha", torch.ones(2)), None, "one finite number"),
        (changed(f"{Q}.alpha", torch.tensor(True)), None, "one finite number, got .. bool"),
        (changed(f"{Q}.lora_A.weight", torch.tensor(1.0)), None, "floating-point matrix, got .. float32"),
        (changed(f"{Q}.lora_A.weight", torch.zeros(0, DIM)), None, "floating-point matrix, got .0, "),
        (changed(), {"position": "above"}, "position must be one of beside, below, got 'above'"),
        (changed(), {"fill": 127}, "fill must be one of grey, black"),
        (changed(), {"mask": "joint"}, "joint attention is not built"),
        (changed(), {"steps": 0}, "steps must be a whole number"),
        (changed(), {"steps": True}, "steps must be a whole number"),
        (changed(), {"prompt": 3}, "prompt must be a text"),
        (changed(), {"colour": "red"}, "setting 'colour'"),
        (changed(), {"double_blocks": 1}, "says double_blocks 1, and has layers of 2"),
        (changed(), {"single_blocks": "38"}, "says single_blocks '38'"),
        (changed(), {"single_blocks": 10**300}, "says single_blocks 1000"),
        (changed(), "text", "'mc_vton' in its metadata must be a JSON object, got 'text'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_refuses_the_file(state, metadata, message):
    metadata = None if metadata is None else {"dit_toolkit": json.dumps({"mc_vton": metadata})}
    with pytest.raises(ValueError, match=message) as caught:
        parse(state, "odd.safetensors", metadata)
    assert str(caught.value).startswith("odd.safetensors")


def test_a_newer_format_asks_for_an_update_whatever_else_is_new_in_the_file():
    state = {**write(checkpoint()), "person.new.weight": torch.zeros(1)}
    newer = {"dit_toolkit": json.dumps({"format": 2, "mc_vton": {"colour": "red"}})}
    with pytest.raises(ValueError, match=r"^odd was made for a newer DiT Toolkit: .* Update DiT Toolkit\.$"):
        parse(state, "odd", newer)


def test_what_is_written_carries_the_format():
    assert json.loads(write_metadata(checkpoint())["dit_toolkit"])["format"] == 1


def test_widths_are_those_of_flux_dev():
    """Which of these layers the paper's 39.7 M parameters are on is not known."""
    assert widths("double_blocks.0.mod", 3072, 12288) == (3072, 18432)
    assert widths("single_blocks.0.mod", 3072, 12288) == (3072, 9216)
    assert widths("single_blocks.0.out", 3072, 12288) == (15360, 3072)
    assert widths("double_blocks.0.mlp_out", 3072, 12288) == (12288, 3072)
    assert widths("single_blocks.0.mlp", 3072, 12288) == (3072, 12288)


def test_a_branch_without_alpha_has_scale_1():
    assert Branch({"double_blocks.0.q.down.weight": torch.zeros(4, 8)}).scales == {}


def test_a_lora_is_made_for_an_mlp_of_four_times_the_width_unless_said():
    names = layers(DOUBLE, SINGLE)
    found = {name: BranchLora(DIM, DOUBLE, SINGLE, dict.fromkeys(names, 1), hidden=h, operations=nn) for name, h in
             (("usual", None), ("said", 4 * DIM), ("other", 3 * DIM))}  # fmt: skip
    shapes = {name: {key: x.shape for key, x in lora.state_dict().items()} for name, lora in found.items()}
    assert shapes["usual"] == shapes["said"] != shapes["other"]
