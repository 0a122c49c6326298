"""Pictures out of files, decoded to their last pixel."""

from __future__ import annotations

from pathlib import Path

import node_helpers
from PIL import Image, ImageOps

from .model_files import in_one_line


def read_picture(path: Path, name: str, remedy: str = "Save it again.") -> Image.Image:
    """The picture at `path`, upright. `name` is what to call it in errors, `remedy` what to do about a damaged one.

    Raises:
        ValueError: it is no picture, or a part of it is missing. Core's own reading fills such a part with grey.
    """
    try:
        picture = node_helpers.pillow(Image.open, path)  # knows what it is; nothing is decoded yet
    except Exception as error:  # decoders raise whatever they stumble over, here and below
        raise ValueError(f"{name} is no picture that can be read. {remedy} ({in_one_line(error)})") from error
    try:
        picture.load()
        return ImageOps.exif_transpose(picture)
    except Exception as error:
        raise ValueError(f"{name} is damaged, or a part of it is missing. {remedy} ({in_one_line(error)})") from error
