"""EasyControl checkpoints as ComfyUI models: finds and loads them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...models.control.easycontrol import ConditionLora
from ...models.control.easycontrol_keys import Checkpoint, Kind, Slot, likely_kind, parse, published_kind
from .. import adapters, model_files

logger = logging.getLogger(__name__)

FOLDER = "easycontrol"


@dataclass(frozen=True, eq=False)
class EasyControlFile:
    """A loaded checkpoint: one patcher with a `ConditionLora` per slot."""

    name: str
    checkpoint: Checkpoint
    patchers: tuple[ModelPatcher, ...]

    def patcher(self, slot: int) -> ModelPatcher:
        """The adapter of one slot.

        Raises:
            ValueError: the file has no such slot.
        """
        last = len(self.patchers) - 1
        if not 0 <= slot <= last:
            raise ValueError(f"{self.name} has no slot {slot}, its last one is {last}. Set 'slot' to at most {last}.")
        return self.patchers[slot]

    @property
    def known_kind(self) -> Kind | None:
        """The kind of condition it is for, if the file or its published name says so."""
        return self.checkpoint.kind or published_kind(self.name)

    @property
    def report(self) -> str:
        """One line: the contents of the file."""
        kind = "not known, set it in Apply EasyControl"
        if self.known_kind:
            kind = self.known_kind
        elif guess := likely_kind(self.name):
            kind = f"{guess} by its name"
        return f"{self.name}: {self.checkpoint.summary}; kind {kind}"

    def kind(self, asked: Kind | Literal["auto"]) -> Kind:
        """The kind of condition to use it for: "auto" follows the file or its name.

        A name that only sounds like the other kind may be the user's own choice, so that is just a warning.

        Raises:
            ValueError: `asked` contradicts the kind that the file is known to be for, or "auto" finds none.
        """
        known, guess = self.known_kind, likely_kind(self.name)
        if asked == "auto":
            if (found := known or guess) is None:
                raise ValueError(
                    f"{self.name} does not say what kind of condition it is for. Set 'kind' to spatial if the image "
                    "lies over the picture, to subject if it shows something to put into it."
                )
            return found
        if known not in (None, asked):
            raise ValueError(
                f"{self.name} is for {known} conditions, and 'kind' is {asked}. Set 'kind' to auto or {known}."
                + ("" if self.checkpoint.kind else " If it is another file than the published one, rename it.")
            )
        if known is None and guess not in (None, asked):
            logger.warning(
                "Apply EasyControl: by its name, %s is for %s conditions, and 'kind' is %s.", self.name, guess, asked
            )
        return asked


def load(name: str) -> EasyControlFile:
    """Read a file of the "easycontrol" kind by its name in the list.

    Raises:
        FileNotFoundError: no such file in any of the folders.
        ValueError: it is no EasyControl LoRA, a damaged one, or one for a newer version of the pack.
    """
    path = model_files.path_of(FOLDER, name)
    state, metadata = model_files.read(path, name)
    return from_state(state, name, path, metadata)


def from_state(
    state: Mapping[str, Tensor], name: str, path: str | None = None, metadata: Mapping[str, str] | None = None
) -> EasyControlFile:
    """Build the adapters of a checkpoint. With a `path`, core can load them again for another device."""
    checkpoint = parse(state, name, metadata)
    patchers = [_patcher(checkpoint, slot) for slot in checkpoint.slots]
    if path is not None:
        for number, patcher in enumerate(patchers):
            patcher.cached_patcher_init = (load_patchers, (path,), number)
    return EasyControlFile(name, checkpoint, tuple(patchers))


def load_patchers(path: str, disable_dynamic: bool = False) -> list[ModelPatcher]:
    """The factory that core calls for another copy of the adapters."""
    name = os.path.basename(path)
    checkpoint = parse(model_files.read(path, name).tensors, name)
    return [_patcher(checkpoint, slot, disable_dynamic) for slot in checkpoint.slots]


def _patcher(checkpoint: Checkpoint, slot: Slot, disable_dynamic: bool = False) -> ModelPatcher:
    make = partial(ConditionLora, checkpoint.dim, checkpoint.double, checkpoint.single, slot.ranks, slot.scales)
    return adapters.patcher(make, slot.weights, disable_dynamic)
