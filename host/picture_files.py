"""Reads pictures from files, down to their last pixel."""

from __future__ import annotations

from pathlib import Path

import node_helpers
from PIL import Image, ImageOps

from .model_files import in_one_line


def read_picture(path: Path, name: str, remedy: str = "Save it again.") -> Image.Image:
    """The picture at `path`, upright. Errors call it `name` and say `remedy` if it is damaged.

    Raises:
        ValueError: the file is no picture, or a part of it is missing. Core fills such a part with grey.
    """
    try:
        picture = node_helpers.pillow(Image.open, path)  # reads the format; decodes nothing yet
    except Exception as error:  # decoders raise errors of any type, here and below
        raise ValueError(f"{name} is no picture that can be read. {remedy} ({in_one_line(error)})") from error
    try:
        picture.load()
        return ImageOps.exif_transpose(picture)
    except Exception as error:
        raise ValueError(f"{name} is damaged, or a part of it is missing. {remedy} ({in_one_line(error)})") from error
