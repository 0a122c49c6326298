"""File layout of DynamiCtrl: parse, tell CogVideoX 1.0 and 1.5 apart, and translate names, of LoRAs too.

Source: the checkpoints published with DynamiCtrl, arXiv:2503.21246. A file is a whole transformer of CogVideoX
image-to-video, because all of it was trained, under the names of diffusers. In it is what DynamiCtrl adds, for block
`i`:

    transformer_blocks.{i}.control_norm1.linear.{weight,bias}      [3 D, E], [3 D]
    transformer_blocks.{i}.control_norm1.norm.{weight,bias}        [D]

ComfyUI has other names for the base:

| diffusers | ComfyUI |
|---|---|
| `transformer_blocks.` | `blocks.` |
| `attn1.to_q`, `to_k`, `to_v`, `to_out.0` | `q`, `k`, `v`, `attn_out` |
| `attn1.norm_q`, `attn1.norm_k` | `norm_q`, `norm_k` |
| `ff.net.0.proj`, `ff.net.2` | `ff_proj`, `ff_out` |
| `time_embedding.linear_1`, `ofs_embedding.linear_1`, ... | `time_embedding_linear_1`, `ofs_embedding_linear_1`, ... |

All others are the same. Both namings are read; what is parsed has ComfyUI's.

Version: the patch embedding is a matrix in 1.5, whose patches hold two latent frames, and a convolution in 1.0. A file
with a key that fits nowhere is refused, and so is one that lacks a key or has a tensor of a wrong shape.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..checkpoint import NUMBER, Keys, checked_weight, put, require, shown

Version = Literal["1.0", "1.5"]

HEAD = 64  # channels of an attention head, in all of CogVideoX
LATENT = 16  # channels of a latent
IMAGE_TO_VIDEO = 2 * LATENT  # channels of the input: the video's, and the picture's
TABLE = 226 + 13 * 30 * 45  # positions in the table of 1.0, text included

# Parts of a block and parts beside them, diffusers' name to ComfyUI's, and the axes of their weights.
BLOCK_PARTS = {
    "norm1.linear": "norm1.linear",
    "norm1.norm": "norm1.norm",
    "attn1.to_q": "q",
    "attn1.to_k": "k",
    "attn1.to_v": "v",
    "attn1.norm_q": "norm_q",
    "attn1.norm_k": "norm_k",
    "attn1.to_out.0": "attn_out",
    "norm2.linear": "norm2.linear",
    "norm2.norm": "norm2.norm",
    "ff.net.0.proj": "ff_proj",
    "ff.net.2": "ff_out",
}
POSE_PARTS = ("control_norm1.linear", "control_norm1.norm")
OFS_PARTS = {f"ofs_embedding.linear_{i}": f"ofs_embedding_linear_{i}" for i in (1, 2)}
TOP_PARTS = {
    "patch_embed.proj": "patch_embed.proj",
    "patch_embed.text_proj": "patch_embed.text_proj",
    **{f"time_embedding.linear_{i}": f"time_embedding_linear_{i}" for i in (1, 2)},
    **OFS_PARTS,
    "norm_final": "norm_final",
    "norm_out.linear": "norm_out.linear",
    "norm_out.norm": "norm_out.norm",
    "proj_out": "proj_out",
}
POSITIONS = "patch_embed.pos_embedding"
NORMS = ("norm", "norm_q", "norm_k", "norm_final")  # how parts with a vector of weights end
LEAVES = ("weight", "bias")

TO_COMFYUI = {**BLOCK_PARTS, **TOP_PARTS, **{part: part for part in POSE_PARTS}}
TO_DIFFUSERS = {ours: theirs for theirs, ours in TO_COMFYUI.items()}


def _any(names: Iterator[str] | Mapping[str, str]) -> str:
    return "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))


_IN_BLOCK = _any({**BLOCK_PARTS, **{ours: "" for ours in BLOCK_PARTS.values()}, **dict.fromkeys(POSE_PARTS, "")})
_BESIDE = _any({**TOP_PARTS, **{ours: "" for ours in TOP_PARTS.values()}})
MODULE = rf"(?:(?:transformer_)?blocks\.(?P<block>{NUMBER})\.(?P<part>{_IN_BLOCK})|(?P<beside>{_BESIDE}))"
KEYS = Keys(
    "DynamiCtrl file",
    re.compile(rf"{MODULE}\.(?P<leaf>weight|bias)|(?P<table>{re.escape(POSITIONS)})"),
    "transformer_blocks.0.control_norm1.linear.weight",
    ("", "transformer.", "model.diffusion_model.", "diffusion_model.", "module.", "model."),
    "Other models go into Load Diffusion Model.",
)


@dataclass(frozen=True)
class Checkpoint:
    """A parsed file. All names are ComfyUI's.

    base: the tensors of CogVideoX. pose: what DynamiCtrl adds, the state_dict of `PoseNorms`.
    dim, time_dim: sizes D and E. blocks: how many. version: of CogVideoX.
    """

    base: dict[str, Tensor]
    pose: dict[str, Tensor]
    dim: int
    time_dim: int
    blocks: int
    version: Version

    @property
    def summary(self) -> str:
        dtype = str(self.base["blocks.0.q.weight"].dtype).removeprefix("torch.")
        return f"DynamiCtrl on CogVideoX {self.version}: {self.blocks} blocks, width {self.dim}, {dtype}"


def comfyui_name(key: str) -> str:
    """ComfyUI's name for a tensor of a transformer under either naming, without a prefix.

    Raises:
        ValueError: CogVideoX with DynamiCtrl has no such tensor.
    """
    return _name(_matched(key), TO_COMFYUI, "blocks")


def diffusers_name(key: str) -> str:
    """The published name of a tensor under either naming. Raises as `comfyui_name` does."""
    return _name(_matched(key), TO_DIFFUSERS, "transformer_blocks")


def _matched(key: str) -> re.Match[str]:
    match = KEYS.pattern.fullmatch(key)
    if match is None:
        raise ValueError(f"{shown(key)} is no name of a tensor of CogVideoX.")
    return match


def _name(match: re.Match[str], names: Mapping[str, str], blocks: str) -> str:
    if match["table"]:
        return POSITIONS
    return f"{_module(match, names, blocks)}.{match['leaf']}"


def _module(match: re.Match[str], names: Mapping[str, str], blocks: str) -> str:
    part = match["part"] or match["beside"]
    part = names.get(part, part)
    return part if match["block"] is None else f"{blocks}.{match['block']}.{part}"


def parse(state: Mapping[str, Tensor], name: str = "This file") -> Checkpoint:
    """Read a checkpoint: a published transformer, or one with ComfyUI's names.

    Args:
        state: the file's tensors. Each is looked at once, so `state` may read it when it is asked for.
        name: what to call the file in an error.

    Raises:
        ValueError: no DynamiCtrl file, an unknown or missing key, or tensors that do not fit each other.
    """
    if not any(key.endswith("control_norm1.linear.weight") for key in state):
        if not any(key.endswith("patch_embed.text_proj.weight") for key in state):
            raise KEYS.other(state, name)
        raise ValueError(
            f"{name} is CogVideoX without the pose norms of DynamiCtrl: it has no 'control_norm1'. Get DynamiCtrl's "
            "own transformer."
        )
    found: dict[str, str] = {}
    blocks = 0
    for key, match in KEYS.find(state, name):
        ours = _name(match, TO_COMFYUI, "blocks")
        if ours in found:
            raise ValueError(f"{name} has {shown(key)} and another key for the same tensor. Save it with one of them.")
        found[ours] = key
        blocks = max(blocks, int(match["block"]) + 1) if match["block"] else blocks
    with_ofs = any(ours.startswith("ofs_embedding") for ours in found)
    require(names(blocks, with_ofs), {diffusers_name(ours) for ours in found}, name)

    base: dict[str, Tensor] = {}
    pose: dict[str, Tensor] = {}
    version: Version = "1.5"
    for ours, key in found.items():
        tensor = state[key]
        if ours == "patch_embed.proj.weight" and tensor.ndim == 4:
            version = "1.0"
        weight = checked_weight(tensor, _axes(ours, tensor), key, name)
        put(pose if ".control_norm1." in ours else base, ours, weight, key, name)
    return _checked(Checkpoint(base, pose, *_sizes(base), blocks, version), found, name)


def names(blocks: int, ofs: bool) -> Iterator[str]:
    """The published names of all tensors of a model, but for the table of positions that some 1.0 have."""
    for part in TOP_PARTS:
        if ofs or part not in OFS_PARTS:
            yield from (f"{part}.{leaf}" for leaf in LEAVES)
    for i in range(blocks):
        parts = (*BLOCK_PARTS, *POSE_PARTS)
        yield from (f"transformer_blocks.{i}.{part}.{leaf}" for part in parts for leaf in LEAVES)


def _is_norm(module: str) -> bool:
    return module.rpartition(".")[2] in NORMS


def _axes(ours: str, tensor: Tensor) -> int:
    module, _, leaf = ours.rpartition(".")
    if ours == POSITIONS:
        return 3
    if leaf == "bias" or _is_norm(module):
        return 1
    return 4 if module == "patch_embed.proj" and tensor.ndim == 4 else 2


def _sizes(base: Mapping[str, Tensor]) -> tuple[int, int]:
    rows, columns = base["blocks.0.norm1.linear.weight"].shape
    return rows // 6, columns


def _checked(checkpoint: Checkpoint, found: Mapping[str, str], name: str) -> Checkpoint:
    """The checkpoint, once every shape follows from its sizes."""
    base, dim = checkpoint.base, checkpoint.dim
    if dim < HEAD or dim % HEAD:
        rows = base["blocks.0.norm1.linear.weight"].shape[0]
        raise ValueError(
            f"{name}: {shown(found['blocks.0.norm1.linear.weight'])} must have six times a multiple of {HEAD} rows, "
            f"got {rows}. The file is damaged; download it again."
        )
    if (channels := _channels(base["patch_embed.proj.weight"])) != IMAGE_TO_VIDEO:
        raise ValueError(
            f"{name} takes {channels:g} channels, and DynamiCtrl is made on image-to-video models, which take "
            f"{IMAGE_TO_VIDEO}. Get DynamiCtrl's own transformer."
        )
    text = base["patch_embed.text_proj.weight"].shape[1]
    shapes = _shapes(dim, checkpoint.time_dim, text, checkpoint.version)
    for ours, weight in {**base, **checkpoint.pose}.items():
        module, _, leaf = ours.rpartition(".")
        kind = re.sub(r"^blocks\.\d+\.", "", module)
        expected = (1, TABLE, dim) if ours == POSITIONS else shapes[kind]
        expected = expected[:1] if leaf == "bias" else expected
        if tuple(weight.shape) != expected:
            raise ValueError(
                f"{name}: {shown(found[ours])} must be {list(expected)} for hidden size {dim}, got "
                f"{list(weight.shape)}. The file is damaged; download it again."
            )
    return checkpoint


def _channels(proj: Tensor) -> float:
    return proj.shape[1] if proj.ndim == 4 else proj.shape[1] / 8


def _shapes(dim: int, time: int, text: int, version: Version) -> dict[str, tuple[int, ...]]:
    """Of every part's weight."""
    whole = version == "1.5"
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj": (dim, 8 * IMAGE_TO_VIDEO) if whole else (dim, IMAGE_TO_VIDEO, 2, 2),
        "patch_embed.text_proj": (dim, text),
        "time_embedding_linear_1": (time, dim),
        "norm_final": (dim,),
        "norm_out.linear": (2 * dim, time),
        "norm_out.norm": (dim,),
        "proj_out": ((8 if whole else 4) * LATENT, dim),
        "ff_proj": (4 * dim, dim),
        "ff_out": (dim, 4 * dim),
        "control_norm1.linear": (3 * dim, time),
        "control_norm1.norm": (dim,),
    }
    shapes |= dict.fromkeys(("time_embedding_linear_2", *OFS_PARTS.values()), (time, time))
    shapes |= dict.fromkeys(("norm1.linear", "norm2.linear"), (6 * dim, time))
    shapes |= dict.fromkeys(("norm1.norm", "norm2.norm"), (dim,))
    shapes |= dict.fromkeys(("q", "k", "v", "attn_out"), (dim, dim))
    shapes |= dict.fromkeys(("norm_q", "norm_k"), (HEAD,))
    return shapes


