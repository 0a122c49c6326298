"""What features hand to the blocks of a model, and whether a block asks for it.

A feature hands something to one call of the model, and waits. ComfyUI's own blocks ask for it through the attention
patch, the attention override or the block replacement. Another pack's forward pass or blocks may leave these hooks out.
Then nobody asks, and the picture comes out as if the feature's node were not there.

So a feature calls `offer`, and its hook calls `ask` when a block comes by. `Offers.watch` wraps the innermost call of
the model and compares the two. It raises an error if blocks ran and none of them asked. It raises none if no block ran,
since that has a reason: a step cache forecasts, EasyCache answers by itself, a node skips layers. Once a block has
asked, the run stops watching that feature.

Forward hooks on the live blocks show which ones ran, for that one call. Under torch.compile they would become part of
the compiled code. There the end of the run decides instead: it looks whether another pack replaced ComfyUI's code.

A new feature calls `offer` in its APPLY_MODEL wrapper and `ask` in its hook. This module does the rest.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from .compiled import untraced
from .transformer import REMOVE, Block, Stranger, live_blocks, stranger, stranger_in_blocks, transformer_of

OFFERS = "dit_toolkit.offers"  # in transformer_options: a tuple of Offer

Hook = Literal["attention patch", "attention override", "block replacement", "norm"]


@dataclass(eq=False)
class Offer:
    """What one feature hands to the blocks in one call of the model.

    feature: the node's title.
    hook: the hook through which blocks ask for it.
    blocks: the blocks it is for; None is any.
    instead: what else helps, a sentence.
    """

    feature: str
    hook: Hook
    blocks: frozenset[Block] | None = None
    instead: str = ""
    asked: bool = False

    def is_for(self, block: Block) -> bool:
        return self.blocks is None or block in self.blocks

    def refused_by(self, who: Stranger | None) -> str:
        """Why the feature has no effect, for people."""
        if who is None:
            why = "the model's blocks run and do not ask for it. Another node may have replaced them."
        else:
            why = f"{who}, which leaves out what {self.feature} hands to the blocks."
        remedy = REMOVE if who is None else who.remedy
        return " ".join(part for part in (f"{self.feature} has no effect: {why}", self.instead, remedy) if part)


def offer(options: dict, what: Offer) -> dict:
    """transformer_options of one call of the model, with one more offer in them."""
    return {**options, OFFERS: (*options.get(OFFERS, ()), what)}


@untraced  # what it finds in the options changes from call to call
def ask(options: dict, hook: Hook, block: Block | None = None) -> None:
    """Note that a block came by this hook. `block` is its name, if the hook knows it."""
    for each in options.get(OFFERS, ()):
        if each.hook == hook and (block is None or each.is_for(block)):
            each.asked = True


class Offers:
    """The features of one run, by whether a block has asked for them yet."""

    def __init__(self) -> None:
        self.taken: set[str] = set()
        self.waiting: dict[str, Offer] = {}
        self._lock = threading.Lock()  # with several GPUs, conditions run in threads

    def watch(self, executor, x, t, c_concat, c_crossattn, control, transformer_options, **conds):
        """APPLY_MODEL, inside all features: compare the offers of this call with what blocks asked for.

        Raises:
            ValueError: blocks ran, and none asked for a feature that no block has asked for before.
        """
        offers = [each for each in transformer_options.get(OFFERS, ()) if each.feature not in self.taken]
        call = (x, t, c_concat, c_crossattn, control, transformer_options)
        if not offers:
            return executor(*call, **conds)
        with running_blocks(executor.class_obj) as ran:
            out = executor(*call, **conds)
            who = None if all(each.asked for each in offers) else found_in(executor.class_obj)
        for each in offers:
            self.settle(each, ran, who)
        return out

    def settle(self, what: Offer, ran: set[Block], who: Stranger | None) -> None:
        with self._lock:
            if what.asked:
                self.taken.add(what.feature)
                return
            self.waiting[what.feature] = what
        if what.feature not in self.taken and any(what.is_for(block) for block in ran):
            raise ValueError(what.refused_by(who))

    def finish(self, model: Any) -> None:
        """At the end of a run that nobody interrupted.

        Raises:
            ValueError: no block asked for a feature in the whole run, and another pack replaced code of `model`.
        """
        who = stranger(model) if self.waiting.keys() - self.taken else None
        for feature, what in self.waiting.items():
            if who is not None and feature not in self.taken:
                raise ValueError(what.refused_by(who))


def found_in(base: Any) -> Stranger | None:
    """The code between the features and the blocks of a running model."""
    return stranger(base) or stranger_in_blocks(base)


@contextmanager
def running_blocks(base: Any) -> Iterator[set[Block]]:
    """The blocks that run inside this context. It sees none if the whole transformer is compiled."""
    ran: set[Block] = set()

    def note(block: Block):
        return lambda *_: ran.add(block)

    compiled = transformer_of(base) is not base.diffusion_model
    blocks = () if compiled else live_blocks(base)
    hooks = [module.register_forward_pre_hook(note(block)) for block, module in blocks]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()
