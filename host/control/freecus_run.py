"""FreeCus during a run: prepares the reference, and runs one pass of it per call of the model."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import comfy.sample
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...models.control.freecus import reference_latent, reference_sigma, subject_keys
from .. import token_grid
from ..attention import ExtraKeys, KeysByBlock, KeysValues, TextScale, with_keys, with_recorder, with_text_scale
from ..families import flux
from ..memory import Bytes, Plan, Prompt, item_size
from ..offers import found_in
from ..run import CHUNK, POSITIVE, VISIT, Run, chunk_of
from ..transformer import REMOVE, Block, transformer_of
from .freecus_settings import FreeCus

uncompiled: Any = torch.compiler.disable  # its type stubs do not cover methods

logger = logging.getLogger(__name__)

PER_CONDITION = ("cond_or_uncond", "uuids")  # lists in transformer_options with an entry for each condition

NO_CONCAT = (
    "Apply FreeCus works on models that take one picture: Fill, Canny and Depth models, and LoRAs of that kind, take a "
    "second one in their channels, and the reference has none. Use FLUX.1-dev, with a ControlNet or EasyControl."
)


@dataclass(eq=False)
class Recording:
    """Records the subject's keys and values in the vital blocks during the reference pass."""

    blocks: frozenset[Block]
    tokens: Tensor  # [S]
    scale: float
    keys: dict[Block, KeysValues] = field(default_factory=dict)

    def wants(self, block: Block) -> bool:
        return block in self.blocks

    def record(self, block: Block, k: Tensor, v: Tensor, text: int) -> None:
        self.keys[block] = subject_keys(k, v, self.tokens, text, self.scale)


class SubjectKeys(Mapping):
    """Keys and values for one condition of a call, computed when the first block asks."""

    def __init__(self, reference: ReferencePass, rows: slice):
        self.reference, self.rows = reference, rows

    def __contains__(self, block: object) -> bool:
        return block in self.reference.blocks

    def __getitem__(self, block: Block) -> KeysValues:
        if block not in self.reference.keys:
            raise ValueError(self.reference.unanswered)
        k, v = self.reference.keys[block]
        return k[self.rows], v[self.rows]

    def __iter__(self) -> Iterator[Block]:
        return iter(self.reference.blocks)

    def __len__(self) -> int:
        return len(self.reference.blocks)


@dataclass(eq=False)
class ReferencePass:
    """One pass of the reference beside one call of the model, made only if a block asks.

    which: the conditions of the call that see the reference, by number. The other fields are the call's arguments.
    """

    run: ReferenceRun
    plain: Any  # APPLY_MODEL without wrappers
    base: Any  # ComfyUI's BaseModel
    sigma: float
    which: tuple[int, ...]
    x: Tensor  # [conditions * rows, C, h, w]
    t: Tensor
    text: Tensor | None
    options: dict
    conds: dict

    @property
    def blocks(self) -> frozenset[Block]:
        return self.run.settings.blocks

    @property
    def unanswered(self) -> str:
        """Why there are no keys, for people."""
        who = found_in(self.base)
        why, remedy = ("another node answers for them", REMOVE) if who is None else (who, who.remedy)
        return f"Apply FreeCus runs the model for its reference too, and the blocks were left out: {why}. {remedy}"

    @cached_property
    def keys(self) -> dict[Block, KeysValues]:
        """Keys and values by block, for the conditions that see the reference, in order."""
        return self.compute()

    @uncompiled  # recursively: a graph would repeat what the first call found in transformer_options
    def compute(self) -> dict[Block, KeysValues]:
        """Run the model on the reference. Nothing else does."""
        settings, chunk = self.run.settings, chunk_of(self.options)
        level = self.run.level(self.sigma, self.base.model_sampling)
        noise = self.run.noise_of(chunk.rows, self.options, self.x.device)
        latent, tokens = (self.run.run.seen(x, {}, self.x.device) for x in (self.run.latent, self.run.tokens))
        x = reference_latent(latent.to(self.x), noise.to(self.x), level).repeat(len(self.which), 1, 1, 1)
        recording = Recording(settings.blocks, tokens, settings.key_scale)

        conds = {name: self._rows(value) for name, value in self.conds.items() if name != "ref_latents"}
        text = self._rows(self.text)
        options = with_recorder(self.options, recording)
        options |= {name: [options[name][i] for i in self.which] for name in PER_CONDITION if name in options}
        options[CHUNK] = chunk.in_role(("FreeCus", id(self.run)), self.which)
        options.pop(VISIT, None)  # a step cache's block wraps are for the picture
        if token_grid.TOKENS in options:
            options[token_grid.TOKENS] = token_grid.tokens(self.base.diffusion_model, x, text, conds)
        wrappers = options.get("wrappers", {})
        options["wrappers"] = {kind: each for kind, each in wrappers.items() if kind != WrappersMP.DIFFUSION_MODEL}

        self.plain(x, self._rows(self.t), None, text, None, options, **conds)
        self.run.passes += 1
        self.run.usage.hold(Bytes(sum(k.nbytes + v.nbytes for k, v in recording.keys.values())))
        return recording.keys

    def _rows(self, value: Any) -> Any:
        """The part of an argument that belongs to the conditions that see the reference."""
        chunk = chunk_of(self.options)
        if len(self.which) == len(chunk.conditions):
            return value
        if not torch.is_tensor(value) or value.ndim == 0 or value.shape[0] != self.x.shape[0]:
            return value
        return torch.cat([value[chunk.part(i)] for i in self.which])


