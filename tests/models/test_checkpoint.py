"""What all parsers of checkpoint files share."""

import json
import re
import tracemalloc

import pytest
import torch

from dit_toolkit.models.checkpoint import (
    ABOUT,
    NUMBER,
    Keys,
    about,
    checked_number,
    checked_weight,
    described,
    put,
    require,
    shown,
)

KEYS = Keys("tune", re.compile(rf"blocks\.({NUMBER})\.weight"), "blocks.0.weight", ("", "model."))


def state(*keys):
    return dict.fromkeys(keys, torch.ones(1))


def test_keys_are_read_behind_one_prefix():
    found = list(KEYS.read(state("model.blocks.0.weight", "model.blocks.12.weight"), "f"))
    assert [(key, match[1]) for key, match, _ in found] == [
        ("model.blocks.0.weight", "0"),
        ("model.blocks.12.weight", "12"),
    ]
    with pytest.raises(ValueError, match=r"f has the key 'model\.blocks\.1\.weight', which no tune has"):
        list(KEYS.read(state("blocks.0.weight", "model.blocks.1.weight"), "f"))


@pytest.mark.parametrize("block", ["00", "01", "\u0660", "\u00b2", "-1", "+1", " 1", "1 ", "1_0", "10000", "9" * 5000])
def test_a_number_has_one_way_to_be_written_and_an_end(block):
    with pytest.raises(ValueError, match="which no tune has") as refused:
        list(KEYS.read(state("blocks.0.weight", f"blocks.{block}.weight"), "f"))
    assert len(str(refused.value)) < 200


def test_a_file_of_another_kind_is_told_from_one_with_an_odd_key():
    with pytest.raises(ValueError, match=r"f is no tune: none of its 1 keys looks like 'blocks\.0\.weight'"):
        list(KEYS.read(state("other"), "f"))


def test_two_keys_for_one_place_are_refused():
    found = {}
    put(found, "a", torch.ones(1), "first", "f")
    with pytest.raises(ValueError, match="f has 'second' and another key for the same tensor"):
        put(found, "a", torch.ones(1), "second", "f")


def test_what_is_missing_is_counted_without_being_built():
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"f is incomplete: 'b0' and 199998 more missing"):
        require((f"b{i}" for i in range(200_000)), {"b1"}, "f")
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
    require(iter(["b1"]), {"b1", "b2"}, "f")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_finite_weights_are_handed_on_as_they_are(dtype):
    tensor = torch.tensor([[1.0, -2.0]]).to(dtype)
    assert checked_weight(tensor, 2, "k", "f") is tensor
    bad = torch.tensor([[1.0, float("nan")]]).to(dtype)
    with pytest.raises(ValueError, match="f: 'k' holds NaN or infinite values"):
        checked_weight(bad, 2, "k", "f")


def test_weights_are_finite_one_by_one_even_where_their_sum_is_not():
    checked_weight(torch.full((2, 2), 3e38), 2, "k", "f")


@pytest.mark.parametrize(
    ("tensor", "axes", "words"),
    [
        (torch.tensor(1.0), 2, r"must be a floating-point matrix, got \(\) float32"),
        (torch.ones(2), 2, r"matrix, got \(2,\) float32"),
        (torch.ones(2, 2), 1, r"vector, got \(2, 2\) float32"),
        (torch.ones(0, 2), 2, r"matrix, got \(0, 2\) float32"),
        (torch.ones(2, 2).int(), 2, "int32"),
        (torch.ones(2, 2).bool(), 2, "bool"),
        (torch.ones(2, 2) * 1j, 2, "complex64"),
        (torch.ones([1] * 60), 7, r"tensor of 7 axes, got \(1, 1, 1, 1, 1, 1, 1, 1, \.\.\.\)"),
    ],
)
def test_other_tensors_are_no_weights(tensor, axes, words):
    with pytest.raises(ValueError, match=words):
        checked_weight(tensor, axes, "k", "f")


@pytest.mark.parametrize("tensor", [torch.tensor(2), torch.tensor([2.0]), torch.tensor([[2.0]], dtype=torch.bfloat16)])
def test_a_number_may_have_any_shape_of_one(tensor):
    assert checked_number(tensor, "k", "f") is tensor


@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        (torch.tensor(True), r"\(\) bool"),
        (torch.tensor(1j), r"\(\) complex64"),
        (torch.tensor([]), r"\(0,\) float32"),
        (torch.ones(2), r"\(2,\) float32"),
        (torch.tensor(float("nan")), "nan"),
        (torch.tensor(-torch.inf), "-inf"),
        (torch.tensor(1e300, dtype=torch.float64), "inf"),  # the picture is computed in float32 at most
    ],
)
def test_other_tensors_are_no_numbers(tensor, found):
    with pytest.raises(ValueError, match=f"f: 'k' must be one finite number, got {found}"):
        checked_number(tensor, "k", "f")


# --------------------------------------------------------------------------------------------- what a file says


def said(text, settings=("a", "b"), newest=1):
    return about({ABOUT: text}, "tune", settings, "f", newest)


def test_what_is_described_is_read_back():
    assert about(described("tune", {"a": 1}), "tune", ("a",), "f") == {"a": 1}
    assert about(described("tune", {"a": 1}, 3), "tune", ("a",), "f", 3) == {"a": 1}


def test_a_file_may_say_nothing():
    assert about(None, "tune", (), "f") == about({"format": "pt"}, "tune", (), "f") == said('{"other": {"c": 1}}') == {}


def test_a_missing_format_is_1():
    assert said('{"tune": {"a": 1}}') == said('{"format": 1, "tune": {"a": 1}}') == {"a": 1}


@pytest.mark.parametrize("newer", [2, 10**1000])
def test_a_newer_format_asks_for_an_update_before_anything_else_is_said(newer):
    text = json.dumps({"format": newer, "tune": {"unheard of": 1}})
    with pytest.raises(ValueError, match=r"^f was made for a newer DiT Toolkit: its format is .*Update DiT Toolkit\.$"):
        said(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"tune": {"c": 1}}', "f has the setting 'c', which no file of its kind has"),
        ('{"tune": 3}', "f: 'tune' in its metadata must be a JSON object, got 3"),
        *((f'{{"format": {odd}}}', "whole number of at least 1 as its format") for odd in ("0", "true", "1.0", '"1"')),
        *((odd, "must be a short JSON object") for odd in ("", "{", "[1]", "null", '"x"', "9" * 5000, "[" * 60_000)),
        ('{"tune": ' + '{"a":' * 10_000 + "1" + "}" * 10_001, "must be a short JSON object"),
        (" " * (1 << 16) + "{}", "must be a short JSON object"),
        (3, "must be a short JSON object"),
        (b"{}", "must be a short JSON object"),
    ],
)
def test_what_cannot_be_read_is_answered_with_a_sentence(text, words):
    with pytest.raises(ValueError, match=words) as refused:
        said(text)
    assert len(str(refused.value)) < 300


def test_what_a_file_says_is_shown_short_and_in_one_line():
    assert shown("a\nb\u202e") == "'a\\nb\\u202e'"
    assert len(shown("9" * 10_000)) <= 120
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert len(shown(deep)) < 100
