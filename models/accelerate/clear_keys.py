"""CLEAR's published files: whole attention weights of FLUX.1-dev in diffusers' layout, as patches of ComfyUI's layout.

Source: Huage001/CLEAR on Hugging Face, five files. They hold, for every block,

    transformer_blocks.{i}.attn.{to_q,to_k,to_v,to_out.0}.{weight,bias}          picture side of the double blocks
    single_transformer_blocks.{i}.attn.{to_q,to_k,to_v}.{weight,bias}            single blocks
    ...attn.processor.spatial_weight    [1, 1, 1, f, 1, f, 1]                    variants with pooled keys only

These are whole weights, no differences: they replace the model's own. ComfyUI keeps q, k and v in one layer: rows [q;
k; v] of `double_blocks.{i}.img_attn.qkv` and the first rows of `single_blocks.{i}.linear1`, whose other rows are the
MLP's. Every tensor becomes one patch of a slice of rows, without copies or joins.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..checkpoint import NUMBER, Keys, checked_weight, put, require

Block = tuple[str, int]  # ("double" or "single", number)

THIRDS = {"to_q": 0, "to_k": 1, "to_v": 2}
LAYERS = {"double": ("to_q", "to_k", "to_v", "to_out.0"), "single": ("to_q", "to_k", "to_v")}
FOLDERS = {"double": "transformer_blocks", "single": "single_transformer_blocks"}
CELL = "processor.spatial_weight"
KEYS = Keys(
    "CLEAR file",
    re.compile(
        rf"(?P<single>single_)?transformer_blocks\.(?P<block>{NUMBER})\.attn\."
        r"(?P<part>(?P<layer>to_q|to_k|to_v|to_out\.0)\.(?:weight|bias)|processor\.spatial_weight)"
    ),
    "transformer_blocks.0.attn.to_q.weight",
)


@dataclass(frozen=True, eq=False)
class Patch:
    """`value` replaces rows `start` to `start + len(value)` of the weight `key`."""

    key: str  # "double_blocks.0.img_attn.qkv.weight"
    start: int
    value: Tensor


@dataclass(frozen=True, eq=False)
class ClearWeights:
    """A parsed file."""

    dim: int
    double: int
    single: int
    patches: tuple[Patch, ...]
    cells: Mapping[Block, Tensor]  # weights of the pooled cells, [f, f]; empty for purely local files

    @property
    def factor(self) -> int:
        """Side of the pooled cells, 0 for none."""
        return next(iter(self.cells.values())).shape[0] if self.cells else 0

    @property
    def summary(self) -> str:
        pooled = f", pooled cells of {self.factor}" if self.cells else ""
        return f"{self.double}+{self.single} blocks, hidden size {self.dim}, {len(self.patches)} tensors{pooled}"


def parse(state: Mapping[str, Tensor], name: str) -> ClearWeights:
    """Read a file in the published layout.

    Args:
        name: of the file, for messages.

    Raises:
        ValueError: unknown or missing keys, or tensors that do not fit each other.
    """
    found: dict[tuple[str, int, str], Tensor] = {}
    for key, match, tensor in KEYS.read(state, name):
        kind, part = "single" if match["single"] else "double", match["part"]
        if match["layer"] and match["layer"] not in LAYERS[kind]:
            raise KEYS.unknown(key, name)
        axes = 7 if part == CELL else 2 if part.endswith("weight") else 1
        put(found, (kind, int(match["block"]), part), checked_weight(tensor, axes, key, name), key, name)

    # Even a file without blocks of a kind must have the first: it then lacks that one.
    blocks = {kind: 1 + max((n for k, n, _ in found if k == kind), default=0) for kind in LAYERS}
    pooled = any(part == CELL for _, _, part in found)
    require(_published_names(blocks, pooled), state, name)

    dim = found["double", 0, "to_q.weight"].shape[0]
    patches, cells = [], {}
    for (kind, n, part), value in found.items():
        if part == CELL:
            cells[kind, n] = _cell(value, name)
        else:
            patches.append(_patch(kind, n, part, value, dim, name))
    if len({cell.shape for cell in cells.values()}) > 1:
        raise ValueError(f"{name} has pooled cells of different sizes. Get the file again.")
    return ClearWeights(dim, blocks["double"], blocks["single"], tuple(patches), cells)


def _published_names(blocks: Mapping[str, int], pooled: bool) -> Iterator[str]:
    """All keys of a file with this many blocks of each kind."""
    for kind, count in blocks.items():
        parts = [f"{layer}.{end}" for layer in LAYERS[kind] for end in ("weight", "bias")] + [CELL] * pooled
        for n in range(count):
            yield from (f"{FOLDERS[kind]}.{n}.attn.{part}" for part in parts)


def _patch(kind: str, n: int, part: str, value: Tensor, dim: int, name: str) -> Patch:
    layer, end = part.rsplit(".", 1)
    expected = (dim, dim) if end == "weight" else (dim,)
    if tuple(value.shape) != expected:
        key = f"{FOLDERS[kind]}.{n}.attn.{part}"
        raise ValueError(f"{name}: '{key}' must be {expected}, got {tuple(value.shape)}. Get the file again.")
    if layer == "to_out.0":
        return Patch(f"double_blocks.{n}.img_attn.proj.{end}", 0, value)
    target = "linear1" if kind == "single" else "img_attn.qkv"
    return Patch(f"{kind}_blocks.{n}.{target}.{end}", THIRDS[layer] * dim, value)


def _cell(value: Tensor, name: str) -> Tensor:
    """`[1, 1, 1, f, 1, f, 1]` as `[f, f]`."""
    f = value.shape[3]
    if tuple(value.shape) != (1, 1, 1, f, 1, f, 1):
        raise ValueError(f"{name}: spatial_weight must be (1, 1, 1, f, 1, f, 1), got {tuple(value.shape)}.")
    return value[0, 0, 0, :, 0, :, 0]