class ReferenceRun:
    """One reference during one run. Encodes it before core loads the model."""

    def __init__(self, settings: FreeCus, run: Run):
        self.settings, self.run = settings, run
        self.passes = 0  # of the reference
        self.logged = False
        noise, model = run.noise, run.model
        if noise is None or model is None or noise.ndim != 4:
            raise ValueError("Apply FreeCus needs a picture latent [B, C, h, w] to work on. Use an image latent.")
        base: Any = model.model
        self.noise = self._noise(noise)
        self.size = (noise.shape[-2], noise.shape[-1])
        self.grid = flux.grid_size(flux.FLUX1.require(model, "Apply FreeCus"), *self.size)
        self.tokens = settings.reference.tokens(*self.size, self.grid)
        latent = settings.reference.latent(*self.size)
        if latent.shape[1] != noise.shape[1]:
            raise ValueError(
                f"Apply FreeCus: the VAE makes {latent.shape[1]} channels, the model works on {noise.shape[1]}. "
                "Connect the VAE of the FLUX.1 model."
            )
        self.latent = base.process_latent_in(latent)
        self.usage = run.memory.open("FreeCus", self.asked)
        run.memory.call_again(self.seeing)
        run.on_close(self.close)

    def _noise(self, noise: Tensor) -> Tensor:
        """The reference's own noise, or the picture's, `[B, C, h, w]`. A run without noise gets noise of its own."""
        seed = self.settings.seed
        if seed is None and torch.count_nonzero(noise):
            return noise
        if seed is None:
            logger.info("FreeCus: this run starts without noise, so the reference has noise of its own, from seed 0")
        own = torch.Generator().manual_seed(seed or 0)  # not the global generator, which the samplers use
        return comfy.sample.prepare_noise_inner(noise, own)  # core's numbers

    def level(self, sigma: float, model_sampling: Any) -> float:
        """Noise level of the reference at this noise level of the picture."""
        half = float(self.run.levels(model_sampling).percent_to_sigma(0.5))  # e^mu / (e^mu + 1), for all flow schedules
        shift = math.log(half / (1 - half))
        return reference_sigma(sigma, shift, self.settings.shift_mode, self.settings.reference_shift)

    def noise_of(self, rows: int, options: dict, device: torch.device) -> Tensor:
        """The noise of the pictures of this call."""
        noise = self.run.seen(self.noise, options, device)
        if noise.shape[0] != rows:
            raise ValueError(
                f"Apply FreeCus started with {noise.shape[0]} pictures and met a call with {rows}. "
                "Another node splits the batch; sample the pictures one by one."
            )
        return noise

    def seeing(self, plan: Plan) -> list[Prompt]:
        """The prompts that see the reference, as its pass gets them."""
        prompts: Sequence[Prompt] = plan.every
        if self.settings.prompts == "positive only":
            prompts = plan.prompts.get(POSITIVE, next(iter(plan.prompts.values()), ()))
        whole = (prompt for prompt in prompts if prompt.get("area") is None)
        return [{name: each for name, each in prompt.items() if name != "reference_latents"} for prompt in whole]

    def asked(self, plan: Plan) -> Bytes:
        """The pass's keys and values, and its streams, queries, keys and values beside those of the block that asks."""
        rows = len(self.seeing(plan)) * max(piece[0] for piece in plan.pieces)
        return Bytes(self.bytes(plan.model, rows), work=5 * rows * math.prod(self.grid) * self._token(plan.model))

    def apply_model(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **conds
    ):
        """APPLY_MODEL: hand over the subject's keys, made on demand, and scale those of the text."""
        base, options = executor.class_obj, transformer_options or {}
        chunk = chunk_of(options)
        every = self.settings.prompts != "positive only"
        which = tuple(i for i, condition in enumerate(chunk.conditions) if every or condition.positive)
        ours = flux.is_flux1(base)  # some guiders have two models
        acts = self.run.in_part(self.settings.part, base.model_sampling)
        if which and ours and acts and any(chunk.conditions[i].tile is not None for i in which):
            raise ValueError(
                "Apply FreeCus works on whole pictures, and another node cuts this one into tiles. Draw the subject at "
                "a size that needs no tiles, and enlarge the picture without Apply FreeCus."
            )
        if which and ours and acts and x.shape[-2:] == self.size:
            if c_concat is not None:
                raise ValueError(NO_CONCAT)
            sigma = self.run.sigma  # now, not in a block
            reference = ReferencePass(self, executor.original, base, sigma, which, x, t, c_crossattn, options, conds)
            options = self.promise(options, reference)
            self.log_once(base, chunk.rows)
        return executor(x, t, c_concat, c_crossattn, control, options, **conds)

    def promise(self, options: dict, reference: ReferencePass) -> dict:
        """transformer_options of a call, with keys that are made when a block asks for them."""
        chunk, which, settings = chunk_of(options), reference.which, self.settings
        seeing = {i: slice(n * chunk.rows, (n + 1) * chunk.rows) for n, i in enumerate(which)}
        first = seeing[which[0]]
        count = range(len(chunk.conditions))
        keys: list[KeysByBlock] = [SubjectKeys(reference, seeing.get(i, first)) for i in count]
        blind = frozenset(i for i in count if i not in seeing)
        factors = [settings.text_key_scale if i in seeing else 1.0 for i in count]
        options = with_keys(options, ExtraKeys(keys, blind=blind, feature="Apply FreeCus"))
        return with_text_scale(options, TextScale(settings.blocks, factors))

    def bytes(self, model: Any, rows: int) -> int:
        """Bytes of the subject's keys and values for this many pictures."""
        return 2 * len(self.settings.blocks) * rows * len(self.tokens) * self._token(model)

    @staticmethod
    def _token(model: Any) -> int:
        """Bytes of one token of a MODEL, or of a running BaseModel."""
        return transformer_of(model).hidden_size * item_size(model)

    def log_once(self, base: Any, rows: int) -> None:
        """Write one line per run."""
        if self.logged:
            return
        self.logged = True
        logger.info(
            "FreeCus: %d of %d tokens show the subject; %d layers, %.1f MiB of keys and values",
            len(self.tokens),
            math.prod(self.grid),
            len(self.settings.blocks),
            self.bytes(base, rows) / 2**20,
        )

    def close(self, completed: bool) -> None:
        """Drop all tensors of the run."""
        if completed and not self.passes:
            logger.warning(
                "FreeCus never acted in this run. Either no step lies between start_percent and end_percent, or all "
                "prompts are for areas of the picture, or other nodes stand in for the layers that see the subject."
            )
        self.noise = self.latent = self.tokens = torch.empty(0)
