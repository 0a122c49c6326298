"""DynamiCtrl during a run: the poses of one call of the model, and the streams that they make.

A stream lives for one call and begins anew with it. The first block that asks makes its tokens, so a call whose blocks
a step cache skips pays nothing. One block's stream is kept at a time: all of them would be gigabytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from .. import adapters
from ..families import cogvideox
from ..memory import Bytes, Plan, Prompt, Shape, Usage, item_size
from ..offers import Offer, ask, offer
from ..run import Run, attached
from ..transformer import transformer_of
from .dynamictrl_conditions import POSES, Poses
from .dynamictrl_settings import LOADER, NODE, DynamiCtrl, Pose


class Stream:
    """The pose stream of one or several conditions of a call that share a pose.

    latent: `[1 or R, C, T, h, w]` of the R videos of each condition. members: number and strength of each condition.
    """

    def __init__(self, latent: Tensor, members: Sequence[tuple[int, float]]):
        self.latent, self.members = latent, tuple(members)
        self.c: Tensor | None = None
        self.last = -1  # block that ran

    def at(self, i: int, e: Tensor, norms: Any, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """What is added in block `i`, `[R, N, D]`. Blocks that were skipped are made up for.

        A block that comes again begins another pass of the model. `e`: `[R, E]`.
        """
        if self.c is None or i <= self.last:
            self.c, self.last = embed(self.latent), -1
        n = self.c
        while self.last < i:
            self.last += 1
            n, self.c = norms.run(self.last, self.c, e)
        return n


class Call:
    """The streams of one call of the model."""

    def __init__(
        self,
        base: Any,
        norms: Any,
        streams: Sequence[Stream],
        conditions: int,
        text_width: int,
        options: Any,
        usage: Usage,
    ):
        self.base, self.norms, self.streams = base, norms, tuple(streams)
        self.conditions, self.text_width, self.options, self.usage = conditions, text_width, options, usage

    def add(self, i: int, video: Tensor, e: Tensor) -> Tensor:
        """The norm of the video in block `i`, `[B, N, D]`, with what the poses add. `e`: `[B, E]`."""
        ask(self.options, "norm")
        rows = len(video) // self.conditions
        parts = list(video.split(rows))
        for stream in self.streams:
            first = stream.members[0][0] * rows
            n = stream.at(i, e[first : first + rows], self.norms, self.embed)
            self.usage.hold(Bytes(n.nbytes + sum(each.c.nbytes for each in self.streams if each.c is not None)))
            for number, strength in stream.members:
                parts[number] = parts[number] + (n if strength == 1 else strength * n)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def embed(self, latent: Tensor) -> Tensor:
        return cogvideox.tokens(self.base, latent, self.text_width)


class Hooked:
    """One transformer whose norms are overridden for the run. `call`: the one that runs now, if it has poses."""

    def __init__(self, transformer: Any):
        self.call: Call | None = None
        self.undo = cogvideox.override_norms(transformer, self.add)

    def add(self, i: int, video: Tensor, e: Tensor) -> Tensor:
        return video if self.call is None else self.call.add(i, video, e)


class Animator:
    """DynamiCtrl in one run of a sampler."""

    def __init__(self, settings: DynamiCtrl, run: Run):
        self.settings, self.run = settings, run
        self.shared = True  # conditions of one pose share its stream
        self.hooked: dict[int, Hooked] = {}
        self._lock = threading.Lock()  # with several GPUs, conditions run in threads
        self.usage = run.memory.open("DynamiCtrl", self.asked)
        run.on_close(self.close)

    def close(self, completed: bool) -> None:
        for each in reversed(self.hooked.values()):
            each.undo()
        self.hooked.clear()

    def asked(self, plan: Plan) -> Bytes:
        """The streams of all poses of a call, and what one of them adds to a block."""
        poses: dict[Hashable, Prompt] = {}
        shared = not any("ofs" in prompt for prompt in plan.every)
        for number, prompt in enumerate(plan.every):
            given = prompt.get("model_conds", {}).get(POSES)
            if given is not None and given.cond.strength:
                area = prompt.get("area")
                poses[(id(given.cond.latent), None if area is None else tuple(area)) if shared else number] = prompt
        transformer, family = transformer_of(plan.model), cogvideox.COGVIDEOX

        def of_one(piece: Shape, prompt: Prompt) -> int:
            picture = sum(grid.picture for grid in family.grids_of(transformer, piece, prompt))
            return piece[0] * picture * cogvideox.build(transformer).widths["img"] * item_size(plan.model)

        streams = replace(plan, prompts={"with a pose": list(poses.values())}).in_a_call(of_one)
        return Bytes(streams + streams // max(len(poses), 1))

    def look(self, executor, model, conds, x, timestep, model_options):
        """CALC_COND_BATCH: a prompt with an `ofs` of its own has another embedding of the timestep than the others."""
        self.shared = not any("ofs" in prompt for prompts in conds for prompt in prompts or ())
        return executor(model, conds, x, timestep, model_options)

    def apply_model(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **conds
    ):
        """APPLY_MODEL: let the poses of this call reach its blocks."""
        base, options = executor.class_obj, transformer_options or {}
        norms = norms_of(base.current_patcher)
        if norms is None:  # a guider's second model without pose norms: core says what is wrong with poses, if any
            return executor(x, t, c_concat, c_crossattn, control, options, **conds)
        transformer = transformer_of(base)
        self.check(transformer, x, c_concat, options)
        poses = conds.pop(POSES, Poses())
        streams = self.streams(poses, base, x, options) if poses else []
        if not streams:
            return executor(x, t, c_concat, c_crossattn, control, options, **conds)
        assert c_crossattn is not None
        options = offer(options, Offer(NODE, "norm"))
        hooked = self.hooks(transformer)
        hooked.call = Call(base, norms, streams, len(poses), c_crossattn.shape[-1], options, self.usage)
        try:
            return executor(x, t, c_concat, c_crossattn, control, options, **conds)
        finally:
            hooked.call = None

    def hooks(self, transformer: Any) -> Hooked:
        """The transformer's norms, overridden from its first call with poses to the end of the run."""
        with self._lock:
            if id(transformer) not in self.hooked:
                self.hooked[id(transformer)] = Hooked(transformer)
            return self.hooked[id(transformer)]

    def check(self, transformer: Any, x: Tensor, c_concat: Tensor | None, options: Mapping[str, Any]) -> None:
        """Refuse a call in which latent frames would be paired wrongly, or the picture is of another size.

        ComfyUI would take the first frame for the missing one, and so spoil the last.
        """
        if cogvideox.frames_per_token(transformer) == 2:
            window = options.get("context_window")
            if window is not None and window.dim == 2 and not cogvideox.whole_pairs(cogvideox.frames_of(window)):
                frames = ", ".join(map(str, cogvideox.frames_of(window)[:4]))
                raise ValueError(
                    f"CogVideoX 1.5 works on pairs of latent frames, and a context window of frames {frames}, ... "
                    "splits them. In the node of the context windows, set length and overlap to even numbers of latent "
                    "frames, and 'causal_window_fix' to false."
                )
            if x.shape[2] % 2:
                raise ValueError(odd(x.shape[2]))
        if c_concat is not None and c_concat.shape[2:] != x.shape[2:]:
            raise ValueError(other_size("the reference", c_concat.shape, x.shape))

    def streams(self, poses: Poses, base: Any, x: Tensor, options: dict) -> list[Stream]:
        """The streams of a call, in the order of their first condition; none where no pose acts."""
        groups: list[tuple[Pose, list[tuple[int, float]]]] = []
        for number, pose in enumerate(poses):
            if not pose.strength or not self.run.in_part(pose.part, base.model_sampling):
                continue
            same = (group for first, group in groups if self.shared and first.shares(pose))
            group = next(same, None)
            if group is None:
                groups.append((pose, group := []))
            group.append((number, pose.strength))
        rows = x.shape[0] // len(poses)
        return [Stream(self.latent(pose, x, rows, options), members) for pose, members in groups]

    def latent(self, pose: Pose, x: Tensor, rows: int, options: dict) -> Tensor:
        """The part of a pose's latent that a call for `x` sees: the same window and area."""
        latent = self.run.seen(pose.latent, options, x.device, axes=(0, 2))
        if all(size >= end for size, end in zip(latent.shape[2:], ends(pose.area), strict=False)):
            latent = cogvideox.narrowed(latent, pose.area)
        if latent.shape[1:] != x.shape[1:]:
            raise ValueError(other_size("the pose video", latent.shape, x.shape))
        if latent.shape[0] not in (1, rows):
            raise ValueError(
                f"{NODE}: there are {latent.shape[0]} pose videos for a batch of {rows} videos. Give it one, or as "
                "many as the batch has."
            )
        return latent


