"""The life of a sampling run: what stays on the MODEL, and what lives only as long as the run.

A *description* is frozen and hangs on a MODEL. A *run* lives from the start of sampling to its end, however it ends,
and counts evaluations. A *lane* is the state that one feature keeps for one condition within a run.

`attach` puts a description on a clone of the MODEL, with the function that binds it. When a sampler starts, an
OUTER_SAMPLE wrapper makes the `Run`, binds the hooks of every description to the run's own copy of the options, and
drops all of it in `finally`. So the order of nodes does not matter, and nothing stays on the MODEL, its weights or its
modules.

Four hooks belong to the run itself. PREPARE_SAMPLING asks core for the memory of all features: `memory.py`.
PREDICT_NOISE is one evaluation by the sampler, whatever the guider makes of it. CALC_COND_BATCH tells which prompts a
guider computes, because core's guiders do not agree on their order. APPLY_MODEL is one call of the model, with one or
more conditions side by side in its batch: a `Chunk`. A second APPLY_MODEL wrapper, inside all features, watches whether
blocks ask for what features hand to them: `offers.py`. A third one stands outside all features, for the one that cuts
the picture into tiles: to the others, each tile is a call (`Run.cut`).
"""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from comfy.model_patcher import ModelPatcher, create_model_options_clone
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from .memory import Memory
from .offers import Offers
from .part_of_run import WHOLE_RUN, PartOfRun
from .tiles import TILES, Tile, tiles_of

logger = logging.getLogger(__name__)

KEY = "dit_toolkit"
CHUNK = "dit_toolkit.chunk"  # in transformer_options: the Chunk that is being computed
PROMPTS = "dit_toolkit.prompts"  # there too: the name of each list of prompts, by number
VISIT = "dit_toolkit.step_cache"  # there too: the step cache's Visit; removed for passes of another picture
POSITIVE = "positive"  # what core's guiders call the prompt of the picture

State = TypeVar("State")
Bind = Callable[[Any, "Run", dict], None]  # (description, run, model_options)


@dataclass(frozen=True, eq=False)
class Attached:
    """A description on a MODEL, and the function that starts its run. `attach` keeps the two together.

    description: frozen settings, which know nothing of their run. Class attributes set its turn among the others,
        whatever the order of nodes. Set `outermost = True` on a feature that may skip a model call, so it decides
        before others prepare for the call. Set `innermost = True` on a feature that calls the model once more, so it
        sees what the others added to the call.
    bind: `bind(description, run, model_options)` adds the feature's hooks to `model_options`, which belong to this run
        alone.
    """

    description: Any
    bind: Bind

    @property
    def turn(self) -> int:
        """Where it stands among the others, the lowest first."""
        return getattr(self.description, "innermost", False) - getattr(self.description, "outermost", False)


@dataclass(frozen=True)
class Condition:
    """What tells the conditions of a batch apart, so that their states never mix.

    The uuid alone is not enough: positive and negative may share one, and context windows and extra passes of guidance
    nodes always do. `occurrence` counts those that look alike, in the order of the evaluation.
    """

    uuid: Hashable
    index: int  # number of its list in the guider's call; `name` says what it is
    occurrence: int
    window: tuple[int, ...] | None  # frames of the context window, if there is one
    hooks: Hashable  # ComfyUI's HookGroup, or None
    device: torch.device
    patched: tuple[Hashable, ...] = ()  # blocks replaced for this pass alone, as by SkipLayerGuidance
    tile: Tile | None = None  # its part of the picture, if another node cuts it into tiles
    role: Hashable = None  # purpose of a feature's own call of the model; None for the picture
    name: str = ""  # the guider's: "positive", "negative", "middle", ...; empty if it knows none

    @property
    def positive(self) -> bool:
        return self.name == POSITIVE

    def __str__(self) -> str:
        """For the log: its name, and what sets it apart from others of that name."""
        apart = {"pass": self.occurrence, "window": self.window, "tile": self.tile, "patched": self.patched}
        return " ".join([self.name or "prompt", *(f"{word} {value}" for word, value in apart.items() if value)])


@dataclass(frozen=True)
class Chunk:
    """One call of the model: `rows` pictures for each of `conditions`, one after the other in the batch.

    A batch of tiles has all conditions for the first tile, then all for the second.
    """

    conditions: tuple[Condition, ...]
    rows: int

    def __str__(self) -> str:
        return f"{self.rows} pictures for each of {', '.join(map(str, self.conditions))}"

    def part(self, i: int) -> slice:
        """The batch rows of condition `i`."""
        return slice(i * self.rows, (i + 1) * self.rows)

    def in_role(self, role: Hashable, which: Sequence[int]) -> Chunk:
        """The chunk of one more call for some of the conditions, with lanes apart from the picture's."""
        return Chunk(tuple(replace(self.conditions[i], role=role) for i in which), self.rows)


