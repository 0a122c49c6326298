"""Pictures side by side, with words that can be read: sheets for help pages, and thumbnails of workflows.

A help page is 282 pixels wide. Sheets are drawn at twice that, so what is 24 pixels high here is 12 there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

Picture = Image.Image
WIDTH = 564  # of a sheet: twice a help page
GAP, LABEL = 8, 36
PAPER, INK = "white", "#222222"

SIDE = 512  # of a thumbnail
DARK, PALE = "#1b1d22", "#f2f2f2"
RIBBON, TITLE = 52, 64  # heights in a thumbnail
COLOURS = {"CPU": "#2e7d32", "FLUX.1": "#1565c0", "SD3.5": "#6a1b9a", "CogVideoX": "#c75000"}
MOST_BYTES = 200_000


def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def fitted(picture: Picture, width: int, height: int) -> Picture:
    """As large as fits. Small pictures are enlarged smoothly, except for those of a few pixels."""
    factor = min(width / picture.width, height / picture.height)
    size = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
    return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def words(draw: ImageDraw.ImageDraw, text: str, box: tuple[int, int, int, int], size: int, fill: str) -> None:
    """A line in the middle of a box, smaller if it must be."""
    left, top, right, bottom = box
    while size > 8 and draw.textlength(text, font=font(size)) > right - left:
        size -= 1
    draw.text(((left + right) / 2, (top + bottom) / 2), text, fill=fill, font=font(size), anchor="mm")


def sheet(
    pictures: Sequence[Picture], labels: Sequence[str] = (), columns: int = 2, width: int = WIDTH, size: int = 24
) -> Picture:
    """A grid of pictures, each with its label below. All cells are as high as the highest picture needs."""
    cell = (width - GAP * (columns - 1)) // columns
    shown = [fitted(picture, cell, 3 * cell) for picture in pictures]
    label = LABEL * size // 24 if labels else 0
    high = max(picture.height for picture in shown) + label
    rows = -(-len(shown) // columns)
    made = Image.new("RGB", (width, rows * high + GAP * (rows - 1)), PAPER)
    draw = ImageDraw.Draw(made)
    for number, picture in enumerate(shown):
        left, top = number % columns * (cell + GAP), number // columns * (high + GAP)
        made.paste(picture, (left + (cell - picture.width) // 2, top + (high - label - picture.height) // 2))
        if labels:
            words(draw, labels[number], (left, top + high - label, left + cell, top + high), size, INK)
    return made


def stacked(pictures: Sequence[Picture]) -> Picture:
    """One below the other, all of the first one's width."""
    width = pictures[0].width
    shown = [fitted(picture, width, 10**6) for picture in pictures]
    made = Image.new("RGB", (width, sum(p.height for p in shown) + GAP * (len(shown) - 1)), PAPER)
    top = 0
    for picture in shown:
        made.paste(picture, (0, top))
        top += picture.height + GAP
    return made


# Thumbnails


def split_title(stem: str) -> tuple[str, str]:
    """What a workflow needs, and what it does: "CPU 01 canny edges to picture" is ("CPU", "canny edges to picture")."""
    for kind in COLOURS:
        if stem.startswith(f"{kind} "):
            number, _, rest = stem.removeprefix(f"{kind} ").partition(" ")
            return kind, rest if number.isdigit() else f"{number} {rest}".strip()
    named, _, bracket = stem.rpartition(" (")
    kind = next((kind for kind in COLOURS if bracket.startswith(kind)), "CPU")
    return kind, named or stem


def framed(stem: str) -> Picture:
    """An empty thumbnail with its ribbon and its title."""
    kind, title = split_title(stem)
    made = Image.new("RGB", (SIDE, SIDE), DARK)
    draw = ImageDraw.Draw(made)
    long = round(draw.textlength(kind, font=font(34)))
    draw.polygon([(0, 0), (long + 52, 0), (long + 32, RIBBON), (0, RIBBON)], fill=COLOURS[kind])
    draw.text((16, RIBBON / 2), kind, fill="white", font=font(34), anchor="lm")
    words(draw, title, (10, SIDE - TITLE, SIDE - 10, SIDE), 34, PALE)
    return made


def mean_shape(pictures: Sequence[Picture]) -> float:
    """Width over height."""
    return sum(picture.width / picture.height for picture in pictures) / len(pictures)


