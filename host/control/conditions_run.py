"""Condition images during a run: one `Encoder` per condition image, one `Lane` per prompt.

There is one lane per prompt, hook group and device, and one per context window if pictures have texts or condition
images of their own. The encoder computes a lane's keys and values again when a source of them differs: pooled text,
guidance, the picture's token grid, RoPE options, dtype or weight patches.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...models.control.conditions import encode_condition
from ...models.control.positions import GridSize, tokens_in_tile
from .. import adapters
from ..attention import ExtraKeys, KeysByBlock, with_keys
from ..families import flux
from ..memory import Bytes, Plan, Prompt, Shape, item_size
from ..progress import one_by_one
from ..resting import Kept, RestingKeys, Shelf
from ..run import Chunk, Run, attached, chunk_of
from ..tiles import Tile
from ..transformer import transformer_of
from .conditions_settings import ConditionImage

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Call:
    """One call of the model, with all that the encoder needs."""

    base: Any  # ComfyUI's BaseModel
    lora: Any  # the adapter, or None for plain tokens
    chunk: Chunk
    options: dict  # transformer_options
    x: Tensor  # [conditions * rows, C, h, w]
    latent: Tensor  # of the condition, on the device: one for all pictures, or one each
    channels: int  # of the transformer's input, concatenated ones included
    conds: dict  # from the conditioning: "y", "guidance"

    @property
    def transformer(self) -> Any:
        return self.base.diffusion_model

    @property
    def picture(self) -> tuple[int, int]:
        """Rows and columns of the picture's own tokens."""
        return flux.grid_size(self.transformer, *self.x.shape[-2:])

    @cached_property
    def given(self) -> tuple[Tensor | None, Tensor | None]:
        """Pooled text and guidance of the whole batch, in main memory. With --gpu-only they have to come over."""
        pooled, guidance = (self.conds.get(name) for name in ("y", "guidance"))
        return None if pooled is None else pooled.cpu(), None if guidance is None else guidance.cpu()

    @cached_property
    def like(self) -> Tensor:
        """An empty tensor with the dtype and device the transformer computes in."""
        return torch.empty(0, dtype=self.base.get_dtype_inference(), device=self.x.device)


@dataclass(frozen=True, eq=False)
class Source:
    """All that a condition's keys and values depend on, apart from the settings.

    Text and guidance are compared, once for each call. So they are in main memory, where core has them anyway.
    """

    latent: Tensor  # [N, C, h, w], one object for all calls that see the same
    pooled: Tensor | None  # [1 or rows, P]
    guidance: Tensor | None  # [1 or rows]
    rest: tuple  # picture grid, RoPE options, channels, dtype, weight patches

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.latent, self.pooled, self.guidance

    @property
    def rows(self) -> int:
        return max(x.shape[0] for x in self.tensors if x is not None)

    @cached_property
    def moved(self) -> dict[torch.device, tuple[Tensor | None, ...]]:
        """Text and guidance by the device that they were moved to."""
        return {}

    def on(self, like: Tensor) -> tuple[Tensor | None, ...]:
        """Text and guidance on the device and in the dtype of `like`."""
        if like.device not in self.moved:
            self.moved[like.device] = tuple(None if x is None else x.to(like) for x in (self.pooled, self.guidance))
        return self.moved[like.device]

    def same_as(self, other: Source | None) -> bool:
        if other is None or self.rest != other.rest:
            return False
        return all(_equal(a, b) for a, b in zip(self.tensors, other.tensors, strict=True))


@dataclass
class Lane:
    """Keys and values for one prompt, and their source."""

    source: Source | None = None
    keys: KeysByBlock = field(default_factory=dict)


