"""CLEAR on ComfyUI's models: one sparse pattern in the attention of every layer, its settings and its run.

`own_attention.py` hands over the calls, `sparse_backends.py` computes them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ...models.accelerate.clear import PIXELS, TEXT, estimate, proportional_scale
from ...models.accelerate.sparse_attention import Grid, Pattern, covers, kept_ratio
from ..families import flux
from ..offers import Offer, offer
from ..part_of_run import WHOLE_RUN, PartOfRun
from ..run import KEY, Run, attached
from ..run import attach as attach_description
from ..transformer import Block, transformer_of
from .own_attention import OwnAttention, take_over
from .sparse_backends import KEPT_PAIRS, UNABLE, Backend

logger = logging.getLogger(__name__)

Scale = Literal["as trained", "log-proportional"]


@dataclass(frozen=True, eq=False)
class SparseAttention:
    """One pattern in the attention of every layer. Neutral: a window that covers the whole picture,
    without pooled keys and with the model's own scale.

    min_tokens: shorter attention, text included, stays dense.
    scale: "log-proportional" for pictures larger than those of the training.
    cells: weights of pooled cells by block, `[f, f]`; other blocks take the mean.
    layers: the sparse blocks; None for all.
    part: the part of the run with the pattern.
    """

    name: str  # for the log
    pattern: Pattern
    min_tokens: int = 4096
    scale: Scale = "as trained"
    part: PartOfRun = WHOLE_RUN
    cells: Mapping[Block, Tensor] = field(default_factory=dict)
    layers: frozenset[Block] | None = None

    sparse_attention = True  # see `attention.makes_sparse`

    def __post_init__(self):
        if self.min_tokens < 0:
            raise ValueError(f"min_tokens must be at least 0, got {self.min_tokens}.")
        if self.scale not in get_args(Scale):
            raise ValueError(f"scale must be one of {', '.join(get_args(Scale))}, got '{self.scale}'.")

    def neutral(self, grid: Grid) -> bool:
        """Whether this is the model's own attention: all pairs, its own scale, no added keys."""
        return covers(self.pattern, grid) and not self.pattern.pool and self.scale == "as trained"


class Sparse:
    """A pattern during one run."""

    def __init__(self, settings: SparseAttention, run: Run):
        self.settings, self.run = settings, run
        self.backend = Backend(run)
        self.dense: Counter[str] = Counter()  # calls that stayed dense, by reason
        self.seen: dict[Grid, float] = {}  # kept share of the pairs
        self.active = f"dit_toolkit.sparse.{id(self)}"

    def sampler_sample(self, executor, *args, **kwargs):
        """SAMPLER_SAMPLE: write one line to the log, however the run ends."""
        try:
            return executor(*args, **kwargs)
        finally:
            logger.info("%s: %s", self.settings.name, self.summary())

    def apply_model(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **conds
    ):
        """APPLY_MODEL: whether the pattern acts in this call."""
        acts = self.run.in_part(self.settings.part, executor.class_obj.model_sampling)
        options = {**(transformer_options or {}), self.active: acts}
        if acts:
            options = offer(options, Offer(self.settings.name, "attention override"))
        return executor(x, t, c_concat, c_crossattn, control, options, **conds)

    def attend(self, call: OwnAttention) -> Tensor | None:
        """One attention call, or None if it stays dense."""
        settings, grid = self.settings, call.grid
        block = call.layer[:2]
        if not call.options.get(self.active, False) or (settings.layers is not None and block not in settings.layers):
            return None
        if grid.length < settings.min_tokens:
            return self.passed_on(f"{grid.length} tokens are fewer than min_tokens")
        if settings.neutral(grid):
            return self.passed_on("the window covers the whole picture")
        scale = None
        if settings.scale == "log-proportional":
            scale = proportional_scale(grid.length, call.q.shape[-1], bool(settings.pattern.pool))
        if grid not in self.seen:
            self.seen[grid] = kept_ratio(settings.pattern, grid)
        weight = settings.cells.get(block)  # type: ignore[arg-type]
        if weight is not None:
            weight = self.run.seen(weight, {}, call.q.device)
        return self.backend.attend(call, settings.pattern, scale=scale, weight=weight).out

    def passed_on(self, reason: str) -> None:
        if reason:
            self.dense[reason] += 1

    def summary(self) -> str:
        """One line: which calls were sparse, by which backend, and why others were not."""
        parts = [
            f"{grid.length} tokens ({grid.frames} x {grid.height} x {grid.width}), {share:.1%} of the pairs"
            for grid, share in self.seen.items()
        ]
        parts += [f"{count} calls by {name}" for name, count in self.backend.used.items()]
        parts += [f"FlexAttention does not compile here: {UNABLE[KEPT_PAIRS]}"] if KEPT_PAIRS in UNABLE else []
        parts += [f"{count} calls stayed dense: {reason}" for reason, count in self.dense.items()]
        return "; ".join(parts) or "no attention of the picture's tokens was seen"


def bind(settings: SparseAttention, run: Run, model_options: dict) -> None:
    sparse = Sparse(settings, run)
    take_over(model_options, sparse.attend, sparse.passed_on)
    for kind, wrapper in (
        (WrappersMP.APPLY_MODEL, sparse.apply_model),
        (WrappersMP.SAMPLER_SAMPLE, sparse.sampler_sample),
    ):
        add_wrapper_with_key(kind, KEY, wrapper, model_options, is_model_options=True)


def attach(model: ModelPatcher, settings: SparseAttention) -> ModelPatcher:
    """A clone of `model` whose attention follows the pattern.

    Raises:
        ValueError: it follows a pattern already.
    """
    if any(isinstance(other, SparseAttention) for other in attached(model)):
        raise ValueError(f"{settings.name}: the model's attention is sparse already. Remove one of the two nodes.")
    return attach_description(model, settings, bind)


SIDES = (1024, 1536, 2048, 4096)  # pixels, in the report


def report(model: ModelPatcher, settings: SparseAttention) -> str:
    """The share of pairs that the pattern keeps, and the speed-up it allows, for square pictures; a line per size.

    Sizes below `settings.min_tokens` stay dense; 0 leaves none dense.
    """
    pattern = settings.pattern
    lines = [f"{pattern}, scale {settings.scale}"]
    if not flux.is_flux1(model):
        return lines[0] + "\nThe log says after each run how many pairs were kept."
    for side in SIDES:
        at = estimate(pattern, side, transformer_of(model).hidden_size)
        tokens = (side // PIXELS) ** 2 + TEXT
        if tokens < settings.min_tokens:
            lines.append(f"{side} px: dense, {tokens} tokens are fewer than min_tokens")
            continue
        lines.append(
            f"{side} px: {at.ratio:.1%} of the pairs kept, the whole model at most {at.speedup:.2f}x as fast "
            f"({at.limit:.2f}x if attention were free)"
        )
    return "\n".join(lines)
