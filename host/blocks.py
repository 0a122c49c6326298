"""Blocks of a model: wrapping them for one run, and telling attention which one it is in.

For features that skip blocks, or put something else in their place, through ComfyUI's `patches_replace["dit"]`. A
block is named by its `Key`, as there: ("double_block", 3). It is called as `replacement(args, {"original_block": run})`
and returns a dict. What changes from block to block, the *streams*, are the entries that `Family.streams` names; all
else in `args` is the same for every block of a kind, Chroma's `vec` excepted. To skip a block is to return its `args`.
Which blocks a model has, and what flows between them, its family says: see `host/families/`.

What runs between two blocks runs after skipped ones too, and adds its residual **in place** to the tensor a block
returned. So:

- clone what is to be kept: args before the block runs, its result before it is returned;
- never return a tensor that is kept, return a clone of it;
- record and inject at the same place, in the last of the wrapped blocks: the residual is then added both times.

A feature that computes a block itself takes the place of the block (`replace_block`), inside of all wraps: whoever
skips the block skips it, whoever looks at what comes out of it sees what the feature made.

Limit: guidance that skips layers (SkipLayerGuidance) puts its own replacements over ours for one more pass of the
model: in that pass, wraps of those blocks are not called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from comfy.model_patcher import ModelPatcher, set_model_options_patch_replace

from .compiled import untraced
from .families import family_of
from .families.family import BlockArgs, Key
from .transformer import transformer_of

RunBlock = Callable[[BlockArgs], dict[str, Any]]
Wrap = Callable[[BlockArgs, RunBlock], dict[str, Any]]


def wrap_block(model_options: dict, key: Key, wrap: Wrap) -> None:
    """Run `wrap(args, run_block)` in place of block `key`, around whatever replaces it already.

    Args:
        model_options: those of the run, which are changed; dicts that others may share are copied first.
        wrap: gets the block's args and what runs it, or the replacement that was there before. Returns what the
            block returns. The last one to come is the outermost. It is never traced by torch.compile; functions
            that it calls are, see `untraced`.
    """
    untraced(wrap)
    earlier = model_options["transformer_options"].get("patches_replace", {}).get("dit", {}).get(key)

    @untraced
    def replacement(args: BlockArgs, extra: dict[str, Any]) -> dict[str, Any]:
        if earlier is None:
            return wrap(args, extra["original_block"])
        return wrap(args, lambda inner: earlier(inner, extra))

    set_model_options_patch_replace(model_options, replacement, "dit", *key)


def replace_block(model_options: dict, key: Key, run: Wrap) -> None:
    """Run `run(args, run_block)` where block `key` itself would run, inside of all wraps, whenever they came.

    Args:
        model_options: those of the run, see `wrap_block`.
        run: gets the block's args and what runs the block. Returns what the block returns.
    """
    untraced(run)
    earlier = model_options["transformer_options"].get("patches_replace", {}).get("dit", {}).get(key)

    @untraced
    def replacement(args: BlockArgs, extra: dict[str, Any]) -> dict[str, Any]:
        def block(inner: BlockArgs) -> dict[str, Any]:
            return run(inner, extra["original_block"])

        return block(args) if earlier is None else earlier(args, {**extra, "original_block": block})

    set_model_options_patch_replace(model_options, replacement, "dit", *key)


def skips_middle_blocks(description: object) -> bool:
    """Whether a description on a MODEL has blocks run behind others that it skips, as Delta-DiT does."""
    return getattr(description, "skips_middle_blocks", False)


def number_blocks(model: ModelPatcher, model_options: dict) -> None:
    """Tell attention the block it is in, for families that do not. Who skips blocks then confuses nobody."""
    family = family_of(model)
    if family.numbered:
        return
    for key in family.keys(transformer_of(model)):
        wrap_block(model_options, key, numbered(key))


def numbered(key: Key) -> Wrap:
    """A block wrap that puts type and number into transformer_options."""
    kind, index = key

    def wrap(args: BlockArgs, run_block: RunBlock) -> dict[str, Any]:
        block = {"block_type": kind.removesuffix("_block"), "block_index": index}
        if "transformer_options" not in args:  # somebody else's forward pass: `host/offers.py` has a word for it
            return run_block(args)
        return run_block({**args, "transformer_options": {**args["transformer_options"], **block}})

    return wrap
