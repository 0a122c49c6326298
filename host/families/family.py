"""What a model family answers. One file per family beside this one holds the answers.

A feature never asks a model what it is. It asks `family_of(model)`:

| question | answer |
|---|---|
| What do users call it? | `name` |
| Where are the picture's tokens in a call, and where text and references? | `grids` |
| Which blocks does it run, and in which order? | `block_keys`, `kinds` |
| What flows from block to block, and do blocks write into it? | `streams`, `joined`, `in_place` |
| Which rows of the last block does the head read? | `picture` |
| Does attention know the block that it is in? | `numbered` |
| How wide are its streams, and how many heads and attentions does it have? | `build` |
| What of a prompt, before a run, changes the number of tokens? | `given` |
| Is this MODEL one of it? The node needs one. | `require` |

`kinds` is empty if ComfyUI calls no block replacement. `grids` and `build` are None if we do not know. `OTHER`, any
other model, answers none of them: features reach only its output, the prediction.

Before a run, memory is counted from shapes alone (`host/memory.py`): `grids_of` and `elements` put `given`, `grids` and
`build` together, for all features.

A question that only one family answers stays a function in that family's file, as FLUX.1's positions and modulation do
(`flux.py`). A feature that needs it calls `FLUX1.require`. Once a second family answers the question, it moves here.

To add a family, write a file here, add a line to `FAMILIES` (`__init__.py`), and add a tiny random model to
`tests/host/families.py`. The tests of all families then run on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...models.accelerate.sparse_attention import Grid
from ..compiled import untraced
from ..transformer import class_of, core_name, transformer_of

BlockKey = tuple[str, int]  # ("double_block", 3), as in patches_replace["dit"]
BlockArgs = dict[str, Any]
Grids = tuple[Grid, ...]

LARGEST = 1e4  # value of a latent: VAEs stay within some tens, and half precision ends at 65504


@dataclass(frozen=True)
class BlockKind:
    """Blocks of one kind, which run one after the other."""

    kind: str  # "double_block" or "single_block"
    modules: str  # the transformer's list of them
    streams: tuple[str, ...]


class Sizes(NamedTuple):
    """What a model must have in common with weights that were trained for it."""

    dim: int
    blocks: int
    dual: frozenset[int] = frozenset()  # blocks with a second attention, as SD3.5 Medium has

    def __str__(self) -> str:
        second = f", {len(self.dual)} of them with a second attention" if self.dual else ""
        return f"hidden size {self.dim}, {self.blocks} blocks{second}"


class Build(NamedTuple):
    """Sizes that memory is counted by.

    widths: of a token of each stream. attentions: how many of each kind that `grids` tells of, in its order.
    """

    widths: Mapping[str, int]
    heads: int
    attentions: tuple[int, ...]

    @property
    def head_dim(self) -> int:
        return self.widths["img"] // self.heads


class Given(NamedTuple):
    """A prompt before a run, as the model will be given it.

    text: tokens of the text, as `grids` takes them. stream: tokens of the stream `txt`, as far as the first grid counts
    them. conds: the arguments of the model that `grids` reads; their values may be anything of the right shape.
    """

    text: int
    stream: int
    conds: dict[str, Any]


def length_of_text(prompt: Mapping[str, Any]) -> int:
    text = prompt.get("cross_attn")
    return 0 if text is None else text.shape[1]


def text_alone(transformer: Any, prompt: Mapping[str, Any]) -> Given:
    text = length_of_text(prompt)
    return Given(text, text, {})


def text_and_references(transformer: Any, prompt: Mapping[str, Any]) -> Given:
    text = length_of_text(prompt)
    return Given(text, text, {"ref_latents": prompt.get("reference_latents")})


@dataclass(frozen=True)
class Family:
    """Models whose transformers are built and run alike.

    transformers: their exact classes. A subclass may run its blocks in another way, as LTX with sound and most
        relatives of Wan do.
    among: whether a transformer of these classes is of this family, if several families share a class.
    listed: its name in lists of models, if not `name`. asked: in messages that ask for one, if not `name`.
    tested: a tiny random model of it runs in the tests. The README lists no others.
    grids: `(transformer, x, text, conds)` to one grid for every kind of attention in that call that has the picture's
        tokens; to none if that is not certain. `x` is the latent, `[B, C, (frames,) h, w]`, `text` the number of text
        tokens, `conds` the other arguments of the model.
    kinds: kinds of blocks that ComfyUI lets us wrap, in the order they run.
    in_place: blocks write into the streams of their args.
    numbered: transformer_options tell attention the type and number of its block.
    build: of a transformer. given: `(transformer, prompt)`, the prompt as core's guiders hold it before a run.
    """

    name: str  # what users call it
    transformers: tuple[type, ...]
    among: Callable[[Any], bool] = lambda transformer: True
    listed: str = ""
    asked: str = ""
    tested: bool = True
    grids: Callable[[Any, Tensor, int, dict], Grids] | None = None
    kinds: tuple[BlockKind, ...] = ()
    in_place: bool = False
    numbered: bool = True
    build: Callable[[Any], Build] | None = None
    given: Callable[[Any, Mapping[str, Any]], Given] = text_alone

    def require(self, model: ModelPatcher, node: str) -> Any:
        """The transformer of `model`, whose class may derive from ours. `node` is the display name of who asks.

        Raises:
            ValueError: `model` is of another family.
        """
        transformer = transformer_of(model)
        if not (issubclass(class_of(model), self.transformers) and self.among(transformer)):
            asked = self.asked or self.name
            raise ValueError(f"{node} needs a {asked} model, got {core_name(model)}. Connect one to 'model'.")
        return transformer

    def block_keys(self, transformer: Any) -> tuple[BlockKey, ...]:
        """All blocks that can be wrapped, in the order they run."""
        return tuple((kind.kind, i) for kind in self.kinds for i in range(len(getattr(transformer, kind.modules))))

    def streams(self, kind: str) -> tuple[str, ...]:
        """The entries of a block's dict that change from block to block."""
        return self._kind(kind).streams

    def joined(self, streams: Mapping[str, Tensor], kind_from: str, kind_to: str) -> dict[str, Tensor]:
        """The input streams of a `kind_to` block, from the input streams of a `kind_from` block before it.

        Args:
            streams: `img` and `txt` (if it is a stream), each `[B, T, D]`; never written to.

        Returns:
            The same, unless the model joins its streams there: then `img` is `[B, T_txt + T_img, D]`, text first.
        """
        order = [self._kind(kind_from), self._kind(kind_to)]
        if order[0] is order[1]:
            return {name: streams[name] for name in order[0].streams}
        if order != list(self.kinds):
            raise ValueError(f"{self.name} runs no {kind_from} before a {kind_to}")
        return {"img": torch.cat((streams["txt"], streams["img"]), 1)}

    def grids_of(self, transformer: Any, shape: Sequence[int], prompt: Mapping[str, Any]) -> Grids:
        """`grids` of a call for a prompt, before the run. `shape`: of the latent, `[B, C, (frames,) h, w]`."""
        if self.grids is None:
            return ()
        text, _, conds = self.given(transformer, prompt)
        return self.grids(transformer, torch.empty(tuple(shape), device="meta"), text, conds)

    def elements(
        self, transformer: Any, kind: str | None, shape: Sequence[int], prompt: Mapping[str, Any]
    ) -> dict[str, int]:
        """How many numbers the streams of a `kind` of block hold for all pictures of a latent, by stream.

        Where attention is not known, the picture's own tokens count. `kind` None: the rows that the head reads.
        """
        if self.build is None or self.grids is None:
            return {}
        grids, text = self.grids_of(transformer, shape, prompt), self.given(transformer, prompt).stream
        if not grids:
            grids, text = self.grids(transformer, torch.empty(tuple(shape), device="meta"), 0, {}), 0
        whole = grids[0].length if grids else 0
        streams = ("img",) if kind is None else self.streams(kind)
        apart = kind is None or "txt" in streams
        tokens = {"img": whole - text if apart else whole, "txt": text}
        widths = self.build(transformer).widths
        return {name: shape[0] * tokens[name] * widths[name] for name in streams}

    @untraced
    def picture(self, args: BlockArgs, out: Mapping[str, Tensor]) -> slice:
        """The rows of `out["img"]` `[B, T, D]` that the head reads after the last block.

        Reference tokens are among them if the model keeps them until then.

        Args:
            args, out: arguments and result of the last block.
        """
        if "txt" in args:
            return slice(0, out["img"].shape[1])
        options = args.get("transformer_options", {})
        if "img_slice" not in options:
            raise ValueError(
                "The model's blocks do not say which of their tokens are the picture's, because another node replaced "
                "its forward pass. Remove that node, or the step cache."
            )
        return slice(*options["img_slice"])  # a single block, text in front

    def _kind(self, name: str) -> BlockKind:
        for kind in self.kinds:
            if kind.kind == name:
                return kind
        raise ValueError(f"{self.name} has no {name}, but {', '.join(kind.kind for kind in self.kinds)}")


