"""DynamiCtrl's files: what is read under which name, what is told apart, and what is refused."""

from __future__ import annotations

import pytest
import torch

from dit_toolkit.models.animate.dynamictrl_keys import comfyui_name, diffusers_name, lora_names, names, parse
from dit_toolkit.tests.models.animate import dynamictrl_reference as reference

NAME = "dance.safetensors"
BLOCK = "transformer_blocks.1"
PREFIXES = ("", "transformer.", "model.diffusion_model.", "diffusion_model.", "module.", "model.")


@pytest.fixture(scope="module")
def published():
    return reference.random_weights(blocks=2)


@pytest.fixture(scope="module")
def first():
    """CogVideoX 1.0, with a table of positions."""
    return reference.random_weights("1.0", blocks=1, heads=3, table=True)


def renamed(state):
    return {comfyui_name(key): tensor for key, tensor in state.items()}


# The whole published layout: 42 blocks of width 3072

LAYOUT = {
    "transformer_blocks.41.control_norm1.linear.weight": ("blocks.41.control_norm1.linear.weight", (9216, 512)),
    "transformer_blocks.41.control_norm1.linear.bias": ("blocks.41.control_norm1.linear.bias", (9216,)),
    "transformer_blocks.0.control_norm1.norm.weight": ("blocks.0.control_norm1.norm.weight", (3072,)),
    "transformer_blocks.0.control_norm1.norm.bias": ("blocks.0.control_norm1.norm.bias", (3072,)),
    "transformer_blocks.10.norm1.linear.weight": ("blocks.10.norm1.linear.weight", (18432, 512)),
    "transformer_blocks.10.norm1.norm.bias": ("blocks.10.norm1.norm.bias", (3072,)),
    "transformer_blocks.10.norm2.linear.bias": ("blocks.10.norm2.linear.bias", (18432,)),
    "transformer_blocks.10.norm2.norm.weight": ("blocks.10.norm2.norm.weight", (3072,)),
    "transformer_blocks.1.attn1.to_q.weight": ("blocks.1.q.weight", (3072, 3072)),
    "transformer_blocks.1.attn1.to_k.bias": ("blocks.1.k.bias", (3072,)),
    "transformer_blocks.1.attn1.to_v.weight": ("blocks.1.v.weight", (3072, 3072)),
    "transformer_blocks.1.attn1.norm_q.weight": ("blocks.1.norm_q.weight", (64,)),
    "transformer_blocks.1.attn1.norm_k.bias": ("blocks.1.norm_k.bias", (64,)),
    "transformer_blocks.1.attn1.to_out.0.weight": ("blocks.1.attn_out.weight", (3072, 3072)),
    "transformer_blocks.1.ff.net.0.proj.weight": ("blocks.1.ff_proj.weight", (12288, 3072)),
    "transformer_blocks.1.ff.net.2.weight": ("blocks.1.ff_out.weight", (3072, 12288)),
    "time_embedding.linear_1.weight": ("time_embedding_linear_1.weight", (512, 3072)),
    "time_embedding.linear_2.weight": ("time_embedding_linear_2.weight", (512, 512)),
    "ofs_embedding.linear_1.weight": ("ofs_embedding_linear_1.weight", (512, 512)),
    "ofs_embedding.linear_2.bias": ("ofs_embedding_linear_2.bias", (512,)),
    "patch_embed.proj.weight": ("patch_embed.proj.weight", (3072, 256)),
    "patch_embed.text_proj.weight": ("patch_embed.text_proj.weight", (3072, 4096)),
    "norm_final.weight": ("norm_final.weight", (3072,)),
    "norm_out.linear.weight": ("norm_out.linear.weight", (6144, 512)),
    "norm_out.norm.bias": ("norm_out.norm.bias", (3072,)),
    "proj_out.weight": ("proj_out.weight", (128, 3072)),
}


def test_names_and_shapes_of_the_published_file():
    """42 blocks, 5.57 billion numbers of the base and 198.8 million of DynamiCtrl."""
    whole = reference.random_weights(blocks=42, heads=48, time=512, text=4096, device="meta")
    for theirs, (ours, shape) in LAYOUT.items():
        assert comfyui_name(theirs) == ours
        assert whole[theirs].shape == shape
    assert set(names(42, ofs=True)) == whole.keys()
    added = sum(tensor.numel() for name, tensor in whole.items() if "control_norm1" in name)
    base = sum(tensor.numel() for name, tensor in whole.items()) - added
    assert (round(base / 1e7), round(added / 1e5)) == (557, 1988)


