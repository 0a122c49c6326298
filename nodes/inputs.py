"""Inputs that several nodes share, with one name, range and step each; and the check of all values.

ComfyUI checks the values of widgets only. A link brings whatever another node made, and NaN passes every check. So the
first line of every `execute` is `check(cls, locals())`, which holds all values to the node's own schema.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from numbers import Integral, Real
from typing import Any, get_args

import numpy as np
import torch
from comfy_api.latest import io
from torch import Tensor

from ..host import model_files
from ..host.control.conditions_settings import Cache
from ..models.control.pixels import any_background

logger = logging.getLogger(__name__)

UNSET: Any = None  # a missing argument for core's inputs, though they declare bool, int or str

ReportType = io.Custom("DIT_REPORT")

MANY = 8  # choices; more are not repeated in a sentence

# Our own types that a node needs, and the nodes that give them. Their inputs are optional all the same, because ComfyUI
# would only say that a required input is missing if the giving node is bypassed or muted.
GIVERS = {
    "DIT_EASYCONTROL": "Load EasyControl LoRA",
    "DIT_PANELS": "Panel Layout",
    "DIT_TRY_ON": "Load Try-On LoRA",
    "DIT_CROP": "Try-On Prepare",
    "DIT_DIT4SR": "Load DiT4SR Patch",
}

ANY_FLUX1 = "A FLUX.1 model: dev, schnell or a fine-tune, fp8 included."
INVERT_MASK = "From Load Image, put Invert Mask between: its mask is 1 where the picture is transparent."


# Inputs. Every text is a tooltip; `advanced` ones are folded away.


def model_input(tooltip: str) -> io.Input:
    return io.Model.Input("model", tooltip=tooltip)


def choice(
    name: str, options: Any, default: str, tooltip: str, *, advanced: bool = UNSET, optional: bool = False
) -> io.Input:
    """One of several words; without a default, the first of them.

    Args:
        options: the Literal that `execute` takes, a table whose keys are the words, or a list of them.
    """
    words = list(get_args(options) or options)
    return io.Combo.Input(name, options=words, default=default, advanced=advanced, optional=optional, tooltip=tooltip)


def weights_file(folder: str) -> io.Input:
    return choice(
        "file",
        model_files.names(folder),
        UNSET,
        f"A file in models/{folder} or models/loras, or one that ships with the pack.",
    )


def strength(name: str, tooltip: str) -> io.Input:
    """A factor on a LoRA."""
    return io.Float.Input(name, default=1.0, min=0.0, max=4.0, step=0.05, tooltip=tooltip)


def share(name: str, default: float, tooltip: str, *, advanced: bool = UNSET) -> io.Input:
    """From nothing to all of something."""
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, advanced=advanced, tooltip=tooltip)


def interval(default: int, longest: int, full: str = "full computation") -> io.Input:
    tooltip = f"Evaluations from one {full} to the next. 1 turns the node off."
    return io.Int.Input("interval", default=default, min=1, max=longest, tooltip=tooltip)


def seed(name: str, tooltip: str, *, advanced: bool = UNSET) -> io.Input:
    return io.Int.Input(name, default=0, min=0, max=0xFFFFFFFFFFFFFFFF, advanced=advanced, tooltip=tooltip)


def part_of_run(begins: str, stops: str, *, advanced: bool = UNSET) -> list[io.Input]:
    """`start_percent` and `end_percent`: the part of the run in which a node acts."""
    bounds = {"min": 0.0, "max": 1.0, "step": 0.001, "advanced": advanced}
    return [
        io.Float.Input("start_percent", default=0.0, tooltip=begins, **bounds),
        io.Float.Input("end_percent", default=1.0, tooltip=stops, **bounds),
    ]


def min_tokens(tooltip: str, step: int = UNSET) -> io.Input:
    """The number of tokens below which attention stays as it is."""
    return io.Int.Input("min_tokens", default=4096, min=0, max=1 << 20, step=step, advanced=True, tooltip=tooltip)


def max_memory(tooltip: str) -> io.Input:
    """In GiB; 0 leaves it to the node. `bytes_of` turns it into bytes."""
    return io.Float.Input("max_memory", default=0.0, min=0.0, max=1024.0, step=0.5, advanced=True, tooltip=tooltip)


def bytes_of(gib: float) -> int | None:
    """`max_memory` in bytes; None leaves it to the node."""
    return int(gib * 2**30) or None


def kv_cache(whose: str) -> io.Input:
    """Where to keep keys and values of conditions. `whose`: the tooltip's word for their owner."""
    return choice(
        "kv_cache",
        Cache,
        "on GPU",
        f"Where {whose} keys and values are kept during a run; the picture is the same. "
        "'offload to CPU' saves memory, 'off' computes them anew in each step and is slow.",
        advanced=True,
    )


def cut_out_mask(name: str, tooltip: str) -> io.Input:
    """A mask of something in its picture, for `warn_of_background` to check."""
    return io.Mask.Input(name, optional=True, tooltip=f"{tooltip} {INVERT_MASK}")


def report_outputs(model: str, report: str) -> list[io.Output]:
    """The model and its report: two outputs of every node that accelerates."""
    return [
        io.Model.Output(display_name="model", tooltip=model),
        ReportType.Output(display_name="report", tooltip=f"{report} For Acceleration Report."),
    ]