# -------------------------------------------------------------------------------------------------------------- LoRAs

_FLAT = {
    part.replace(".", "_"): part for part in (*BLOCK_PARTS, *BLOCK_PARTS.values(), *TOP_PARTS, *TOP_PARTS.values())
}
_PREFIXES = r"(?:base_model\.model\.)?(?:transformer\.|model\.diffusion_model\.|diffusion_model\.|module\.)?"
_DOTTED = re.compile(rf"{_PREFIXES}{MODULE}(?P<rest>(?:\.|_lora\.).+)")
_KOHYA = re.compile(
    rf"lora_(?:unet|transformer)_(?:(?:transformer_)?blocks_(?P<block>{NUMBER})_)?"
    rf"(?P<part>{_any(_FLAT)})(?P<rest>\..+)"
)


def lora_names(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of a LoRA for CogVideoX under the names that ComfyUI's LoRA code knows: `diffusion_model.blocks...`.

    Files of diffusers, of peft and of kohya's scripts are read. What stands behind the layer's name (lora_A, lora_down,
    alpha, ...) stays, for ComfyUI knows all of these.

    Returns:
        The renamed tensors, and the keys that name no layer of CogVideoX.
    """
    renamed: dict[str, Tensor] = {}
    strange = []
    for key, tensor in state.items():
        match = _DOTTED.fullmatch(key) or _KOHYA.fullmatch(key)
        if match is None:
            strange.append(key)
            continue
        part = match["part"] or match.groupdict().get("beside") or ""
        part = _FLAT.get(part, part)
        part = TO_COMFYUI.get(part, part)
        module = part if match["block"] is None else f"blocks.{match['block']}.{part}"
        renamed[f"diffusion_model.{module}{match['rest']}"] = tensor
    return renamed, tuple(strange)