def test_names_go_there_and_back():
    whole = reference.random_weights(blocks=42, heads=48, time=512, text=4096, device="meta")
    there = [comfyui_name(name) for name in whole]
    assert len(set(there)) == len(whole)
    assert [diffusers_name(name) for name in there] == list(whole)
    assert [comfyui_name(name) for name in there] == there
    assert [diffusers_name(name) for name in whole] == list(whole)


@pytest.mark.parametrize("key", ["blocks.0.attn1.weight", "blocks.0.q", "blocks.x.q.weight", "", "blocks.01.q.weight"])
def test_what_is_no_name_is_refused(key):
    for translate in (comfyui_name, diffusers_name):
        with pytest.raises(ValueError, match="is no name of a tensor of CogVideoX"):
            translate(key)


# Reading


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("naming", [dict, renamed])
def test_both_namings_are_read_with_any_prefix(published, naming, prefix):
    checkpoint = parse({prefix + key: tensor for key, tensor in naming(published).items()}, NAME)
    assert (checkpoint.dim, checkpoint.time_dim, checkpoint.blocks, checkpoint.version) == (128, 32, 2, "1.5")
    expected = renamed(published)
    assert checkpoint.pose.keys() == {key for key in expected if "control_norm1" in key}
    assert checkpoint.base.keys() | checkpoint.pose.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in {**checkpoint.base, **checkpoint.pose}.items())
    assert checkpoint.summary == "DynamiCtrl on CogVideoX 1.5: 2 blocks, width 128, float32"


def test_the_version_is_told_by_the_patch_embedding(first):
    checkpoint = parse(first, NAME)
    assert checkpoint.version == "1.0"
    assert "patch_embed.pos_embedding" in checkpoint.base
    without = {key: tensor for key, tensor in first.items() if not key.endswith("pos_embedding")}
    assert parse(without, NAME).version == "1.0"


def test_each_tensor_is_looked_at_once(published):
    seen = []

    class Watched(dict):
        def __getitem__(self, key):
            seen.append(key)
            return super().__getitem__(key)

    parse(Watched(published), NAME)
    assert sorted(seen) == sorted(published)


# Refusing


def without(part):
    return lambda state: {key: tensor for key, tensor in state.items() if part not in key}


def with_(**other):
    return lambda state: {**state, **{key.replace("__", "."): tensor for key, tensor in other.items()}}