# The check of what comes in


def check(node: type[io.ComfyNode], values: Mapping[str, Any], files: Collection[str] = ()) -> None:
    """Hold a node's values to its own schema.

    Args:
        values: by the input's id; ignores all others.
        files: ids of choices from a folder. Their list may be older than the folder, so opening the file is the check.

    Raises:
        ValueError: with the node, the input, what it takes and what came.
    """
    schema = node.define_schema()
    for entry, name, value in given(schema, values):
        fault = fault_of(entry, value, entry.id in files)
        if fault is not None:
            raise ValueError(f"{schema.display_name}: '{name}' {fault}")


def given(schema: io.Schema, values: Mapping[str, Any]) -> Iterator[tuple[io.Input, str, Any]]:
    """Every input, its name on the screen, and its value; of a growing one, each that is connected."""
    for entry in schema.inputs:
        if isinstance(entry, io.Autogrow.Input):
            yield from ((entry.template.input, name, each) for name, each in (values[entry.id] or {}).items())
        else:
            yield entry, entry.display_name or entry.id, values[entry.id]


def fault_of(entry: io.Input, value: Any, is_file: bool = False) -> str | None:
    """What is wrong with a value, as the end of a sentence; None if nothing is."""
    kind = entry.get_io_type()
    if value is None and kind in GIVERS:
        return f"is missing. Connect {GIVERS[kind]}, or bypass this node, too, if that one is bypassed or muted."
    if value is None and entry.optional:
        return None
    match entry:
        case io.Int.Input():
            return fault_of_number(entry, value, Integral, "a whole number")
        case io.Float.Input():
            return fault_of_number(entry, value, Real, "a number")
        case io.Boolean.Input():
            return None if isinstance(value, bool | np.bool_) else f"must be true or false, got {shown(value)}."
        case io.String.Input():
            return None if isinstance(value, str) else f"must be a text, got {shown(value)}."
        case io.Combo.Input():
            return fault_of_choice(entry, value, is_file)
        case io.Image.Input():
            return fault_of_picture(value)
        case io.Mask.Input():
            return fault_of_mask(value)
        case io.Latent.Input():
            return fault_of_latent(value)
    return None


def fault_of_number(entry: Any, value: Any, kind: type, words: str) -> str | None:
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    if is_number and entry.min <= value <= entry.max:  # NaN is in no range
        return None
    return f"must be {words} from {entry.min} to {entry.max}, got {shown(value)}."


def fault_of_choice(entry: io.Combo.Input, value: Any, is_file: bool) -> str | None:
    options = list(entry.options or ())
    if isinstance(value, str) and (value in options or (is_file and value.strip() and "\0" not in value)):
        return None
    few = len(options) <= MANY and not is_file
    choices = ", ".join(f"'{option}'" for option in options) if few else "the choices in its list"
    return f"must be one of {choices}; got {shown(value)}."


def fault_of_picture(value: Any) -> str | None:
    """Of an IMAGE, `[N, H, W, C]`: grey, RGB or RGB with alpha."""
    if not isinstance(value, Tensor) or value.ndim != 4 or not value.is_floating_point():
        return f"must be pictures [N, H, W, C] in 0..1, got {shown(value)}."
    if value.shape[-1] not in (1, 3, 4):
        return f"must have 1, 3 or 4 channels (grey, RGB, RGB with alpha), got {value.shape[-1]}."
    return fault_of_values(value, "pixels")


def fault_of_mask(value: Any) -> str | None:
    """Of a MASK, `[N, H, W]` or `[H, W]`."""
    if not isinstance(value, Tensor) or value.ndim not in (2, 3):
        return f"must be masks [N, H, W], got {shown(value)}."
    return fault_of_values(value, "pixels")


def fault_of_latent(value: Any) -> str | None:
    samples = value.get("samples") if isinstance(value, Mapping) else None
    if not isinstance(samples, Tensor):
        return f"must be the latent of pictures or of a video, got {shown(value if samples is None else samples)}."
    return fault_of_values(samples, "values")


def fault_of_values(values: Tensor, what: str) -> str | None:
    if values.numel() == 0:
        return f"is empty: {shown(values)}. Look for the node that made it."
    low, high = values.aminmax()  # both are NaN where one value is; no copy, however long the video
    if torch.isfinite(low) and torch.isfinite(high):
        return None
    return f"has {what} that are no numbers (NaN or infinite), so it is broken. Look for the node that made it."


def shown(value: Any) -> str:
    """A value in a sentence, whatever it is."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}, {value.dtype}".replace("torch.", "")
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return f"a value of type {type(value).__name__} that is too long to show"
    return text if len(text) <= 60 else f"{text[:60]}..."


def whole_tokens(side: int, **sides: int) -> None:
    """Refuse sides in pixels that are no multiple of `side`, those of one token."""
    for name, value in sides.items():
        if value % side:
            raise ValueError(f"'{name}' must be a multiple of {side} pixels, got {value}.")


# Masks of a cut-out


def warn_of_background(node: str, name: str, mask: Tensor) -> None:
    """Warn in the log if masks `[N, H, W]` cover the background, as Load Image's mask of a cut-out does.

    It is no error, because a wreath or a frame looks the same.
    """
    if any_background(mask):
        logger.warning("%s: '%s' covers all corners of its picture and not the middle. %s", node, name, INVERT_MASK)
