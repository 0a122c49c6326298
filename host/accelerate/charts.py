"""Small charts as IMAGEs, drawn with Pillow, which ComfyUI has."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, isnan

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 960, 640, 80, 56, 32, 72
GROUND, INK, GREY, GOOD, BAD = "#ffffff", "#1c2430", "#b9c0ca", "#0b6e4f", "#b23a48"


def trade_off(points: Sequence[tuple[float, float, str]], floor: float, chosen: int | None) -> Tensor:
    """Quality over speed-up as an IMAGE `[1, 640, 960, 3]`.

    Args:
        points: (all evaluations / computed ones, PSNR in dB, label). An infinite PSNR is drawn at the top.
        floor: lowest PSNR allowed.
        chosen: the point to mark, or None.
    """
    image = Image.new("RGB", (WIDTH, HEIGHT), GROUND)
    draw = ImageDraw.Draw(image)
    font, small = ImageFont.load_default(20), ImageFont.load_default(15)
    finite = [db for _, db, _ in points if isfinite(db)] + [floor]
    low, high = min(finite) - 3, max(finite) + 3
    most = max([2.0, *(speed for speed, _, _ in points)]) * 1.08

    def point(speed: float, db: float) -> tuple[float, float]:
        x = LEFT + (speed - 1) / (most - 1) * (WIDTH - LEFT - RIGHT)
        y = TOP + (high - min(db, high)) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return x, y

    for step in range(1, int(most) + 1):
        x, _ = point(step, low)
        draw.line((x, TOP, x, HEIGHT - BOTTOM), fill=GREY)
        draw.text((x, HEIGHT - BOTTOM + 10), f"{step} x", fill=INK, font=small, anchor="ma")
    spacing = 5 if high - low < 40 else 10
    for db in range(int(low // spacing + 1) * spacing, int(high) + 1, spacing):
        _, y = point(1, db)
        draw.line((LEFT, y, WIDTH - RIGHT, y), fill=GREY)
        draw.text((LEFT - 10, y), f"{db}", fill=INK, font=small, anchor="rm")
    _, y = point(1, floor)
    draw.line((LEFT, y, WIDTH - RIGHT, y), fill=BAD, width=3)
    draw.text((WIDTH - RIGHT, y + 4), f"floor {floor:g} dB", fill=BAD, font=small, anchor="ra")
    draw.text((LEFT, 16), "PSNR to the full picture, dB", fill=INK, font=font)
    draw.text((WIDTH - RIGHT, HEIGHT - 30), "evaluations per computed one", fill=INK, font=font, anchor="ra")

    for number, (speed, db, _) in enumerate(points):
        if isnan(db):
            continue
        x, y = point(speed, db)
        size = 11 if number == chosen else 7
        draw.ellipse((x - size, y - size, x + size, y + size), fill=GOOD if db >= floor else BAD, outline=INK)
        draw.text((x + (24 if number == chosen else 14), y), str(number + 1), fill=INK, font=small, anchor="lm")
    if chosen is not None:
        x, y = point(*points[chosen][:2])
        draw.ellipse((x - 17, y - 17, x + 17, y + 17), outline=GOOD, width=3)
    return torch.from_numpy(np.asarray(image).copy())[None].float() / 255
