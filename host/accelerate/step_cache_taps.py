"""Where a step cache takes what it stores, and where it puts its forecast in.

| tap | stores | a forecast evaluation still runs | models |
|---|---|---|---|
| `PredictionTap` | the model's output, in latent space | nothing | all |
| `LastBlockTap` | the picture's tokens behind the last block | embeddings, head, the probed block | with block hooks |
| `SpanTap` | what a span of blocks changed | the blocks outside the span | with block hooks |
| `ModuleTap` | the output of every attention and MLP | modulation | FLUX.1 |

A run wraps blocks for itself. In a forecast, wrapped blocks hand their input on, and the last one of the span returns
the forecast. The stored values include what ControlNet and others add between skipped blocks, so it counts once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...models.accelerate.cg_taylor import FirstBlockGate, gate_error
from ...models.accelerate.delta_dit import Span, Stages
from ...models.accelerate.policies import COMPUTE, FORECAST, PROBE
from ..blocks import RunBlock, Wrap, wrap_block
from ..compiled import untraced
from ..families import Family, family_of, flux
from ..families.family import BlockKey
from ..memory import Prompt, Shape, item_size
from ..offers import ask
from ..run import VISIT
from ..transformer import core_name, stranger, transformer_of
from .step_cache_run import FIRST_BLOCK, StepCacheRun, Visit
from .step_cache_settings import Sizes, Tap

FLOAT32 = 4  # bytes
TapName = Literal["auto", "last block", "prediction", "every module"]


@dataclass(frozen=True)
class PredictionTap:
    """The model's raw output m, from the denoised latent x0 = A * x - B * m.

    A and B come from the model's own sampling, so this holds for flow, EPS and v-prediction. If B vanishes, the
    evaluation is computed.
    """

    name = "prediction"
    wraps_blocks = False
    skips_middle_blocks = False

    def install(self, cache: StepCacheRun, model_options: dict) -> None:
        pass

    def parts(self, cache: StepCacheRun) -> tuple[str, ...]:
        return ("prediction",)

    def sizes(self, cache: StepCacheRun, model: ModelPatcher, shape: Shape, prompt: Prompt) -> tuple[Sizes, ...]:
        return (Sizes({"prediction": FLOAT32 * math.prod(shape)}),)

    def denoise(self, visit: Visit, call: Callable[[], Tensor], base: Any, x: Tensor, sigma: Tensor) -> Tensor:
        skip, scale = input_and_output_weight(base.model_sampling, sigma, x)
        usable = has_output(base.model_sampling, visit.point.sigma)
        if visit.choice is FORECAST and usable:
            (raw,) = visit.forecast("prediction")
            return skip * x - scale * raw
        visit.choice = COMPUTE
        denoised = call()
        if usable:
            visit.captured["prediction"] = (((skip * x - denoised) / scale).float(),)
        return denoised


def has_output(sampling: Any, sigma: float) -> bool:
    """Whether B does not vanish at this noise level, computed in main memory, so that nobody waits for the GPU."""
    _, scale = input_and_output_weight(sampling, torch.tensor([sigma]), torch.empty(1, 1))
    return abs(float(scale)) > 1e-4


def input_and_output_weight(sampling: Any, sigma: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of `denoised = A * x - B * output`, as tensors that broadcast over `x`."""
    one = torch.ones((x.shape[0],) + (1,) * (x.ndim - 1), device=x.device, dtype=torch.float32)
    zero = torch.zeros_like(one)
    return sampling.calculate_denoised(sigma, zero, one), -sampling.calculate_denoised(sigma, one, zero)


@untraced
def visit_of(args: dict) -> Visit | None:
    """The step cache's visit around a block's call. None in passes without one, and in other packs' forward passes."""
    options = args.get("transformer_options", {})  # forward passes of other packs may leave them out
    ask(options, "block replacement")
    return options.get(VISIT)


