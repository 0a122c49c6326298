"""The result of Image Difference in words."""

from __future__ import annotations

import math

from .image_difference import Box, Pair, mean_ssim


def report(pairs: list[Pair], whole: float, threshold: float) -> list[str]:
    """The parts of the report. `whole` is the PSNR over all pictures together."""
    many = len(pairs) > 1
    count = f"{len(pairs)} pictures: " if many else ""
    if math.isinf(whole):
        return [f"{count}identical, PSNR infinite, SSIM 1", "no pixel changed"]
    parts = [f"{count}PSNR {whole:.1f} dB, SSIM {similarity(mean_ssim(pairs))}"]
    parts.append(share_changed(sum(pair.changed for pair in pairs) / len(pairs), threshold))
    if many:
        worst = min(range(len(pairs)), key=lambda index: pairs[index].psnr)
        parts.append(f"worst is picture {worst + 1} with {pairs[worst].psnr:.1f} dB")
        same = sum(math.isinf(pair.psnr) for pair in pairs)
        parts += [f"{same} identical"] if same else []
    index, box = largest(pairs)
    if box is not None:
        where = f" of picture {index + 1}" if many else ""
        parts.append(f"largest in ({box.x}, {box.y}, {box.width}, {box.height}){where}")
    return parts


def largest(pairs: list[Pair]) -> tuple[int, Box | None]:
    """The box with the most changed pixels, and which picture it is in."""
    firsts = [(index, pair.boxes[0]) for index, pair in enumerate(pairs) if pair.boxes]
    return max(firsts, key=lambda found: found[1].pixels, default=(0, None))


def similarity(value: float) -> str:
    """Three digits, or four near 1: pictures that differ never get a 1."""
    return f"{value:.3f}" if value < 0.9995 else f"{value:.4f}" if value < 0.99995 else "above 0.9999"


def share_changed(share: float, threshold: float) -> str:
    if share == 0:
        return f"no pixel changed by more than {threshold:g}"
    percent = 100 * share
    return f"{f'{percent:.1f}' if percent >= 0.1 else 'less than 0.1'} % of pixels changed"
