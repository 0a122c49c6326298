"""`make pictures` knows every picture of the tree, and what it puts together can be read."""

import re

import numpy as np
import pytest
from PIL import Image

from dit_toolkit.scripts.pictures import sheet, table, thumbnails
from dit_toolkit.scripts.places import ROOT

ENTRIES = table.entries()


def plain(colour="red", size=(96, 96)):
    return Image.new("RGB", size, colour)


# The table


def test_every_picture_in_the_tree_has_an_entry():
    known = {*ENTRIES}
    unknown = [name for name in table.tracked() if name not in known and not name.startswith(table.SETS)]
    assert not unknown, "scripts/pictures/table.py says how each picture is made"


def test_every_entry_has_its_picture():
    assert not [name for name in ENTRIES if not (ROOT / name).is_file()], "make pictures"


def test_a_picture_is_either_made_or_given():
    assert not {*table.makers(), *table.thumbnails()} & {*table.SOURCES}


def test_words_choose_pictures_by_their_path():
    assert table.chosen(["web/docs/FREECUS"]) == ["web/docs/freecus.jpg"]
    assert set(table.chosen([])) == {*table.makers(), *table.thumbnails()}
    assert table.chosen(["no such picture"]) == []


def test_every_picture_that_is_made_is_shown_on_a_page():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("web/docs/**/*.md")]
    shown = set()
    for page in pages:
        links = re.findall(r"""(?:\]\(|src=")([^)"\s]+)""", page.read_text(encoding="utf-8"))
        shown |= {(page.parent / link).resolve() for link in links if "://" not in link}
    assert not [name for name in table.makers() if (ROOT / name).resolve() not in shown]


@pytest.mark.parametrize("name", sorted(table.makers()))
def test_pictures_are_small_enough_to_ship(name):
    assert (ROOT / name).stat().st_size < 300_000


# Sheets


