"""File layout of try-on LoRAs after MC-VTON, one LoRA per branch: parse, check, write back.

Source: MC-VTON, arXiv:2501.03630, trains low-rank weights on a FLUX.1 transformer that sees a masked person and a
garment as tokens of its own. Its code and weights are not public, so this layout is ours: the name of a branch,
`person` or `garment`, then diffusers' names of the image stream. For block `i`, each followed by `.lora_A.weight`
`[rank, in]`, `.lora_B.weight` `[out, rank]` and, if alpha is not the rank, `.alpha`, a single number:

    {branch}.transformer_blocks.{i}.attn.{to_q,to_k,to_v,to_out.0}           D to D
    {branch}.transformer_blocks.{i}.{ff.net.0.proj,ff.net.2,norm1.linear}    D to M, M to D, D to 6D
    {branch}.single_transformer_blocks.{i}.attn.{to_q,to_k,to_v}             D to D
    {branch}.single_transformer_blocks.{i}.{proj_mlp,proj_out,norm.linear}   D to M, D + M to D, D to 3D

A file may have one branch or both, with any layers of any blocks, at any rank. Its metadata says how it was trained,
see `checkpoint.py`: `{"format": 1, "mc_vton": {"position": "beside", "fill": "grey", "mask": "isolated", "steps": 20,
"prompt": "a doll", "double_blocks": 19, "single_blocks": 38}}`. Each setting is optional. A new setting that old
readers do not know makes a new format.

Inside the pack a layer is called `double_blocks.{i}.{part}` or `single_blocks.{i}.{part}`, as in `BranchLora`.
The parser refuses a file with an unknown key or setting. It never drops anything silently.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal, get_args

from torch import Tensor

from ..checkpoint import MOST, NUMBER, Keys, about, checked_number, checked_weight, described, put, require, shown
from .low_rank import LowRankWeights

Position = Literal["beside", "below"]  # where the garment's tokens lie: right of the picture, or EasyControl's subject
Fill = Literal["grey", "black"]  # of the masked part of the person

BRANCHES = ("person", "garment")
SECTION, FORMAT = "mc_vton", 1  # of the metadata
PARTS = {
    "double_blocks": {
        "q": "attn.to_q",
        "k": "attn.to_k",
        "v": "attn.to_v",
        "proj": "attn.to_out.0",
        "mlp_in": "ff.net.0.proj",
        "mlp_out": "ff.net.2",
        "mod": "norm1.linear",
    },
    "single_blocks": {
        "q": "attn.to_q",
        "k": "attn.to_k",
        "v": "attn.to_v",
        "mlp": "proj_mlp",
        "out": "proj_out",
        "mod": "norm.linear",
    },
}
FOLDERS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
STREAMS = {folder: stream for stream, folder in FOLDERS.items()}
LEAVES = {"lora_A.weight": "down.weight", "lora_B.weight": "up.weight"}
TEXT_STREAM = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context", "norm1_context")


class TryOnKeys(Keys):
    def why(self, key: str) -> str:
        if any(part in key for part in TEXT_STREAM):
            return "which belongs to the text stream; a branch acts on its own image tokens only"
        return super().why(key)


KEYS = TryOnKeys(
    "try-on LoRA",
    re.compile(
        rf"(?P<branch>person|garment)\.(?P<folder>transformer_blocks|single_transformer_blocks)\.(?P<block>{NUMBER})\."
        r"(?P<layer>[a-z0-9_.]+?)\.(?P<leaf>lora_[AB]\.weight|alpha)"
    ),
    "person.transformer_blocks.0.attn.to_q.lora_A.weight",
)


@dataclass(frozen=True)
class Settings:
    """How a file was trained, if it says so.

    position: of the garment's tokens. fill: of the masked part of the person. mask: isolated conditions see themselves
    only, text and picture see all. steps: of sampling. prompt: the training's only one; "" for any.
    """

    position: Position = "beside"
    fill: Fill = "grey"
    mask: Literal["isolated"] = "isolated"
    steps: int = 20
    prompt: str = ""

    def __post_init__(self):
        for title, choices in (("position", Position), ("fill", Fill)):
            if getattr(self, title) not in get_args(choices):
                found = shown(getattr(self, title))
                raise ValueError(f"{title} must be one of {', '.join(get_args(choices))}, got {found}")
        if self.mask != "isolated":
            raise ValueError(f"mask must be 'isolated', got {shown(self.mask)}: joint attention is not built")
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or not 1 <= self.steps <= MOST:
            raise ValueError(f"steps must be a whole number from 1 to {MOST}, got {shown(self.steps)}")
        if not isinstance(self.prompt, str):
            raise ValueError(f"prompt must be a text, got {shown(self.prompt)}")


class Branch(LowRankWeights):
    """The LoRA of one branch: the state_dict of `BranchLora`, and its alphas."""

    @property
    def summary(self) -> str:
        """`"rank 8: 19 double blocks (q, k, v), 38 single blocks (q, k, v, out)"`."""
        ranks = sorted(set(self.ranks.values()))
        rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        touched = []
        for stream, parts in PARTS.items():
            layers = [layer.split(".")[1:] for layer in self.ranks if layer.startswith(stream)]
            count, found = len({block for block, _ in layers}), Counter(part for _, part in layers)
            names = (part if found[part] == count else f"{part} in {found[part]}" for part in parts if found[part])
            if count:
                kind = stream.removesuffix("_blocks")
                touched.append(f"{count} {kind} block{'s' if count > 1 else ''} ({', '.join(names)})")
        return f"rank {rank}: {', '.join(touched)}"


@dataclass(frozen=True)
class Checkpoint:
    """A parsed file for models of `dim` channels, `hidden` in the MLP, `double` and `single` blocks.

    The block counts come from the metadata, else they reach to the last block with a layer. `hidden` is 4 * dim, as in
    FLUX.1, if no layer of the file tells.
    """

    branches: dict[str, Branch]  # "person", "garment"; one of them may be missing: plain tokens then
    dim: int
    hidden: int
    double: int
    single: int
    settings: Settings = field(default_factory=Settings)

    @property
    def summary(self) -> str:
        """The layers of each branch, in one line."""
        parts = [f"{name} {self.branches[name].summary if name in self.branches else 'plain'}" for name in BRANCHES]
        return f"{'; '.join(parts)}; garment {self.settings.position} the picture, hidden size {self.dim}"


def parse(
    state: Mapping[str, Tensor], name: str = "This file", metadata: Mapping[str, str] | None = None
) -> Checkpoint:
    """Read a file.

    Args:
        state: the file's tensors.
        name: what to call the file in an error.
        metadata: the safetensors metadata, texts by key. None: all settings are the defaults.

    Raises:
        ValueError: no try-on LoRA, an unknown key or setting, half a layer, or tensors that do not fit each other.
    """
    said = about(metadata, SECTION, (*PARTS, *Settings.__dataclass_fields__), name, FORMAT)
    weights: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, dict[str, Tensor]] = {}
    for key, match, tensor in KEYS.read(state, name):
        stream, branch = STREAMS[match["folder"]], match["branch"]
        part = next((part for part, layer in PARTS[stream].items() if layer == match["layer"]), None)
        if part is None:
            raise KEYS.unknown(key, name)
        layer = f"{stream}.{int(match['block'])}.{part}"
        if match["leaf"] == "alpha":
            put(alphas.setdefault(branch, {}), layer, checked_number(tensor, key, name), key, name)
        else:
            target = f"{layer}.{LEAVES[match['leaf']]}"
            put(weights.setdefault(branch, {}), target, checked_weight(tensor, 2, key, name), key, name)

    branches = {}
    for branch in BRANCHES:
        if branch in weights or branch in alphas:
            own = weights.get(branch, {}), alphas.get(branch, {})
            touched = {key.rsplit(".", 2)[0] for key in own[0]} | own[1].keys()
            require((file_name(branch, layer, leaf) for layer in sorted(touched) for leaf in LEAVES), state, name)
            branches[branch] = Branch(*own)
    dim, hidden = _sizes(branches, name)
    counts = [_blocks(branches, stream, said.pop(stream, None), name) for stream in PARTS]
    try:
        settings = Settings(**said)
    except ValueError as error:
        raise ValueError(f"{name}: {error}.") from None
    return Checkpoint(branches, dim, hidden, counts[0], counts[1], settings)


def write(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The inverse of `parse`: the tensors by their names in a file."""
    state = {}
    for branch, lora in checkpoint.branches.items():
        for key, weight in lora.weights.items():
            layer, end, _ = key.rsplit(".", 2)
            state[file_name(branch, layer, "lora_A.weight" if end == "down" else "lora_B.weight")] = weight
        for layer, alpha in lora.alphas.items():
            state[file_name(branch, layer, "alpha")] = alpha
    return state


