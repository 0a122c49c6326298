"""Re-ttention during one run: which evaluations are full, what each layer remembers of them, and the limit on memory.

Hook: `optimized_attention_override`, behind all earlier ones, for the attention over the picture's own tokens as
`own_attention.py` reads it. State: rho, R and the number of computed evaluations, for each condition (`run.lane`) and
layer. A step cache that skips a layer does not call it, so only computed evaluations count. If ComfyUI does not number
the blocks (SD3, LTX), `number_blocks` does, because blocks may be skipped. The state goes with the run.

A condition's rho and R go earlier when the strength of a scheduled LoRA changes, or when more than two evaluations of
the model pass without the condition. Prompts that have ended and context windows that have moved on stay away like
this.

Each call of the model is one kind: full while all its conditions start, sparse if all of them may be, else a refresh.
The node refuses models whose attention it cannot reach, such as PixArt.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ...models.accelerate.re_ttention import (
    Kind,
    Stored,
    drifted,
    full_attention,
    full_log_sum_exp,
    kept_share,
    memory,
    reshaped,
    residual,
    restore,
    store,
    window,
)
from ...models.accelerate.sparse_attention import Pattern, covers, kept_pairs
from ...models.accelerate.sparse_attention_flex import flex_dense
from .. import token_grid
from ..blocks import number_blocks
from ..compiled import untraced
from ..families import family_of
from ..memory import Bytes, Plan, Prompt, Shape, item_size
from ..offers import Offer, ask, offer
from ..resting import Ahead, Kept, Shelf
from ..run import KEY, Chunk, Condition, Run, chunk_of
from ..transformer import transformer_of
from .own_attention import OVERRIDE, OwnAttention, own_attention
from .re_ttention_settings import ReTtention
from .sparse_backends import REFRESHES, UNABLE, Backend, by_flex, has_flex

logger = logging.getLogger(__name__)

UNUSED = 2  # evaluations that a condition may stay away, as in a step cache
WEIGHTS = "dit_toolkit.re_ttention.weights"  # in transformer_options: scheduled LoRAs and their strength in the call


@dataclass
class Layer:
    """What one layer remembers of one condition. rho is `[rows, H, L]`, R is in its stored form."""

    computed: int = 0  # evaluations
    refreshed: int | None = None  # `computed` at the last refresh
    sigma: float = 0.0  # at the last refresh
    rho: Tensor | None = None
    rest: Stored | None = None

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in (self.rho,) if x is not None) + (0 if self.rest is None else self.rest.bytes)

    def forget_unless(self, shape: tuple[int, ...], device: torch.device) -> None:
        """Drop statistics of another shape or device."""
        if self.rho is not None and (self.rho.shape != shape or self.rho.device != device):
            self.forget()

    def forget(self) -> None:
        """Drop the statistics; the next evaluation takes new ones."""
        self.refreshed, self.rho, self.rest = None, None, None


@dataclass(eq=False)
class Lane:
    """One condition."""

    layers: dict[Hashable, Layer] = field(default_factory=dict)
    weights: tuple = ()  # scheduled LoRAs and their strength
    used: int = -1  # its last evaluation, as `ReTtentionRun.passes` counts them

    def forget(self) -> None:
        for layer in self.layers.values():
            layer.forget()

    @property
    def bytes(self) -> int:
        return sum(layer.bytes for layer in self.layers.values())

    @property
    def bytes_of_rho(self) -> int:
        return sum(layer.rho.nbytes for layer in self.layers.values() if layer.rho is not None)


class Call(NamedTuple):
    """One attention call, with its pattern and state in this run."""

    own: OwnAttention
    pattern: Pattern
    chunk: Chunk
    layers: list[Layer]  # one for each condition of the chunk
    full: Callable[[], Tensor]  # attention without us, `[B, H, L, d]`

    @property
    def pairs(self) -> int:
        return self.own.q.shape[0] * self.own.q.shape[2] * self.own.k.shape[2]

    @property
    def kept_pairs(self) -> int:
        return self.own.q.shape[0] * kept_pairs(self.pattern, self.own.grid, self.own.extra)


class ReTtentionRun:
    """One run of one sampler."""

    def __init__(self, settings: ReTtention, run: Run):
        self.settings = settings
        self.report = settings.report.start()
        self.run = run
        self.backend = Backend(run)
        self.planned: dict[tuple[Condition, Hashable], tuple[int, int]] = {}  # bytes, by condition and layer
        self.allowed = -1  # bytes that we know to fit
        self.alone = True  # no other node changes attention
        self.shelf = Shelf()
        self.aheads: dict[torch.device, tuple[Chunk, Ahead]] = {}  # of the call that runs there
        self.lock = threading.Lock()  # with several GPUs, conditions run in threads
        self.evaluation = -1  # the run's last one that reached the model
        self.sigma = 0.0  # of the current one
        self.passes = -1  # evaluations that reached the model: a step cache's forecasts make no condition older

    def install(self, model_options: dict) -> None:
        token_grid.install(model_options)
        add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, self.apply_model, model_options, is_model_options=True)
        self.run.memory.open("Re-ttention", self.asked, self.report.memory, reported=True)
        if self.run.model is not None:
            number_blocks(self.run.model, model_options)
        self.run.on_close(self.close)

        options = model_options["transformer_options"]
        earlier = options.get(OVERRIDE)
        self.alone = earlier is None

        @untraced  # what it finds in the options changes from call to call
        def override(func: Callable, *args: Any, **kwargs: Any) -> Tensor:
            def without_us() -> Tensor:
                return func(*args, **kwargs) if earlier is None else earlier(func, *args, **kwargs)

            ask(kwargs.get("transformer_options") or {}, "attention override")
            own = own_attention(args, kwargs)
            call = self.call_of(own, without_us, kwargs.get("skip_output_reshape", False))
            if call is None:
                return without_us()
            out = self.attend(call)
            return out if kwargs.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)

        options[OVERRIDE] = override

    def apply_model(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **conds
    ):
        """APPLY_MODEL: note the call's conditions."""
        hooks = getattr(getattr(executor.class_obj.current_patcher, "current_hooks", None), "hooks", ())
        weights = tuple((hook.hook_ref, hook.strength) for hook in hooks)
        options = {**(transformer_options or {}), WEIGHTS: weights}
        options = offer(options, Offer("Apply Re-ttention", "attention override"))
        self.sigma = self.run.sigma  # read now, not in a block
        self.visit(chunk_of(options), weights)
        out = executor(x, t, c_concat, c_crossattn, control, options, **conds)
        held = sum(lane.bytes for lane in self.run.lanes_of(self))
        rho = sum(lane.bytes_of_rho for lane in self.run.lanes_of(self))
        self.report.memory.hold(Bytes(rho, main=held - rho) if self.settings.storage == "cpu" else Bytes(held))
        return out

    def asked(self, plan: Plan) -> Bytes:
        """The statistics of all layers that will be sparse."""
        transformer, family, settings = transformer_of(plan.model), family_of(plan.model), self.settings
        if family.build is None:
            return Bytes()
        build = family.build(transformer)

        def size(piece: Shape, prompt: Prompt, part: int) -> int:
            total = 0
            grids = family.grids_of(transformer, piece, prompt)
            for grid, layers in zip(grids, build.attentions, strict=bool(grids)):
                pattern = window(settings.pattern, grid, settings.keep)
                if grid.length >= settings.min_tokens and not covers(pattern, grid):
                    sizes = (piece[0], grid.length, build.heads, build.head_dim)
                    total += layers * memory(*sizes, settings.storage, item_size(plan.model))[part]
            return total

        device, main = (plan.in_all(partial(size, part=part), again=True) for part in (0, 1))
        return Bytes(device, main=main)

    def visit(self, chunk: Chunk, weights: tuple) -> None:
        """Forget conditions that stay away, and statistics from another LoRA strength."""
        with self.lock:
            if self.evaluation != self.run.evaluation:
                self.evaluation, self.passes = self.run.evaluation, self.passes + 1
                self._let_go()
            for condition in chunk.conditions:
                self._use(condition, weights)

    def _lane(self, condition: Condition) -> Lane:
        return self.run.lane(self, condition, Lane)

    def _use(self, condition: Condition, weights: tuple) -> Lane:
        """The lane of a condition that is computed now, without statistics from another LoRA strength."""
        lane = self._lane(condition)
        if lane.weights != weights:
            lane.forget()
        lane.weights, lane.used = weights, self.passes
        return lane

    def _let_go(self) -> None:
        """Forget the conditions that the last `UNUSED` + 1 evaluations of the model did not have."""
        gone = {each for each, _ in self.planned if self.passes - 1 - self._lane(each).used > UNUSED}
        for condition in gone:
            self._lane(condition).forget()
        self.planned = {key: size for key, size in self.planned.items() if key[0] not in gone}

    def call_of(self, own: OwnAttention | str | None, without_us: Callable[[], Tensor], by_head: bool) -> Call | None:
        """The call to compute ourselves, or None if attention stays as it is."""
        if own is None or isinstance(own, str):
            return self._leave(own)
        chunk, grid = chunk_of(own.options), own.grid
        if own.q.shape[0] != chunk.rows * len(chunk.conditions):
            return self._leave("its batch is not that of the pictures")
        if grid.length < self.settings.min_tokens:
            return self._leave(f"{grid.length} tokens are fewer than min_tokens")
        pattern = window(self.settings.pattern, grid, self.settings.keep)
        if covers(pattern, grid):
            return self._leave("the window covers the whole picture")
        self.report.patterns[grid] = pattern

        def full() -> Tensor:
            out = without_us()
            return out if by_head else out.unflatten(2, (own.q.shape[1], -1)).transpose(1, 2)

        # Again here, because passes of our own features, such as FreeCus's, skip APPLY_MODEL.
        lanes = [self._use(each, own.options[WEIGHTS]) for each in chunk.conditions]
        layers = [lane.layers.setdefault(own.layer, Layer()) for lane in lanes]
        return Call(own, pattern, chunk, layers, full)

    def _leave(self, reason: str | None) -> None:
        if reason:
            self.report.left_full[reason] += 1

    def attend(self, call: Call) -> Tensor:
        """Attention over the picture's own tokens, `[B, H, L, d]`: full, or its sparse estimate."""
        kind = self._kind(call)
        self._plan(call, kind)
        compute = {"full": self._full, "refresh": self._refresh, "sparse": self._sparse}[kind]
        out = compute(call)
        for layer in call.layers:
            layer.computed += 1
        self.report.kinds.setdefault(self.run.evaluation, set()).add(kind)
        self.report.pairs_in_full += call.pairs
        return out

    def _kind(self, call: Call) -> Kind:
        shape, device = (call.chunk.rows, *call.own.q.shape[1:3]), call.own.q.device
        kinds: set[Kind] = set()
        for layer in call.layers:
            layer.forget_unless(shape, device)
            kinds.add(self.settings.schedule.kind(layer.computed, layer.refreshed, self.sigma, layer.sigma))
        return kinds.pop() if len(kinds) == 1 else "refresh"

    def _full(self, call: Call) -> Tensor:
        self.report.pairs += call.pairs
        return call.full()

    def _refresh(self, call: Call) -> Tensor:
        """Full attention, and new statistics for the layers."""
        own = call.own
        full, full_lse = self._full_and_log_sum_exp(call)
        sparse, sparse_lse = self.backend.attend(own, call.pattern, with_lse=True)
        assert sparse_lse is not None
        rho = kept_share(sparse_lse, full_lse)
        rest = residual(full, sparse, rho)
        for i, layer in enumerate(call.layers):
            part = call.chunk.part(i)
            layer.refreshed, layer.sigma = layer.computed, self.sigma
            layer.rho, layer.rest = rho[part], store(rest[part], self.settings.storage, self.shelf.put)
        self.report.pairs += call.pairs + call.kept_pairs
        return full

    def _full_and_log_sum_exp(self, call: Call) -> tuple[Tensor, Tensor]:
        """In one pass if a kernel returns both and no other node changes attention, else in two."""
        own = call.own
        if self.alone:
            together = self._flex(own) if own.bias is None and has_flex(own.q.device) else None
            if together is None:
                together = full_attention(own.q, own.k, own.v, own.scale, own.bias)
            if together is not None:
                return together
        self.report.pairs += call.pairs // 2  # queries times keys once more
        return call.full(), full_log_sum_exp(own.q, own.k, own.bias, scale=own.scale)

    def _flex(self, own: OwnAttention) -> tuple[Tensor, Tensor] | None:
        """Both by FlexAttention, or None. A failure here leaves the sparse evaluations' FlexAttention on."""
        instead = "Re-ttention refreshes without it, slower."
        return by_flex(REFRESHES, instead, lambda: flex_dense(own.q, own.k, own.v, scale=own.scale))

    def _sparse(self, call: Call) -> Tensor:
        """Attention over the kept keys, scaled by their share of the full softmax, plus the stored rest."""
        sparse = self.backend.attend(call.own, call.pattern).out
        rho = _joined([layer.rho for layer in call.layers])
        rest = _joined([restore(rest, sparse) for rest in self._rests(call)])
        if rho is None:
            raise RuntimeError("a sparse evaluation came before a full one")
        out = reshaped(sparse, rho, rest)
        for layer in call.layers:
            if layer.rho is not None:
                layer.rho = drifted(layer.rho, self.settings.drift, clamp=self.settings.clamp)
        self.report.pairs += call.kept_pairs
        return out

    def _rests(self, call: Call) -> Sequence[Stored | None]:
        """R of each condition, on the device."""
        if self.settings.storage != "cpu":
            return [layer.rest for layer in call.layers]
        return [Stored(x) for x in self._ahead(call).take(call.own.layer)]

    def _ahead(self, call: Call) -> Ahead:
        """Brings R of the conditions of a call from main memory, layer by layer."""
        device = call.own.q.device
        with self.lock:
            if self.aheads.get(device, (None,))[0] is not call.chunk:
                layers = [self._lane(each).layers for each in call.chunk.conditions]

                def kept(name: Hashable) -> list[Kept]:
                    rests = (each[name].rest for each in layers if name in each)
                    return [rest.values for rest in rests if rest is not None]

                self.aheads[device] = call.chunk, Ahead(list(layers[0]), kept, device)
            return self.aheads[device][1]

    def _plan(self, call: Call, kind: Kind) -> None:
        """Add up the memory to keep. Refuse too much once all is known: in the second evaluation, or a refresh."""
        _, heads, tokens, head_dim = call.own.q.shape
        size = memory(call.chunk.rows, tokens, heads, head_dim, self.settings.storage, call.own.q.element_size())
        known = all((each, call.own.layer) in self.planned for each in call.chunk.conditions)
        self.planned |= {(each, call.own.layer): size for each in call.chunk.conditions}
        if not known and kind == "full":
            return
        device, host = (sum(sizes) for sizes in zip(*self.planned.values(), strict=True))
        self.report.planned = max(self.report.planned, (device, host), key=sum)
        if device + host <= self.allowed:
            return
        limit = self.settings.max_bytes
        if limit is None:
            limit = self._free(call.own.q.device if device >= host else torch.device("cpu")) // 4
        if device + host > limit:
            raise ValueError(
                f"Apply Re-ttention would keep {(device + host) / 2**20:.0f} MiB for this size, "
                f"{limit / 2**20:.0f} MiB are allowed. "
                f"Set 'storage' to '8 bits', 'offload to CPU' or 'share only', or raise 'max_memory'."
            )
        self.allowed = device + host

    def _free(self, where: torch.device) -> int:
        """Bytes free on a device, including those that ComfyUI would give back."""
        if where.type == "cpu" or self.run.model is None:
            return int(comfy.model_management.get_free_memory(where))  # pyright: ignore[reportArgumentType]
        return int(self.run.model.get_free_memory(where))

    def close(self, completed: bool) -> None:
        """At the end of the run: complete the report, and write one line to the log."""
        self.aheads.clear()
        self.shelf.close()
        self.report.held = sum(lane.bytes for lane in self.run.lanes_of(self))
        self.report.backends = self.backend.used
        self.report.failed = dict(UNABLE)
        logger.info("%s", self.report.summary)


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    """The rows of all conditions, `[B, ...]`; None if there are none."""
    found = [part for part in parts if part is not None]
    return torch.cat(found) if len(found) > 1 else next(iter(found), None)
