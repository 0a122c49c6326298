"""Image Difference: what a control or an accelerator changed in a picture, as numbers, a heat map and boxes.

The measures are in `models/image_difference.py`, its sentences in `models/image_difference_report.py`.
"""

from __future__ import annotations

from typing import Literal

from comfy_api.latest import io, ui
from torch import Tensor

from ..host.image_difference import bounding_boxes, matched, show_on_node
from ..host.progress import each_of
from ..models.image_difference import compare, heat_map, mark, mean_ssim, psnr
from ..models.image_difference_report import report
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
        check_pictures(reference, image, resize)
        first, second = matched(reference, image)
        pairs, whole = compare(first, second, threshold, merge_gap, min_pixels, each_of), psnr(first, second)
        numbers, *places = report(pairs, whole, threshold)
        line = ", ".join((numbers, *places))
        show_on_node(cls.hidden and cls.hidden.unique_id, f"{numbers}\n{', '.join(places)}")
        return io.NodeOutput(
            heat_map(first, second, heat_range),
            mark(second, pairs),
            bounding_boxes(pairs),
            line,
            whole,
            mean_ssim(pairs),
            ui=ui.PreviewText(line),
        )


def check_pictures(reference: Tensor, image: Tensor, resize: Resize) -> None:
    """Refuse batches that cannot be compared."""
    if reference.shape[1:3] != image.shape[1:3] and resize == "off":
        raise ValueError(
            f"Image Difference needs two pictures of one size, got {size(reference)} for 'reference' and "
            f"{size(image)} for 'image'. Set 'resize' to stretch 'image'."
        )
    if reference.shape[3] != image.shape[3]:
        raise ValueError(
            f"Image Difference needs pictures with the same colour channels, got {reference.shape[3]} for 'reference' "
            f"and {image.shape[3]} for 'image'. Split Image with Alpha takes an alpha channel off."
        )
    if len({len(reference), len(image)} - {1}) > 1:
        raise ValueError(
            f"Image Difference compares batches one by one, or one picture with many, got {len(reference)} for "
            f"'reference' and {len(image)} for 'image'."
        )


def size(pictures: Tensor) -> str:
    return f"{pictures.shape[2]} x {pictures.shape[1]}"


NODES = [ImageDifference]