def norms_of(patcher: ModelPatcher) -> Any:
    """The pose norms of a MODEL on its device; None where it has none."""
    settings = next((each for each in attached(patcher) if isinstance(each, DynamiCtrl)), None)
    if settings is None:
        return None
    found = adapters.module_in(patcher, settings.adapter)
    if found is None:
        raise RuntimeError(
            f"{LOADER}: the pose norms of {settings.name} did not reach {patcher.load_device}. Load the model again."
        )
    return found


def ends(area: Sequence[int] | None) -> list[int]:
    sides = len(area or ()) // 2
    return [area[i] + area[i + sides] for i in range(sides)] if area else []


def odd(frames: int) -> str:
    return (
        f"CogVideoX 1.5 works on pairs of latent frames, and the sampler asks for {frames}. Take a length of 5, 13, "
        f"21, ... frames (8k + 5), or connect the 'latent' of {NODE} to the sampler."
    )


def other_size(what: str, shape: Sequence[int], wanted: Sequence[int]) -> str:
    has, asks = (f"{s[-1]} x {s[-2]} and {s[2]} frames" for s in (shape, wanted))
    return (
        f"{NODE}: {what} has a latent of {has}, and the sampler asks for {asks}. Connect the 'latent' of {NODE} to the "
        "sampler."
    )
