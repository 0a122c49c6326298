"""Image Difference: what a control or an accelerator changed in a picture, as numbers, a heat map and boxes.

The measures are in `models/image_difference.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from comfy.utils import common_upscale
from comfy_api.latest import io, ui
from torch import Tensor

from ..models.image_difference import Box, difference, draw_boxes, find_boxes, heat, psnr, ssim
from .inputs import check, choice, share

Resize = Literal["off", "image to reference"]


class ImageDifference(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiTImageDifference",
            display_name="Image Difference",
            category="DiT Toolkit/image",
            description=(
                "Says how far two pictures are apart (PSNR, SSIM) and shows where: a heat map, and boxes around what "
                "changed. For judging what an accelerator costs, or what a control does, with the same seed."
            ),
            search_aliases=["psnr", "ssim", "compare images", "image metric", "quality", "heat map", "diff"],
            inputs=[
                io.Image.Input("reference", tooltip="The picture to measure against: say, the one without the node."),
                io.Image.Input("image",
                               tooltip="The picture to judge. A batch is compared one by one; a single "
                               "picture with every other."),
                io.Float.Input("threshold", default=0.05, min=0.0, max=1.0, step=0.005, round=0.001,
                               tooltip="A pixel counts as changed when a colour channel differs by more than this. 1 "
                               "is from black to white, 0 counts every difference. PSNR and SSIM do not depend on it."),
                choice("resize", Resize, "off", advanced=True,
                       tooltip="What to do when the sizes differ. off refuses; 'image to "
                       "reference' stretches 'image'."),
                share("heat_range", 0.25, advanced=True,
                      tooltip="The difference that gets the brightest colour. 0 takes the largest one that is found, "
                      "which makes maps of different pictures hard to compare."),
                io.Int.Input("merge_gap", default=8, min=0, max=512, advanced=True,
                             tooltip="Changed spots with at most this many pixels between them share a box."),
                io.Int.Input("min_pixels", default=16, min=1, max=1_000_000, advanced=True,
                             tooltip="Spots with fewer changed pixels get no box. 1 boxes them all."),
            ],
            outputs=[
                io.Image.Output(display_name="heat_map",
                                tooltip="Black where nothing changed, pale yellow at 'heat_range'."),
                io.Image.Output(display_name="marked", tooltip="'image' with a frame around everything that changed."),
                io.BoundingBox.Output(display_name="boxes",
                                      tooltip="The boxes of each picture, the one with most changed pixels first."),
                io.String.Output(display_name="report", tooltip="One line with all of it, also shown on the node."),
                io.Float.Output(display_name="psnr", tooltip="dB, over the whole batch. Infinite if it is identical."),
                io.Float.Output(display_name="ssim", tooltip="The mean over the batch. 1 if it is identical."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            not_idempotent=True,  # or ComfyUI's cache takes two equal nodes for one, and shows the line on the first
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        reference: Tensor,
        image: Tensor,
        threshold: float,
        resize: Resize,
        heat_range: float,
        merge_gap: int,
        min_pixels: int,
    ) -> io.NodeOutput:
        check(cls, locals())
        first, second = matched(reference, image, resize)
        pairs = [compare(a, b, threshold, merge_gap, min_pixels) for a, b in zip(first, second, strict=True)]
        numbers, *places = report(pairs, psnr(first, second), threshold)
        line = ", ".join((numbers, *places))
        show_on_node(cls.hidden and cls.hidden.unique_id, f"{numbers}\n{', '.join(places)}")

        amount = difference(first, second)
        marked = [draw_boxes(rgb(picture), pair.boxes) for picture, pair in zip(second, pairs, strict=True)]
        return io.NodeOutput(
            heat(amount, heat_range or float(amount.max()) or 1.0),
            torch.stack(marked),
            [[as_bounding_box(box) for box in pair.boxes] for pair in pairs],
            line,
            psnr(first, second),
            mean_ssim(pairs),
            ui=ui.PreviewText(line),
        )


@dataclass(frozen=True)
class Pair:
    """What was found in one picture."""

    psnr: float  # dB
    ssim: float
    changed: float  # share of the pixels, 0..1
    boxes: tuple[Box, ...]


def matched(reference: Tensor, image: Tensor, resize: Resize) -> tuple[Tensor, Tensor]:
    """Both batches with the same shape `[B, H, W, C]` and colours in 0..1, or a sentence that says why not."""
    if reference.shape[1:3] != image.shape[1:3]:
        if resize == "off":
            raise ValueError(
                f"Image Difference needs two pictures of one size, got {size(reference)} for 'reference' and "
                f"{size(image)} for 'image'. Set 'resize' to stretch 'image'."
            )
        image = stretched(image, *reference.shape[1:3])
    if reference.shape[3] != image.shape[3]:
        raise ValueError(
            f"Image Difference needs pictures with the same colour channels, got {reference.shape[3]} for 'reference' "
            f"and {image.shape[3]} for 'image'. Split Image with Alpha takes an alpha channel off."
        )
    counts = {len(reference), len(image)}
    if len(counts - {1}) > 1:
        raise ValueError(
            f"Image Difference compares batches one by one, or one picture with many, got {len(reference)} for "
            f"'reference' and {len(image)} for 'image'."
        )
    reference, image = (pictures.clamp(0, 1).expand(max(counts), -1, -1, -1) for pictures in (reference, image))
    return reference, image


def stretched(pictures: Tensor, height: int, width: int) -> Tensor:
    channels = pictures.shape[-1]
    pixels = pictures.movedim(-1, 1).expand(-1, max(channels, 3), -1, -1)  # core's Lanczos drops a single channel
    return common_upscale(pixels, width, height, "lanczos", "disabled").movedim(1, -1)[..., :channels]


def compare(reference: Tensor, image: Tensor, threshold: float, merge_gap: int, min_pixels: int) -> Pair:
    """Two pictures, `[H, W, C]`."""
    changed = difference(reference, image) > threshold
    boxes = find_boxes(changed, merge_gap, min_pixels)
    return Pair(psnr(reference, image), ssim(reference, image), float(changed.double().mean()), boxes)


def rgb(picture: Tensor) -> Tensor:
    """`[H, W, C]` with grey or alpha -> `[H, W, 3]` to draw on."""
    return picture[..., :3].expand(-1, -1, 3)


def mean_ssim(pairs: list[Pair]) -> float:
    return sum(pair.ssim for pair in pairs) / len(pairs)


def as_bounding_box(box: Box) -> dict[str, int]:
    return {"x": box.x, "y": box.y, "width": box.width, "height": box.height}


# Sentences


def report(pairs: list[Pair], whole: float, threshold: float) -> list[str]:
    """What there is to say, part by part. `whole` is the PSNR over all pictures together."""
    many = len(pairs) > 1
    count = f"{len(pairs)} pictures: " if many else ""
    if math.isinf(whole):
        return [f"{count}identical, PSNR infinite, SSIM 1", "no pixel changed"]
    parts = [f"{count}PSNR {whole:.1f} dB, SSIM {similarity(mean_ssim(pairs))}"]
    parts.append(share_changed(sum(pair.changed for pair in pairs) / len(pairs), threshold))
    if many:
        worst = min(range(len(pairs)), key=lambda place: pairs[place].psnr)
        parts.append(f"worst is picture {worst + 1} with {pairs[worst].psnr:.1f} dB")
        same = sum(math.isinf(pair.psnr) for pair in pairs)
        parts += [f"{same} identical"] if same else []
    place, box = largest(pairs)
    if box is not None:
        where = f" of picture {place + 1}" if many else ""
        parts.append(f"largest in ({box.x}, {box.y}, {box.width}, {box.height}){where}")
    return parts


def largest(pairs: list[Pair]) -> tuple[int, Box | None]:
    """The box with the most changed pixels, and which picture it is in."""
    firsts = [(place, pair.boxes[0]) for place, pair in enumerate(pairs) if pair.boxes]
    return max(firsts, key=lambda found: found[1].pixels, default=(0, None))


def similarity(value: float) -> str:
    """Three digits, or four near 1: what differs is never called 1."""
    return f"{value:.3f}" if value < 0.9995 else f"{value:.4f}" if value < 0.99995 else "above 0.9999"


def share_changed(share: float, threshold: float) -> str:
    if share == 0:
        return f"no pixel changed by more than {threshold:g}"
    percent = 100 * share
    return f"{f'{percent:.1f}' if percent >= 0.1 else 'less than 0.1'} % of pixels changed"


def size(pictures: Tensor) -> str:
    return f"{pictures.shape[2]} x {pictures.shape[1]}"


def show_on_node(node: str | None, text: str) -> None:
    """Put the text on the node, as ComfyUI's own nodes do."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if node and server is not None:
        server.send_progress_text(text, node)


NODES = [ImageDifference]
