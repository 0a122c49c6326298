"""Files that are damaged, of another kind, or made to do harm: a loader takes them or says in a sentence why not."""

from __future__ import annotations

import json
import random
import struct
import tracemalloc
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import folder_paths
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from dit_toolkit.host import embedded, model_files
from dit_toolkit.host.accelerate import clear_files
from dit_toolkit.host.control import easycontrol_files, in_context_lora, try_on_files
from dit_toolkit.host.model_files import WEIGHTS
from dit_toolkit.models.checkpoint import ABOUT
from dit_toolkit.models.control import easycontrol_keys, mc_vton_keys
from dit_toolkit.tests.host import tiny
from dit_toolkit.tests.models.accelerate.test_clear_keys import published

pytestmark = pytest.mark.comfy

NAME = "clear_local_8.safetensors"  # any loader takes it
MUTATIONS = 300  # of each kind of file
State = dict[str, Tensor]


def easycontrol_state() -> State:
    state = tiny.lora_state(double=1, single=2, dim=8)
    alphas = {key.replace("down.weight", "alpha"): torch.tensor(4.0) for key in state if ".q_loras.0.down" in key}
    return {**state, **alphas}


def try_on_state() -> State:
    generator, state = torch.Generator().manual_seed(0), {}
    for branch in mc_vton_keys.BRANCHES:
        for layer in ("double_blocks.0.q", "double_blocks.1.mlp_in", "single_blocks.0.out", "single_blocks.1.mod"):
            into, out = mc_vton_keys.widths(layer, 8, 32)
            for leaf, shape in (("lora_A.weight", (2, into)), ("lora_B.weight", (out, 2))):
                state[mc_vton_keys.file_name(branch, layer, leaf)] = torch.randn(shape, generator=generator)
            state[mc_vton_keys.file_name(branch, layer, "alpha")] = torch.tensor(2.0)
    return state


def clear_state() -> State:
    return published(1, 2, factor=2, dim=8)


class Loader(NamedTuple):
    """A loader, a good file for it, and the numbers that it took from a file."""

    load: Callable
    state: Callable[[], State]
    metadata: dict[str, str]
    numbers: Callable[..., list[Tensor]]


def low_rank_numbers(loras) -> list[Tensor]:
    assert all(rank > 0 for lora in loras for rank in lora.ranks.values())
    scales = [torch.tensor(scale) for lora in loras for scale in lora.scales.values()]
    return [weight for lora in loras for weight in lora.weights.values()] + scales


