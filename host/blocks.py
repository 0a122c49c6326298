"""Blocks of a model: wrapping them for one run, and telling attention which one it is in.

For features that skip blocks or replace them, through ComfyUI's `patches_replace["dit"]`. The key of a block there is
its `BlockKey`: ("double_block", 3). ComfyUI calls `replacement(args, {"original_block": run})`, which returns a dict.
The entries that change from block to block are the *streams*, see `Family.streams`. All others are the same for every
block of a kind, except Chroma's `vec`. To skip a block, return its `args`. The families in `host/families/` say which
blocks a model has and what flows between them.

Code between two blocks, such as ControlNet's, runs after skipped blocks too. It adds its residual **in place** to the
tensor that a block returned. So:

- clone what you keep: args before the block runs, its result before you return it;
- never return a tensor that you keep, return a clone;
- record and inject in the same block, the last of the wrapped ones: the residual is then added both times.

A feature that computes a block itself takes the place of the block (`replace_block`), inside all wraps. So a wrap that
skips the block skips the feature too, and a wrap that reads the block's result reads the feature's.

Limit: SkipLayerGuidance puts its own replacements over ours for one more pass of the model. In that pass, ComfyUI does
not call our wraps of those blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from comfy.model_patcher import ModelPatcher, set_model_options_patch_replace

from .compiled import untraced
from .families import family_of
from .families.family import BlockArgs, BlockKey
from .transformer import transformer_of

RunBlock = Callable[[BlockArgs], dict[str, Any]]
Wrap = Callable[[BlockArgs, RunBlock], dict[str, Any]]


def wrap_block(model_options: dict, key: BlockKey, wrap: Wrap) -> None:
    """Run `wrap(args, run_block)` in place of block `key`, around whatever replaces it already.

    Args:
        model_options: the run's own, changed here; dicts that others may share are copied first.
        wrap: gets the block's args and the function that runs the block, or the earlier replacement. Returns what the
            block returns. The last wrap is the outermost. torch.compile never traces it, but traces the functions that
            it calls, see `untraced`.
    """
    untraced(wrap)
    earlier = model_options["transformer_options"].get("patches_replace", {}).get("dit", {}).get(key)

    @untraced
    def replacement(args: BlockArgs, extra: dict[str, Any]) -> dict[str, Any]:
        if earlier is None:
            return wrap(args, extra["original_block"])
        return wrap(args, lambda inner: earlier(inner, extra))

    set_model_options_patch_replace(model_options, replacement, "dit", *key)


def replace_block(model_options: dict, key: BlockKey, run: Wrap) -> None:
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
    """Tell attention the block it is in, for families that do not. Skipped blocks then shift no number."""
    family = family_of(model)
    if family.numbered:
        return
    for key in family.block_keys(transformer_of(model)):
        wrap_block(model_options, key, numbered(key))


def numbered(key: BlockKey) -> Wrap:
    """A block wrap that puts type and number into transformer_options."""
    kind, index = key

    def wrap(args: BlockArgs, run_block: RunBlock) -> dict[str, Any]:
        block = {"block_type": kind.removesuffix("_block"), "block_index": index}
        if "transformer_options" not in args:  # another pack's forward pass, see `host/offers.py`
            return run_block(args)
        return run_block({**args, "transformer_options": {**args["transformer_options"], **block}})

    return wrap
