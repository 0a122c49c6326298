"""DiT4SR during a run: windows of the picture, and the stream of one call of the model.

The stream's tokens live for one call and begin anew with it: `Stream`. The first block that asks makes them, so a call
whose blocks a step cache skips pays nothing. Nothing is kept from one evaluation to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...models.restore.dit4sr import joint_block
from ...models.restore.dit4sr_tiles import Blend, Window, weights, windows
from .. import adapters
from ..blocks import RunBlock
from ..compiled import untraced
from ..families import sd3
from ..families.family import BlockArgs
from ..memory import Prompts, Shape
from ..offers import Offer, ask, offer
from ..run import Chunk, Run, attached, chunk_of
from ..tiles import TILES, Tile
from .dit4sr_settings import NODE, DiT4SR

STREAM = "dit_toolkit.dit4sr"  # in transformer_options: the Stream of the call


class Stream:
    """The low-resolution stream beside one call of the model.

    latent: of every picture of the call's batch, `[B, C, h, w]`, cut as the call is.
    """

    def __init__(self, settings: DiT4SR, base: Any, control: Any, latent: Tensor):
        self.settings, self.base, self.control, self.latent = settings, base, control, latent
        self.transformer = base.diffusion_model
        self.grid = sd3.token_grid(self.transformer, *latent.shape[-2:])
        self.tokens: Tensor | None = None
        self.last = -1  # block that ran

    @untraced  # it changes from call to call; the block that it calls is compiled
    def run(self, i: int, args: BlockArgs) -> dict[str, Tensor | None]:
        """Block `i` with all three streams. A block that comes again begins another pass of the model."""
        if self.tokens is None or i <= self.last:
            self.tokens = sd3.tokens(self.base, self.latent)
        self.last = i
        transformer = self.transformer
        img, self.tokens, txt = joint_block(
            transformer.joint_blocks[i],
            self.control.transformer_blocks[i],
            args["img"],
            self.tokens,
            args["txt"],
            args["vec"],
            self.grid,
            attention=sd3.attention(transformer, args["transformer_options"]),
            strength=self.settings.strength,
            cross_stream_scale=self.settings.cross_stream_scale,
        )
        return {"img": img, "txt": txt}


class Restorer:
    """DiT4SR in one run of a sampler."""

    def __init__(self, settings: DiT4SR, run: Run):
        self.settings, self.run = settings, run
        self.windows = windows(settings.size, settings.tile, settings.overlap)
        self.at_once = min(settings.tile_batch, len(self.windows))
        self.progress = Progress(run)
        run.memory.reshape("DiT4SR", self.reserved)
        if len(self.windows) > 1:
            run.memory.cut(len(self.windows), (self.windows[0].height, self.windows[0].width), self.at_once)

    def block(self, i: int):
        """What block `i` does instead, where a call has a stream."""

        @untraced  # what it finds in the options changes from call to call
        def run(args: BlockArgs, run_block: RunBlock) -> dict[str, Any]:
            options = args.get("transformer_options", {})  # forward passes of other packs may leave them out
            ask(options, "block replacement")
            stream: Stream | None = options.get(STREAM)
            return run_block(args) if stream is None else stream.run(i, args)

        return run

    def reserved(self, noise_shape: Shape, conds: Prompts) -> Shape:
        """The latent that core makes room for: as many windows as go side by side, each with two streams.

        A ControlNet sees the whole picture, so with one the whole is asked for.
        """
        batch, *channels, height, width = noise_shape
        controlled = any(cond.get("control") is not None for prompt in conds.values() for cond in prompt)
        if len(self.windows) > 1 and not controlled:
            batch *= self.at_once
            height, width = self.windows[0].height, self.windows[0].width
        return (batch, *channels, height, 2 * width)

    def weight(self, window: Window, device: torch.device) -> Tensor:
        """The weight of the cells of a window, all of which have one size."""
        side = window.height, window.width
        return self.run.once(("weights of a window", *side, device), lambda: weights(*side).to(device))

    def given(self, base: Any) -> bool:
        """Not to the negative model of a guider with two models."""
        return any(each is self.settings for each in attached(base.current_patcher))

    # One call of the model, whole or one window of it

    def apply_model(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **conds
    ):
        """APPLY_MODEL: hand the stream to the blocks of this call."""
        base, options = executor.class_obj, transformer_options or {}
        if self.given(base) and self.run.in_part(self.settings.part, base.model_sampling):
            if c_concat is not None:
                raise ValueError(f"{NODE} does not work with a model that takes more than a picture and a prompt.")
            latent = self.latent(chunk_of(options), x, options)
            options = offer(options, Offer(NODE, "block replacement"))
            options = {**options, STREAM: Stream(self.settings, base, self.control(base.current_patcher), latent)}
        return executor(x, t, c_concat, c_crossattn, control, options, **conds)

    def control(self, patcher: ModelPatcher) -> Any:
        """The control weights on the device of this MODEL."""
        if self.settings.adapter is not None:
            found = adapters.module_in(patcher, self.settings.adapter)
            if found is not None:
                return found
        raise RuntimeError(
            f"{NODE}: the patch {self.settings.name} did not reach {patcher.load_device}. Put {NODE} before the node "
            "that spreads the model over several GPUs."
        )

    def latent(self, chunk: Chunk, x: Tensor, options: dict) -> Tensor:
        """The low-resolution latent of every row of the call's batch, `[B, C, h, w]`."""
        latent = self.run.seen(self.settings.latent, options, x.device)
        if latent.shape[0] not in (1, chunk.rows):
            raise ValueError(
                f"{NODE} got {latent.shape[0]} images for a batch of {chunk.rows} pictures. Connect its 'latent' to "
                "the sampler, or give it one image."
            )
        whole = self.settings.size
        corners = (each.tile or Tile(*self.run.areas.get(each.uuid, (0, 0)), whole) for each in chunk.conditions)
        parts = [self.part(latent, corner, x) for corner in corners]
        return torch.cat([part.expand(chunk.rows, -1, -1, -1) for part in parts])

    def part(self, latent: Tensor, corner: Tile, x: Tensor) -> Tensor:
        """The part of `latent` that a call for `x` at this corner sees.

        Raises:
            ValueError: it is not known which part that is.
        """
        if not corner.found:
            raise ValueError(
                f"{NODE}: another node cuts the picture into tiles, and does not tell where they lie. Remove it: "
                f"{NODE} cuts tiles by itself."
            )
        window = Window(corner.top, corner.left, x.shape[-2], x.shape[-1])
        found = window.of(latent)
        if found.shape[-2:] != x.shape[-2:]:
            height, width = (8 * side for side in x.shape[-2:])
            raise ValueError(
                f"{NODE}: the sampler asks for {width} x {height} pixels, which lie outside of the picture that {NODE} "
                "prepared. Connect its 'latent' to the sampler."
            )
        return found

    # Windows

    def cut(self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **conds):
        """APPLY_MODEL, outside of all features: call the model for each window, and blend what comes of it.

        A negative model of its own is cut, too: only so do the two of them ask for as much memory.
        """
        settings, options = self.settings, transformer_options or {}
        size = (x.shape[-2], x.shape[-1])
        found = windows(size, settings.tile, settings.overlap)
        if len(found) == 1:
            return executor(x, t, c_concat, c_crossattn, control, options, **conds)
        transformer = executor.class_obj.diffusion_model
        corners = self.run.corners(x, options)
        blend = Blend(size, self.weight(found[0], x.device))
        progress, rest = self.progress.of_call(len(found)), iter(found)
        while some := tuple(islice(rest, settings.tile_batch)):
            comfy.model_management.throw_exception_if_processing_interrupted()
            several = partial(parts_of, parts=some, like=x)
            result = executor(
                *map(several, (x, t, c_concat, c_crossattn)),
                None if control is None else sd3.control_of_parts(control, transformer, size, some),
                options_of(options, some, corners),
                **{name: several(value) for name, value in conds.items()},
            )
            for window, part in zip(some, result.chunk(len(some)), strict=True):
                blend.add(window, part)
            progress(len(some))
        return blend.result()


