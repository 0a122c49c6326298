"""The pictures of the help pages: at most two by two cells, cut out of the example pictures.

The page shows help in a panel 282 pixels wide. `python -m scripts.help_pictures` writes `web/docs/*.jpg` anew.
"""

from __future__ import annotations

import sys
from io import BytesIO

from PIL import Image

from .places import DEMO_INPUTS, ROOT

FOLDER = ROOT / "web" / "docs"
WIDTH, GAP = 564, 8  # twice the panel, for dense screens

Box = tuple[int, int, int, int]  # left, top, width, height in the source


def cells(lefts: tuple[int, ...], tops: tuple[int, ...], size: int) -> list[Box]:
    """Square cells, row by row."""
    return [(left, top, size, size) for top in tops for left in lefts]


# Pictures that are put together of whole files, by their names.
WHOLE = {"examples": ("drawn_doll.png", "painted_doll.png", "photo_coin.jpg", "painted_person.png")}

# Name of the picture: its source, its cells, and how many of them stand in a row.
PICTURES: dict[str, tuple[str, list[Box], int]] = {
    "accelerate": ("accelerate.jpg", cells((8, 160, 460, 760), (44,), 144), 2),
    "cg_taylor": ("cg_taylor.png", [(10, 10, 650, 232)], 1),
    "clear": ("clear_patterns.png", cells((12, 216, 420, 624), (240,), 192), 2),
    "cogvideox_steps": ("cogvideox_steps.png", [(0, 0, 941, 343)], 1),
    "delta_dit": ("delta_dit.jpg", cells((8, 460), (44, 212), 144), 2),
    "dit4sr": ("dit4sr.jpg", cells((8, 424), (34, 658), 200), 2),
    "easycontrol": ("contact_sheet.jpg",
        [(9, 34, 231, 231), (489, 34, 231, 231), (9, 853, 231, 231), (489, 853, 231, 231)], 2),
    "embedded": ("contact_sheet.jpg",
        [(489, 34, 230, 230), (489, 307, 230, 230), (489, 580, 230, 230), (489, 1130, 230, 228)], 2),
    "freecus": ("freecus.jpg", cells((110, 260), (6, 306), 144), 2),
    "image_difference": ("image_difference.png",
        [(24, 60, 222, 200), (24, 360, 222, 200), (744, 60, 222, 200), (744, 360, 222, 200)], 2),
    "panels": ("panel_sets.png", [(19, 19, 386, 194)], 1),
    "panel_sets": ("panel_sets.png", [(423, 19, 386, 194), (827, 19, 386, 194)], 1),
    "panels_given": ("panels_given.png", [(239, 35, 386, 194), (647, 35, 386, 194)], 1),
    "pose_preview": ("pose_preview.png", cells((4, 394), (0, 194), 194), 2),
    "pose_video": ("pose_video.png",
        [(0, 0, 192, 192), (196, 0, 192, 192), (588, 0, 192, 192), (980, 0, 192, 192)], 2),
    "re_ttention": ("re_ttention_quarter.png", cells((8, 208, 408, 608), (26,), 192), 2),
    "taylorseer": ("taylorseer.jpg", cells((8, 160, 460, 760), (380,), 144), 2),
    "training": ("training_gradients.png", [(0, 26, 578, 330)], 1),
    "try_on": ("try_on.jpg",
        [(8, 222, 190, 190), (206, 222, 190, 190), (799, 232, 192, 170), (998, 222, 190, 190)], 2),
    "try_on_prepare": ("try_on_prepare.png",
        [(9, 29, 242, 242), (259, 29, 242, 242), (509, 29, 194, 242), (711, 29, 194, 242)], 2),
    "dynamictrl": ("dynamictrl.jpg", cells((0, 600), (0, 200), 190), 2),
}  # fmt: skip


def cut(name: str) -> tuple[list[Image.Image], int]:
    """The cells of a picture, and how many stand in a row."""
    if name in WHOLE:
        return [Image.open(DEMO_INPUTS / file).convert("RGB") for file in WHOLE[name]], 2
    source, boxes, columns = PICTURES[name]
    picture = Image.open(DEMO_INPUTS / source).convert("RGB")
    return [picture.crop((left, top, left + wide, top + high)) for left, top, wide, high in boxes], columns


def draw(name: str) -> Image.Image:
    """The cells side by side and below each other, all of one size, on white."""
    pictures, columns = cut(name)
    side = (WIDTH - GAP * (columns - 1)) // columns
    height = round(max(side * cell.height / cell.width for cell in pictures))
    rows = -(-len(pictures) // columns)
    canvas = Image.new("RGB", (WIDTH, rows * height + GAP * (rows - 1)), "white")
    for number, cell in enumerate(pictures):
        scale = min(side / cell.width, height / cell.height)
        size = (round(cell.width * scale), round(cell.height * scale))
        row, column = divmod(number, columns)
        corner = (column * (side + GAP) + (side - size[0]) // 2, row * (height + GAP) + (height - size[1]) // 2)
        canvas.paste(cell.resize(size, Image.Resampling.LANCZOS), corner)
    return canvas


def written(name: str) -> bytes:
    """The file."""
    draw(name).save(file := BytesIO(), "jpeg", quality=85)
    return file.getvalue()


def main() -> int:
    names = [*PICTURES, *WHOLE]
    for name in names:
        (FOLDER / f"{name}.jpg").write_bytes(written(name))
    print(f"{len(names)} pictures in {FOLDER.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
