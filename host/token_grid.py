"""Where the picture's tokens are in the attention of the model call that is running.

Hook: an APPLY_MODEL wrapper, the one hook that every model has (SD3 has no other), puts `Tokens` into
transformer_options. The grid follows from the latent's size, the live model's patch size and the call's other
arguments, never from a number of tokens. Attention of any other length is not the picture's.

The families in `host/families/` say in which order tokens come. Unknown: models that we have not studied, and
subclasses with a forward pass of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ..models.accelerate.sparse_attention import Grid
from .families import family_of
from .run import KEY
from .transformer import transformer_of

TOKENS = "dit_toolkit.tokens"  # in transformer_options: the Tokens of the call


@dataclass(eq=False)
class Tokens:
    """One call of the model.

    grids: one for every kind of attention that has the picture's tokens; none if the family is unknown.
    reason: why there are none, for people.
    """

    grids: tuple[Grid, ...]
    reason: str = ""
    _seen: Counter[Hashable] = field(default_factory=Counter)

    def grid(self, length: int) -> Grid | None:
        """The grid of an attention over this many tokens."""
        return next((grid for grid in self.grids if grid.length == length), None)

    def layer(self, options: dict) -> Hashable:
        """A name for the attention that asks, the same in every call of the model.

        Block type and number if the family tells them, then how often that block asked before. For families that tell
        nothing (SD3, CogVideoX, LTX) this is a plain count, so a name holds only while every block runs.
        """
        block = (options.get("block_type", ""), options.get("block_index", -1))
        self._seen[block] += 1
        return (*block, self._seen[block] - 1)


def install(model_options: dict) -> None:
    """Put `Tokens` into every call of this run. Later calls change nothing."""
    wrappers = model_options["transformer_options"].get("wrappers", {})
    if apply_model not in wrappers.get(WrappersMP.APPLY_MODEL, {}).get(KEY, ()):
        add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, apply_model, model_options, is_model_options=True)


def apply_model(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **conds):
    """APPLY_MODEL: tell attention where the picture's tokens are."""
    options = {**(transformer_options or {}), TOKENS: tokens(executor.class_obj.diffusion_model, x, c_crossattn, conds)}
    return executor(x, t, c_concat, c_crossattn, control, options, **conds)


def tokens(transformer: Any, x: Tensor, context: Tensor | None, conds: dict) -> Tokens:
    """Where the picture's tokens are in a call of `transformer`.

    Args:
        x: the latent, `[B, C, (frames,) h, w]`.
        context: the text, `[B, T, D]`.
        conds: the other arguments of the model.
    """
    transformer, find = transformer_of(transformer), family_of(transformer).grids
    if find is None:
        return Tokens((), f"{type(transformer).__name__} is not among the families whose tokens are known")
    grids = find(transformer, x, 0 if context is None else context.shape[1], conds)
    return Tokens(grids, "" if grids else "this combination of text, references and size is not known for sure")