class Run:
    """One run of one sampler. `evaluation` is the number of the current one, from 0; -1 before the first.

    model: the sampled MODEL.
    sigmas: the schedule from the sampler node; empty if there is none.
    sampler: ComfyUI's name of the sampler function, such as "sample_euler"; empty if it has none.
    noise: the starting noise, in the shape of the latent, `[B, C, (frames,) h, w]`; None when the run is over.
    x: the sampler's input in the current evaluation, in the same shape; None between two.
    names: the guider's name for each prompt, by uuid.
    memory: what features ask of core and hold.
    guidance: the guider's scale of classifier-free guidance; 1 where there is none, or where nobody knows.

    Reading a value from a GPU stops the program until the GPU has done all that is queued. So the noise level is read
    for all features together (`sigma`), and what stays the same in a run is made once (`once`, `seen`).
    """

    def __init__(
        self,
        model: ModelPatcher | None = None,
        sigmas: Sequence[float] = (),
        sampler: str = "",
        noise: torch.Tensor | None = None,
        names: Mapping[Hashable, str] | None = None,
        guider: Any = None,
    ):
        self.model = model
        self.guidance = guidance_of(guider)
        self.memory = Memory(None if noise is None else noise.shape, guider)
        self.names = dict(names or {})
        self.noise = noise
        self.x: torch.Tensor | None = None
        self._level: torch.Tensor | float | None = None  # of the current evaluation, as a tensor until it is read
        self._once: dict[Hashable, Any] = {}
        self.areas: dict[Hashable, tuple[int, int]] = {}  # prompts for an area of the picture, by uuid: its corner
        self.cut: Callable[..., torch.Tensor] | None = None  # APPLY_MODEL of a feature that makes several calls of one
        self.sigmas = tuple(sigmas)
        self.sampler = sampler
        self.evaluation = -1
        self.replaced: dict[Hashable, Any] = {}  # patches_replace["dit"] as it stands for most passes
        self.offers = Offers()
        self._closing: list[Callable[[bool], None]] = []
        self._lanes: dict[tuple[int, Condition], Any] = {}
        self._seen: Counter[Hashable] = Counter()
        self._lock = threading.RLock()  # with several GPUs, conditions run in threads

    def lane(self, owner: object, condition: Condition, make: Callable[[], State]) -> State:
        """The state of `owner` for `condition` in this run; the first use calls `make`."""
        with self._lock:
            key = (id(owner), condition)
            if key not in self._lanes:
                self._lanes[key] = make()
            return self._lanes[key]

    def begin_evaluation(self, x: torch.Tensor | None = None, timestep: torch.Tensor | None = None) -> None:
        """`timestep`: the noise level of every picture, `[B]`, all the same."""
        with self._lock:
            self.evaluation += 1
            self.x, self._level = x, timestep
            self._seen.clear()

    @property
    def sigma(self) -> float:
        """The noise level of this evaluation. Who asks first waits for the GPU; features that need none do not ask."""
        with self._lock:
            if isinstance(self._level, torch.Tensor):
                self._level = float(self._level.flatten()[0])
            if self._level is None:
                raise RuntimeError("ComfyUI called the model outside of an evaluation by the sampler.")
            return self._level

    def in_part(self, part: PartOfRun, model_sampling: Any) -> bool:
        """Whether this evaluation lies in a part of the run."""
        return part == WHOLE_RUN or part.includes(self.sigma, self.levels(model_sampling))

    def levels(self, model_sampling: Any) -> Any:
        """The noise levels of a model's sampling by percent. Some models look them up in a table on the GPU: once."""

        def make() -> SimpleNamespace:
            return SimpleNamespace(percent_to_sigma=cache(model_sampling.percent_to_sigma))  # keeps model_sampling

        return self.once(("levels", id(model_sampling)), make)

    def once(self, key: Hashable, make: Callable[[], State]) -> State:
        """What stays the same in this run, made when somebody first asks. It goes with the run."""
        with self._lock:
            if key not in self._once:
                self._once[key] = make()
            return self._once[key]

    def seen(self, x: torch.Tensor, options: dict, device: torch.device, axes: Sequence[int] = (0,)) -> torch.Tensor:
        """The part of a tensor of the settings that a call sees, on the call's device: moved once in this run.

        Args:
            x: of the whole run. The run keeps it, as it is known by its identity.
            options: transformer_options of the call, which may be for a context window.
            axes: of `x`, along which context windows cut. They cut what is as long as their whole.
        """
        window = options.get("context_window")
        if window is None or window.dim not in axes or x.shape[window.dim] != window.total_frames:
            return self.once(("seen", id(x), device), lambda: (x, x.to(device)))[1]
        anchor = getattr(window, "causal_anchor_index", None)
        key = ("seen", id(x), device, window.dim, tuple(window.index_list), anchor)
        return self.once(key, lambda: (x, window.get_tensor(x, device, dim=window.dim)))[1]

    def name_of(self, uuid: Hashable, index: int) -> str:
        """The guider's name for a prompt. Without a uuid, or without a "positive", list 0 counts as positive."""
        if uuid is None or POSITIVE not in self.names.values():
            return POSITIVE if index == 0 else "negative"
        return self.names.get(uuid, "")

    def names_of(self, lists: Sequence[Sequence[Mapping] | None]) -> tuple[str, ...]:
        """The name of each list of prompts, by its first prompt: core appends copies from other lists."""
        firsts = [prompts[0].get("uuid") if prompts else None for prompts in lists]
        return tuple(self.name_of(uuid, index) for index, uuid in enumerate(firsts))

    def open_chunk(self, x: torch.Tensor, options: dict, hooks: Hashable) -> Chunk:
        """The conditions of a model call with batch `x` and these transformer_options."""
        uuids, indices = options.get("uuids"), options.get("cond_or_uncond")
        indices = indices or [0] * len(uuids or [None])
        uuids = uuids or [None] * len(indices)
        names = options.get(PROMPTS, ())
        window = options.get("context_window")
        frames = None if window is None else tuple(window.index_list)
        blocks = options.get("patches_replace", {}).get("dit", {})
        patched = tuple(sorted((key for key, call in blocks.items() if self.replaced.get(key) is not call), key=str))
        conditions = []
        prompts = tuple(zip(uuids, indices, strict=True))
        given = options.get(TILES)
        parts = product(self.tiles(x, window, uuids), prompts) if given is None else zip(given, prompts, strict=True)
        with self._lock:
            for tile, (uuid, index) in parts:
                same = (uuid, index, frames, hooks, x.device, patched, tile)
                name = names[index] if index < len(names) else self.name_of(uuid, index)
                identity = (uuid, index, self._seen[same], frames, hooks, x.device, patched, tile)
                conditions.append(Condition(*identity, name=name))
                self._seen[same] += 1
        return Chunk(tuple(conditions), x.shape[0] // len(conditions))

    def tiles(self, x: torch.Tensor, window: Any, uuids: Sequence[Hashable]) -> list[Tile | None]:
        """The tiles in a call with batch `x`; `[None]` for whole pictures, and for prompts that are for an area."""
        if self.x is None or any(uuid in self.areas for uuid in uuids):
            return [None]
        batch = window.index_list if window is not None and window.dim == 0 else range(self.x.shape[0])
        return tiles_of(x, self.x, len(uuids), batch[0], len(batch))

    def corners(self, x: torch.Tensor, options: dict) -> list[Tile]:
        """Which part of the picture each condition of a call with batch `x` is for, tile by tile, areas included."""
        uuids = options.get("uuids") or [None] * len(options.get("cond_or_uncond") or [None])
        if TILES in options:
            return list(options[TILES])
        whole = (x if self.x is None else self.x).shape[-2:]
        tiles = self.tiles(x, options.get("context_window"), uuids)
        return [tile or Tile(*self.areas.get(uuid, (0, 0)), (whole[0], whole[1])) for tile in tiles for uuid in uuids]

    def on_close(self, call: Callable[[bool], None]) -> None:
        """Call `call(completed)` at the end of the run, before its lanes go. An interrupted run is not completed."""
        self._closing.append(call)

    def lanes_of(self, owner: object) -> list[Any]:
        """All states of `owner` in this run."""
        with self._lock:
            return [state for (who, _), state in self._lanes.items() if who == id(owner)]

    def close(self, completed: bool) -> None:
        try:
            for call in self._closing:
                call(completed)
        finally:
            self._closing.clear()
            self.memory.close()
            self.noise = self._level = self.cut = None  # who cuts knows this run: the two would keep the MODEL alive
            with self._lock:
                self._lanes.clear()
                self._once.clear()


def attach(model: ModelPatcher, description: Any, bind: Bind) -> ModelPatcher:
    """A clone of `model` on which `description` takes effect whenever it is sampled: see `Attached`."""
    patched = model.clone()
    options = patched.model_options["transformer_options"]
    options[KEY] = (*options.get(KEY, ()), Attached(description, bind))
    patched.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, sampler_run)
    return patched


