"""A step cache during a run: what it computes, what it keeps for each condition, and when it throws that away.

One decision holds for all conditions of an evaluation. The cache forecasts a chunk only if it can forecast every lane
in it. Otherwise it computes and records all of it. Each condition has a lane, so positive and negative prompts, areas,
context windows and the extra passes of guidance nodes never mix.

The cache throws everything away at the end of the run, and when sigma rises by more than 1 % (a restart). It throws a
lane away when the shape, dtype or device of its input or the strength of a scheduled LoRA changes, or when the lane
goes unused for more than two evaluations.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import pairwise
from math import inf, isfinite
from typing import Any

import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ...models.accelerate.cg_taylor import FirstBlockGate
from ...models.accelerate.input_change import Change, InputChange
from ...models.accelerate.policies import COMPUTE, FORECAST, PROBE, Choice, Moment, Spread
from ...models.accelerate.schedules import ENOUGH, spread
from ...models.accelerate.taylorseer import Forecaster, Point, weighted_sum
from ..memory import Bytes, Plan, Prompt, Shape
from ..offers import Offer, offer
from ..part_of_run import begun
from ..resting import Ahead, Kept, Shelf
from ..run import KEY, VISIT, Chunk, Run, chunk_of
from .step_cache_report import Entry, StepCacheRunReport
from .step_cache_settings import Sizes, StepCache

logger = logging.getLogger(__name__)

Tensors = tuple[Tensor, ...]

FIRST_BLOCK = "block 0"  # the history of the block that a gate looks at
OF_CHANGE = 3  # the input, and input and output of the last computed evaluation: `InputChange`
ANY_MODEL = "Apply TaylorSeer with tap 'prediction' works on every model."


class History:
    """The newest computed values at one tap for one condition, as many as the forecast reads."""

    def __init__(self, forecaster: Forecaster):
        self.forecaster = forecaster
        self.points: list[Point] = []
        self.values: list[tuple[Kept, ...]] = []

    def add(self, point: Point, values: tuple[Kept, ...]) -> None:
        """Add the newest point. It replaces its predecessor if the two are too near for a difference.

        Points of other shapes go: Flux KV Cache takes the reference tokens out after the first evaluation.
        """
        if self.values and [x.shape for x in values] != [x.shape for x in self.values[0]]:
            self.points, self.values = [], []
        if self.points and self.forecaster.too_near(point, self.points[0]):
            self.points, self.values = self.points[1:], self.values[1:]
        order = self.forecaster.order
        self.points, self.values = [point, *self.points[:order]], [values, *self.values[:order]]

    @property
    def kept(self) -> list[Kept]:
        """All tensors, point by point."""
        return [x for values in self.values for x in values]

    def forecast(self, at: Point, kept: Sequence[Tensor]) -> Tensors:
        """`kept`: as above, on the device."""
        weights, streams = self.forecaster.weights(self.points, at), len(self.values[0])
        return tuple(weighted_sum(kept[i::streams], weights) for i in range(streams))

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for values in self.values for x in values)


@dataclass(eq=False)
class Lane:
    """One condition. `histories`: by the name of what the tap captures."""

    signature: tuple = ()
    used: int = -1  # its last evaluation
    full: int = 0  # computed evaluations
    histories: dict[str, History] = field(default_factory=dict)
    change: Change = field(default_factory=Change)

    def clear(self) -> None:
        self.full, self.histories, self.change = 0, {}, Change()

    @property
    def bytes(self) -> int:
        return sum(history.bytes for history in self.histories.values())

    @property
    def newest_bytes(self) -> int:
        """Bytes of the newest point of each history."""
        return sum(x.nbytes for history in self.histories.values() for x in history.values[0])


@dataclass(eq=False)
class Visit:
    """One call of the model under a step cache."""

    cache: StepCacheRun
    chunk: Chunk
    lanes: list[Lane]
    point: Point
    choice: Choice
    device: torch.device
    parts: tuple[str, ...] = ()  # the histories that the tap forecasts from, by name
    transformer: Any = None
    captured: dict[str, Tensors] = field(default_factory=dict)  # for the whole batch, in memory of its own
    entry: dict[str, Tensor] = field(default_factory=dict)  # input streams of the span's first block
    injected: bool = False
    misfit: bool = False  # the stored values do not have the shape of what they replace

    def forecast(self, name: str) -> Tensors:
        """The forecast for the whole batch of the chunk."""
        kept, parts = self.ahead.take(name), []
        for history in (lane.histories[name] for lane in self.lanes):
            parts.append(history.forecast(self.point, kept[: len(history.kept)]))
            kept = kept[len(history.kept) :]
        return parts[0] if len(parts) == 1 else tuple(torch.cat(rows) for rows in zip(*parts, strict=True))

    def first_block(self) -> Tensor | None:
        """The forecast of block 0 for the first condition, before it is known whether a forecast is wanted."""
        history = self.lanes[0].histories.get(FIRST_BLOCK)
        if history is None:
            return None
        return history.forecast(self.point, Ahead((), lambda name: history.kept, self.device).take(FIRST_BLOCK))[0]

    @cached_property
    def ahead(self) -> Ahead:
        """What the forecasts of this call need, part by part."""
        lanes = self.lanes
        return Ahead(self.parts, lambda name: [x for lane in lanes for x in lane.histories[name].kept], self.device)

    def record(self) -> None:
        """Keep the captured values once the call is over: an interrupt may come inside any layer."""
        self.cache.note(self)
        keep = self.cache.shelf.put if self.cache.settings.offload else lambda x: x
        for name, tensors in self.captured.items():
            for i, lane in enumerate(self.lanes):
                rows = self.chunk.part(i)
                history = lane.histories.setdefault(name, History(self.cache.forecaster_of(name)))
                history.add(self.point, tuple(keep(x[rows]) for x in tensors))
        for lane in self.lanes:
            lane.full += 1
            for name in lane.histories.keys() - self.captured.keys():  # of another span
                del lane.histories[name]

    @property
    def bytes(self) -> int:
        """What this call has captured, and what it keeps while its blocks run."""
        return sum(x.nbytes for tensors in (*self.captured.values(), tuple(self.entry.values())) for x in tensors)

    def settle(self, error: float) -> None:
        """Take the probe's answer, see `StepCacheRun.settle`."""
        self.choice = self.cache.settle(error)
        if self.choice is FORECAST and not self.ready():
            self.choice = COMPUTE

    def ready(self) -> bool:
        """Whether every lane holds enough for a forecast."""
        return all(self.holds_enough(lane) for lane in self.lanes)

    def holds_enough(self, lane: Lane) -> bool:
        return lane.full >= self.cache.settings.policy.min_full and all(part in lane.histories for part in self.parts)