LOADERS = {
    "easycontrol": Loader(
        easycontrol_files.load,
        easycontrol_state,
        easycontrol_keys.write_metadata("subject"),
        lambda file: low_rank_numbers(file.checkpoint.slots),
    ),
    "try_on": Loader(
        try_on_files.load,
        try_on_state,
        {ABOUT: '{"format": 1, "mc_vton": {"fill": "grey", "single_blocks": 9, "steps": 20}}'},
        lambda file: low_rank_numbers(file.checkpoint.branches.values()),
    ),
    "clear": Loader(
        clear_files.load,
        clear_state,
        {},
        lambda file: [patch.value for patch in file.weights.patches] + list(file.weights.cells.values()),
    ),
}
each_loader = pytest.mark.parametrize("kind", LOADERS)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Where the loaders look for NAME."""
    known = {**folder_paths.folder_names_and_paths, "loras": ([str(tmp_path)], folder_paths.supported_pt_extensions)}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path / NAME


def saved(kind: str) -> bytes:
    loader = LOADERS[kind]
    return safetensors.torch.save(loader.state(), loader.metadata)


# ------------------------------------------------------------------------------------------------- what people have

DAMAGES = [
    (lambda good: b"", "is empty. Download it again."),
    (lambda good: good[:-7], "is damaged, or was not downloaded to its end. Download it again."),
    (lambda good: good[:100], "is damaged, or was not downloaded to its end. Download it again."),
    (lambda good: good + b"more", "is damaged, or was not downloaded to its end. Download it again."),
    (lambda good: b"\n<!DOCTYPE html><html>" + b"x" * 5000, "is a web page, not the file itself. Download it again;"),
    (lambda good: b"Entry not found", "is a text, 'Entry not found', not the file itself. Download it again."),
    (lambda good: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a Git LFS pointer"),
    (lambda good: b"PK\x03\x04" + bytes(500), "is a zip archive or a PyTorch file. Get it as a safetensors file"),
    (lambda good: b"\x80\x02}q\x00." + bytes(500), "is a PyTorch file. Get it as a safetensors file"),
    (lambda good: b"GGUF\x03" + bytes(500), "is a GGUF file. Get it as a safetensors file"),
]  # fmt: skip


@each_loader
@pytest.mark.parametrize(("damage", "words"), DAMAGES, ids=[words[:30] for _, words in DAMAGES])
def test_a_damaged_file_is_answered_with_its_name_and_what_to_do(place, kind, damage, words):
    place.write_bytes(damage(saved(kind)))
    with pytest.raises(ValueError, match=NAME) as refused:
        LOADERS[kind].load(NAME)
    said = str(refused.value)
    assert said.startswith(f"{NAME} {words}")
    assert said.endswith(")")  # the parser's own words
    assert "\n" not in said
    assert len(said) < 400


def test_a_folder_in_the_place_of_a_file_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"^f is a folder, not a file\. Put the file inside it"):
        model_files.read(str(tmp_path), "f")


def test_a_good_file_may_begin_like_another_kind(place):
    """Its first byte belongs to the length of its header: 0x80 and '<' are as good as others."""
    for padding in range(300):
        one = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
        header = json.dumps({"__metadata__": {"x": "x" * padding}, "a": one}).encode()
        place.write_bytes(struct.pack("<Q", len(header)) + header + b"\x01")
        assert model_files.read(str(place), NAME).tensors["a"].item() == 1


@each_loader
def test_a_good_file_loads(place, kind):
    place.write_bytes(saved(kind))
    numbers = LOADERS[kind].numbers(LOADERS[kind].load(NAME))
    assert len(numbers) >= 20
    assert all(tensor.isfinite().all() for tensor in numbers)


# ------------------------------------------------------------------------------------------------ what does harm

ENDLESS = ["999999999", "9" * 5000, "9999"]


@each_loader
@pytest.mark.parametrize("number", ENDLESS, ids=["nine digits", "5000 digits", "four digits"])
def test_an_endless_number_in_a_key_takes_no_memory(place, kind, number):
    state = LOADERS[kind].state()
    keys = [key for key in state if "_blocks.0." in key]
    state |= {key.replace("_blocks.0.", f"_blocks.{number}.", 1): state[key].clone() for key in keys[:1]}
    place.write_bytes(safetensors.torch.save(state, LOADERS[kind].metadata))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"^{NAME} (has the key|is incomplete)") as refused:
            LOADERS[kind].load(NAME)
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("kind", ["easycontrol", "try_on"])
@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 50_000, "9" * 5000, '"' + "x" * 10**6 + '"', "\x00", "{}" * 9], ids=range(6)
)
def test_metadata_without_end_is_answered_with_a_sentence(place, kind, text):
    place.write_bytes(safetensors.torch.save(LOADERS[kind].state(), {ABOUT: text}))
    with pytest.raises(ValueError, match=f"^{NAME}: 'dit_toolkit' in its metadata must be a short JSON object"):
        LOADERS[kind].load(NAME)


@pytest.mark.parametrize("kind", ["easycontrol", "try_on"])
def test_a_file_of_a_newer_version_asks_for_an_update(place, kind):
    place.write_bytes(safetensors.torch.save({"new.weight": torch.ones(1)}, {ABOUT: '{"format": 2}'}))
    with pytest.raises(ValueError, match=rf"^{NAME} was made for a newer DiT Toolkit: .* Update DiT Toolkit\.$"):
        LOADERS[kind].load(NAME)


# ------------------------------------------------------------------------------------------------------- mutations

DTYPES = [torch.int64, torch.int8, torch.uint8, torch.bool, torch.float64, torch.float16, torch.bfloat16,
          torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64]  # fmt: skip
VALUES = [float("nan"), float("inf"), -float("inf"), 3e38, 0.0]
NUMBERS = ["00", "01", "-1", "+1", "1e9", "\u0661", "\u00b2", "\uff11", " 1", "9999", "10000", "9" * 30, "9" * 5000, ""]
SAID = ["{", "[]", "null", "[" * 60_000, '{"format": 2}', '{"format": "1"}', '{"format": 1e999}', '{"mc_vton": []}',
        '{"easycontrol": {"kind": "both"}}', '{"easycontrol": {"kind": {}}}', '{"mc_vton": {"steps": NaN}}',
        '{"mc_vton": {"fill": ["grey"]}}', '{"mc_vton": {"prompt": 1}}', '{"mc_vton": {"double_blocks": 1e300}}',
        '{"mc_vton": {"single_blocks": ' + "9" * 4000 + "}}", '{"mc_vton": {"new": 1}}', "\ud7ff\u202e"]  # fmt: skip


def other_dtype(state: State, key: str, rng: random.Random) -> None:
    state[key] = state[key].to(rng.choice(DTYPES))


def other_shape(state: State, key: str, rng: random.Random) -> None:
    tensor = state[key]
    twice = tensor.repeat(2, *[1] * max(tensor.ndim - 1, 0))
    others = [tensor.flatten(), tensor[None], torch.zeros((), dtype=tensor.dtype), twice]
    if tensor.ndim:
        others += [tensor[:0], tensor[..., :0], tensor[1:], tensor.movedim(0, -1)]
    state[key] = rng.choice(others)


def other_value(state: State, key: str, rng: random.Random) -> None:
    flat = state[key].clone().flatten()
    flat[int(rng.random() * len(flat)) :][:1] = torch.tensor(rng.choice(VALUES)).to(flat.dtype)
    state[key] = flat.view(state[key].shape)


def other_key(state: State, key: str, rng: random.Random) -> None:
    state[renamed(key, rng)] = state.pop(key)


def one_more(state: State, key: str, rng: random.Random) -> None:
    state[renamed(key, rng)] = state[key].clone()


def one_less(state: State, key: str, rng: random.Random) -> None:
    del state[key]


def renamed(key: str, rng: random.Random) -> str:
    parts = key.split(".")
    place = rng.randrange(len(parts))
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    if numbers and rng.random() < 0.6:  # where most harm is
        parts[rng.choice(numbers)] = rng.choice(NUMBERS)
    else:
        parts[place] = rng.choice(["", "alpha", "weight", "\u0430lpha", "x" * 10_000, "\n", parts[place].upper()])
    return ".".join(parts)


def flipped(raw: bytearray, rng: random.Random) -> None:
    """One bit of the header, or of what comes behind it."""
    end = min(8 + struct.unpack("<Q", raw[:8])[0], len(raw))
    at = rng.randrange(end) if rng.random() < 0.7 else rng.randrange(len(raw))
    raw[at] ^= 1 << rng.randrange(8)


def swapped(raw: bytearray, rng: random.Random) -> None:
    """A word of the header for another one."""
    old, new = rng.choice([(b"F32", b"I32"), (b"F32", b"F16"), (b"[0,", b"[1,"), (b"[8,", b"[-8"), (b'":', b'" '),
                           (b"_blocks.0", b"_blocks.1"), (b"shape", b"shap\xff"), (b"dtype", b"dtypf")])  # fmt: skip
    raw[:] = raw.replace(old, new, rng.choice([1, -1]))


def cut(raw: bytearray, rng: random.Random) -> None:
    del raw[rng.randrange(len(raw)) :]


def doubled(raw: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(raw))
    raw[at:at] = raw[at : at + rng.randrange(1, 400)]


ON_TENSORS = (other_dtype, other_shape, other_value, other_key, one_more, one_less)
ON_BYTES = (flipped, swapped, cut, doubled)


def mutated(state: State, metadata: dict[str, str], rng: random.Random) -> bytes:
    """A file with one to three things wrong, at times harmless ones."""
    state, metadata = {key: tensor.clone() for key, tensor in state.items()}, dict(metadata)
    if rng.random() < 0.15:
        metadata[ABOUT] = rng.choice(SAID)
    mutations = [rng.choice(ON_TENSORS + ON_BYTES) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
    for mutate in mutations:
        if mutate in ON_TENSORS:
            mutate(state, rng.choice(list(state)), rng)
    whole = {key: tensor.clone().contiguous() for key, tensor in state.items()}
    raw = bytearray(safetensors.torch.save(whole, metadata))
    for mutate in mutations:
        if mutate in ON_BYTES and len(raw) > 100:
            mutate(raw, rng)
    return bytes(raw)


def refusal(load: Callable, name: str, seed: object) -> str | None:
    """What a loader says of a file; None where it takes it. Only sentences with the file's name are allowed."""
    try:
        load()
    except ValueError as error:
        said = str(error)
        assert said.startswith(name), (seed, said)
        assert "\n" not in said, (seed, said)
        assert len(said) < 600, (seed, said)
        return said
    return None


