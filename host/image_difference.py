"""Image Difference on ComfyUI: ComfyUI's Lanczos, its bounding boxes, and the text on the node."""

from __future__ import annotations

from comfy.utils import common_upscale
from torch import Tensor

from ..models.image_difference import Box, Pair


def matched(reference: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """Both batches in one shape `[B, H, W, C]` and with colours in 0..1; stretches `image` if its size differs."""
    if reference.shape[1:3] != image.shape[1:3]:
        image = stretched(image, *reference.shape[1:3])
    count = max(len(reference), len(image))
    reference, image = (pictures.clamp(0, 1).expand(count, -1, -1, -1) for pictures in (reference, image))
    return reference, image


def stretched(pictures: Tensor, height: int, width: int) -> Tensor:
    channels = pictures.shape[-1]
    pixels = pictures.movedim(-1, 1).expand(-1, max(channels, 3), -1, -1)  # core's Lanczos drops a single channel
    return common_upscale(pixels, width, height, "lanczos", "disabled").movedim(1, -1)[..., :channels]


def bounding_boxes(pairs: list[Pair]) -> list[list[dict[str, int]]]:
    """The boxes of each picture in ComfyUI's format."""
    return [[as_bounding_box(box) for box in pair.boxes] for pair in pairs]


def as_bounding_box(box: Box) -> dict[str, int]:
    return {"x": box.x, "y": box.y, "width": box.width, "height": box.height}


def show_on_node(node: str | None, text: str) -> None:
    """Put the text on the node, as ComfyUI's own nodes do."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if node and server is not None:
        server.send_progress_text(text, node)