@dataclass(frozen=True)
class BlockTap(ABC):
    """A span of blocks, skipped in a forecast. The two taps below are its two uses."""

    family: Family
    block_keys: tuple[BlockKey, ...]
    wraps_blocks = True
    skips_middle_blocks = False

    @property
    @abstractmethod
    def payload(self) -> Literal["output", "residual"]:
        """What to store: the span's output, or its change."""

    @abstractmethod
    def span(self, cache: StepCacheRun) -> Span:
        """The first skipped block and the first block behind the span, in this evaluation."""

    def parts(self, cache: StepCacheRun) -> tuple[str, ...]:
        start, stop = self.span(cache)
        return (f"{start}:{stop}",) if start < stop else ()

    @abstractmethod
    def spans(self) -> tuple[Span, ...]:
        """All spans that there may be in a run."""

    def sizes(self, cache: StepCacheRun, model: ModelPatcher, shape: Shape, prompt: Prompt) -> tuple[Sizes, ...]:
        transformer, item = transformer_of(model), item_size(model)

        def streams(position: int) -> dict[str, int]:
            kind = self.block_keys[position][0] if position < len(self.block_keys) else None
            return {name: item * n for name, n in self.family.elements(transformer, kind, shape, prompt).items()}

        def of_span(start: int, stop: int) -> Sizes:
            if start == stop:
                return Sizes({})
            last = stop if stop == len(self.block_keys) else stop - 1  # behind the last block only the head's rows
            points = {f"{start}:{stop}": sum(streams(last).values())}
            if isinstance(cache.settings.policy, FirstBlockGate):
                points[FIRST_BLOCK] = streams(0).get("img", 0)
            return Sizes(points, sum(streams(start).values()) if self.payload == "residual" else 0)

        return tuple(of_span(*span) for span in self.spans())

    def install(self, cache: StepCacheRun, model_options: dict) -> None:
        for position, key in enumerate(self.block_keys):
            wrap_block(model_options, key, self.wrapped(position))

    def denoise(self, visit: Visit, call: Callable[[], Tensor], base: Any, x: Tensor, sigma: Tensor) -> Tensor:
        if not visit.parts:
            visit.choice = COMPUTE
        denoised = call()
        if visit.choice is PROBE:  # another node replaced our wrap of block 0
            visit.choice = COMPUTE
        if visit.choice is FORECAST and not visit.injected:  # or of the block that returns the forecast
            visit.choice = COMPUTE
            visit.captured.clear()
            denoised = call()
        return denoised

    def wrapped(self, position: int) -> Wrap:
        """The wrap of block number `position`."""

        @untraced  # what it finds in the options changes from call to call
        def wrap(args: dict, run_block: RunBlock) -> dict:
            visit = visit_of(args)
            if visit is None or not visit.parts:
                return run_block(args)
            start, stop = self.span(visit.cache)
            if position == start:
                self.enter(visit, position, args)
            probing = position == 0 and isinstance(visit.cache.settings.policy, FirstBlockGate)
            if probing and visit.choice is not FORECAST:
                out = self.probe(visit, args, run_block)
            elif visit.choice is FORECAST and start <= position < stop:
                if position == stop - 1:
                    return self.inject(visit, position, args)
                return self.unchanged(position, args)
            else:
                out = run_block(args)
            if visit.choice is not FORECAST and position == stop - 1:
                self.capture(visit, position, args, out)
            return out

        return wrap

    @torch.compiler.disable()
    def enter(self, visit: Visit, position: int, args: dict) -> None:
        if self.payload == "residual":  # cloned: blocks, and ControlNet after them, write in place
            names = self.family.streams(self.block_keys[position][0])
            visit.entry = {name: args[name].clone() for name in names}

    @untraced
    def probe(self, visit: Visit, args: dict, run_block: RunBlock) -> dict:
        """Run block 0, and let it decide if the policy asked for a probe."""
        gate: Any = visit.cache.settings.policy
        before = args["img"].clone() if gate.compare == "residual" else None
        out = run_block(args)
        self.judge(visit, gate, out["img"], before)
        return out

    @torch.compiler.disable()
    def judge(self, visit: Visit, gate: FirstBlockGate, img: Tensor, before: Tensor | None) -> None:
        value = img if before is None else img - before
        if visit.choice is PROBE:
            visit.settle(self.error(visit, gate, value))
        if visit.choice is not FORECAST:
            visit.captured[FIRST_BLOCK] = (value.clone() if value is img else value,)

    def error(self, visit: Visit, gate: FirstBlockGate, value: Tensor) -> float:
        """The error of block 0's forecast, for the first condition of the call: see `StepCacheRun.settle`."""
        guess, actual = visit.first_block(), value[visit.chunk.part(0)]
        return inf if guess is None or guess.shape != actual.shape else gate_error(guess, actual, gate.reduce)

    @torch.compiler.disable()
    def inject(self, visit: Visit, position: int, args: dict) -> dict:
        """The forecast, as the result of the last block of the span."""
        stored = visit.forecast(visit.parts[0])
        kind = self.block_keys[position][0]
        names = self.family.streams(kind)
        here = {name: args[name] for name in names}
        if self.payload == "residual":
            start, _ = self.span(visit.cache)
            here = self.family.joined(visit.entry, self.block_keys[start][0], kind)
        rows = slice(None) if position < len(self.block_keys) - 1 else self.family.picture(args, {"img": here["img"]})
        if [x.shape for x in stored] != [here[name][:, rows].shape for name in names][: len(stored)]:
            return self.unchanged(position, args)  # not injected: `denoise` calls the model again, and computes
        visit.injected = True
        if position < len(self.block_keys) - 1:
            if self.payload == "residual":
                return {name: here[name] + value for name, value in zip(names, stored, strict=True)}
            return dict(zip(names, stored, strict=True))
        img = here["img"].clone()
        img[:, rows] = img[:, rows] + stored[0] if self.payload == "residual" else stored[0]
        return {**{name: args.get(name) for name in names}, "img": img}

    @torch.compiler.disable()
    def capture(self, visit: Visit, position: int, args: dict, out: dict) -> None:
        kind = self.block_keys[position][0]
        names = self.family.streams(kind)
        if position == len(self.block_keys) - 1:
            rows = self.family.picture(args, out)
            values = {"img": out["img"][:, rows]}
        else:
            rows, values = slice(None), {name: out[name] for name in names}
        if self.payload == "residual":
            if not visit.entry:
                return  # another node replaced our wrap of the span's first block
            start, _ = self.span(visit.cache)
            entry = self.family.joined(visit.entry, self.block_keys[start][0], kind)
            tensors = tuple(value - entry[name][:, rows] for name, value in values.items())
        else:
            tensors = tuple(value.clone() for value in values.values())
        visit.captured[visit.parts[0]] = tensors
        visit.cache.note(visit)
        visit.entry = {}

    def unchanged(self, position: int, args: dict) -> dict:
        return {name: args[name] for name in self.family.streams(self.block_keys[position][0])}


