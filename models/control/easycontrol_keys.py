"""File layout of EasyControl LoRAs: parse, check, write back.

Source: the checkpoints published with EasyControl, arXiv:2503.07027. For block `i` and slot `n`:

    transformer_blocks.{i}.attn.processor.{q,k,v,proj}_loras.{n}.{down,up}.weight     double blocks
    single_transformer_blocks.{i}.attn.processor.{q,k,v}_loras.{n}.{down,up}.weight   single blocks

Shapes: down `[rank, D]`, up `[D, rank]`. Slot `n` belongs to the n-th condition in the file's training; nearly all
files have one slot. Published files carry no alpha, which means alpha = rank. Other trainers may add
`..._loras.{n}.alpha` (or `.network_alpha`), a single number.

The names of published files tell the kind of their condition. Ours say it in their metadata, see `checkpoint.py`:
`{"format": 1, "easycontrol": {"kind": "subject"}}`.

Inside the pack a layer is called `double_blocks.{i}.{part}` or `single_blocks.{i}.{part}`, as in `ConditionLora`.
The parser refuses a file with an unknown or a missing key. It never drops anything silently.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from ..checkpoint import NUMBER, Keys, about, checked_number, checked_weight, described, put, require, shown
from .low_rank import LowRankWeights

Kind = Literal["spatial", "subject"]  # the condition lies over the picture, or shows something to put into it

SECTION, FORMAT = "easycontrol", 1  # of the metadata
PARTS = {"double_blocks": ("q", "k", "v", "proj"), "single_blocks": ("q", "k", "v")}
STREAMS = {"transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks"}
FOLDERS = {stream: folder for folder, stream in STREAMS.items()}
LEAVES = ("down.weight", "up.weight")
KEYS = Keys(
    "EasyControl LoRA",
    re.compile(
        rf"(?P<folder>transformer_blocks|single_transformer_blocks)\.(?P<block>{NUMBER})\.attn\.processor\."
        rf"(?P<part>q|k|v|proj)_loras\.(?P<slot>{NUMBER})\.(?P<leaf>down\.weight|up\.weight|alpha|network_alpha)"
    ),
    "transformer_blocks.0.attn.processor.q_loras.0.down.weight",
    ("", "transformer.", "module.", "model.", "diffusion_model.", "base_model.model."),
)
PUBLISHED: dict[Kind, tuple[str, ...]] = {  # names of the files
    "spatial": ("canny", "depth", "hedsketch", "pose", "seg", "inpainting", "ghibli"),
    "subject": ("subject",),
}
WORDS: dict[Kind, tuple[str, ...]] = {  # more words in the names of such files
    "spatial": ("hed", "sketch", "edge", "edges", "lineart", "openpose", "segmentation", "inpaint", "style"),
    "subject": (),
}


class Slot(LowRankWeights):
    """The LoRA of one condition: the state_dict of `ConditionLora`, and its alphas."""


@dataclass(frozen=True)
class Checkpoint:
    """A parsed file: `dim` channels, `double` and `single` blocks, one `Slot` per condition.

    kind: of its conditions, if the file says so.
    """

    slots: tuple[Slot, ...]
    dim: int
    double: int
    single: int
    prefix: str = ""
    alpha_leaf: str = "alpha"
    kind: Kind | None = None

    @property
    def summary(self) -> str:
        ranks = sorted({rank for slot in self.slots for rank in slot.ranks.values()})
        rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        return f"rank {rank}, slots {len(self.slots)}, blocks {self.double}+{self.single}, hidden size {self.dim}"


def parse(
    state: Mapping[str, Tensor], name: str = "This file", metadata: Mapping[str, str] | None = None
) -> Checkpoint:
    """Read a checkpoint.

    Args:
        state: the file's tensors by their published names.
        name: what to call the file in an error.
        metadata: the safetensors metadata, texts by key.

    Raises:
        ValueError: no EasyControl LoRA, an unknown or missing key, or tensors that do not fit each other.
    """
    kind = _said_kind(metadata, name)
    prefix = KEYS.prefix(state, name)
    weights: dict[int, dict[str, Tensor]] = {}
    alphas: dict[int, dict[str, Tensor]] = {}
    alpha_leaves: set[str] = set()
    for key, match, tensor in KEYS.read(state, name):
        stream, slot = STREAMS[match["folder"]], int(match["slot"])
        if match["part"] not in PARTS[stream]:
            raise KEYS.unknown(key, name)
        layer = f"{stream}.{int(match['block'])}.{match['part']}"
        if match["leaf"].endswith("alpha"):
            put(alphas.setdefault(slot, {}), layer, checked_number(tensor, key, name), key, name)
            alpha_leaves.add(match["leaf"])
        else:
            target = f"{layer}.{match['leaf']}"
            put(weights.setdefault(slot, {}), target, checked_weight(tensor, 2, key, name), key, name)

    if len(alpha_leaves) > 1:
        raise ValueError(f"{name} mixes '.alpha' and '.network_alpha'; keep one of them.")
    double, single = (_blocks([*weights.values(), *alphas.values()], stream) for stream in PARTS)
    slots = []
    for slot in range(max([*weights, *alphas]) + 1):
        expected = (published_name(layer, slot, leaf) for layer in layers(double, single) for leaf in LEAVES)
        require((prefix + key for key in expected), state, name)
        slots.append(Slot(weights[slot], alphas.get(slot, {})))
    dim = _checked_dim(slots, name)
    return Checkpoint(tuple(slots), dim, double, single, prefix, next(iter(alpha_leaves), "alpha"), kind)


def write(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The inverse of `parse`: the tensors by their published names."""
    state = {}
    for number, slot in enumerate(checkpoint.slots):
        for key, weight in slot.weights.items():
            layer, leaf = _split(key)
            state[checkpoint.prefix + published_name(layer, number, leaf)] = weight
        for layer, alpha in slot.alphas.items():
            state[checkpoint.prefix + published_name(layer, number, checkpoint.alpha_leaf)] = alpha
    return state