def write_metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """The safetensors metadata that `parse` reads back."""
    counts = {"double_blocks": checkpoint.double, "single_blocks": checkpoint.single}
    return described(SECTION, {**asdict(checkpoint.settings), **counts}, FORMAT)


def file_name(branch: str, layer: str, leaf: str) -> str:
    """`("person", "double_blocks.3.q", "alpha")` -> `"person.transformer_blocks.3.attn.to_q.alpha"`."""
    stream, block, part = layer.split(".")
    return f"{branch}.{FOLDERS[stream]}.{block}.{PARTS[stream][part]}.{leaf}"


def widths(layer: str, dim: int, hidden: int) -> tuple[int, int]:
    """Channels into and out of a layer of a model with `dim` channels and `hidden` in its MLP."""
    part = layer.rsplit(".", 1)[1]
    if part == "mod":
        return dim, (6 if layer.startswith("double") else 3) * dim
    into = {"mlp_out": hidden, "out": dim + hidden}.get(part, dim)
    return into, hidden if part in ("mlp_in", "mlp") else dim


def _sizes(branches: dict[str, Branch], name: str) -> tuple[int, int]:
    """Channels of the model and of its MLP, once every layer agrees on them."""
    layers = [
        (
            file_name(branch, layer, "lora"),
            layer,
            lora.weights[f"{layer}.down.weight"],
            lora.weights[f"{layer}.up.weight"],
        )
        for branch, lora in branches.items()
        for layer in lora.ranks
    ]
    _, layer, down, up = layers[0]
    dim = up.shape[0] if layer.endswith((".mlp_out", ".out")) else down.shape[1]
    hidden = 4 * dim
    for _, layer, down, up in layers:
        part = layer.rsplit(".", 1)[1]
        if part in ("mlp_in", "mlp", "mlp_out", "out"):
            hidden = up.shape[0] if part in ("mlp_in", "mlp") else down.shape[1] - (dim if part == "out" else 0)
            break
    if hidden < 1:
        raise ValueError(f"{name}: the 'proj_out' layers leave no channel to the MLP. Get the file again.")
    for label, layer, down, up in layers:
        into, out = widths(layer, dim, hidden)
        if down.shape[0] != up.shape[1]:
            raise ValueError(
                f"{name}: '{label}_A' has rank {down.shape[0]} and '{label}_B' {up.shape[1]}. Get the file again."
            )
        if (down.shape[1], up.shape[0]) != (into, out):
            raise ValueError(
                f"{name}: '{label}_A' and '_B' must map {into} channels to {out}, as other layers have hidden size "
                f"{dim} and {hidden} in the MLP; got {down.shape[1]} to {up.shape[0]}."
            )
    return dim, hidden


def _blocks(branches: dict[str, Branch], stream: str, said: object, name: str) -> int:
    """Number of blocks of one kind: as the file says, or up to the last block with a layer."""
    layers = (layer for lora in branches.values() for layer in lora.ranks)
    last = max((int(layer.split(".")[1]) + 1 for layer in layers if layer.startswith(stream)), default=0)
    if said is None:
        return last
    if not isinstance(said, int) or isinstance(said, bool) or not last <= said <= MOST:
        raise ValueError(
            f"{name} says {stream} {shown(said)}, and has layers of {last}. Save it with the right number."
        )
    return said
