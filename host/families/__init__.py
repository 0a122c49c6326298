"""The model families: `family_of(model)` finds a model's family. `family.py` says what a family answers."""

from __future__ import annotations

from typing import Any

from ..transformer import class_of, transformer_of
from . import chroma, cogvideox, flux, hunyuan_video, ltx, lumina, mochi, pixart, qwen_image, sd3, wan
from .family import Family

FAMILIES: tuple[Family, ...] = (  # the first match wins
    *(flux.FLUX1, flux.FLUX2, flux.LIKE_FLUX),
    chroma.CHROMA,
    sd3.SD3,
    qwen_image.QWEN_IMAGE,
    *(wan.WAN, wan.VACE, wan.CAMERA),
    hunyuan_video.HUNYUAN_VIDEO,
    ltx.LTX,
    mochi.MOCHI,
    cogvideox.COGVIDEOX,
    *(lumina.LUMINA2, lumina.Z_IMAGE),
    pixart.PIXART,
)
OTHER = Family("any other", (), tested=False)  # we know only its output, the prediction


def family_of(model: Any) -> Family:
    """The family of a MODEL, a running BaseModel, or its transformer. `OTHER` if it is not in the list.

    Not in the list: U-Nets, LTX with sound, Wan's relatives other than VACE and Camera, and models whose class another
    pack has replaced.
    """
    kind = class_of(model)
    for family in FAMILIES:
        if kind in family.transformers and family.among(transformer_of(model)):
            return family
    return OTHER
