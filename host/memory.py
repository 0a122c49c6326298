"""Memory that features hold: asked of ComfyUI's core before a run, and counted while it goes on.

Core makes room for a run before it loads the model (PREPARE_SAMPLING), by the shape of the latent. It knows nothing of
what features hold. So each feature opens an account when it binds to a run, with a function from shapes to bytes, and
core is told of a latent that is larger by just as many: its minimum grows by what is asked, rounded up to one more
column of the latent. What core would like to have counts pictures twice, so that grows by twice as much.

During the run a feature notes what its tensors take, at the moments when there are most of them. `Usage` keeps the
largest of these sums, so what was asked and what was held can be compared.

What is asked for are the prompts that the guider computes, in all windows and tiles that the picture is cut into, as
far as core or a feature of ours cuts it. Not known beforehand: extra passes of guidance nodes, tiles of other packs.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
from comfy.context_windows import IndexListContextHandler
from comfy.model_patcher import ModelPatcher
from comfy.samplers import CFGGuider

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]  # of a latent, [B, C, (frames,) h, w]
Prompt = Mapping[str, Any]  # a prompt as core's guiders hold it: "cross_attn", "reference_latents", ...
Prompts = Mapping[str, Sequence[Prompt]]  # by the guider's name for them
Reshape = Callable[[Shape, Prompts], Shape]


@dataclass(frozen=True)
class Bytes:
    """kept: on the model's device, from block to block or from evaluation to evaluation. work: there too, for a part of
    a call, beside the work that core reckons with. main: in main memory, of which core is not asked."""

    kept: int = 0
    work: int = 0
    main: int = 0

    @property
    def device(self) -> int:
        return self.kept + self.work

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(self.kept + other.kept, self.work + other.work, self.main + other.main)

    def most(self, other: Bytes) -> Bytes:
        """The larger of each."""
        return Bytes(max(self.kept, other.kept), max(self.work, other.work), max(self.main, other.main))


@dataclass(eq=False)
class Usage:
    """What one feature asked for in one run, and the most that it held at any time. Work is asked for, not counted."""

    asked: Bytes = Bytes()
    held: Bytes = Bytes()

    def hold(self, now: Bytes) -> None:
        """Note what is held now, counted from tensors."""
        self.held = self.held.most(now)

    def __str__(self) -> str:
        text = f"{in_mib(self.asked.device)} asked for, {in_mib(self.held.device)} held at most"
        return f"{text}, and {in_mib(self.held.main)} of main memory" if self.held.main else text


@dataclass(frozen=True, eq=False)
class Plan:
    """What is known of a run before it starts.

    model: the MODEL that core is about to load.
    prompts: those that the guider computes, by its names.
    pieces: shapes of the latents that each prompt is computed for in one evaluation, and how many there are of each.
    at_once: how many of them are side by side in one call of the model.
    again: prompts with which features of ours call the model once more.
    """

    model: ModelPatcher
    prompts: Prompts
    pieces: Mapping[Shape, int]
    at_once: int = 1
    again: Sequence[Prompt] = ()

    @property
    def every(self) -> list[Prompt]:
        return [prompt for prompts in self.prompts.values() for prompt in prompts]

    def in_all(self, size: Callable[[Shape, Prompt], int], *, again: bool = False) -> int:
        """The sum over all prompts and pieces: of what is kept for each condition. `again`: those of such calls too."""
        prompts = [*self.every, *(self.again if again else ())]
        return sum(count * size(piece, prompt) for prompt in prompts for piece, count in self.pieces.items())

    def in_a_call(self, size: Callable[[Shape, Prompt], int]) -> int:
        """The sum over what goes into the largest call, which has all prompts side by side."""
        return sum(self.at_once * max(size(piece, prompt) for piece in self.pieces) for prompt in self.every)


@dataclass(frozen=True, eq=False)
class Account:
    """feature: as people call it. ask: from a plan to bytes. reported: the feature's own report tells the usage."""

    feature: str
    ask: Callable[[Plan], Bytes]
    usage: Usage
    reported: bool


