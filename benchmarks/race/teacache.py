"""TeaCache on diffusers' FLUX.1: no package has it, so it is here, after the authors' own code for FLUX.1.

Paper: arXiv:2411.19108 (ali-vilab/TeaCache, Apache-2.0). Before the blocks run, the first block's modulated input is
compared with that of the evaluation before: the mean change over the mean size. A polynomial of degree 4 makes of it
the change of the output to be expected. These are added up; while the sum stays below the threshold, all blocks are
skipped and what they added the last time is added again. The first and the last evaluation are always computed. The
authors fitted the polynomial to runs of FLUX.1-dev; `fit` does so with runs of the model at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .diffusers_flux import cached

DEGREE = 4


def change(now: Tensor, before: Tensor) -> float:
    return float((now - before).abs().mean() / before.abs().mean())


@dataclass
class State:
    """Of one of the two prompts of guidance, in one run."""

    modulated: Tensor | None = None
    total: float = 0.0
    entered: Tensor | None = None
    residual: Tensor | None = None
    skips: bool = False


class TeaCache:
    """`place.evaluations` must be known: the last evaluation is computed."""

    def __init__(self, transformer: Any, polynomial: np.ndarray, threshold: float):
        self.transformer, self.polynomial, self.threshold = transformer, np.poly1d(polynomial), threshold
        self.blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        self.states: dict[str, State] = {}

    @contextmanager
    def on(self) -> Iterator[None]:
        self.states.clear()
        for block in self.blocks:
            block.forward = self.wrapped(block, block.forward)
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward

    def wrapped(self, block: Any, forward: Any) -> Any:
        first, last = block is self.blocks[0], block is self.blocks[-1]

        def run(hidden_states, encoder_hidden_states, temb, *args, **kwargs):
            state = self.states.setdefault(self.transformer.place.prompt, State())
            if first:
                self.decide(state, block.norm1(hidden_states, emb=temb)[0])
                state.entered = hidden_states
            if state.skips:
                if first:
                    hidden_states = hidden_states + state.residual
                return encoder_hidden_states, hidden_states
            text, hidden = forward(hidden_states, encoder_hidden_states, temb, *args, **kwargs)
            if last:
                state.residual = hidden - state.entered
            return text, hidden

        return run

    def decide(self, state: State, modulated: Tensor) -> None:
        place = self.transformer.place
        if place.evaluation == 0 or place.evaluation == place.evaluations - 1 or state.modulated is None:
            state.skips, state.total = False, 0.0
        else:
            state.total += float(self.polynomial(change(modulated, state.modulated)))
            state.skips = state.total < self.threshold
            state.total = state.total if state.skips else 0.0
        state.modulated = modulated


def fit(arena: Any, heats: list, steps: int, sampler: str, cfg: float) -> np.ndarray:
    """The polynomial, highest power first: change of the modulated input to change of the model's output."""
    transformer, seen = arena.transformer, {}
    block = transformer.transformer_blocks[0]
    pairs: list[tuple[float, float]] = []

    def modulated(module, args, kwargs):
        inputs = block.norm1(kwargs["hidden_states"], emb=kwargs["temb"])[0]
        seen.setdefault(transformer.place.prompt, []).append([inputs, None])

    def output(module, args, kwargs, out):
        line = seen[transformer.place.prompt]
        line[-1][1] = out[0]
        if len(line) > 1:
            (before, came), (now, comes) = line[-2:]
            pairs.append((change(now, before), change(comes, came)))

    hooks = [
        block.register_forward_pre_hook(modulated, with_kwargs=True),
        transformer.register_forward_hook(output, with_kwargs=True),
    ]
    try:
        for heat in heats:
            seen.clear()
            arena.sample(cached(arena.twin, nullcontext, transformer.place), heat, steps, sampler, cfg)
    finally:
        for hook in hooks:
            hook.remove()
    changes, wanted = np.array(pairs).T
    return np.polyfit(changes, wanted, DEGREE)


def unpacked(tokens: Tensor, ids: Tensor) -> Tensor:
    """Latents `[C, 1, h, w]`, as FLUX.1's tokens `[1, n, 4 C]` with their position ids `[n, 3]` mean them."""
    rows, columns = (int(n) + 1 for n in torch.round(ids[:, 1:].amax(0)))
    picture = tokens[0].unflatten(0, (rows, columns)).unflatten(-1, (-1, 2, 2))
    return picture.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)[:, None]