def double_blocks(modules: str, *streams: str) -> tuple[BlockKind, ...]:
    """Blocks of one kind only. `modules` is the transformer's list of them."""
    return (BlockKind("double_block", modules, streams),)


def double_and_single_blocks() -> tuple[BlockKind, ...]:
    """FLUX's two kinds: img and txt apart, then joined in img, text first."""
    return (*double_blocks("double_blocks", "img", "txt"), BlockKind("single_block", "single_blocks", ("img",)))


def of_width(width: int, heads: int, *attentions: int) -> Build:
    """All streams have one width."""
    return Build({"img": width, "txt": width}, heads, attentions)


def cells(size: tuple[int, ...] | Any, patch: tuple[int, ...] | Any) -> tuple[int, ...]:
    """Patches along every axis; odd sizes are padded up, as all these models do."""
    return tuple(-(-n // p) for n, p in zip(size, patch, strict=True))


def count(size: tuple[int, ...] | Any, patch: tuple[int, ...] | Any) -> int:
    """Patches in all, of a latent of this size."""
    return math.prod(cells(size, patch))


def require_latent(latent: Tensor, what: str) -> None:
    """Refuse a latent that would turn the picture black. `what` it is, for messages.

    Raises:
        ValueError: no values at all, values that are no numbers, or far larger ones than any VAE gives.
    """
    if latent.numel() == 0:
        raise ValueError(f"{what} is empty: its latent is {list(latent.shape)}. Check the image.")
    if not latent.abs().max() <= LARGEST:  # NaN too
        raise ValueError(
            f"{what} holds NaN or infinite values, or far larger ones than any VAE gives. Check the image, or the VAE "
            "that encoded it."
        )