class Encoder:
    """One condition image during one run: finds or computes its keys and values for each call of the model."""

    def __init__(self, settings: ConditionImage, run: Run):
        self.settings = settings
        self.run = run
        self.logged = False
        self.shelf = Shelf()
        self.usage = run.memory.open(settings.feature, self.asked)
        run.on_close(lambda completed: self.shelf.close())

    def asked(self, plan: Plan) -> Bytes:
        """The keys of all prompts. Windows share them, unless their pictures have conditions or texts of their own."""

        def of_their_own(prompt: Prompt) -> bool:
            pooled = prompt.get("pooled_output")
            return self.settings.latent.shape[0] > 1 or (pooled is not None and pooled.shape[0] > 1)

        def rows(piece: Shape, prompt: Prompt) -> int:
            return piece[0] if of_their_own(prompt) else 0

        shared = sum(not of_their_own(prompt) for prompt in plan.every)
        size = size_of_keys(plan.model, self.settings.latent, shared + plan.in_all(rows))
        return Bytes(main=size) if self.settings.offloaded else Bytes(size)

    def note(self, keys: Sequence[KeysByBlock]) -> None:
        """Count what there is of keys while a call runs: those of the lanes, and its own."""
        lanes = [lane.keys for lane in self.run.lanes_of(self)]
        size = sum(bytes_of(each) for each in {id(each): each for each in (*lanes, *keys)}.values())
        self.usage.hold(Bytes(main=size) if self.settings.offloaded else Bytes(size))

    def apply_model(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **conds
    ):
        """APPLY_MODEL: hand this condition's keys and values to the attention patch."""
        base, options = executor.class_obj, transformer_options or {}
        # A guider with two models may lack this image on its negative model.
        given = any(each is self.settings for each in attached(base.current_patcher))
        if given and self.run.in_part(self.settings.part, base.model_sampling):
            channels = x.shape[1] + (0 if c_concat is None else c_concat.shape[1])
            lora, chunk = self.lora(base.current_patcher), chunk_of(options)
            latent = self.latent(chunk, options, x.device)
            call = Call(base, lora, chunk, options, x, latent, channels, conds)
            keys = [self.keys(call, i) for i in range(len(call.chunk.conditions))]
            self.note(keys)
            options = with_keys(options, ExtraKeys(keys, math.log(self.settings.influence), feature=self.settings.node))
        return executor(x, t, c_concat, c_crossattn, control, options, **conds)

    def lora(self, patcher: ModelPatcher) -> Any:
        """The module of the LoRA on the device of this MODEL; None for plain tokens."""
        if self.settings.adapter is None:
            return None
        if (lora := adapters.module_in(patcher, self.settings.adapter)) is not None:
            return lora
        raise RuntimeError(
            f"{self.settings.node}: the LoRA {self.settings.name} did not reach {patcher.load_device}. Put "
            f"{self.settings.node} before the node that spreads the model over several GPUs."
        )

    def keys(self, call: Call, i: int) -> KeysByBlock:
        """Keys and values for condition `i` of the call, from its lane if its source is the same."""
        source, condition = self.source(call, call.chunk.part(i)), call.chunk.conditions[i]
        if self.settings.latent.shape[0] == source.rows == 1:
            condition = replace(condition, window=None)  # every window needs the same keys
        lane = self.run.lane(self, condition, Lane)
        earlier = lane.source
        if earlier is not None and source.same_as(earlier):
            source = earlier  # its text and guidance are on the device already
        if self.settings.cache == "off":
            lane.source = source
            return self.encode(call, source, condition.tile)
        if source is not earlier:
            lane.source, lane.keys = None, {}  # free the old ones before making new ones
            lane.keys = self.encode(call, source, condition.tile)
            lane.source = source  # only now: an interrupt may come from inside any layer
        return lane.keys

    def source(self, call: Call, part: slice) -> Source:
        """The source of the keys of these batch rows; one row if all rows agree."""
        pooled, guidance = (None if x is None else x[part] for x in call.given)
        if not call.transformer.params.guidance_embed:
            guidance = None
        if all(x is None or torch.equal(x, x[:1].expand_as(x)) for x in (pooled, guidance)):
            pooled, guidance = (None if x is None else x[:1] for x in (pooled, guidance))
        patcher = call.base.current_patcher
        hooks = getattr(patcher.current_hooks, "hooks", ())
        weights = (patcher.patches_uuid, *((hook.hook_ref, hook.strength) for hook in hooks))
        rope = tuple(sorted((call.options.get("rope_options") or {}).items()))
        rest = (call.picture, rope, call.channels, call.like.dtype, weights)
        return Source(call.latent, pooled, guidance, rest)

    def latent(self, chunk: Chunk, options: dict, device: torch.device) -> Tensor:
        """The condition latents of a call's pictures, on its device: one for all, or one each."""
        latent = self.run.seen(self.settings.latent, options, device)
        if latent.shape[0] not in (1, chunk.rows):
            raise ValueError(
                f"{self.settings.node} got {latent.shape[0]} {self.settings.images} for a batch of {chunk.rows} "
                "pictures. Give one image for all, or as many as the batch has."
            )
        return latent

    def encode(self, call: Call, source: Source, tile: Tile | None) -> KeysByBlock:
        """Run the condition through the model's image branch. Nothing else does."""
        settings, transformer = self.settings, call.transformer
        self.refuse_if_too_large(call, source)
        latent = source.latent
        pooled, guidance = source.on(call.like)
        grid = flux.grid_size(transformer, *latent.shape[-2:])
        ids, inside = self.laid_out(call, grid, tile, latent.device)
        keys = encode_condition(
            transformer,
            call.lora,
            flux.latent_tokens(call.base, latent, call.channels),
            flux.modulation_vector(transformer, 0.0, guidance, pooled, call.like),
            flux.rotations(transformer, ids, call.options),
            attention=flux.attention,
            apply_rope=flux.apply_rope,
            strength=settings.strength,
            store=partial(_stored, inside=inside, shelf=self.shelf if settings.offloaded else None),
            each=self.blocks,
        )
        self.log_once(call, source, grid)
        keys = flux.by_block(transformer, keys)
        return RestingKeys(keys, latent.device) if settings.offloaded else keys

    def blocks(self, blocks: Iterator[T], count: int) -> Iterator[T]:
        """The blocks of the image branch, on the sampler's progress bar; without a cache they come in every step."""
        return blocks if self.settings.cache == "off" else one_by_one(blocks, count)

    def laid_out(
        self, call: Call, grid: GridSize, tile: Tile | None, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Position ids of the condition's tokens, `[T, 3]`, and the numbers of those to use; None for all.

        In a tile, use the part of a condition over the picture that lies over the tile. A condition beside the picture
        lies beside each tile.

        Raises:
            ValueError: the tile's part of the picture is unknown.
        """
        settings = self.settings
        position_ids = settings.position_ids[settings.kind]
        if tile is None or settings.kind not in settings.over:
            return position_ids(grid, call.picture, device), None
        if not tile.found:
            height, width = (8 * side for side in tile.whole)
            raise ValueError(
                f"{settings.node}: another node cuts the picture of {width} x {height} pixels into tiles, and does not "
                f"tell where they lie, so each would get all of {settings.name}. Cut picture and condition into tiles "
                "before sampling instead; the help page says how."
            )
        whole = flux.grid_size(call.transformer, *tile.whole)
        corner = (tile.top / call.transformer.patch_size, tile.left / call.transformer.patch_size)
        time, row, column = position_ids(grid, whole, device).unbind(-1)
        ids = torch.stack((time, row - corner[0], column - corner[1]), -1)
        of_tile = (grid, whole, corner, call.picture)
        return ids, self.run.once(("tokens in tile", *of_tile, device), lambda: tokens_in_tile(*of_tile).to(device))

    def refuse_if_too_large(self, call: Call, source: Source) -> None:
        """Before computing anything, refuse keys that do not fit into free memory."""
        offloaded = self.settings.offloaded
        needed = size_of_keys(call.base, source.latent, source.rows)
        free: Any
        if offloaded:
            free = comfy.model_management.get_free_memory(torch.device("cpu"))
        else:
            free = call.base.current_patcher.get_free_memory(call.x.device)  # includes what core would give back
        if needed > free:
            size = self.settings.size_input
            remedy = f"Lower {size}" if offloaded else f"Set kv_cache to 'offload to CPU' or lower {size}"
            raise ValueError(
                f"The keys and values of {self.settings.feature} {self.settings.name} need {needed / 2**20:.1f} MiB, "
                f"{free / 2**20:.1f} MiB are free. {remedy}."
            )

    def log_once(self, call: Call, source: Source, grid: tuple[int, int]) -> None:
        """Write one line per run."""
        if self.logged:
            return
        self.logged = True
        has, takes = source.latent.shape[1], call.channels
        logger.info(
            "%s %s: %s, %d tokens, %.1f MiB of keys and values per prompt%s",
            self.settings.feature,
            self.settings.name,
            self.settings.kind,
            grid[0] * grid[1],
            size_of_keys(call.base, source.latent, source.rows) / 2**20,
            f"; the model takes {takes} channels, the condition has {has}: zeros for the rest" if takes > has else "",
        )


def size_of_keys(model: Any, latent: Tensor, rows: int) -> int:
    """Bytes of all keys and values of `rows` conditions like `latent`. `model`: a MODEL, or a running BaseModel."""
    transformer = transformer_of(model)
    tokens = math.prod(flux.grid_size(transformer, *latent.shape[-2:]))
    blocks = len(transformer.double_blocks) + len(transformer.single_blocks)
    return 2 * blocks * rows * tokens * transformer.hidden_size * item_size(model)


def bytes_of(keys: KeysByBlock) -> int:
    """Bytes of keys and values wherever they are."""
    if isinstance(keys, RestingKeys):
        return keys.nbytes
    return sum(k.nbytes + v.nbytes for k, v in keys.values())


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _stored(x: Tensor, inside: Tensor | None, shelf: Shelf | None) -> Kept:
    """Keys or values `[N, H, T, d]` in their stored form: of the tokens `inside` only, on a shelf if there is one.

    Values that no LoRA changes are a part of what a layer makes, up to seven times as large: they get memory of their
    own.
    """
    if inside is not None:
        x = x.index_select(2, inside)
    if x.untyped_storage().nbytes() > x.nbytes:
        x = x.clone()
    return x if shelf is None else shelf.put(x)