@dataclass(frozen=True)
class LastBlockTap(BlockTap):
    """The picture's tokens behind the last block, before the head. With a gate, block 0 always runs.

    residual: store the change that the skipped blocks make, instead of their output.
    or_prediction: let the prediction tap stand in if the blocks of a run are out of reach.
    """

    gated: bool = False
    residual: bool = False
    or_prediction: bool = False
    name = "last block"

    @property
    def payload(self) -> Literal["output", "residual"]:
        return "residual" if self.residual else "output"

    def span(self, cache: StepCacheRun) -> Span:
        return self.spans()[0]

    def spans(self) -> tuple[Span, ...]:
        return ((1 if self.gated else 0, len(self.block_keys)),)


@dataclass(frozen=True)
class SpanTap(BlockTap):
    """The change that a span of blocks makes; the span moves with the stage of sampling (Delta-DiT)."""

    stages: Stages = field(default_factory=Stages)
    name = "block span"
    skips_middle_blocks = True

    @property
    def payload(self) -> Literal["output", "residual"]:
        return "residual"

    def span(self, cache: StepCacheRun) -> Span:
        return self.stages.span(len(self.block_keys), early=not cache.behind(self.stages.boundary))

    def spans(self) -> tuple[Span, ...]:
        early = {1.0: (True,), 0.0: (False,)}.get(self.stages.boundary, (True, False))
        return tuple(self.stages.span(len(self.block_keys), early=each) for each in early)


