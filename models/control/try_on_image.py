"""Pictures for a try-on: cut out the person, hide the garment, lay the new one on white, and paste the result back.

Source: MC-VTON, arXiv:2501.03630, takes a masked person and a flat garment of one size. The paper does not say how
photos become these. Our choices are usual in the field: masked pixels are grey 127 (as in VITON-HD, arXiv:2103.16874)
or black, garments are letter-boxed on white, and only masked pixels are pasted back.

Three things hold, whatever the sizes:

- The pixels under the mask do not show in the masked person, because they are filled before any resampling.
- Pixels outside the mask are the original's, bit for bit: nothing computes them.
- A crop that keeps its size comes back bit for bit behind the feather. The feather ends within the dilation, before the
  mask as the user drew it.

Shapes: pictures `[N, H, W, C]` in 0..1, C being 1, 3 or 4; masks `[N, H, W]`. Units: pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .pixels import around, bounds, dilate, distance_to, resize, rgb

TOKEN = 16  # pixels
SHAPE_TOLERANCE = 0.02  # relative difference allowed between the proportions of two pictures that belong together
MOST = 0.75  # of a crop's area: the least that a smaller crop may have
FILLS = {"grey": 127 / 255, "black": 0.0}

Fill = Literal["grey", "black"]
Size = tuple[int, int]  # height, width
Each = Callable[[Tensor], Iterable[Tensor]]  # walks over a batch: `iter`, or with a progress bar


@dataclass(frozen=True)
class Crop:
    """A rectangle of a picture, in pixels. It may reach over the border; border pixels are repeated there."""

    left: int
    top: int
    width: int
    height: int

    def of(self, image: Tensor) -> Tensor:
        """`[H, W, ...]` -> `[height, width, ...]`."""
        rows = torch.arange(self.top, self.top + self.height, device=image.device).clamp(0, image.shape[0] - 1)
        columns = torch.arange(self.left, self.left + self.width, device=image.device).clamp(0, image.shape[1] - 1)
        return image[rows][:, columns]

    def inside(self, size: Size) -> tuple[slice, slice]:
        """Rows and columns of a picture of this size that it covers."""
        rows = slice(max(self.top, 0), min(self.top + self.height, size[0]))
        return rows, slice(max(self.left, 0), min(self.left + self.width, size[1]))

    def holds(self, other: Crop) -> bool:
        """Whether `other` lies within this one."""
        return (
            self.left <= other.left
            and self.top <= other.top
            and self.left + self.width >= other.left + other.width
            and self.top + self.height >= other.top + other.height
        )

    def grown(self, working: Size, picture: Size) -> Crop:
        """The smallest crop around this one with the proportions of `working`; within the picture if it fits."""
        width = max(self.width, math.ceil(self.height * working[1] / working[0]))
        height = max(self.height, math.ceil(self.width * working[0] / working[1]))
        left = _shifted(self.left - (width - self.width) // 2, width, picture[1])
        return Crop(left, _shifted(self.top - (height - self.height) // 2, height, picture[0]), width, height)

    def largest_around(self, working: Size, picture: Size) -> Crop:
        """The largest crop in the picture with the proportions of `working`, with this one in its middle if possible.

        It may be too small to hold this one.
        """
        width = min(picture[1], max(picture[0] * working[1] // working[0], 1))
        height = min(picture[0], max(picture[1] * working[0] // working[1], 1))
        left = _shifted(self.left - (width - self.width) // 2, width, picture[1])
        return Crop(left, _shifted(self.top - (height - self.height) // 2, height, picture[0]), width, height)


@dataclass(frozen=True, eq=False)
class Paste:
    """All that pasting results back needs: a crop and a mask per person.

    masks: `[N, H, W]` bool at the size of the person's picture, dilated: the pixels that may change.
    working: height and width of the pictures made from the crops.
    dilation: of the masks, in pixels.
    """

    crops: tuple[Crop, ...]
    masks: Tensor
    working: Size
    dilation: int = 0

    @property
    def picture(self) -> Size:
        return self.masks.shape[1], self.masks.shape[2]


@dataclass(frozen=True, eq=False)
class Prepared:
    """The pictures that a try-on samples from.

    persons: `[N, h, w, 3]`, masked.
    masks: `[N, h, w]` in 0..1, the hidden part of the persons.
    garments: `[M, h, w, 3]` on white.
    garment_masks: `[M, H, W]` bool, on the given garments; None without masks.
    """

    persons: Tensor
    masks: Tensor
    garments: Tensor
    garment_masks: Tensor | None
    paste: Paste


def prepare(
    person: Tensor,
    mask: Tensor,
    garment: Tensor,
    garment_mask: Tensor | None,
    *,
    margin: float | None,
    size: Size | float,
    dilation: int,
    fill: Fill,
    each: Each = iter,
) -> Prepared:
    """Persons `[N, H, W, C]` without what `mask` covers, and garments `[M, H, W, C]`, all in one size.

    `margin`, `size` and `dilation` are those of `plan`, `fill` that of `masked_persons`. `each` walks over the
    pictures.
    """
    paste = plan(fitted_masks(mask, person, dilation, each=each), margin, size, dilation)
    if garment_mask is not None:
        garment_mask = fitted_masks(garment_mask, garment, what="garment")
    persons, masks = masked_persons(person, paste, fill, each)
    return Prepared(persons, masks, garments_on_white(garment, garment_mask, paste.working, each), garment_mask, paste)


def fitted_masks(mask: Tensor, pictures: Tensor, dilation: int = 0, what: str = "person", each: Each = iter) -> Tensor:
    """Masks for pictures `[N, H, W, C]` as `[N, H, W]` bool: above 0.5, then dilated. Errors call the subject `what`.

    A mask of another size but the same proportions is resized to the picture.

    Raises:
        ValueError: an empty mask, a mask of other proportions, or another number of masks.
    """
    mask = (mask[None] if mask.ndim == 2 else mask).to(pictures.device)
    count, size = pictures.shape[0], (pictures.shape[1], pictures.shape[2])
    if mask.ndim != 3:
        raise ValueError(f"A mask must be [N, H, W], got {tuple(mask.shape)}.")
    if mask.shape[0] not in (1, count):
        raise ValueError(f"Got {mask.shape[0]} masks for {count} {what}s. Give one mask for all, or one for each.")
    for number, one in enumerate(mask):  # first: a picture without alpha comes with an empty mask of any size
        if not (one > 0.5).any():
            which = f" of {what} {number + 1}" if mask.shape[0] > 1 else ""
            raise ValueError(f"The mask{which} is empty. Paint over the garment.")
    if not same_shape((mask.shape[1], mask.shape[2]), size):
        raise ValueError(
            f"The mask is {mask.shape[2]} x {mask.shape[1]} pixels and the {what} {size[1]} x {size[0]}. "
            "Use a mask that was made of this picture."
        )
    fitted = resize(mask[..., None].float(), *size)[..., 0] > 0.5
    if not fitted.flatten(1).any(1).all():
        raise ValueError("The mask is too small: nothing is left of it at the picture's size. Paint a larger one.")
    return torch.stack([dilate(one, dilation) for one in each(fitted)]).expand(count, -1, -1)


def crop_around(mask: Tensor, margin: float) -> Crop:
    """The box of a mask `[H, W]`, wider on each side by `margin` times its longer side, within the picture."""
    *_, width, height = bounds(mask)
    rows, columns = around(mask, round(margin * max(width, height)))
    right, bottom = min(columns.stop, mask.shape[1]), min(rows.stop, mask.shape[0])
    return Crop(columns.start, rows.start, right - columns.start, bottom - rows.start)


def size_for(crops: Sequence[Crop], pixels: float) -> Size:
    """A working size of about `pixels` pixels, in whole tokens, with the proportions of a box that holds all crops."""
    width, height = max(crop.width for crop in crops), max(crop.height for crop in crops)
    factor = math.sqrt(pixels / (width * height)) / TOKEN
    return max(round(height * factor), 1) * TOKEN, max(round(width * factor), 1) * TOKEN


def plan(masks: Tensor, margin: float | None, size: Size | float, dilation: int = 0) -> Paste:
    """Where to crop.

    With a given size, a crop may have to reach over the picture's border. With a size that we round to whole tokens,
    the crop becomes smaller instead, as long as it holds the mask and `MOST` of its area.

    Args:
        masks: `[N, H, W]` bool, none of them empty.
        margin: around the mask, as a part of its longer side; None takes the whole picture.
        size: height and width of the crops' pictures, or about their number of pixels.
        dilation: of the masks, in pixels.
    """
    picture = (masks.shape[1], masks.shape[2])
    whole = Crop(0, 0, picture[1], picture[0])
    boxes = [whole if margin is None else crop_around(mask, margin) for mask in masks]
    working = size if isinstance(size, tuple) else size_for(boxes, size)
    crops = [box.grown(working, picture) for box in boxes]
    if not isinstance(size, tuple):
        for number, (crop, mask) in enumerate(zip(crops, masks, strict=True)):
            smaller, needed = crop.largest_around(working, picture), Crop(*bounds(mask))
            smaller = needed.largest_around(working, picture) if not smaller.holds(needed) else smaller
            most = MOST * min(crop.width, picture[1]) * min(crop.height, picture[0])
            if not whole.holds(crop) and smaller.holds(needed) and smaller.width * smaller.height >= most:
                crops[number] = smaller
    return Paste(tuple(crops), masks, working, dilation)


def masked_persons(person: Tensor, paste: Paste, fill: Fill, each: Each = iter) -> tuple[Tensor, Tensor]:
    """The crops with their masks filled, `[N, h, w, 3]`, and the masks at that size, `[N, h, w]` float.

    A working pixel is masked if any part of it is.
    """
    pictures, masks = [], []
    for image, mask, crop in zip(each(rgb(person)), paste.masks, paste.crops, strict=True):
        hidden = torch.where(mask[..., None], FILLS[fill], image)
        small = smaller_mask(mask, crop, paste.working)
        masks.append(small.to(person.dtype))
        pictures.append(torch.where(small[..., None], FILLS[fill], resize(crop.of(hidden), *paste.working)))
    return torch.stack(pictures), torch.stack(masks)


def smaller_mask(mask: Tensor, crop: Crop, working: Size) -> Tensor:
    """A mask `[H, W]` bool on the working picture of a crop: True wherever it touches a pixel.

    Beyond the picture's border it repeats, like the pixels it hides.
    """
    cut = crop.of(mask)
    if cut.shape == working:
        return cut
    return torch.nn.functional.adaptive_max_pool2d(cut[None].float(), working)[0] > 0


def garments_on_white(garment: Tensor, mask: Tensor | None, size: Size, each: Each = iter) -> Tensor:
    """Garments `[N, H, W, C]` letter-boxed on white, uncut, as `[N, *size, 3]`.

    Args:
        mask: of the garment, `[N, H, W]` bool; cuts the garment out and trims its surroundings. Without a mask, an
            alpha channel cuts it out, and nothing trims it.
    """
    fitted = []
    for number, image in enumerate(each(garment)):
        picture = rgb(image)
        if mask is not None:
            picture = torch.where(mask[number, ..., None], picture, 1.0)[around(mask[number], 0)]
        elif image.shape[-1] == 4:
            picture = 1 + image[..., 3:] * (picture - 1)
        fitted.append(letter_boxed(picture, size))
    return torch.stack(fitted)


def letter_boxed(picture: Tensor, size: Size) -> Tensor:
    """`[H, W, 3]` in the middle of a white picture of `size`, as large as it fits."""
    factor = min(size[0] / picture.shape[0], size[1] / picture.shape[1])
    height, width = (
        min(max(round(side * factor), 1), most) for side, most in zip(picture.shape[:2], size, strict=True)
    )
    boxed = picture.new_ones(*size, 3)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    boxed[top : top + height, left : left + width] = resize(picture, height, width)
    return boxed


def composite(
    result: Tensor, person: Tensor, paste: Paste, feather: int, masks: Tensor | None = None, each: Each = iter
) -> Tensor:
    """The persons with the results in place of the masked pixels.

    Args:
        result: `[M, h, w, C]` with the proportions of the crops, at any scale.
        person: `[N, H, W, C]`, the original; N is 1 or M.
        feather: pixels over which a result fades in, from the border of the mask inwards. 0 is a hard edge. The
            dilation limits it: further in, the old garment would shine through.
        masks: `[N, H, W]` bool, leaves fewer pixels to change. None outside `paste.masks` ever changes.
        each: walks over the results.

    Returns:
        `[M, H, W, C]` as the original; a grey original becomes RGB. Alpha stays the original's.

    Raises:
        ValueError: persons that the crops do not come from, another number of results, or other proportions.
    """
    refuse_strangers(result, person, paste)
    feather = min(feather, paste.dilation)
    masks = (paste.masks if masks is None else masks & paste.masks).to(person.device)
    weights = [paste_weight(mask, crop, feather) for mask, crop in zip(masks, paste.crops, strict=True)]
    person = person if person.shape[-1] == 4 else rgb(person)
    pasted = []
    for number, picture in enumerate(each(rgb(result))):
        original = person[number if person.shape[0] > 1 else 0]
        which = number if len(paste.crops) > 1 else 0
        pasted.append(_pasted(picture.to(original), original, paste.crops[which], weights[which]))
    return torch.stack(pasted)


def refuse_strangers(result: Tensor, person: Tensor, paste: Paste) -> None:
    """Refuse results, persons and crops that do not belong together."""
    counts = (result.shape[0], person.shape[0], len(paste.crops))
    size, working = (person.shape[1], person.shape[2]), (result.shape[1], result.shape[2])
    if size != paste.picture or counts[1] != counts[2]:
        raise ValueError(
            f"The crop was made of {counts[2]} person(s) of {paste.picture[1]} x {paste.picture[0]} pixels, got "
            f"{counts[1]} of {size[1]} x {size[0]}. Connect the pictures that Try-On Prepare got."
        )
    if counts[1] not in (1, counts[0]):
        raise ValueError(f"Got {counts[0]} results for {counts[1]} persons. Give one result for each, or one person.")
    if not same_shape(working, paste.working):
        raise ValueError(
            f"The result is {working[1]} x {working[0]} pixels, the crop was {paste.working[1]} x {paste.working[0]}. "
            "Sample at the width and height that Try-On Prepare gives."
        )


def placed_masks(mask: Tensor, paste: Paste) -> Tensor:
    """Masks `[N, h, w]` of the person, or of the working pictures, as `[N, H, W]` bool on the persons.

    Raises:
        ValueError: a mask of neither size, or another number of masks.
    """
    mask = (mask[None] if mask.ndim == 2 else mask).to(paste.masks.device)
    size, count = tuple(mask.shape[1:]), len(paste.crops)
    if mask.shape[0] not in (1, count) or size not in (paste.picture, paste.working):
        raise ValueError(
            f"'mask' must be {paste.picture[1]} x {paste.picture[0]} pixels like the person, or {paste.working[1]} x "
            f"{paste.working[0]} like the crop, one for all or {count}; got {mask.shape[0]} of {size[1]} x {size[0]}."
        )
    above = (mask > 0.5).expand(count, -1, -1)
    if size == paste.picture:
        return above
    placed = torch.zeros_like(paste.masks)
    for onto, each, crop in zip(placed, above, paste.crops, strict=True):
        rows, columns = crop.inside(paste.picture)
        large = resize(each[..., None].float(), crop.height, crop.width)[..., 0] > 0.5
        onto[rows, columns] = large[_moved(rows, crop.top), _moved(columns, crop.left)]
    return placed


def paste_weight(mask: Tensor, crop: Crop, feather: int) -> Tensor:
    """How much of a result shows, `[H, W]` in 0..1: 0 outside mask and crop, 1 more than `feather` pixels inwards.

    It is exactly 1 there, so a mask dilated by `feather` pixels still hides all that it hid before the dilation. The
    edge of the picture is no border of the mask.
    """
    within = torch.zeros_like(mask)
    within[crop.inside((mask.shape[0], mask.shape[1]))] = True
    within &= mask
    weight = torch.zeros(mask.shape, device=mask.device)
    if within.any():
        near = around(within, 1)  # beyond its border there is nothing nearer
        distance = distance_to(~within[near], feather)
        weight[near] = torch.where(distance > feather, 1.0, distance / (feather + 1))
    return weight


def _pasted(picture: Tensor, original: Tensor, crop: Crop, weight: Tensor) -> Tensor:
    """`[h, w, 3]` over `[H, W, 3 or 4]`."""
    rows, columns = crop.inside((original.shape[0], original.shape[1]))
    patch = resize(picture, crop.height, crop.width)[_moved(rows, crop.top), _moved(columns, crop.left)]
    share = weight[rows, columns, None]
    before = original[rows, columns, :3]
    merged = original.clone()
    merged[rows, columns, :3] = torch.where(share > 0, torch.lerp(before, patch, share.to(before.dtype)), before)
    return merged


def same_shape(a: Size, b: Size) -> bool:
    """Whether two pictures have the same proportions, up to rounding."""
    return abs(a[0] * b[1] / (a[1] * b[0]) - 1) <= SHAPE_TOLERANCE


def _shifted(start: int, length: int, available: int) -> int:
    """The nearest start at which `length` lies within `available`; centred if it is too long."""
    return min(max(start, 0), available - length) if length <= available else (available - length) // 2


def _moved(part: slice, by: int) -> slice:
    return slice(part.start - by, part.stop - by)