def write_metadata(kind: Kind) -> dict[str, str]:
    """The safetensors metadata with the kind of condition that a file is for."""
    return described(SECTION, {"kind": kind}, FORMAT)


def published_kind(name: str) -> Kind | None:
    """The kind of condition of the published file of this name: `"flux/Ghibli.safetensors"` -> `"spatial"`."""
    return next((kind for kind, names in PUBLISHED.items() if _stem(name) in names), None)


def likely_kind(name: str) -> Kind | None:
    """The kind that the words of a file's name suggest: `"my_depth-v2.safetensors"` -> `"spatial"`. None if unclear."""
    words = set(re.findall("[a-z]+", _stem(name)))
    kinds: list[Kind] = [kind for kind, names in PUBLISHED.items() if words & {*names, *WORDS[kind]}]
    return kinds[0] if len(kinds) == 1 else None


def published_name(layer: str, slot: int, leaf: str) -> str:
    """`("double_blocks.3.q", 0, "up.weight")` -> `"transformer_blocks.3.attn.processor.q_loras.0.up.weight"`."""
    stream, block, part = layer.split(".")
    return f"{FOLDERS[stream]}.{block}.attn.processor.{part}_loras.{slot}.{leaf}"


def layers(double: int, single: int) -> Iterator[str]:
    """Names of all layers of a LoRA for a model with this many blocks."""
    for stream, blocks in (("double_blocks", double), ("single_blocks", single)):
        for i in range(blocks):
            yield from (f"{stream}.{i}.{part}" for part in PARTS[stream])


def _stem(name: str) -> str:
    return re.split(r"[/\\]", name)[-1].rsplit(".", 1)[0].casefold()


def _said_kind(metadata: Mapping[str, str] | None, name: str) -> Kind | None:
    kind = about(metadata, SECTION, ("kind",), name, FORMAT).get("kind")
    if kind is not None and kind not in get_args(Kind):
        raise ValueError(f"{name} must say 'spatial' or 'subject' as its kind, got {shown(kind)}.")
    return kind


def _blocks(slots: Iterable[dict[str, Tensor]], stream: str) -> int:
    numbers = [int(key.split(".")[1]) for tensors in slots for key in tensors if key.startswith(stream)]
    return max(numbers, default=-1) + 1


def _split(key: str) -> tuple[str, str]:
    """`"double_blocks.0.q.up.weight"` -> `("double_blocks.0.q", "up.weight")`."""
    layer, leaf, weight = key.rsplit(".", 2)
    return layer, f"{leaf}.{weight}"


def _checked_dim(slots: list[Slot], name: str) -> int:
    """Hidden size, once every layer's down `[rank, D]` and up `[D, rank]` agree."""
    dim = next(slots[0].weights[f"{layer}.down.weight"].shape[1] for layer in slots[0].ranks)
    for index, slot in enumerate(slots):
        for layer in slot.ranks:
            down, up = slot.weights[f"{layer}.down.weight"], slot.weights[f"{layer}.up.weight"]
            label = published_name(layer, index, "down.weight").removesuffix(".down.weight")
            if down.shape[0] != up.shape[1]:
                raise ValueError(
                    f"{name}: '{label}' has rank {down.shape[0]} in 'down' and {up.shape[1]} in 'up'. "
                    "The file is damaged; download it again."
                )
            if down.shape[1] != dim or up.shape[0] != dim:
                shapes = f"down {tuple(down.shape)} and up {tuple(up.shape)}"
                raise ValueError(f"{name}: '{label}' must map {dim} channels to {dim}, got {shapes}.")
    return dim
