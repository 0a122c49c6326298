"""Sparse attention on ComfyUI's models: who may take over an attention call, and the pattern of CLEAR as one who does.

Hook: one `optimized_attention_override` per feature, on the run's own options, behind whatever was installed before.
Features do not read attention arguments themselves: `take_over` hands them an `OwnAttention`, queries, keys and values
of the picture's own tokens in one layout, and passes on to the earlier function what is no such call:

- cross-attention, attention of text alone, and every length but that of the token grid;
- keys beside the model's own, unless they are those of `host/attention.py`, which every token sees;
- masks that differ from query to query. A bias per key, as of padded text or EasyControl's influence, is kept.

A feature may pass a call on as well, by answering None.

State: `Plans`, tilings and block masks by pattern, grid and device. They are values, so they outlive the run; the four
used last are kept, and large ones only for the run.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ...models.accelerate.clear import PIXELS, TEXT, estimate, proportional_scale
from ...models.accelerate.sparse_attention import Attended, Grid, Pattern, additive, covers, kept_ratio, masked
from ...models.accelerate.sparse_attention_flex import Blocks, blocks, flex
from ...models.accelerate.sparse_attention_tiles import Tiling, tile, tiled
from .. import token_grid
from ..attention import EXTRA_KEYS
from ..compiled import untraced
from ..families import FAMILIES, family_of, flux
from ..offers import Offer, ask, offer
from ..part_of_run import WHOLE_RUN, PartOfRun
from ..run import KEY, Run, attached
from ..run import attach as attach_description
from ..transformer import core_name, stranger, transformer_of

logger = logging.getLogger(__name__)

OVERRIDE = "optimized_attention_override"
KEPT_PLANS, KEPT_BYTES = 4, 64 << 20
MASKED_AT_MOST = 4608 * 4608  # pairs for which a whole mask may be made, where tiles save nothing
TILES_WORTH = 0.55  # of the pairs: with more, tiles are slower than dense attention (measured on a CPU)

Scale = Literal["as trained", "log-proportional"]
Block = tuple[str, int]  # ("double" or "single", number)


@dataclass(frozen=True, eq=False)
class OwnAttention:
    """One attention call over the picture's own tokens.

    q: `[B, H, L, d]`. k, v: `[B, H, L + extra, d]`, rotated.
    bias: added to the logits of every key, `[B or 1, H or 1, 1, L + extra]`, or None.
    scale: factor on the logits that the model asks for, or None for `d^-1/2`.
    layer: names the attention within the model; its first two entries are block type and number where known.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    scale: float | None
    grid: Grid
    layer: tuple[Hashable, ...]
    options: dict  # transformer_options

    @property
    def extra(self) -> int:
        return self.k.shape[2] - self.q.shape[2]


Attend = Callable[[OwnAttention], Tensor | None]


def take_over(model_options: dict, attend: Attend, passed_on: Callable[[str], None] | None = None) -> None:
    """Have `attend` answer the attention of the picture's own tokens in this run, `[B, H, L, d]`, or None to pass on.

    Args:
        passed_on: told in words why a call of self-attention was not offered to `attend`.
    """
    token_grid.install(model_options)
    options = model_options["transformer_options"]
    earlier = options.get(OVERRIDE)

    @untraced  # what it finds in the options changes from call to call
    def override(func: Callable, *args: Any, **kwargs: Any) -> Tensor:
        ask(kwargs.get("transformer_options") or {}, "attention override")
        found = own_attention(args, kwargs)
        answer = attend(found) if isinstance(found, OwnAttention) else None
        if answer is not None:
            return answer if kwargs.get("skip_output_reshape") else answer.transpose(1, 2).flatten(2)
        if isinstance(found, str) and passed_on is not None:
            passed_on(found)
        return func(*args, **kwargs) if earlier is None else earlier(func, *args, **kwargs)

    options[OVERRIDE] = override


OTHER_LENGTH = "self-attention of another length than the picture's"


def own_attention(args: tuple, kwargs: dict) -> OwnAttention | str | None:
    """The arguments of ComfyUI's attention in one layout; a reason in words, or None for attention of other tokens."""
    options = kwargs.get("transformer_options") or {}
    tokens: token_grid.Tokens | None = options.get(token_grid.TOKENS)
    if tokens is None or not tokens.grids:
        return "" if tokens is None else tokens.reason
    given = dict(zip(("q", "k", "v", "heads", "mask", "attn_precision", "skip_reshape"), args, strict=False)) | kwargs
    heads, reshaped = given["heads"], given.get("skip_reshape", False)
    q, k, v = (_by_head(given[name], heads, reshaped) for name in "qkv")

    length, keys = q.shape[2], k.shape[2]
    grid = tokens.grid(length)
    if keys < length:
        return None
    if grid is None:  # Flux KV Cache takes the references out after the first evaluation
        return OTHER_LENGTH if length >= min(each.picture for each in tokens.grids) else None
    layer = tokens.layer(options)
    if keys - length != extra_keys(options):
        # Cross-attention to a text longer than the picture looks the same, so no reason is given.
        return None
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    bias = key_bias(given.get("mask"), q, keys)
    if isinstance(bias, str):
        return bias
    return OwnAttention(q, k, v, bias, given.get("scale"), grid, layer, options)