class StepCacheRun:
    """One step cache in one run of a sampler."""

    def __init__(self, settings: StepCache, run: Run):
        self.settings, self.run = settings, run
        self.steps = steps_of(run.sigmas)
        self.total = evaluations_of(self.steps, run.sampler, ends=bool(run.sigmas) and run.sigmas[-1] == 0)
        self.report: StepCacheRunReport = settings.report.start(self.total)
        self.shelf = Shelf()
        self.lock = threading.Condition()  # with several GPUs, chunks of one evaluation run in threads
        self.index = -1  # evaluations since the start or the last reset
        self.last_full: int | None = None
        self.resets = 0
        self.sigma = inf
        self.choice, self.reason = COMPUTE, ""
        self.error: float | None = None
        self.computed = self.forecast = 0  # chunks of this evaluation, by choice
        self.began = time.perf_counter()  # when the evaluation began
        self.plan = self.planned()
        self.forecaster = settings.forecaster.for_run(self.count(), run.guidance, is_multistep(run.sampler))
        self.short = self.steps is not None and len(self.steps) <= settings.policy.min_full + 1
        if self.steps is None:
            self.report.notes.append("The schedule does not fall evenly to its end, so the last steps are not guarded.")
        if self.short:
            self.report.notes.append("Too few steps for a forecast: everything is computed.")
        logger.debug("%s: %s, tap %s, %s, %s, %s", settings.method, settings.policy, settings.tap.name,
                     self.forecaster, settings.guard, settings.part)  # fmt: skip

    def install(self, model_options: dict) -> None:
        self.settings.tap.install(self, model_options)
        for kind, wrapper in (
            (WrappersMP.PREDICT_NOISE, self.predict_noise),
            (WrappersMP.APPLY_MODEL, self.apply_model),
        ):
            add_wrapper_with_key(kind, KEY, wrapper, model_options, is_model_options=True)
        self.run.on_close(self.close)
        self.run.memory.open(self.settings.method, self.asked, self.report.memory, reported=True)

    def asked(self, plan: Plan) -> Bytes:
        """All points of all histories, one more that a call has captured, and what it keeps while its blocks run.

        The three are there together before the oldest point goes. Offloaded points rest in main memory.
        """
        tap = self.settings.tap

        def stages(piece: Shape, prompt: Prompt) -> tuple[Sizes, ...]:
            return tap.sizes(self, plan.model, piece, prompt)

        def points(piece: Shape, prompt: Prompt, stage: int) -> int:
            found = stages(piece, prompt)[stage].points.items()
            return sum((self.forecaster_of(name).order + 1) * size for name, size in found)

        def captured(piece: Shape, prompt: Prompt, stage: int) -> int:
            found = stages(piece, prompt)[stage]
            return sum(found.points.values()) + found.entry

        def changes(piece: Shape, prompt: Prompt) -> int:
            if not isinstance(self.settings.policy, InputChange):
                return 0
            return OF_CHANGE * thinned(torch.empty(piece, device="meta")).nbytes

        each = plan.in_all(changes)
        first = next(iter(plan.pieces))
        count = len(stages(first, {}))
        kept = max(plan.in_all(partial(points, stage=i)) for i in range(count))
        call = max(plan.in_a_call(partial(captured, stage=i)) for i in range(count))
        return Bytes(each + call, main=kept) if self.settings.offload else Bytes(each + call + kept)

    def note(self, visit: Visit) -> None:
        """Count what is held during a call."""
        lanes = self.run.lanes_of(self)
        kept, changes = sum(lane.bytes for lane in lanes), sum(lane.change.bytes for lane in lanes)
        now = changes + visit.bytes
        self.report.memory.hold(Bytes(now, main=kept) if self.settings.offload else Bytes(now + kept))

    def forecaster_of(self, name: str) -> Forecaster:
        policy = self.settings.policy
        if name == FIRST_BLOCK and isinstance(policy, FirstBlockGate):
            return Forecaster(0 if policy.compare == "residual" else policy.order)
        return self.forecaster

    # schedule

    def planned(self) -> dict[int, bool]:
        """Which evaluations of this run a `Spread` computes; empty without one, or where the schedule does not tell."""
        policy, run = self.settings.policy, self.run
        if not isinstance(policy, Spread) or self.total is None or run.model is None:
            return {}
        levels = noise_shares(run.model.get_model_object("model_sampling"), sigmas_of(run.sigmas, run.sampler))
        computed = spread(levels, policy.count(self.total), run.guidance, is_multistep(run.sampler))
        return {index: index in computed for index in range(self.total)}

    def count(self) -> int:
        """How many evaluations of this run will be computed. A gate does not know, and counts as enough."""
        if self.plan:
            return sum(self.plan.values())
        if self.total is None or isinstance(self.settings.policy, (FirstBlockGate, InputChange)):
            return ENOUGH
        full: list[int] = []
        for index in range(self.total):
            choice, _ = self.settings.policy.choose(Moment(index, index - full[-1] if full else 0, None, self.total))
            full += [index] if choice is COMPUTE else []
        return len(full)

    @cached_property
    def levels(self) -> Any:
        """The noise levels of the MODEL's sampling, by percent."""
        model = self.run.model
        return None if model is None else self.run.levels(model.get_model_object("model_sampling"))

    def behind(self, percent: float) -> bool:
        """Whether this evaluation lies at or behind `percent`, 0 to 1, of the run."""
        return begun(percent, self.sigma, self.levels)

    # evaluations

    def predict_noise(self, executor, x: Tensor, timestep: Tensor, *args, **kwargs) -> Tensor:
        """PREDICT_NOISE: one evaluation by the sampler."""
        self.begin(self.run.sigma)  # waits for the GPU, so the clock always reads at the same point
        self.tick()
        try:
            result = executor(x, timestep, *args, **kwargs)
        finally:
            self.settle(inf)  # so that no thread waits for a failed probe
        self.finish(time.perf_counter() - self.began)
        return result

    def tick(self) -> None:
        """Read the clock. An evaluation lasts until the next begins, so it includes work still queued on a GPU."""
        now = time.perf_counter()
        if self.report.entries:
            self.report.entries[-1] = replace(self.report.entries[-1], seconds=now - self.began)
        self.began = now

    def close(self, completed: bool) -> None:
        if completed:
            comfy.model_management.synchronize()  # what is queued belongs to the last evaluation
        self.tick()
        self.shelf.close()
        self.settings.report.end(self.report, completed)

    def begin(self, sigma: float) -> None:
        if sigma > self.sigma * 1.01:
            self.reset("sigma rose")
        self.sigma = sigma
        self.index += 1
        self.error = None
        self.computed = self.forecast = 0
        self.choice, self.reason = self.choose()

    def reset(self, why: str) -> None:
        """Forget everything, as at the start of a run."""
        self.index, self.last_full, self.total, self.plan = -1, None, None, {}
        for lane in self.run.lanes_of(self):
            lane.clear()
        self.resets += 1
        if self.resets == 1:
            self.report.notes.append(f"Started anew at evaluation {self.run.evaluation}: {why}.")
        else:
            again = f"Started anew {self.resets} times, last at evaluation {self.run.evaluation}: {why}."
            self.report.notes = [again if note.startswith("Started anew") else note for note in self.report.notes]

    def choose(self) -> tuple[Choice, str]:
        since = 0 if self.last_full is None else self.index - self.last_full
        moment = Moment(self.index, since, self.left(), self.total, self.plan.get(self.index))
        if self.short:
            return COMPUTE, "short"
        if not self.settings.part.includes(self.sigma, self.levels):
            return COMPUTE, "range"
        guarded = self.settings.guard.reason(moment)
        if guarded:
            return COMPUTE, guarded
        return self.settings.policy.choose(moment)

    def left(self) -> int | None:
        """Steps of the schedule that begin below this sigma."""
        if self.steps is None:
            return None
        return sum(step < self.sigma * (1 - 1e-5) for step in self.steps)

    def settle(self, error: float) -> Choice:
        """Take the answer to a probe. The first answer holds for the whole evaluation.

        It belongs to the first condition of the first chunk. ComfyUI batches prompts or calls the model for one after
        the other, as memory allows, but that condition always comes first. So one seed gives one picture.
        """
        with self.lock:
            if self.choice is PROBE:
                policy: Any = self.settings.policy
                self.error = error
                opens = policy.opens(error) if isinstance(policy, FirstBlockGate) else error < policy.threshold
                self.choice = FORECAST if opens else COMPUTE
                self.lock.notify_all()
            return self.choice

    def wait_for_the_first(self, options: dict) -> None:
        """With several GPUs, let the MODEL's own device decide: ComfyUI gives it the first chunk of an evaluation."""
        device = options.get("multigpu_thread_device")
        if device is None or self.run.model is None or device == self.run.model.load_device:
            return
        with self.lock:
            while self.choice is PROBE:
                comfy.model_management.throw_exception_if_processing_interrupted()
                self.lock.wait(1.0)  # seconds between checks for an interrupt

    def finish(self, seconds: float) -> None:
        full = self.forecast == 0
        if full:
            self.last_full = self.index
        lanes = self.run.lanes_of(self)
        held = sum(lane.bytes for lane in lanes)
        self.report.bytes_held = max(self.report.bytes_held, held)
        for lane in lanes:
            if self.run.evaluation - lane.used > 2:  # its prompt has ended, or was away too long
                lane.clear()
        reason = "new" if full and self.choice is FORECAST else self.reason  # a lane had nothing to forecast from
        error = self.error if self.error is not None and isfinite(self.error) else None
        threshold = getattr(self.settings.policy, "threshold", None)
        threshold = threshold if threshold is not None and isfinite(threshold) else None
        entry = Entry(self.run.evaluation, self.sigma, full, reason, error, threshold, seconds)
        self.settings.report.add(self.report, entry)
        logger.debug(
            "%s: evaluation %d, sigma %.4g, %s because of %s%s; calls computed %d, forecast %d",
            *(self.settings.method, entry.index, entry.sigma, "computed" if full else "forecast", reason),
            *("" if error is None else f" (error {error:.3g})", self.computed, self.forecast),
        )

    # calls of the model

    def apply_model(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **conds
    ):
        """APPLY_MODEL: one chunk, forecast or computed and recorded."""
        options = transformer_options or {}
        self.wait_for_the_first(options)
        visit = self.visit(executor.class_obj, x, c_crossattn, chunk_of(options))

        def call() -> Tensor:
            given = {**options, VISIT: visit}
            if self.settings.tap.wraps_blocks:
                given = offer(given, Offer(self.settings.method, "block replacement", instead=ANY_MODEL))
            return executor(x, t, c_concat, c_crossattn, control, given, **conds)

        denoised = self.settings.tap.denoise(visit, call, executor.class_obj, x, t)
        self.settle(inf)  # the first chunk decides, even if its probe did not run
        with self.lock:
            if visit.choice is FORECAST:
                self.forecast += 1
            else:
                self.computed += 1
                visit.record()
        if visit.choice is COMPUTE and isinstance(self.settings.policy, InputChange):
            output = visit.captured["prediction"][0] if "prediction" in visit.captured else denoised
            for i, lane in enumerate(visit.lanes):
                rows = visit.chunk.part(i)
                lane.change.computed(thinned(x[rows]), thinned(output[rows]))
        return denoised

    def visit(self, base: Any, x: Tensor, text: Tensor | None, chunk: Chunk) -> Visit:
        """This chunk's lanes, cleared if their input changed, and the choice for it."""
        lanes = [self.run.lane(self, condition, Lane) for condition in chunk.conditions]
        hooks = getattr(getattr(base.current_patcher, "current_hooks", None), "hooks", ())
        weights = tuple((hook.hook_ref, hook.strength) for hook in hooks)  # scheduled LoRAs change during a run
        shape_of_text = None if text is None else tuple(text.shape[1:])
        signature = (tuple(x.shape[1:]), chunk.rows, x.dtype, shape_of_text, weights)
        for lane in lanes:
            if lane.signature != signature:
                lane.clear()
            lane.signature, lane.used = signature, self.run.evaluation
        point = Point(self.index, self.sigma, fractional_step(self.run.sigmas, self.sigma) if self.steps else None)
        parts = self.settings.tap.parts(self)
        visit = Visit(self, chunk, lanes, point, self.choice, x.device, parts, base.diffusion_model)
        if isinstance(self.settings.policy, InputChange):
            for i, lane in enumerate(lanes):
                lane.change.moved(thinned(x[chunk.part(i)]))
            if visit.choice is PROBE:
                total = lanes[0].change.total()  # waits for the GPU, once in an evaluation
                visit.settle(inf if total is None else total)
        if visit.choice is PROBE and not visit.holds_enough(lanes[0]):
            visit.settle(inf)
        if visit.choice is FORECAST and not visit.ready():
            visit.choice = COMPUTE
        return visit