@each_loader
def test_a_mutated_file_loads_or_is_refused_in_a_sentence(place, kind):
    loader, refused = LOADERS[kind], 0
    state = loader.state()

    def load():
        assert all(tensor.double().isfinite().all() for tensor in loader.numbers(loader.load(NAME)))

    for seed in range(MUTATIONS):
        place.write_bytes(mutated(state, loader.metadata, random.Random(seed)))
        refused += refusal(load, NAME, seed) is not None
    assert MUTATIONS * 0.6 < refused < MUTATIONS * 0.98, refused  # both happen


@pytest.mark.parametrize(
    ("name", "load", "count"),
    [
        ("tiny_text_encoder.safetensors", embedded.load_clip, 40),
        ("tiny_vae.safetensors", embedded.load_vae, 40),
        ("tiny_flux.safetensors", embedded.load_model, 10),
    ],
)
def test_a_mutated_embedded_file_loads_or_is_refused_in_a_sentence(tmp_path, monkeypatch, name, load, count):
    good = model_files.read(str(WEIGHTS / name), name)
    monkeypatch.setattr(embedded, "WEIGHTS", tmp_path)
    refused = []
    for seed in range(count):
        (tmp_path / name).write_bytes(mutated(good.tensors, good.metadata, random.Random(seed)))
        refused.append(refusal(load, name, seed))
    assert sum(said is not None for said in refused) > count * 0.5


