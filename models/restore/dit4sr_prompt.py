"""Prompts for DiT4SR: a caption of the photo, what is said of every photo, and what must not be in it.

Source: the authors' code of DiT4SR, arXiv:2503.23580: the command line ("published") and the demo. Their captions come
from a language model that sees the small photo. Such models tell of the photo as a photo ("the background is blurred"),
which the restored one would then show. So each sentence with one of `TELLING` in it, whatever the case, is left out.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

Preset = Literal["published", "demo", "none"]

SUFFIXES: dict[Preset, str] = {
    "published": (
        "Cinematic, hyper sharpness, highly detailed, perfect without deformations, camera, hyper detailed photo - "
        "realistic maximum detail, 32k, Color Grading, ultra HD, extreme meticulous detailing, skin pore detailing."
    ),
    "demo": "Cinematic, perfect without deformations, ultra HD, camera, detailed photo, realistic maximum, 32k, Color.",
    "none": "",
}
NEGATIVE = (
    "motion blur, noisy, dotted, bokeh, pointed, CG Style, 3D render, unreal engine, blurring, dirty, messy, worst "
    "quality, low quality, frames, watermark, signature, jpeg artifacts, deformed, lowres, chaotic"
)
TELLING = (
    "focus", "focal", "prominent", "close-up", "black and white", "blur", "depth", "dense", "locate", "position",
)  # fmt: skip


class Prompts(NamedTuple):
    positive: str
    negative: str


def prompts(caption: str, preset: Preset = "published", filtered: bool = True) -> Prompts:
    """The prompts for a photo. `filtered`: without sentences that tell of the photo as a photo."""
    said = without_telling(caption) if filtered else caption.strip()
    return Prompts(" ".join(part for part in (said, SUFFIXES[preset]) if part), "" if preset == "none" else NEGATIVE)


def without_telling(caption: str) -> str:
    """A caption without the sentences that have one of `TELLING` in them. Sentences end with `.`, `?` or `!`."""
    sentences = re.findall(r"[^.?!]+[.?!]*|[.?!]+", caption)
    return "".join(each for each in sentences if not any(word in each.lower() for word in TELLING)).strip()