def steps_of(sigmas: Sequence[float]) -> list[float] | None:
    """The sigmas at which steps begin, or None if they do not strictly fall."""
    if len(sigmas) < 2 or any(b >= a for a, b in pairwise(sigmas)):
        return None
    return list(sigmas[:-1])


PER_STEP = {  # samplers with several evaluations a step; their last step has one
    "sample_heun": 2,
    "sample_exp_heun_2_x0": 2,
    "sample_exp_heun_2_x0_sde": 2,
    "sample_dpm_2": 2,
    "sample_dpm_2_ancestral": 2,
    "sample_dpmpp_2s_ancestral": 2,
    "sample_dpmpp_2s_ancestral_cfg_pp": 2,
    "sample_dpmpp_sde": 2,
    "sample_dpmpp_sde_gpu": 2,
    "sample_sa_solver_pece": 2,
    "sample_seeds_2": 2,
    "sample_seeds_3": 3,
}
AT_THE_END = ("sample_heun", "sample_exp_heun_2_x0", "sample_exp_heun_2_x0_sde")  # where the second evaluation lies
IRREGULAR = ("sample_heunpp2", "dpm_adaptive_function")


def evaluations_of(steps: Sequence[float] | None, sampler: str, ends: bool = True) -> int | None:
    """The number of evaluations of a run; None if the schedule does not tell.

    ends: the schedule goes down to 0, so its last step needs one evaluation with any sampler.
    """
    if steps is None or sampler in IRREGULAR:
        return None
    each = PER_STEP.get(sampler, 1)
    return each * (len(steps) - 1) + (1 if ends else each)


