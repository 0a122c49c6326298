"""Shared by the parsers of all checkpoint files: reading keys, checking tensors, reading metadata.

Anybody may have made a file: it may be damaged, renamed, of another kind, or harmful. A parser declares the pattern of
its keys (`Keys`), checks each tensor with `checked_weight` or `checked_number`, and asks for the keys it needs with
`require`. Numbers in keys are bounded, and a parser builds nothing from them before it has the tensors.

Our own files describe themselves in a JSON text in their safetensors metadata, under "dit_toolkit":

    {"format": 1, SECTION: {setting: value, ...}}

SECTION is the name of the kind of file. `format` is the version of that kind, 1 if it is missing. It stands beside the
section, so versions of the pack that do not know it ignore it.

Every error begins with the file's name.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, TypeVar

import torch
from torch import Tensor

NUMBER = "(?:0|[1-9][0-9]{0,3})"  # of a block or a slot: one way to write it, so that no two keys mean one layer
MOST = 10_000  # largest count of blocks or of anything else
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
AXES = {1: "vector", 2: "matrix"}

ABOUT = "dit_toolkit"  # key of the metadata
LONGEST = 1 << 16  # characters of the JSON text

Target = TypeVar("Target", bound=Hashable)

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 120
_short.maxtuple = 8


def shown(value: object) -> str:
    """A name or a value from a file for an error: quoted, on one line, and short."""
    return _short.repr(value)


# ------------------------------------------------------------------------------------------------------------- keys


@dataclass(frozen=True)
class Keys:
    """The keys of one kind of file.

    what: name of the kind, as in "EasyControl LoRA". pattern: of a whole key behind its prefix. example: one key.
    prefixes: strings that other programs put in front of all keys. otherwise: what to do with a file of another kind.
    """

    what: str
    pattern: re.Pattern[str]
    example: str
    prefixes: tuple[str, ...] = ("",)
    otherwise: str = "Ordinary LoRAs go into a LoRA loader."

    def prefix(self, state: Collection[str], name: str) -> str:
        """The prefix of all keys.

        Raises:
            ValueError: the file is of another kind.
        """
        for prefix in self.prefixes:
            if any(self._match(key, prefix) for key in state):
                return prefix
        raise self.other(state, name)

    def find(self, state: Collection[str], name: str) -> Iterator[tuple[str, re.Match[str]]]:
        """Each key with its match; no tensor is looked at.

        Raises:
            ValueError: at a key that such a file does not have.
        """
        prefix = self.prefix(state, name)
        for key in state:
            match = self._match(key, prefix)
            if match is None:
                raise self.unknown(key, name)
            yield key, match

    def read(self, state: Mapping[str, Tensor], name: str) -> Iterator[tuple[str, re.Match[str], Tensor]]:
        """The same, each with its tensor."""
        for key, match in self.find(state, name):
            yield key, match, state[key]

    def other(self, state: Collection[str], name: str) -> ValueError:
        """What to say of a file of another kind."""
        return ValueError(
            f"{name} is no {self.what}: none of its {len(state)} keys looks like '{self.example}'. {self.otherwise}"
        )

    def unknown(self, key: str, name: str) -> ValueError:
        return ValueError(f"{name} has the key {shown(key)}, {self.why(key)}.")

    def why(self, key: str) -> str:
        """What is wrong with an unknown key."""
        return f"which no {self.what} has"

    def _match(self, key: str, prefix: str) -> re.Match[str] | None:
        return self.pattern.fullmatch(key, len(prefix)) if key.startswith(prefix) else None


def put(found: dict[Target, Tensor], target: Target, tensor: Tensor, key: str, name: str) -> None:
    """Write `tensor` at `target`. Two keys of a file must not lead to the same target."""
    if target in found:
        raise ValueError(f"{name} has {shown(key)} and another key for the same tensor. Save it with one of them.")
    found[target] = tensor


def require(expected: Iterable[str], state: Collection[str], name: str) -> None:
    """Refuse a file that lacks keys. `expected` may be far longer than the file, so this reads it lazily."""
    missing = (key for key in expected if key not in state)
    first = next(missing, None)
    if first is not None:
        count = sum(1 for _ in missing)
        others = f" and {count} more" if count else ""
        raise ValueError(f"{name} is incomplete: {shown(first)}{others} missing. Get the whole file again.")


# ---------------------------------------------------------------------------------------------------------- tensors


def checked_weight(tensor: Tensor, axes: int, key: str, name: str) -> Tensor:
    """`tensor`, if it has `axes` axes and holds finite floating-point numbers."""
    if tensor.ndim != axes or tensor.dtype not in FLOATS or tensor.numel() == 0:
        kind = AXES.get(axes, f"tensor of {axes} axes")
        raise ValueError(f"{name}: {shown(key)} must be a floating-point {kind}, got {_kind(tensor)}.")
    # The smallest and the largest number tell, many times faster than a look at each. fp8 has no comparison.
    ends = (tensor.float() if tensor.dtype.itemsize == 1 else tensor).aminmax()
    if not all(isfinite(end) for end in ends):
        raise ValueError(f"{name}: {shown(key)} holds NaN or infinite values. Get the file again.")
    return tensor


def checked_number(tensor: Tensor, key: str, name: str) -> Tensor:
    """`tensor`, if it holds one number that is finite in float32, such as an alpha."""
    single = tensor.numel() == 1 and tensor.dtype in (*FLOATS, *INTEGERS)
    value = tensor.float().item() if single else None
    if value is None or not isfinite(value):
        found = _kind(tensor) if value is None else value
        raise ValueError(f"{name}: {shown(key)} must be one finite number, got {found}.")
    return tensor


def _kind(tensor: Tensor) -> str:
    return f"{shown(tuple(tensor.shape))} {str(tensor.dtype).removeprefix('torch.')}"


# --------------------------------------------------------------------------------------------- what a file says


def about(
    metadata: Mapping[str, str] | None, section: str, settings: Collection[str], name: str, newest: int = 1
) -> dict[str, Any]:
    """The settings in a file's metadata; {} if there are none.

    Args:
        section: name of the kind.
        settings: the settings that the kind has.
        newest: newest format of the kind that this version reads.

    Raises:
        ValueError: an unreadable text, a newer format, or an unknown setting.
    """
    whole = _parsed(metadata, name)
    written = whole.get("format", 1)
    if not isinstance(written, int) or isinstance(written, bool) or written < 1:
        raise ValueError(f"{name} must say a whole number of at least 1 as its format, got {shown(written)}.")
    if written > newest:
        raise ValueError(
            f"{name} was made for a newer DiT Toolkit: its format is {shown(written)}, this one reads up to {newest}. "
            "Update DiT Toolkit."
        )
    said = whole.get(section, {})
    if not isinstance(said, dict):
        raise ValueError(f"{name}: '{section}' in its metadata must be a JSON object, got {shown(said)}.")
    strange = next((setting for setting in said if setting not in settings), None)
    if strange is not None:
        raise ValueError(f"{name} has the setting {shown(strange)}, which no file of its kind has.")
    return said


def described(section: str, settings: Mapping[str, Any], written: int = 1) -> dict[str, str]:
    """The metadata that `about` reads back."""
    return {ABOUT: json.dumps({"format": written, section: settings}, sort_keys=True)}


def _parsed(metadata: Mapping[str, str] | None, name: str) -> dict[str, Any]:
    text: object = (metadata or {}).get(ABOUT, "{}")
    try:
        whole = json.loads(text) if isinstance(text, str) and len(text) <= LONGEST else None
    except (ValueError, RecursionError):  # no JSON, or nested too deep
        whole = None
    if not isinstance(whole, dict):
        raise ValueError(f"{name}: '{ABOUT}' in its metadata must be a short JSON object. Save the file without it.")
    return whole