def attached(model: ModelPatcher) -> tuple[Any, ...]:
    """The descriptions that hang on `model`, in the order of their nodes."""
    return descriptions_in(model.model_options)


def descriptions_in(model_options: dict) -> tuple[Any, ...]:
    """The descriptions in the options of a MODEL, or of its run."""
    return tuple(each.description for each in model_options["transformer_options"].get(KEY, ()))


def guidance_of(guider: Any) -> float:
    """The scale of classifier-free guidance, of guiders that call it `cfg` as core's do."""
    scale = getattr(guider, "cfg", None)
    return float(scale) if isinstance(scale, (int, float)) and math.isfinite(scale) else 1.0


def chunk_of(options: dict) -> Chunk:
    """The chunk that transformer_options belong to, anywhere below APPLY_MODEL."""
    return options[CHUNK]


def sampler_run(executor, *args, **kwargs):
    """OUTER_SAMPLE: one run from first to last."""
    guider = executor.class_obj
    noise = args[0] if args else kwargs.get("noise")
    names = names_in(getattr(guider, "conds", {}))
    run = Run(guider.model_patcher, *schedule_of(*args, **kwargs), noise, names, guider)
    completed, before = False, guider.model_options
    guider.model_options = options = create_model_options_clone(before)

    def count(executor, *args, **kwargs):
        x, timestep = (args[i] if len(args) > i else kwargs.get(name) for i, name in enumerate(("x", "timestep")))
        run.begin_evaluation(x, timestep)
        try:
            return executor(*args, **kwargs)
        finally:
            run.x = None

    def name_prompts(executor, model, conds, x, timestep, model_options):
        run.areas.update(areas_in(conds))
        options = {**model_options["transformer_options"], PROMPTS: run.names_of(conds)}
        return executor(model, conds, x, timestep, {**model_options, "transformer_options": options})

    def cut(executor, *call, **conds):
        return executor(*call, **conds) if run.cut is None else run.cut(executor, *call, **conds)

    def name_conditions(executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
        hooks = getattr(executor.class_obj.current_patcher, "current_hooks", None)
        chunk = run.open_chunk(x, transformer_options, hooks)
        logger.debug("evaluation %d: %s", run.evaluation, chunk)
        transformer_options = {**transformer_options, CHUNK: chunk}
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    try:
        add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, count, options, is_model_options=True)
        add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, name_prompts, options, is_model_options=True)
        for wrapper in (cut, name_conditions):
            add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, wrapper, options, is_model_options=True)
        found: tuple[Attached, ...] = options["transformer_options"].get(KEY, ())
        for each in sorted(found, key=lambda each: each.turn):
            each.bind(each.description, run, options)
        add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, run.memory.prepare, options, is_model_options=True)
        add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, run.offers.watch, options, is_model_options=True)
        run.replaced = dict(options["transformer_options"].get("patches_replace", {}).get("dit", {}))
        result = executor(*args, **kwargs)
        run.offers.finish(run.model)
        completed = True
        return result
    finally:
        guider.model_options = before
        run.close(completed)


def names_in(conds: Mapping[str, Sequence[Mapping]]) -> dict[Hashable, str]:
    """The guider's name for each of its prompts, by uuid."""
    return {prompt["uuid"]: name for name, prompts in conds.items() for prompt in prompts if "uuid" in prompt}


def areas_in(conds: Sequence[Sequence[Mapping] | None]) -> Iterator[tuple[Hashable, tuple[int, int]]]:
    """Each prompt that is for an area of the picture, with the area's top and left, in cells of the latent."""
    for prompt in (prompt for prompts in conds for prompt in prompts or ()):
        if prompt.get("area"):  # sizes along all axes, then starts
            yield prompt.get("uuid"), (prompt["area"][-2], prompt["area"][-1])


def schedule_of(noise=None, latent_image=None, sampler=None, sigmas=None, *args, **kwargs) -> tuple[list[float], str]:
    """The sigmas and the name of the sampler function, from the arguments of OUTER_SAMPLE."""
    function = getattr(sampler, "sampler_function", None)
    return ([] if sigmas is None else sigmas.tolist()), getattr(function, "__name__", "")