def changed(key, change):
    return lambda state: {**state, key: change(state[key])}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("control_norm1"), "is CogVideoX without the pose norms of DynamiCtrl: it has no 'control_norm1'. Get"),
        (without(f"{BLOCK}.control_norm1.norm.bias"), f"is incomplete: '{BLOCK}.control_norm1.norm.bias' missing. Get"),
        (without("transformer_blocks.0"), "is incomplete: 'transformer_blocks.0.norm1.linear.weight' and 27 more"),
        (without("ofs_embedding.linear_2.bias"), "is incomplete: 'ofs_embedding.linear_2.bias' missing"),
        (without("patch_embed.proj.weight"), "is incomplete: 'patch_embed.proj.weight' missing"),
        (with_(new__weight=torch.ones(1)), "has the key 'new.weight', which no DynamiCtrl file has"),
        (with_(transformer_blocks__99999__attn1__to_q__weight=torch.ones(1)), "has the key 'transformer_blocks.99999"),
        (with_(transformer_blocks__9999__attn1__to_q__weight=torch.ones(1)), "is incomplete: 'transformer_blocks.2"),
        (with_(blocks__0__q__weight=torch.ones(1)), "has 'blocks.0.q.weight' and another key for the same tensor"),
        (changed(f"{BLOCK}.attn1.to_q.weight", lambda w: w[:-1]), r"must be \[128, 128\] for hidden size 128, got"),
        (changed(f"{BLOCK}.attn1.to_q.weight", lambda w: w[0]), "must be a floating-point matrix, got"),
        (changed(f"{BLOCK}.attn1.to_q.bias", lambda w: w * torch.nan), "holds NaN or infinite values. Get the file"),
        (changed(f"{BLOCK}.attn1.to_q.bias", lambda w: w.int()), "must be a floating-point vector"),
        (changed(f"{BLOCK}.control_norm1.linear.weight", lambda w: w[:128]), r"must be \[384, 32\] for hidden size"),
        (
            changed("transformer_blocks.0.norm1.linear.weight", lambda w: w[:600]),
            "must have six times a multiple of 64",
        ),
        (
            changed("patch_embed.proj.weight", lambda w: w[:, :128]),
            "takes 16 channels, and DynamiCtrl is made on image-",
        ),
        (changed("patch_embed.proj.weight", lambda w: w[:, :255]), r"takes 31.875 channels"),
        (changed("proj_out.weight", lambda w: w[:64]), r"'proj_out.weight' must be \[128, 128\]"),
        (with_(patch_embed__pos_embedding=torch.ones(1, 5, 128)), r"'patch_embed.pos_embedding' must be \[1, 17776, "),
        (
            lambda state: {"double_blocks.0.img.weight": torch.ones(1)},
            "is no DynamiCtrl file: none of its 1 keys looks",
        ),
        (lambda state: {"proj_out.weight": torch.ones(1, 1)}, "is no DynamiCtrl file"),
        (lambda state: {}, "is no DynamiCtrl file: none of its 0 keys"),
    ],
)
def test_what_is_not_whole_or_not_right_is_refused(published, change, words):
    with pytest.raises(ValueError, match=words) as refused:
        parse(change(published), NAME)
    said = str(refused.value)
    assert said.startswith(NAME)
    assert said.endswith(".")
    assert len(said) < 300


# LoRAs

A = torch.ones(4, 8)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("transformer.transformer_blocks.0.attn1.to_q.lora_A.weight", "blocks.0.q.lora_A.weight"),
        ("transformer.transformer_blocks.12.attn1.to_out.0.lora_B.weight", "blocks.12.attn_out.lora_B.weight"),
        ("transformer_blocks.0.attn1.to_k.lora_down.weight", "blocks.0.k.lora_down.weight"),
        ("transformer_blocks.0.ff.net.0.proj.alpha", "blocks.0.ff_proj.alpha"),
        ("transformer_blocks.0.ff.net.2.lora.up.weight", "blocks.0.ff_out.lora.up.weight"),
        ("transformer_blocks.0.attn1.to_v_lora.up.weight", "blocks.0.v_lora.up.weight"),
        ("base_model.model.transformer_blocks.3.ff.net.2.lora_A.x.weight", "blocks.3.ff_out.lora_A.x.weight"),
        ("transformer.proj_out.lora_A.weight", "proj_out.lora_A.weight"),
        ("transformer.time_embedding.linear_1.lora_A.weight", "time_embedding_linear_1.lora_A.weight"),
        ("diffusion_model.blocks.0.q.lora_A.weight", "blocks.0.q.lora_A.weight"),
        ("lora_unet_transformer_blocks_0_attn1_to_q.lora_down.weight", "blocks.0.q.lora_down.weight"),
        ("lora_unet_blocks_7_ff_out.alpha", "blocks.7.ff_out.alpha"),
        ("lora_transformer_transformer_blocks_41_attn1_to_out_0.lora_up.weight", "blocks.41.attn_out.lora_up.weight"),
        ("lora_unet_patch_embed_proj.lora_up.weight", "patch_embed.proj.lora_up.weight"),
    ],
)  # fmt: skip
def test_loras_of_every_trainer_get_comfyuis_names(key, expected):
    found, strange = lora_names({key: A})
    assert found == {f"diffusion_model.{expected}": A}
    assert strange == ()


@pytest.mark.parametrize(
    "key",
    [
        "text_encoder.layers.0.q.lora_A.weight",
        "transformer_blocks.0.attn2.to_q.lora_A.weight",
        "transformer_blocks.99999.attn1.to_q.lora_A.weight",
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
        "transformer_blocks.0.attn1.to_q",
        "",
    ],
)
def test_what_names_no_layer_is_told(key):
    assert lora_names({key: A}) == ({}, (key,))