@dataclass(frozen=True)
class ModuleTap:
    """The output of every attention and MLP, before its gate, as TaylorSeer's authors store it. FLUX.1 only.

    A forecast computes modulation too, so gates belong to the current noise level. Memory is the price: two points hold
    4.3 GB for one 1024 px picture of FLUX.1.

    max_bytes: most bytes to hold. None: a quarter of the memory that is free when sampling starts.
    """

    family: Family
    block_keys: tuple[BlockKey, ...]
    max_bytes: int | None = None
    name = "every module"
    wraps_blocks = True
    skips_middle_blocks = False

    def install(self, cache: StepCacheRun, model_options: dict) -> None:
        for key in self.block_keys:
            wrap_block(model_options, key, self.wrapped(key))

    def parts(self, cache: StepCacheRun) -> tuple[str, ...]:
        return tuple(f"{kind} {index}" for kind, index in self.block_keys)

    def sizes(self, cache: StepCacheRun, model: ModelPatcher, shape: Shape, prompt: Prompt) -> tuple[Sizes, ...]:
        transformer, item = transformer_of(model), item_size(model)
        kinds = {kind for kind, _ in self.block_keys}
        streams = {kind: sum(self.family.elements(transformer, kind, shape, prompt).values()) for kind in kinds}
        point = {kind: item * flux.parts_per_stream(kind) * streams[kind] for kind in kinds}
        return (Sizes({f"{kind} {index}": point[kind] for kind, index in self.block_keys}),)

    def denoise(self, visit: Visit, call: Callable[[], Tensor], base: Any, x: Tensor, sigma: Tensor) -> Tensor:
        denoised = call()
        if visit.misfit:
            visit.choice = COMPUTE
            denoised = call()
        if visit.choice is COMPUTE:
            self.refuse_if_too_large(visit, base)
        return denoised

    def wrapped(self, key: BlockKey) -> Wrap:
        """The wrap of block `key`."""
        part = f"{key[0]} {key[1]}"

        @untraced
        def wrap(args: dict, run_block: RunBlock) -> dict:
            visit = visit_of(args)
            if visit is None:
                return run_block(args)
            block = flux.block(visit.transformer, *key)
            if visit.choice is FORECAST:
                outputs = visit.forecast(part)
                visit.misfit = visit.misfit or outputs[0].shape[1] != args["img"].shape[1]
                return flux.block_from_outputs(block, args, outputs) if not visit.misfit else args
            with flux.recorded_outputs(block) as outputs:
                out = run_block(args)
            visit.captured[part] = tuple(outputs)
            return out

        return wrap

    def refuse_if_too_large(self, visit: Visit, base: Any) -> None:
        """Check after the first computed call of these conditions, when the size of one point is known.

        Conditions from other calls count too.
        """
        if any(lane.full for lane in visit.lanes):
            return
        one = sum(x.nbytes for tensors in visit.captured.values() for x in tensors)
        one += sum(lane.newest_bytes for lane in visit.cache.run.lanes_of(visit.cache))
        needed = one * (visit.cache.settings.forecaster.order + 1)
        limit = self.max_bytes
        if limit is None:
            where = torch.device("cpu") if visit.cache.settings.offload else visit.device
            limit = int(free_memory(base, where)) // 4
        if needed > limit:
            visit.captured.clear()
            raise ValueError(
                f"{visit.cache.settings.method} on every module would hold {needed / 2**20:.0f} MiB for this size, "
                f"{limit / 2**20:.0f} MiB are allowed. Set 'tap' to 'last block', or raise 'max_memory'."
            )


def free_memory(base: Any, where: torch.device) -> float:
    """Bytes free on a device, including those that ComfyUI would give back."""
    if where.type == "cpu" or base.current_patcher is None:
        return float(comfy.model_management.get_free_memory(where))  # pyright: ignore[reportArgumentType]
    return float(base.current_patcher.get_free_memory(where))


BlockHooks = tuple[Family, tuple[BlockKey, ...]]  # a model's family, and the blocks that can be wrapped


def block_hooks(model: ModelPatcher) -> BlockHooks | None:
    """The block hooks of a MODEL, or None if ComfyUI offers none for its family."""
    family = family_of(model)
    return (family, family.block_keys(transformer_of(model))) if family.kinds else None


def in_reach(model: ModelPatcher) -> bool:
    """Whether wraps of blocks surely work. Another pack's forward pass may ignore them."""
    return block_hooks(model) is not None and stranger(model) is None


def require_blocks(model: ModelPatcher, node: str, instead: str = "tap 'prediction'") -> BlockHooks:
    """The block hooks of a MODEL. `node` is the node that asks, by its display name, `instead` works on every model.

    Raises:
        ValueError: ComfyUI offers none for this family.
    """
    blocks = block_hooks(model)
    if blocks is None:
        who = stranger(model)
        why = f"ComfyUI offers no such hook for {core_name(model)}" if who is None else str(who)
        raise ValueError(
            f"{node} needs a model whose blocks can be patched, and {why}. Use {instead}, which works on every model."
        )
    return blocks


def tap_for(model: ModelPatcher, name: TapName, node: str, max_bytes: int | None = None) -> Tap:
    """The tap that a user chose for this MODEL. `node` is the display name of the node that asks.

    Raises:
        ValueError: the model has no such tap.
    """
    if name == "prediction":
        return PredictionTap()
    if name == "every module":
        flux.FLUX1.require(model, f"{node} with tap 'every module'")
        return ModuleTap(*require_blocks(model, node), max_bytes)
    if name == "auto" and not in_reach(model):
        return PredictionTap()
    return LastBlockTap(*require_blocks(model, node), or_prediction=name == "auto")


def tap_in_run(tap: Tap, model: ModelPatcher, node: str) -> Tap:
    """The tap for a run of `model`, since nodes behind the step cache may have put a class or forward pass into it.

    Raises:
        ValueError: its blocks cannot be wrapped any more, and no other tap may stand in.
    """
    if isinstance(tap, PredictionTap):
        return tap
    if getattr(tap, "or_prediction", False) and not in_reach(model):
        return PredictionTap()
    require_blocks(model, node)
    return tap