def _by_head(x: Tensor, heads: int, reshaped: bool) -> Tensor:
    """`[B, H, L, d]` from that, from `[B, L, H * d]` or from `[B, L, H, d]`, which SD3 has for its values."""
    if reshaped:
        return x
    if x.ndim == 4:
        return x.transpose(1, 2)
    return x.unflatten(2, (-1, x.shape[2] // heads)).transpose(1, 2)


def extra_keys(options: dict) -> int:
    """How many keys `host/attention.py` has put behind those of the block that is running."""
    block = (options.get("block_type", ""), options.get("block_index", -1))
    given = [keys.conditions for keys in options.get(EXTRA_KEYS, ())]
    return sum(parts[0][block][0].shape[2] for parts in given if all(block in part for part in parts))


def key_bias(mask: Tensor | None, q: Tensor, keys: int) -> Tensor | str | None:
    """What a mask adds to the logits of each key, `[B or 1, H or 1, 1, keys]`, or in words why it is none such.

    Args:
        mask: as ComfyUI has it: `[Lq, keys]`, `[B, Lq, keys]` or `[B, H, Lq, keys]`, additive or bool.
    """
    if mask is None:
        return None
    if mask.ndim == 2:
        mask = mask[None]
    if mask.ndim == 3:
        mask = mask[:, None]
    if mask.ndim != 4 or mask.shape[-1] != keys or mask.shape[0] not in (1, q.shape[0]):
        return "an attention mask has an unknown shape"
    if mask.shape[1] not in (1, q.shape[1]):
        return "an attention mask has an unknown shape"
    if mask.shape[2] != 1 and mask.stride(2) != 0:
        return "an attention mask differs from query to query"
    mask = mask[:, :, :1]
    return additive(mask, q.dtype) if mask.dtype == torch.bool else mask


class Plans:
    """Tilings and block masks, the last few that were used."""

    def __init__(self, count: int = KEPT_PLANS, size: int = KEPT_BYTES):
        self.count, self.size = count, size
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()  # with several GPUs, conditions run in threads

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        with self._lock:
            plan = self._kept.pop(key, None) or make()
            self._kept[key] = plan
            while len(self._kept) > self.count:
                self._kept.popitem(last=False)
            return plan

    def drop_large(self) -> None:
        """Give back what is too large to be kept while nothing runs."""
        with self._lock:
            for key in [key for key, plan in self._kept.items() if plan.size > self.size]:
                del self._kept[key]

    def __len__(self) -> int:
        return len(self._kept)


PLANS = Plans()


@dataclass
class Backend:
    """Computes patterns during one run. FlexAttention where it can be had, tiles where not, or once it has failed."""

    plans: Plans = field(default_factory=lambda: PLANS)
    failed: str = ""  # why FlexAttention is not used any more
    used: Counter[str] = field(default_factory=Counter)

    def attend(
        self,
        call: OwnAttention,
        pattern: Pattern,
        *,
        scale: float | None = None,
        weight: Tensor | None = None,
        with_lse: bool = False,
    ) -> Attended:
        """Attention of one call under `pattern`.

        Args:
            scale: factor on the logits; None is the model's own.
            weight: of pooled cells, `[f, f]`; None is the mean.
        """
        settings: dict[str, Any] = {
            "scale": call.scale if scale is None else scale,
            "bias": call.bias,
            "weight": weight,
            "with_lse": with_lse,
        }
        device, grid = call.q.device, call.grid
        if has_flex(device) and not self.failed:
            try:
                key = (pattern, grid, device, call.extra)
                plan: Blocks = self.plans.get(key, lambda: blocks(pattern, grid, call.extra, device))
                result = flex(call.q, call.k, call.v, plan, **settings)
            except comfy.model_management.OOM_EXCEPTION:
                raise
            except Exception as error:  # compilers fail in many ways; the tiles give the same result
                self.failed = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                logger.warning("FlexAttention failed (%s). Sparse attention goes on in tiles, slower.", self.failed)
            else:
                self.used["FlexAttention"] += 1
                return result

        tiling: Tiling = self.plans.get((pattern, grid, device), lambda: tile(pattern, grid, device))
        if not worth_tiles(tiling, call.extra) and grid.length * call.k.shape[2] <= MASKED_AT_MOST:
            self.used["dense with a mask"] += 1
            return masked(call.q, call.k, call.v, pattern, grid, **settings)
        self.used["tiles"] += 1
        return tiled(call.q, call.k, call.v, tiling, **settings)


def has_flex(device: torch.device) -> bool:
    """Whether FlexAttention may be tried there. On a CPU it compiles as well, for longer than the tiles take."""
    return device.type == "cuda"


def worth_tiles(tiling: Tiling, extra: int) -> bool:
    """Whether tiles compute few enough pairs to be faster than dense attention."""
    grid = tiling.grid
    pairs = tiling.pairs + grid.length * (grid.globals + extra) + grid.globals * grid.picture
    return pairs <= TILES_WORTH * grid.length * (grid.length + extra)


@dataclass(frozen=True, eq=False)
class SparseAttention:
    """One pattern in the attention of every layer. Neutral: a window that covers the whole picture,
    without pooled keys and with the model's own scale.

    min_tokens: shorter attention, text included, stays dense.
    scale: "log-proportional" for pictures larger than those of the training.
    cells: weights of pooled cells by block, `[f, f]`; blocks that are not in it take the mean.
    layers: blocks that are sparse; None for all.
    part: of the run that it acts in.
    """

    name: str  # for the log
    pattern: Pattern
    min_tokens: int = 4096
    scale: Scale = "as trained"
    part: PartOfRun = WHOLE_RUN
    cells: Mapping[Block, Tensor] = field(default_factory=dict)
    layers: frozenset[Block] | None = None

    def __post_init__(self):
        if self.min_tokens < 0:
            raise ValueError(f"min_tokens must be at least 0, got {self.min_tokens}.")
        if self.scale not in get_args(Scale):
            raise ValueError(f"scale must be one of {', '.join(get_args(Scale))}, got '{self.scale}'.")

    def bind(self, run: Run, model_options: dict) -> None:
        sparse = Sparse(self)
        take_over(model_options, sparse.attend, sparse.passed_on)
        for kind, wrapper in (
            (WrappersMP.APPLY_MODEL, sparse.apply_model),
            (WrappersMP.SAMPLER_SAMPLE, sparse.sampler_sample),
        ):
            add_wrapper_with_key(kind, KEY, wrapper, model_options, is_model_options=True)

    def neutral(self, grid: Grid) -> bool:
        """Whether this is the model's own attention: all pairs are kept, under its own scale, and no keys are added."""
        return covers(self.pattern, grid) and not self.pattern.pool and self.scale == "as trained"


class Sparse:
    """A pattern during one run."""

    def __init__(self, settings: SparseAttention):
        self.settings = settings
        self.backend = Backend()
        self.dense: Counter[str] = Counter()  # calls that stayed dense, by reason
        self.seen: dict[Grid, float] = {}  # kept share of the pairs
        self.active = f"dit_toolkit.sparse.{id(self)}"

    def sampler_sample(self, executor, *args, **kwargs):
        """SAMPLER_SAMPLE: say once what was done, however the run ends."""
        try:
            return executor(*args, **kwargs)
        finally:
            logger.info("%s: %s", self.settings.name, self.summary())
            self.backend.plans.drop_large()

    def apply_model(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **conds
    ):
        """APPLY_MODEL: whether the pattern acts in this call."""
        acts = self.settings.part.includes(float(t.flatten()[0]), executor.class_obj.model_sampling)
        options = {**(transformer_options or {}), self.active: acts}
        if acts:
            options = offer(options, Offer(self.settings.name, "attention override"))
        return executor(x, t, c_concat, c_crossattn, control, options, **conds)

    def attend(self, call: OwnAttention) -> Tensor | None:
        """One attention call, or None where it stays dense."""
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
        return self.backend.attend(call, settings.pattern, scale=scale, weight=weight).out

    def passed_on(self, reason: str) -> None:
        if reason:
            self.dense[reason] += 1

    def summary(self) -> str:
        """What was sparse, by which backend, what was not and why."""
        parts = [
            f"{grid.length} tokens ({grid.frames} x {grid.height} x {grid.width}), {share:.1%} of the pairs"
            for grid, share in self.seen.items()
        ]
        parts += [f"{count} calls by {name}" for name, count in self.backend.used.items()]
        parts += [f"FlexAttention failed: {self.backend.failed}"] if self.backend.failed else []
        parts += [f"{count} calls stayed dense: {reason}" for reason, count in self.dense.items()]
        return "; ".join(parts) or "no attention of the picture's tokens was seen"


def attach(model: ModelPatcher, settings: SparseAttention) -> ModelPatcher:
    """A clone of `model` whose attention follows the pattern.

    Raises:
        ValueError: it follows one already.
    """
    if any(isinstance(other, SparseAttention) for other in attached(model)):
        raise ValueError(f"{settings.name}: the model's attention is sparse already. Remove one of the two nodes.")
    return attach_description(model, settings)


def require_known_tokens(model: ModelPatcher, node: str) -> None:
    """Refuse models of which it is not known where their tokens are. `node` is the display name of who asks.

    Raises:
        ValueError: such a model.
    """
    if family_of(model).grids is not None:
        return
    who = stranger(model)
    if who is not None:
        raise ValueError(Offer(node, "attention override").refused_by(who))
    *known, last = (family.listed or family.name for family in FAMILIES if family.grids is not None and family.tested)
    raise ValueError(
        f"{node} does not know where the picture's tokens are in a {core_name(model)} model. It works with "
        f"{', '.join(known)} and {last}."
    )


SIDES = (1024, 1536, 2048, 4096)  # pixels, in the report


def report(model: ModelPatcher, settings: SparseAttention) -> str:
    """What the pattern keeps and can save for square pictures, a line per size, for people.

    Which sizes stay dense is in `settings.min_tokens`, which is 0 where none does.
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
