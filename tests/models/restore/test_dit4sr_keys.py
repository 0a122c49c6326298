"""DiT4SR's files: what is read, what is told apart, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dit_toolkit.models.checkpoint import described
from dit_toolkit.models.restore.dit4sr import ControlBranch
from dit_toolkit.models.restore.dit4sr_keys import chosen, names, parse, write
from dit_toolkit.tests.models.restore import dit4sr_reference as reference

NAME = "photo.safetensors"


@pytest.fixture(scope="module")
def r1():
    """A whole published transformer."""
    return reference.random_weights(3, (0, 1))


def control_of(state):
    return {name: weight for name, weight in state.items() if "control" in name}


def test_a_published_file_is_read_whatever_stands_beside_its_control_weights(r1):
    checkpoint = parse(r1, NAME)
    assert (checkpoint.dim, checkpoint.blocks, checkpoint.dual) == (192, 3, frozenset({0, 1}))
    assert checkpoint.weights.keys() == control_of(r1).keys() == set(names(3, checkpoint.dual, keys=True))
    assert checkpoint.unused == 2 * (3 * 2 + 2 + 2)
    assert checkpoint.base == len(r1) - len(checkpoint.weights) - checkpoint.unused
    assert "base tensors are left out, 20 tensors that DiT4SR never uses are left out, too" in checkpoint.summary


@pytest.mark.parametrize("prefix", ["", "transformer.", "module."])
def test_a_prefix_of_other_programs_is_taken_off(r1, prefix):
    checkpoint = parse({prefix + name: weight for name, weight in r1.items()}, NAME)
    assert checkpoint.prefix == prefix
    assert checkpoint.weights.keys() == control_of(r1).keys()


def test_the_variant_is_told_by_the_projection_of_keys(r1):
    assert parse(r1).variant == "r1"
    assert parse(reference.as_v1(r1)).variant == "v1"
    one = {**reference.as_v1(r1)}
    one["transformer_blocks.2.attn.to_k_control.bias"] = one["transformer_blocks.2.attn.to_k_control.bias"] + 1e-6
    assert parse(one).variant == "r1"


def test_only_control_weights_are_looked_at(r1):
    """A file of 11 GB is not read for the 1.4 GB that matter."""

    class Watched(dict):
        def __getitem__(self, name):
            assert "control" in name
            return super().__getitem__(name)

    assert parse(Watched(r1)).blocks == 3


@pytest.mark.parametrize("variant", ["v1", "r1"])
def test_a_patch_is_read_as_it_was_written(r1, variant):
    whole = parse(r1 if variant == "r1" else reference.as_v1(r1))
    tensors, metadata = write(whole.weights, whole.variant)
    assert ("transformer_blocks.0.attn.to_k_control.weight" in tensors) == (variant == "r1")
    again = parse(tensors, NAME, metadata)
    assert (again.variant, again.dim, again.blocks, again.dual, again.base) == (variant, 192, 3, whole.dual, 0)
    assert all(torch.equal(again.weights[name], weight) for name, weight in tensors.items())


@pytest.mark.parametrize("variant", ["v1", "r1"])
def test_what_a_branch_holds_is_a_patch(variant):
    """What training exports."""
    branch = ControlBranch(64, 1, {0}, variant, operations=nn)
    tensors, metadata = write(branch.state_dict(), variant)
    checkpoint = parse(tensors, NAME, metadata)
    branch.load_state_dict(checkpoint.used_as(variant))
    assert checkpoint.variant == variant


@pytest.mark.parametrize(("variant", "millions"), [("r1", 350.9), ("v1", 263.5)])
def test_the_published_size_is_that_of_the_paper_s_files(variant, millions):
    """24 blocks of 1536 channels, 13 of them with a second attention: 37 attentions of 3 or 4 matrices, 24 MLPs."""
    branch = ControlBranch(1536, 24, range(13), variant, operations=nn, device=torch.device("meta"))
    weights = branch.state_dict()
    assert sum(weight.numel() for weight in weights.values()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert weights.keys() == set(names(24, frozenset(range(13)), keys=variant == "r1"))


def test_the_file_says_more_than_its_weights(r1):
    zero = reference.as_v1(r1)
    assert parse(control_of(zero), NAME, described("dit4sr", {"variant": "r1"})).variant == "r1"
    assert parse(control_of(r1), NAME, described("dit4sr", {"variant": "v1"})).variant == "v1"


def test_the_user_says_more_than_the_file(r1):
    assert chosen(parse(r1), "v1", NAME) == "v1"
    assert chosen(parse(reference.as_v1(r1)), "r1", NAME) == "r1"
    assert chosen(parse(r1), "auto", NAME) == "r1"
    tensors, metadata = write(parse(r1).weights, "v1")
    with pytest.raises(ValueError, match=r"photo.safetensors is a v1 patch without 'to_k_control', and cannot run"):
        chosen(parse(tensors, NAME, metadata), "r1", NAME)


def without(state, *parts):
    return {name: weight for name, weight in state.items() if not any(part in name for part in parts)}


def with_tensor(state, name, tensor):
    return {**state, name: tensor}


Q = "transformer_blocks.1.attn.to_q_control.weight"
NAN = torch.full((192, 192), float("nan"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {"lora_up.weight": torch.zeros(2, 2)}, "is no DiT4SR file: none of its 1 keys looks like"),
        (lambda s: {}, "is no DiT4SR file: none of its 0 keys"),
        (lambda s: without(s, "control"), "is no DiT4SR file: none of its .* keys looks like .* Load Diffusion Model"),
        (lambda s: with_tensor(s, "transformer_blocks.0.attn.to_x_control.weight", NAN), "which no DiT4SR file has"),
        (lambda s: with_tensor(s, "transformer_blocks.0.attn3.to_q.weight", NAN), "which no DiT4SR file has"),
        (lambda s: with_tensor(s, "transformer_blocks.01.attn.to_q_control.weight", NAN), "which no DiT4SR file has"),
        (lambda s: with_tensor(s, "controlnet_blocks.0.weight", NAN), "which no DiT4SR file has"),
        (lambda s: without(s, "blocks.1.attn.to_q_control.weight"), "is incomplete: 'transformer_blocks.1.attn.to_q_c"),
        (lambda s: without(s, "blocks.1.ff.control_conv"), "is incomplete: .* and 1 more missing"),
        (lambda s: without(s, "blocks.1.attn2.to_k_control"), "is incomplete: .* and 1 more missing"),
        (lambda s: without(s, "blocks.0.attn.to_q_control", "blocks.0.attn2"), "is incomplete"),
        (lambda s: with_tensor(s, "transformer_blocks.9999.ff.control_conv.bias", s[Q][0]), "is incomplete"),
        (lambda s: with_tensor(s, Q, NAN), "holds NaN or infinite values"),
        (lambda s: with_tensor(s, Q, s[Q].long()), "must be a floating-point matrix"),
        (lambda s: with_tensor(s, Q, s[Q][:, :64]), r"must be \[192, 192\] for hidden size 192, got \[192, 64\]"),
        (lambda s: with_tensor(s, "transformer_blocks.0.ff.control_conv.weight", torch.zeros(768, 1, 1, 1)),
         r"must be \[768, 1, 3, 3\]"),
        (lambda s: with_tensor(s, "transformer_blocks.0.ff.control_conv.weight", torch.zeros(768, 9)), "4 axes"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_a_sentence(r1, change, words):
    with pytest.raises(ValueError, match=words) as refused:
        parse(change(r1), NAME)
    assert str(refused.value).startswith(NAME)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        (described("dit4sr", {"variant": "v2"}), "must say 'v1' or 'r1' as its variant, got 'v2'"),
        (described("dit4sr", {"variant": []}), "must say 'v1' or 'r1'"),
        (described("dit4sr", {"version": "v1"}), "has the setting 'version', which no file of its kind has"),
        (described("dit4sr", {}, 2), "was made for a newer DiT Toolkit"),
    ],
)
def test_what_a_file_says_is_held_to_what_it_may_say(r1, metadata, words):
    with pytest.raises(ValueError, match=words):
        parse(control_of(r1), NAME, metadata)


def test_a_file_that_says_r1_has_its_keys(r1):
    with pytest.raises(ValueError, match="says that it is r1, and has no 'to_k_control'"):
        parse(without(control_of(r1), "to_k_control"), NAME, described("dit4sr", {"variant": "r1"}))