@pytest.mark.parametrize(("damage", "words"), DAMAGES, ids=[words[:30] for _, words in DAMAGES])
def test_a_damaged_embedded_file_asks_to_install_the_pack_again(tmp_path, monkeypatch, damage, words):
    monkeypatch.setattr(embedded, "WEIGHTS", tmp_path)
    for name, load in (("tiny_vae", embedded.load_vae), ("tiny_flux", embedded.load_model)):
        (tmp_path / f"{name}.safetensors").write_bytes(damage((WEIGHTS / f"{name}.safetensors").read_bytes()))
        with pytest.raises(ValueError, match=rf"^{name}\.safetensors is .*\. Install DiT Toolkit again\. \("):
            load()


def test_a_damaged_example_picture_asks_to_install_the_pack_again(tmp_path, monkeypatch):
    name = "painted_person.png"
    (tmp_path / name).write_bytes((embedded.EXAMPLES / name).read_bytes()[:500])
    monkeypatch.setattr(embedded, "EXAMPLES", tmp_path)
    with pytest.raises(ValueError, match=rf"^{name} is damaged, or a part of it is missing. Install DiT Toolkit again"):
        embedded.load_example(name)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_a_mutated_picture_of_a_training_set_loads_or_is_refused_in_a_sentence(tmp_path, ending):
    buffer = BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (24, 16, 3), np.uint8)
    Image.fromarray(noise).save(buffer, {"jpg": "jpeg"}.get(ending, ending))
    path, refused = tmp_path / f"1.{ending}", 0

    def load():
        in_context_lora.read_picture(tmp_path, path)

    for seed in range(150):
        rng, raw = random.Random(seed), bytearray(buffer.getvalue())
        for _ in range(rng.choice([1, 1, 4])):
            at = rng.randrange(min(len(raw), 120) if rng.random() < 0.5 else len(raw))
            raw[at] ^= 1 << rng.randrange(8)
        if rng.random() < 0.3:
            del raw[rng.randrange(len(raw)) :]
        path.write_bytes(raw)
        refused += refusal(load, f"Set '{tmp_path.name}': 1.{ending} is", seed) is not None
    assert 30 < refused < 150
