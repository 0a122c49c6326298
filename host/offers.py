"""What a run hands to the blocks of its model, and whether a block asks for it.

A feature hangs what it wants on one call of the model, and waits: ComfyUI's own blocks ask for it through the attention
patch, the attention override or the block replacement. A pack that brings its own forward pass or its own blocks may
leave these hooks out. Then nobody asks, and the picture comes out as if the feature's node were not there.

So a feature says what it hands over (`offer`), and the hook says that a block has asked (`ask`). `Offers.watch` stands
around the innermost call of the model and looks at both. It raises where blocks ran and none of them asked. It raises
nothing where no block ran, because somebody had a reason for that: a step cache forecasts, EasyCache answers by itself,
layers are skipped. Once a block has asked, the feature is not watched any more in this run.

How it is seen that blocks ran: forward hooks on the live blocks, for that one call. Under torch.compile such hooks
would become part of the compiled code, so there the end of the run decides, by whether ComfyUI's code was replaced.

For a feature to come: `offer` in its APPLY_MODEL wrapper, `ask` in its hook. The rest is done here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from .compiled import untraced
from .transformer import REMOVE, Stranger, blocks_of, stranger, stranger_in_blocks, transformer_of

OFFERS = "dit_toolkit.offers"  # in transformer_options: a tuple of Offer

Block = tuple[str, int]  # ("double", 3)
Hook = Literal["attention patch", "attention override", "block replacement"]


@dataclass(eq=False)
class Offer:
    """What one feature hands to the blocks in one call of the model.

    feature: what people call it: the node's title.
    hook: by which blocks ask for it.
    blocks: the ones that it is for; None is any.
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
    """A block has come by this hook. `block` is its name, where the hook knows it."""
    for each in options.get(OFFERS, ()):
        if each.hook == hook and (block is None or each.is_for(block)):
            each.asked = True


class Offers:
    """The features of one run that a block has asked for, and those that none has asked for yet."""

    def __init__(self) -> None:
        self.taken: set[str] = set()
        self.waiting: dict[str, Offer] = {}
        self._lock = threading.Lock()  # with several GPUs, conditions run in threads

    def watch(self, executor, x, t, c_concat, c_crossattn, control, transformer_options, **conds):
        """APPLY_MODEL, inside of all features: what is handed over in this call, and what comes of it.

        Raises:
            ValueError: blocks ran, and none asked for a feature that is handed over for the first time.
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
        """At the end of a run that came to its end by itself.

        Raises:
            ValueError: nothing asked for a feature in the whole run, and ComfyUI's code is replaced in `model`.
        """
        who = stranger(model) if self.waiting.keys() - self.taken else None
        for feature, what in self.waiting.items():
            if who is not None and feature not in self.taken:
                raise ValueError(what.refused_by(who))


def found_in(base: Any) -> Stranger | None:
    """Who stands between the features and the blocks of a model that is running."""
    return stranger(base) or stranger_in_blocks(base)


@contextmanager
def running_blocks(base: Any) -> Iterator[set[Block]]:
    """The blocks of the model that run meanwhile. None are seen where the whole transformer is compiled."""
    ran: set[Block] = set()

    def note(block: Block):
        return lambda *_: ran.add(block)

    compiled = transformer_of(base) is not base.diffusion_model
    blocks = () if compiled else blocks_of(base)
    hooks = [module.register_forward_pre_hook(note(block)) for block, module in blocks]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()