def test_a_sheet_is_a_grid_with_a_label_below_each_picture():
    made = sheet.sheet([plain("red"), plain("blue"), plain("green")], ["one", "two", "three"])
    cell = (sheet.WIDTH - sheet.GAP) // 2
    assert made.size == (sheet.WIDTH, 2 * (cell + sheet.LABEL) + sheet.GAP)
    assert made.getpixel((cell // 2, cell // 2)) == (255, 0, 0)
    assert made.getpixel((cell + sheet.GAP + cell // 2, cell // 2)) == (0, 0, 255)
    label = made.crop((0, cell, cell, cell + sheet.LABEL))
    assert np.asarray(label.convert("L")).min() < 100, "no words below the picture"
    assert made.getpixel((sheet.WIDTH - 5, made.height - 5)) == (255, 255, 255), "the fourth cell is empty"


def test_pictures_keep_their_shape():
    assert sheet.fitted(plain(size=(200, 100)), 100, 100).size == (100, 50)
    assert sheet.fitted(plain(size=(10, 30)), 100, 60).size == (20, 60)


# Thumbnails


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("CPU 01 canny edges to picture", ("CPU", "canny edges to picture")),
        ("FLUX.1 06 speed up", ("FLUX.1", "speed up")),
        ("SD3.5 01 upscale a photo", ("SD3.5", "upscale a photo")),
        ("CogVideoX 01 pose to video", ("CogVideoX", "pose to video")),
        ("CPU two words", ("CPU", "two words")),
    ],
)
def test_a_workflows_name_says_what_it_needs_and_what_it_does(stem, expected):
    assert sheet.split_title(stem) == expected


@pytest.mark.parametrize("kind", sheet.COLOURS)
def test_a_ribbon_has_the_colour_of_what_is_needed_and_bears_its_name(kind):
    made = sheet.framed(f"{kind} 01 upscale")
    ribbon = made.crop((0, 0, sheet.SIDE, sheet.RIBBON))
    colour = tuple(int(sheet.COLOURS[kind][i : i + 2], 16) for i in (1, 3, 5))
    assert made.getpixel((4, 4)) == colour
    assert (np.asarray(ribbon) == 255).all(-1).any()
    assert made.getpixel((sheet.SIDE - 4, 4)) != colour
    title = made.crop((0, sheet.SIDE - sheet.TITLE, sheet.SIDE, sheet.SIDE)).convert("L")
    assert np.asarray(title).max() > 200


def test_a_long_title_is_made_smaller_and_stays_inside():
    made = sheet.framed("CPU 09 " + "consistent character in many scenes " * 2)
    columns = made.crop((0, sheet.SIDE - sheet.TITLE, 9, sheet.SIDE)).convert("L")
    assert np.asarray(columns).max() < 60


def test_results_are_larger_than_what_goes_in():
    made = sheet.thumbnail("CPU 01 canny", [plain("red")], [plain("blue")])
    counts = {colour: count for count, colour in made.getcolors(maxcolors=100_000)}
    assert counts[(255, 0, 0)] > 4 * counts[(0, 0, 255)] > 0


@pytest.mark.parametrize(("count", "shape", "columns"), [(1, 1, 1), (2, 2, 1), (2, 0.5, 2), (4, 1, 2), (3, 0.4, 3)])
def test_pictures_are_laid_out_as_large_as_they_can_be(count, shape, columns):
    assert sheet.best_columns(count, shape, 400, 400) == columns


# What a workflow without its weights may show


PROMPT = {
    "1": {"class_type": "DiTExamplePicture", "inputs": {"picture": "photo_coin.jpg"}},
    "2": {"class_type": "Canny", "inputs": {"image": ["1", 0]}},
    "3": {"class_type": "PreviewImage", "inputs": {"images": ["2", 0]}},
    "4": {"class_type": "UNETLoader", "inputs": {"unet_name": "flux1-dev.safetensors"}},
    "5": {"class_type": "KSampler", "inputs": {"model": ["4", 0]}},
    "6": {"class_type": "SaveImage", "inputs": {"images": ["5", 0]}},
}


def test_only_what_needs_no_weights_is_run():
    assert set(thumbnails.without_weights(PROMPT)) == {"1", "2", "3"}


def test_poses_are_shown_as_written_where_finding_a_persons_joints_needs_weights():
    prompt = {
        "1": {"class_type": "DiTPoseKeyframes", "inputs": {"text": "[]"}},
        "2": {"class_type": "CheckpointLoaderSimple", "inputs": {}},
        "3": {"class_type": "SDPoseKeypointExtractor", "inputs": {"model": ["2", 0]}},
        "4": {"class_type": "DiTPoseVideo", "inputs": {"poses": ["1", 0], "reference": ["3", 0], "alignment": "paper"}},
    }
    assert thumbnails.without_weights(thumbnails.with_poses(prompt)) == {}
    kept = thumbnails.without_weights(thumbnails.with_poses(thumbnails.as_written(prompt)))
    assert set(kept) == {"1", "4", thumbnails.POSES}
    assert prompt["4"]["inputs"]["alignment"] == "paper", "the prompt itself stays"


def test_a_users_own_file_is_not_looked_for():
    own = {
        "7": {"class_type": "LoadImage", "inputs": {"image": "my holiday.png"}},
        "8": {"class_type": "PreviewImage", "inputs": {"images": ["7", 0]}},
    }
    assert set(thumbnails.without_weights({**PROMPT, **own})) == {"1", "2", "3"}


def test_example_pictures_are_shown_once_and_masks_are_not():
    mask = {"7": {"class_type": "DiTExamplePicture", "inputs": {"picture": "mask_doll.png"}}}
    again = {"8": {"class_type": "LoadImage", "inputs": {"image": "photo_coin.jpg"}}}
    assert [picture.size for picture in thumbnails.given({**PROMPT, **mask, **again})] == [(384, 384)]


def test_a_preview_is_a_result_where_it_shows_a_decoded_picture_and_not_a_heat_map():
    prompt = {
        "1": {"class_type": "VAEDecode", "inputs": {}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}, "_meta": {"title": "Forecast"}},
        "3": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}, "_meta": {"title": "In full"}},
        "4": {"class_type": "DiTImageDifference", "inputs": {"reference": ["1", 0], "image": ["1", 0]}},
        "5": {"class_type": "PreviewImage", "inputs": {"images": ["4", 0]}},
    }
    made = {"2": [plain("blue")], "3": [plain("red")], "5": [plain("green")]}
    pictures, labels = thumbnails.compared(prompt, made)
    assert [picture.getpixel((0, 0)) for picture in pictures] == [(255, 0, 0), (0, 0, 255)]
    assert labels == ["In full", "Forecast"]


def test_a_report_gives_the_strip_of_a_run():
    text = "TaylorSeer: 10 evaluations\nevaluations: ###..#..#.\nmemory held: 0.1 MiB"
    assert thumbnails.schedule({"7": {"text": [text]}, "8": {"images": []}}) == "1110010010"
    assert thumbnails.schedule({"7": {"text": ["nothing was run"]}}) == ""


def test_a_strip_shows_what_was_computed():
    strip = sheet.bars("10", 100, 50)
    assert strip.getpixel((25, 5)) != strip.getpixel((75, 5))
    assert strip.getpixel((75, 48)) != strip.getpixel((75, 5))


def test_two_pictures_of_one_thing_are_alike_whatever_their_size():
    picture = sheet.bars("1100", 64, 64)
    assert thumbnails.alike(picture, picture.resize((256, 256)))
    assert not thumbnails.alike(picture, sheet.bars("0011", 64, 64))