def best_columns(count: int, shape: float, width: int, height: int) -> int:
    """How many columns show `count` pictures of this shape largest."""

    def scale(columns: int) -> float:
        rows = -(-count // columns)
        return min(width / columns / shape, height / rows)

    return max(range(1, count + 1), key=lambda columns: (round(scale(columns), 3), -columns))


def scale_of(count: int, shape: float, width: int, height: int) -> float:
    """How high each picture is then."""
    columns = best_columns(count, shape, width, height)
    return min(width / columns / shape, height / -(-count // columns))


INSET = 120  # the longest side of what goes in


def thumbnail(
    stem: str,
    results: Sequence[Picture],
    inputs: Sequence[Picture] = (),
    labels: Sequence[str] = (),
    note: str = "",
    strip: str = "",
) -> Picture:
    """What goes in, small, beside or below what comes out, large, under a ribbon that says what the workflow needs.

    Args:
        note: a line below the pictures.
        strip: a run as `bars` draws it, below the pictures.
    """
    made = framed(stem)
    draw = ImageDraw.Draw(made)
    left, top, right, bottom = GAP, RIBBON + GAP, SIDE - GAP, SIDE - TITLE
    if note:
        words(draw, note, (left, bottom - 30, right, bottom), 22, "#aab4c0")
        bottom -= 34
    if strip:
        made.paste(bars(strip, right - left, 34), (left, bottom - 38))
        bottom -= 46
    if inputs and results:
        small = [fitted(picture, INSET, min(INSET, (bottom - top) // len(inputs) - GAP)) for picture in inputs]
        shape = mean_shape(results)
        beside = scale_of(len(results), shape, right - left - INSET - GAP, bottom - top)
        below = scale_of(len(results), shape, right - left, bottom - top - INSET - GAP)
        x, y = left, top if beside >= below else bottom - INSET
        for picture in small:
            made.paste(picture, (x, y))
            draw.rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline="white")
            x, y = (x, y + picture.height + GAP) if beside >= below else (x + picture.width + GAP, y)
        if beside >= below:
            left += INSET + GAP
        else:
            bottom -= INSET + GAP
    shown = list(results) or list(inputs)
    if not shown:
        return made
    columns = best_columns(len(shown), mean_shape(shown), right - left, bottom - top)
    rows = -(-len(shown) // columns)
    text = 26 if labels else 0
    wide, high = (right - left - GAP * (columns - 1)) // columns, (bottom - top - GAP * (rows - 1)) // rows
    scaled = [fitted(picture, wide, high - text) for picture in shown]
    taken = max(picture.height for picture in scaled) + text
    start = top + (bottom - top - rows * taken - GAP * (rows - 1)) // 2
    for number, picture in enumerate(scaled):
        x, y = left + number % columns * (wide + GAP), start + number // columns * (taken + GAP)
        made.paste(picture, (x + (wide - picture.width) // 2, y))
        if labels:
            words(draw, labels[number], (x, y + taken - text, x + wide, y + taken), 22, "#aab4c0")
    return made


def bars(schedule: str, width: int, height: int) -> Picture:
    """A run as the nodes show it: "1" is a computed step, "0" a forecast one."""
    made = Image.new("RGB", (width, height), DARK)
    draw, step = ImageDraw.Draw(made), width / len(schedule)
    for number, computed in enumerate(schedule):
        top = 0 if computed == "1" else round(height * 0.62)
        fill = "#4a9eff" if computed == "1" else "#5fc9a8"
        draw.rectangle((round(number * step) + 1, top, round((number + 1) * step) - 1, height), fill=fill)
    return made


def save(picture: Picture, file: Path, quality: int = 88) -> Path:
    """As its name says: PNG with few colours where that is enough, or JPEG."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".png":
        picture.convert("RGB").save(file, optimize=True)
    else:
        picture.convert("RGB").save(file, "JPEG", quality=quality, optimize=True)
    return file


def save_moving(frames: Sequence[Picture], file: Path, rate: float = 8) -> Path:
    """An animated WebP, whatever the file is called: the page looks for `.jpg`, and browsers look inside."""
    first, *rest = frames
    first.save(file, "WEBP", save_all=True, append_images=rest, duration=round(1000 / rate), loop=0, quality=70)
    return file