MULTISTEP = (
    "dpmpp_2m",
    "dpmpp_3m",
    "res_multistep",
    "ipndm",
    "deis",
    "lms",
    "unipc",
    "gradient_estimation",
    "sa_solver",
)


def is_multistep(sampler: str) -> bool:
    """Whether a sampler remembers earlier evaluations, and follows their slope."""
    return sampler.removeprefix("sample_").startswith(MULTISTEP)


def sigmas_of(sigmas: Sequence[float], sampler: str) -> list[float]:
    """The noise level of every evaluation of a run over a falling schedule that `evaluations_of` can count.

    Where in its step a second evaluation lies depends on the sampler; for those that are not of Heun's kind, evenly.
    """
    each = PER_STEP.get(sampler, 1)
    parts = max(1, each - 1) if sampler in AT_THE_END else each
    found = [high + (low - high) * k / parts for high, low in pairwise(sigmas) for k in range(each)]
    return found[: len(found) - each + 1] if sigmas[-1] == 0 else found


def noise_shares(model_sampling: Any, sigmas: Sequence[float]) -> list[float]:
    """The share of noise in the latent at these noise levels, 0 to 1: sigma itself for flow, `s / (1 + s)` for EPS."""
    one, zero = torch.ones(1), torch.zeros(1)
    found = []
    for sigma in sigmas:
        level = torch.tensor([sigma])
        noise = float(model_sampling.noise_scaling(level, one, zero))
        picture = float(model_sampling.noise_scaling(level, zero, one))
        found.append(noise / (noise + picture))
    return found


def fractional_step(sigmas: Sequence[float], sigma: float) -> float:
    """Where a sigma lies in a falling schedule: 2.5 is half-way from `sigmas[2]` to `sigmas[3]`."""
    for i, (high, low) in enumerate(pairwise(sigmas)):
        if sigma >= low:
            return i + (high - sigma) / (high - low)
    return float(len(sigmas) - 1)


def thinned(x: Tensor) -> Tensor:
    """Every eighth row and column, as EasyCache compares; more of them if a side is short."""
    return x[..., :: max(1, min(8, x.shape[-2] // 16)), :: max(1, min(8, x.shape[-1] // 16))]
