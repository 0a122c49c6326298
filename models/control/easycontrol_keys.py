"""File layout of EasyControl LoRAs: parse, check, write back.

Source: the checkpoints published with EasyControl, arXiv:2503.07027. For block `i` and slot `n`:

    transformer_blocks.{i}.attn.processor.{q,k,v,proj}_loras.{n}.{down,up}.weight     double blocks
    single_transformer_blocks.{i}.attn.processor.{q,k,v}_loras.{n}.{down,up}.weight   single blocks

Shapes: down `[rank, D]`, up `[D, rank]`. Slot `n` belongs to the n-th condition a file was trained with; nearly all
files have one. Published files carry no alpha, which means alpha = rank; files of other trainers may add
`..._loras.{n}.alpha` (or `.network_alpha`), a single number.

Inside the pack a layer is called `double_blocks.{i}.{part}` or `single_blocks.{i}.{part}`, as in `ConditionLora`.
Nothing is dropped in silence: a key that does not fit, or a missing one, refuses the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite

from torch import Tensor

from .low_rank import LowRankWeights

PREFIXES = ("", "transformer.", "module.", "model.", "diffusion_model.", "base_model.model.")
PARTS = {"double_blocks": ("q", "k", "v", "proj"), "single_blocks": ("q", "k", "v")}
STREAMS = {"transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks"}
FOLDERS = {stream: folder for folder, stream in STREAMS.items()}
# One way to write a number: no two keys of a file fall on one layer.
KEY = re.compile(
    r"(?P<folder>transformer_blocks|single_transformer_blocks)\.(?P<block>0|[1-9]\d{0,3})\.attn\.processor\."
    r"(?P<part>q|k|v|proj)_loras\.(?P<slot>0|[1-9]\d{0,3})\.(?P<leaf>down\.weight|up\.weight|alpha|network_alpha)",
    re.ASCII,
)


class Slot(LowRankWeights):
    """The LoRA of one condition: the state_dict of `ConditionLora`, and its alphas."""


@dataclass(frozen=True)
class Checkpoint:
    """A parsed file: `dim` channels, `double` and `single` blocks, one `Slot` per condition."""

    slots: tuple[Slot, ...]
    dim: int
    double: int
    single: int
    prefix: str = ""
    alpha_leaf: str = "alpha"

    @property
    def summary(self) -> str:
        ranks = sorted({rank for slot in self.slots for rank in slot.ranks.values()})
        rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        return f"rank {rank}, slots {len(self.slots)}, blocks {self.double}+{self.single}, hidden size {self.dim}"


def parse(state: Mapping[str, Tensor], name: str = "This file") -> Checkpoint:
    """Read a checkpoint.

    Args:
        state: the file's tensors by their published names.
        name: what to call the file in an error.

    Raises:
        ValueError: no EasyControl LoRA, an unknown or missing key, or shapes that do not fit each other.
    """
    prefix = _prefix(state, name)
    weights: dict[int, dict[str, Tensor]] = {}
    alphas: dict[int, dict[str, Tensor]] = {}
    alpha_leaves: set[str] = set()
    for key, tensor in state.items():
        match = KEY.fullmatch(key.removeprefix(prefix))
        if match is None or not key.startswith(prefix) or match["part"] not in PARTS[STREAMS[match["folder"]]]:
            raise ValueError(f"{name} has the key '{key}', which no EasyControl LoRA for FLUX.1 has.")
        layer = f"{STREAMS[match['folder']]}.{int(match['block'])}.{match['part']}"
        if match["leaf"].endswith("alpha"):
            alphas.setdefault(int(match["slot"]), {})[layer] = _checked_alpha(tensor, key, name)
            alpha_leaves.add(match["leaf"])
        else:
            weights.setdefault(int(match["slot"]), {})[f"{layer}.{match['leaf']}"] = tensor

    if len(alpha_leaves) > 1:
        raise ValueError(f"{name} mixes '.alpha' and '.network_alpha'; keep one of them.")
    double, single = (_blocks(weights.values(), stream) for stream in PARTS)
    slots = []
    for slot in range(max([*weights, *alphas]) + 1):
        _refuse_missing(weights.get(slot, {}), slot, double, single, prefix, name)
        slots.append(Slot(weights[slot], alphas.get(slot, {})))
    dim = _checked_dim(slots, name)
    return Checkpoint(tuple(slots), dim, double, single, prefix, next(iter(alpha_leaves), "alpha"))


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


def published_name(layer: str, slot: int, leaf: str) -> str:
    """`("double_blocks.3.q", 0, "up.weight")` -> `"transformer_blocks.3.attn.processor.q_loras.0.up.weight"`."""
    stream, block, part = layer.split(".")
    return f"{FOLDERS[stream]}.{block}.attn.processor.{part}_loras.{slot}.{leaf}"


def layers(double: int, single: int) -> Iterator[str]:
    """Names of all layers of a LoRA for a model with so many blocks."""
    for stream, blocks in (("double_blocks", double), ("single_blocks", single)):
        for i in range(blocks):
            yield from (f"{stream}.{i}.{part}" for part in PARTS[stream])


def _prefix(state: Mapping[str, Tensor], name: str) -> str:
    for prefix in PREFIXES:
        if any(key.startswith(prefix) and KEY.fullmatch(key.removeprefix(prefix)) for key in state):
            return prefix
    raise ValueError(
        f"{name} is no EasyControl LoRA: none of its {len(state)} keys looks like "
        "'transformer_blocks.0.attn.processor.q_loras.0.down.weight'. Ordinary LoRAs go into a LoRA loader."
    )


def _blocks(slots: Iterable[dict[str, Tensor]], stream: str) -> int:
    numbers = [int(key.split(".")[1]) for weights in slots for key in weights if key.startswith(stream)]
    return max(numbers, default=-1) + 1


def _refuse_missing(weights: dict[str, Tensor], slot: int, double: int, single: int, prefix: str, name: str) -> None:
    expected = (f"{layer}.{leaf}" for layer in layers(double, single) for leaf in ("down.weight", "up.weight"))
    first = next((key for key in expected if key not in weights), None)  # lazy: block numbers in a file may be absurd
    if first is None:
        return
    layer, leaf = _split(first)
    count = 2 * (double * len(PARTS["double_blocks"]) + single * len(PARTS["single_blocks"])) - len(weights)
    others = f" and {count - 1} more" if count > 1 else ""
    raise ValueError(
        f"{name} is incomplete: '{prefix}{published_name(layer, slot, leaf)}'{others} missing. Download it again."
    )


def _split(key: str) -> tuple[str, str]:
    """`"double_blocks.0.q.up.weight"` -> `("double_blocks.0.q", "up.weight")`."""
    layer, leaf, weight = key.rsplit(".", 2)
    return layer, f"{leaf}.{weight}"


def _checked_dim(slots: list[Slot], name: str) -> int:
    """Hidden size, once every layer's down `[rank, D]` and up `[D, rank]` agree."""
    first = next(iter(slots[0].weights.values()))
    dim = max(first.shape)
    for number, slot in enumerate(slots):
        for layer in slot.ranks:
            down, up = slot.weights[f"{layer}.down.weight"], slot.weights[f"{layer}.up.weight"]
            label = published_name(layer, number, "down.weight").removesuffix(".down.weight")
            if down.ndim != 2 or up.ndim != 2 or not (down.is_floating_point() and up.is_floating_point()):
                raise ValueError(f"{name}: '{label}' must hold two floating-point matrices, got {_shapes(down, up)}.")
            if down.shape[0] != up.shape[1]:
                raise ValueError(
                    f"{name}: '{label}' has rank {down.shape[0]} in 'down' and {up.shape[1]} in 'up'. "
                    "The file is damaged; download it again."
                )
            if down.shape[1] != dim or up.shape[0] != dim:
                raise ValueError(f"{name}: '{label}' must map {dim} channels to {dim}, got {_shapes(down, up)}.")
            if not all(weight.float().sum().isfinite() for weight in (down, up)):
                raise ValueError(f"{name}: '{label}' holds NaN or infinite values. Download it again.")
    return dim


def _checked_alpha(alpha: Tensor, key: str, name: str) -> Tensor:
    if alpha.numel() != 1 or not isfinite(float(alpha)):
        raise ValueError(f"{name}: '{key}' must be one finite number, got shape {tuple(alpha.shape)}.")
    return alpha


def _shapes(down: Tensor, up: Tensor) -> str:
    return f"down {tuple(down.shape)} and up {tuple(up.shape)}"