def parts_of(value: Any, parts: Sequence[Window], like: Tensor) -> Any:
    """An argument of the model for several windows side by side in the batch.

    Args:
        like: the batch of the whole call, `[B, C, h, w]`. What has its height and width is cut.
    """
    if not isinstance(value, Tensor):
        return value
    if value.ndim == like.ndim and value.shape[-2:] == like.shape[-2:]:
        return torch.cat([part.of(value) for part in parts])
    return torch.cat([value] * len(parts)) if value.ndim and value.shape[0] == like.shape[0] else value


def options_of(options: dict, parts: Sequence[Window], corners: Sequence[Tile]) -> dict:
    """transformer_options of a call for several windows. `corners`: of each condition of the whole call."""
    tiles = [
        corner._replace(top=corner.top + part.top, left=corner.left + part.left) if corner.found else corner
        for part in parts
        for corner in corners
    ]
    names = [name for name in ("uuids", "cond_or_uncond") if options.get(name)]
    repeated = {name: list(options[name]) * (len(tiles) // len(options[name])) for name in names}
    return {**options, **repeated, TILES: tuple(tiles)}


class Progress:
    """Shows windows on the bar of the sampler's node, as parts of its steps."""

    def __init__(self, run: Run):
        self.run = run
        self.evaluation, self.call = -1, 0
        self.calls = 1  # of the model for each evaluation, as the last one had them

    def of_call(self, tiles: int):
        """A call of the model with so many windows begins. Returns what to call when some of them are done."""
        if self.evaluation != self.run.evaluation:
            self.calls = max(self.calls, self.call)
            self.evaluation, self.call = self.run.evaluation, 0
        self.call += 1
        steps = self.run.sigmas[:-1]
        each = max(self.calls, self.call) * tiles  # windows of a step
        # Read once in an evaluation, and only for a bar that has steps.
        begun = sum(step > self.run.sigma * (1 + 1e-5) for step in steps)
        done = begun * each + (self.call - 1) * tiles

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if steps:
                comfy.utils.ProgressBar(len(steps) * each).update_absolute(done)

        return advance