class Memory:
    """The accounts of one run.

    whole: shape of the latent that is sampled; None if the run has none. guider: whose prompts it computes.
    """

    def __init__(self, whole: Sequence[int] | None = None, guider: Any = None):
        self.whole = None if whole is None else tuple(whole)
        self.guider = guider
        self.accounts: list[Account] = []
        self.reshapes: list[tuple[str, Reshape]] = []
        self.reshaped: list[str] = []  # what became of the latent, in words
        self.tiles: tuple[int, tuple[int, int], int] | None = None
        self.calls: list[Callable[[Plan], Sequence[Prompt]]] = []

    def open(
        self, feature: str, ask: Callable[[Plan], Bytes], usage: Usage | None = None, *, reported: bool = False
    ) -> Usage:
        """An account for this run. `usage`: where it is kept, if a report has a place for it."""
        self.accounts.append(Account(feature, ask, usage or Usage(), reported))
        return self.accounts[-1].usage

    def reshape(self, feature: str, change: Reshape) -> None:
        """Have core reckon with another latent than the sampler's, for its own work."""
        self.reshapes.append((feature, change))

    def cut(self, count: int, size: tuple[int, int], at_once: int) -> None:
        """A feature cuts the picture into `count` tiles of this height and width, `at_once` in one call."""
        self.tiles = count, size, at_once

    def call_again(self, which: Callable[[Plan], Sequence[Prompt]]) -> None:
        """A feature calls the model once more, for `which` prompts of a plan, with all that acts in blocks."""
        self.calls.append(which)

    def prepare(self, executor, model: ModelPatcher, noise_shape, conds, *args, **kwargs):
        """PREPARE_SAMPLING: ask core for what all features will hold together."""
        options = kwargs.get("model_options") or {}
        for feature, change in self.reshapes:
            before, noise_shape = tuple(noise_shape), change(tuple(noise_shape), conds)
            self.reshaped.append(f"{feature} room for {in_words(noise_shape)} in place of {in_words(before)}")
        plan = self.plan(model, tuple(noise_shape), conds, options)
        plan = replace(plan, again=[prompt for which in self.calls for prompt in which(plan)])
        for account in self.accounts:
            asked = account.ask(plan)  # settings may be numbers of numpy, which no report can write down
            account.usage.asked = Bytes(int(asked.kept), int(asked.work), int(asked.main))
        more = sum(account.usage.asked.device for account in self.accounts)
        shape = larger(model.model, noise_shape, more) if more else noise_shape
        return executor(model, shape, conds, *args, **kwargs)

    def plan(self, model: ModelPatcher, shape: Shape, conds: Prompts, options: Mapping[str, Any]) -> Plan:
        whole = self.whole or shape
        prompts = computed(self.guider, conds, options)
        if self.tiles is not None:
            count, size, at_once = self.tiles
            return Plan(model, prompts, {(*whole[:-2], *size): count}, at_once)
        return Plan(model, prompts, windows(whole, options))

    def close(self) -> None:
        """Tell what features asked for that have no report, and let go of them."""
        told = [f"{each.feature} {each.usage}" for each in self.accounts if not each.reported and any_of(each.usage)]
        if told or self.reshaped:
            logger.info("Memory: %s", "; ".join([*told, *self.reshaped]))
        self.accounts.clear()
        self.reshapes.clear()
        self.calls.clear()
        self.guider = None


def any_of(usage: Usage) -> bool:
    return usage.asked != Bytes()


def computed(guider: Any, conds: Prompts, model_options: Mapping[str, Any]) -> Prompts:
    """The prompts that a guider computes: core's leaves out the negative at cfg 1. Of an unknown guider, all."""
    if getattr(type(guider), "predict_noise", None) is not CFGGuider.predict_noise:
        return conds
    off = math.isclose(guider.cfg, 1.0) and not model_options.get("disable_cfg1_optimization", False)
    return {name: conds[name] for name in (("positive",) if off else ("positive", "negative")) if name in conds}


def windows(whole: Shape, model_options: Mapping[str, Any]) -> dict[Shape, int]:
    """The latents that core's context windows make of one; the latent itself where there are none.

    Some schedules move their windows from step to step: those of the first step count.
    """
    handler = model_options.get("context_handler")
    if not isinstance(handler, IndexListContextHandler) or handler.dim >= len(whole):
        return {whole: 1}
    frames = whole[handler.dim]
    if frames <= handler.context_length:
        return {whole: 1}
    found: Counter[Shape] = Counter()
    for window in handler.context_schedule.func(frames, handler, model_options):
        anchored = handler.causal_window_fix and window[0] > 0  # core lets the frame before join the window
        found[(*whole[: handler.dim], len(window) + anchored, *whole[handler.dim + 1 :])] += 1
    return dict(found)


def larger(base: Any, shape: Sequence[int], more: int) -> list[int]:
    """A latent for which core reckons with `more` bytes than for this one, rounded up to a column."""
    share = more / max(base.memory_required(list(shape)), 1)
    return [*shape[:-1], math.ceil(shape[-1] * (1 + share))]


def item_size(model: Any) -> int:
    """Bytes of one number in the blocks of a MODEL, or of a running BaseModel.

    All clones of a MODEL share one BaseModel, which computes as the clone that was loaded last, until this one is.
    """
    if not isinstance(model, ModelPatcher):
        return comfy.model_management.dtype_size(model.get_dtype_inference())
    base: Any = model.model
    cast: Any = model.get_model_object("manual_cast_dtype")
    return comfy.model_management.dtype_size(base.get_dtype() if cast is None else cast)


def in_mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def in_words(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
