"""Panels and prompts against the published table, and against cutting and masking pixel by pixel."""

import ast
import inspect
import random
import re
import sys

import pytest
import torch

from dit_toolkit.models.control.panel_layout import PRESETS, TOKEN, Layout, panel_layout, parse_given
from dit_toolkit.models.control.panel_pictures import (
    FILL,
    compose,
    encode_panels,
    fitted,
    given_panels,
    latent_panels,
    split,
    start_panel,
    unknown_mask,
)
from dit_toolkit.models.control.panel_prompt import has_word, joint_prompt, panel_texts

LEFT_RIGHT = ("[LEFT]", "[RIGHT]")
TOP_BOTTOM = ("[TOP]", "[BOTTOM]")
CORNERS = ("[TOP-LEFT]", "[TOP-RIGHT]", "[BOTTOM-LEFT]", "[BOTTOM-RIGHT]")
SCENES = ("[SCENE-1]", "[SCENE-2]", "[SCENE-3]")

# The authors' model table: width and height of the canvas. Rows, columns, tags and prefix as in its sample prompts.
PUBLISHED = {
    "couple-profile": (2048, 1024, 1, 2, LEFT_RIGHT, ""),
    "film-storyboard": (1024, 1536, 3, 1, SCENES, "[MOVIE-SHOTS]"),
    "font-design": (1792, 1216, 2, 2, CORNERS, ""),
    "home-decoration": (1344, 1728, 2, 2, CORNERS, ""),
    "portrait-illustration": (1152, 1088, 1, 2, LEFT_RIGHT, ""),
    "portrait-photography": (1344, 1728, 2, 2, CORNERS, "[FOUR-PANEL]"),
    "ppt-templates": (1984, 1152, 2, 2, CORNERS, ""),
    "sandstorm-visual-effect": (1408, 1600, 2, 1, TOP_BOTTOM, "[SANDSTORM-PSA]"),
    "sparklers-visual-effect": (960, 1088, 2, 1, TOP_BOTTOM, "[REAL-SPARKLERS-OVERLAYS]"),
    "visual-identity-design": (1472, 1024, 1, 2, LEFT_RIGHT, ""),
}


def grid(rows, columns, width=32, height=16, given="", tags="auto", prefix=""):
    return panel_layout("custom", rows, columns, width, height, tags, prefix, given)


def preset(name, given="", tags="auto", prefix=""):
    return panel_layout(name, 7, 7, 7, 7, tags, prefix, given)  # a preset reads none of the numbers


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def some_panels(layout, seed=0, channels=3):
    return {
        index: noise(1, layout.panel_height, layout.panel_width, channels, seed=seed + index)
        for index in range(layout.count)
    }


def size(layout):
    return f"{layout.rows}x{layout.columns} of {layout.panel_width}x{layout.panel_height}"


# Layouts


def test_every_published_lora_has_its_preset():
    assert set(PRESETS) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_canvases(name):
    width, height, rows, columns, tags, prefix = PUBLISHED[name]
    layout = preset(name)
    assert (layout.width, layout.height, layout.rows, layout.columns) == (width, height, rows, columns)
    assert (layout.panel_width * columns, layout.panel_height * rows) == (width, height)
    assert layout.panel_width % 16 == layout.panel_height % 16 == 0
    assert (layout.tags, layout.prefix, layout.given) == (tags, prefix, ())


@pytest.mark.parametrize(
    ("rows", "columns", "tags"),
    [
        (1, 2, LEFT_RIGHT),
        (2, 1, TOP_BOTTOM),
        (2, 2, CORNERS),
        (3, 1, SCENES),
        (1, 3, ("[IMAGE1]", "[IMAGE2]", "[IMAGE3]")),
        (2, 3, tuple(f"[IMAGE{i}]" for i in range(1, 7))),
    ],
)
def test_tags_of_a_grid_of_ones_own(rows, columns, tags):
    assert grid(rows, columns).tags == tags


def test_tags_can_be_chosen_and_a_prefix_typed():
    layout = preset("film-storyboard", tags="image", prefix=" [NOIR] ")
    assert layout.tags == ("[IMAGE1]", "[IMAGE2]", "[IMAGE3]")
    assert layout.prefix == "[NOIR]"
    assert preset("couple-profile", tags="scene").tags == ("[SCENE-1]", "[SCENE-2]")


@pytest.mark.parametrize(
    ("text", "expected"), [("", ()), ("  ", ()), ("1", (0,)), ("1, 3", (0, 2)), ("3;1 4,1", (0, 2, 3)), ("2,", (1,))]
)
def test_given_panels_are_numbers_from_1(text, expected):
    assert parse_given(text, 4) == expected


@pytest.mark.parametrize("text", ["0", "5", "-1", "left", "1-3", "1.5", "²", "\u0662"])
def test_given_that_is_no_panel_is_refused(text):
    with pytest.raises(ValueError, match=r"panel numbers from 1 to 4, like 1, 3, or stay empty; got"):
        parse_given(text, 4)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rows": 0}, "'rows' must be from 1 to 8, got 0"),
        ({"columns": 9}, "'columns' must be from 1 to 8, got 9"),
        ({"panel_width": 100}, "'panel_width' must be a multiple of 16 pixels, got 100. Take 96 or 112"),
        ({"panel_width": 104}, "'panel_width' must be a multiple of 16 pixels, got 104. Take 96 or 112"),
        ({"panel_height": 0}, "'panel_height' must be a multiple of 16 pixels, got 0. Take 16 or more"),
        ({"panel_height": -16}, "'panel_height' must be a multiple of 16 pixels, got -16. Take 16 or more"),
        ({"tags": "position", "rows": 3}, r"not for 3 x 2\. Choose scene or image"),
        ({"tags": "poetry"}, "'tags' must be auto, position, scene or image, got 'poetry'"),
        ({"preset": "film"}, "There is no preset 'film'. Choose custom, couple-profile, film-storyboard"),
        ({"given": "9"}, "from 1 to 2"),
    ],
)
def test_layouts_that_cannot_be_are_refused(change, sentence):
    values = dict(preset="custom", rows=1, columns=2, panel_width=96, panel_height=96, tags="auto", prefix="", given="")
    panel_layout(**values)
    with pytest.raises(ValueError, match=sentence):
        panel_layout(**{**values, **change})


def test_a_layout_counts_its_tags_and_its_given_panels():
    with pytest.raises(ValueError, match="2 panels need 2 tags, got 1"):
        Layout(1, 2, 16, 16, ("[LEFT]",))
    for given in ((2,), (1, 0), (0, 0)):
        with pytest.raises(ValueError, match="indices below 2"):
            Layout(1, 2, 16, 16, LEFT_RIGHT, given=given)


# Prompts


def test_a_storyboard_is_one_sentence_as_published():
    assert joint_prompt(
        preset("film-storyboard"),
        "A quiet evening by the sea.",
        ["<Mara> lights a lamp.", " a boat turns\n towards the light ", "<Mara> runs to the shore"],
    ) == (
        "[MOVIE-SHOTS] A quiet evening by the sea, [SCENE-1] <Mara> lights a lamp, [SCENE-2] a boat turns towards the "
        "light, [SCENE-3] <Mara> runs to the shore."
    )


def test_positions_are_joined_by_semicolons_as_published():
    prompt = joint_prompt(grid(1, 2), "Two cats", ["a black cat", "a white cat"])
    assert prompt == "Two cats; [LEFT] a black cat; [RIGHT] a white cat."


def test_marks_tags_and_prefixes_that_were_typed_stay():
    prompt = joint_prompt(
        preset("portrait-photography"),
        "This [FOUR-PANEL] image shows a painter:",
        ["she stands,", "she sits;", "does she rest?", "and [BOTTOM-RIGHT] she leaves!"],
    )
    assert prompt == (
        "This [FOUR-PANEL] image shows a painter: [TOP-LEFT] she stands, [TOP-RIGHT] she sits; [BOTTOM-LEFT] does she "
        "rest? and [BOTTOM-RIGHT] she leaves!"
    )


def test_only_the_summary_can_have_the_prefix_already_and_as_a_word():
    def prompt(summary, *texts):
        return joint_prompt(grid(1, 2, prefix="sks"), summary, texts)

    assert prompt("A sks dog, twice", "a", "b") == "A sks dog, twice; [LEFT] a; [RIGHT] b."
    for summary, texts in (("Tasks", "ab"), ("", ("a sks dog", "b")), ("sks_2", "ab"), ("2sks", "ab")):
        assert prompt(summary, *texts).startswith("sks ")


def test_a_sentence_has_one_end_whatever_the_script():
    assert (
        joint_prompt(grid(1, 2), "Well?..", ["\u96e8\u3002", "\u300c\u98a8\u3002\u300d"])
        == "Well? [LEFT] \u96e8; [RIGHT] \u300c\u98a8\u3002\u300d"
    )
    assert joint_prompt(grid(1, 2), "...", ["“no.”", "“yes”"]) == "[LEFT] “no.”; [RIGHT] “yes”."


def test_panels_without_text_keep_their_tags():
    assert joint_prompt(grid(1, 3), "", ["a cat", "", ""]) == "[IMAGE1] a cat; [IMAGE2]; [IMAGE3]."
    assert joint_prompt(preset("film-storyboard"), "", ["", "", ""]) == "[MOVIE-SHOTS] [SCENE-1], [SCENE-2], [SCENE-3]."


def test_one_line_is_one_panel():
    assert panel_texts("a\n\n c \n\n", 4) == ("a", "", "c", "")
    assert panel_texts("", 2) == ("", "")
    with pytest.raises(ValueError, match="'panel_prompts' has 3 lines for 2 panels"):
        panel_texts("a\nb\nc", 2)
    with pytest.raises(ValueError, match="2 panels need 2 texts, got 1"):
        joint_prompt(grid(1, 2), "", ["a"])


# Composing and cutting

GRIDS = [(1, 1), (1, 2), (2, 1), (3, 1), (2, 2), (2, 3), (5, 3), (8, 8)]


def by_definition(layout, panels):
    """The canvas, pixel by pixel: row y lies in row y // panel_height of panels."""
    canvas = torch.empty(1, layout.height, layout.width, 3)
    for y in range(layout.height):
        for x in range(layout.width):
            index = y // layout.panel_height * layout.columns + x // layout.panel_width
            canvas[0, y, x] = panels[index][0, y % layout.panel_height, x % layout.panel_width]
    return canvas


@pytest.mark.parametrize(("rows", "columns"), [(1, 2), (3, 1), (2, 3)])
def test_every_pixel_of_the_canvas_is_its_panels(rows, columns):
    layout = grid(rows, columns)
    panels = some_panels(layout)
    assert torch.equal(compose(layout, panels), by_definition(layout, panels))


@pytest.mark.parametrize("layout", [*map(preset, PUBLISHED), *(grid(*shape) for shape in GRIDS)], ids=size)
def test_splitting_undoes_composing_to_the_pixel(layout):
    panels = some_panels(layout, channels=1)
    parts = split(layout, compose(layout, panels))
    assert parts.shape == (layout.count, layout.panel_height, layout.panel_width, 1)
    assert all(torch.equal(parts[index], panel[0]) for index, panel in panels.items())


def test_a_batch_is_cut_picture_after_picture():
    layout = grid(2, 3)
    first, second = some_panels(layout), some_panels(layout, seed=50)
    parts = split(layout, torch.cat([compose(layout, first), compose(layout, second)]))
    assert all(torch.equal(parts[index], panel[0]) for index, panel in first.items())
    assert all(torch.equal(parts[6 + index], panel[0]) for index, panel in second.items())


def test_an_inset_is_cut_off_all_four_sides():
    layout = grid(2, 2)
    panels = some_panels(layout)
    parts = split(layout, compose(layout, panels), inset=3)
    assert all(torch.equal(parts[index], panel[0, 3:-3, 3:-3]) for index, panel in panels.items())
    for inset in (8, 100, -1):
        with pytest.raises(ValueError, match=f"below half a panel of 32 x 16, got {inset}"):
            split(layout, compose(layout, panels), inset=inset)


@pytest.mark.parametrize("scale", [2, 3, 1.5, 0.5])
def test_an_image_scaled_afterwards_is_cut_in_the_same_places(scale):
    layout = grid(2, 3)
    wide, high = int(32 * scale), int(16 * scale)
    scaled = {index: noise(high, wide, 4, seed=index) for index in range(6)}
    rows = [torch.cat([scaled[row * 3 + column] for column in range(3)], 1) for row in range(2)]
    parts = split(layout, torch.cat(rows)[None])
    assert all(torch.equal(parts[index], panel) for index, panel in scaled.items())


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        ((33, 96), "96 x 33, which has not the proportions of the layout's 96 x 32"),
        ((16, 96), "has not the proportions"),
        ((11, 33), "33 x 11, which does not divide evenly into 2 rows and 3 columns"),
    ],
)
def test_an_image_that_does_not_fit_is_refused(size, sentence):
    with pytest.raises(ValueError, match=sentence):
        split(grid(2, 3), noise(1, *size, 3))


def test_given_panels_come_back_untouched_from_the_canvas():
    layout = grid(2, 2, given="1, 4")
    panels = some_panels(layout)
    canvas = compose(layout, panels)
    sampled = torch.cat([canvas + 0.1, canvas - 0.1])
    parts = split(layout, sampled, inset=1, canvas=canvas)
    plain = split(layout, sampled, inset=1)
    for place in range(8):
        expected = panels[place % 4][0, 1:-1, 1:-1] if place % 4 in (0, 3) else plain[place]
        assert torch.equal(parts[place], expected)
    assert torch.equal(
        split(grid(2, 2), sampled, canvas=canvas), split(layout, sampled)
    )  # nothing given, nothing taken
    with pytest.raises(
        ValueError, match="one picture of 64 x 32 with 3 channels, as what is split, got 1 of 128 x 64 with 3 channels"
    ):
        split(layout, sampled, canvas=canvas.repeat_interleave(2, 1).repeat_interleave(2, 2))
    with pytest.raises(ValueError, match="64 x 32 with 4 channels, as what is split, got 1 of 64 x 32 with 3 channels"):
        split(layout, torch.cat([sampled, sampled[..., :1]], -1), canvas=canvas)


# Masks and latents


@pytest.mark.parametrize("frames", [(), (1,)], ids=["picture", "video"])
def test_a_latent_is_cut_where_its_picture_is(frames):
    layout = grid(2, 3)
    latent = noise(2, 4, *frames, 2 * 2, 3 * 4)
    parts = latent_panels(layout, latent)
    assert parts.shape == (12, 4, *frames, 2, 4)
    for place, part in enumerate(parts):
        picture, index = divmod(place, 6)
        y, x = index // 3 * 2, index % 3 * 4
        assert torch.equal(part, latent[picture, ..., y : y + 2, x : x + 4])
    for wrong in ((4, 13), (5, 15), (8, 12)):
        with pytest.raises(ValueError, match=f"the latent is {wrong[1]} x {wrong[0]}, which does not divide into"):
            latent_panels(layout, noise(1, 4, *frames, *wrong))


@pytest.mark.parametrize("layout", [grid(2, 3, given="2, 6"), preset("film-storyboard", "1"), grid(1, 2)], ids=size)
def test_the_mask_is_the_unknown_panels_and_nothing_else(layout):
    mask = unknown_mask(layout)
    assert mask.shape == (1, 1, layout.height, layout.width)
    assert mask.sum() == len(layout.unknown) * layout.panel_width * layout.panel_height
    marked = {i: torch.full((1, layout.panel_height, layout.panel_width, 3), 0.0) for i in layout.given}
    ones = torch.ones(1, layout.panel_height, layout.panel_width, 3)
    assert torch.equal(mask[0, 0], compose(layout, marked, fill=ones)[0, ..., 0])
    tokens = mask[0, 0].unfold(0, TOKEN, TOKEN).unfold(1, TOKEN, TOKEN)
    assert torch.equal(tokens.amax((-1, -2)), tokens.amin((-1, -2)))  # no token sees both


def test_each_panel_is_encoded_by_itself_and_once():
    layout = grid(2, 2, given="2, 3")
    panels = {index: panel for index, panel in some_panels(layout).items() if index in layout.given}
    seen = []

    def encode(picture):
        seen.append(picture)
        return picture.movedim(-1, 1).unflatten(2, (-1, 8)).mean(3).unflatten(3, (-1, 8)).mean(4)

    latent = encode_panels(layout, panels, None, encode)
    assert [tuple(picture.shape) for picture in seen] == [(1, 16, 32, 3)] * 3  # two given, one grey
    assert torch.equal(latent, encode(compose(layout, panels)))
    seen.clear()
    copies = encode_panels(layout, panels, panels[1], encode)
    assert len(seen) == 2
    assert torch.equal(copies, encode(compose(layout, panels, panels[1])))


def test_grey_is_of_the_pictures_kind():
    """ComfyUI can keep pictures in half precision."""
    layout = grid(1, 2, given="1")
    panels = {0: noise(1, 16, 32, 3).half()}
    assert compose(layout, panels).dtype == torch.float16
    assert encode_panels(layout, panels, None, lambda picture: picture.movedim(-1, 1)).dtype == torch.float16


def test_unknown_panels_begin_grey_or_as_the_first_given_one():
    layout = grid(1, 3, given="2")
    panels = {1: noise(1, 16, 32, 3)}
    grey = split(layout, compose(layout, panels, start_panel(layout, panels, "neutral")))
    assert torch.equal(grey[0], torch.full((16, 32, 3), FILL))
    copies = split(layout, compose(layout, panels, start_panel(layout, panels, "first given panel")))
    assert all(torch.equal(copy, panels[1][0]) for copy in copies)
    with pytest.raises(ValueError, match=r"needs a given panel\. Write its number into 'given'"):
        start_panel(grid(1, 3), {}, "first given panel")
    with pytest.raises(ValueError, match="'start' must be neutral or first given panel, got 'noise'"):
        start_panel(layout, panels, "noise")


# Pictures of any size


def test_pictures_go_to_the_given_panels_in_order():
    layout = grid(2, 2, given="4, 2")
    first, second = noise(1, 16, 32, 3), noise(1, 16, 32, 3, seed=1)
    panels = given_panels(layout, [first, second], "crop")
    assert panels.keys() == {1, 3}
    assert torch.equal(panels[1], first)
    assert torch.equal(panels[3], second)
    with pytest.raises(ValueError, match=r"marks 2 panels as given \(2, 4\), but 1 pictures are connected"):
        given_panels(layout, [first], "crop")
    with pytest.raises(ValueError, match=r"0 panels as given \(none\), but 1 pictures"):
        given_panels(grid(1, 2), [first], "crop")


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_a_picture_of_the_right_size_stays_as_it_is(fit):
    picture = noise(1, 16, 32, 4)
    assert torch.equal(fitted(picture, 32, 16, fit), picture[..., :3])


def test_crop_keeps_the_middle():
    picture = torch.zeros(1, 40, 20, 3)
    picture[:, 10:30] = 1.0
    assert torch.equal(fitted(picture, 20, 20, "crop"), torch.ones(1, 20, 20, 3))
    assert torch.equal(fitted(picture.transpose(1, 2), 20, 20, "crop"), torch.ones(1, 20, 20, 3))


def test_pad_keeps_everything_between_grey():
    picture = noise(1, 40, 20, 3)
    padded = fitted(picture, 64, 40, "pad")
    assert torch.equal(padded[:, :, 22:42], picture)
    assert torch.equal(padded[:, :, :22], torch.full((1, 40, 22, 3), FILL))
    assert torch.equal(padded[:, :, 42:], torch.full((1, 40, 22, 3), FILL))


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(7, 300), (301, 5), (1, 1), (17, 33), (15, 31)])
def test_any_picture_fits(fit, size):
    picture = noise(1, *size, 3)
    before = picture.clone()
    panel = fitted(picture, 32, 16, fit)
    assert panel.shape == (1, 16, 32, 3)
    assert panel.min() >= 0
    assert panel.max() <= 1
    assert torch.equal(picture, before)


def test_grey_pictures_get_three_channels_and_odd_fits_are_refused():
    assert fitted(noise(1, 20, 20, 1), 32, 16, "stretch").shape == (1, 16, 32, 3)
    with pytest.raises(ValueError, match="'fit' must be crop, pad or stretch, got 'squeeze'"):
        fitted(noise(1, 20, 20, 3), 32, 16, "squeeze")


@pytest.mark.parametrize("fit", ["crop", "stretch"])
def test_flat_colours_stay_to_the_last_digit(fit):
    colour = torch.tensor([1.0, 0.3, 0.0])
    for size in ((50, 200), (90, 60), (7, 9)):
        panel = fitted(colour.expand(1, *size, 3), 48, 32, fit)
        assert torch.equal(panel, colour.expand(1, 32, 48, 3))


def test_a_stretched_gradient_stays_a_gradient():
    """Bicubic resampling reproduces straight lines away from the edges."""
    picture = torch.linspace(0, 1, 64)[None, None, :, None].expand(1, 8, 64, 3)
    panel = fitted(picture, 32, 16, "stretch")[0, 8, 4:-4, 0]
    expected = (torch.arange(4, 28) * 2 + 0.5) / 63
    torch.testing.assert_close(panel, expected, atol=1e-3, rtol=0)


def test_no_pattern_begins_anew_at_every_blank():
    """A text of 16,000 blanks may come over a link: nothing that could fail stands behind a repetition."""
    module = sys.modules[panel_layout.__module__]
    calls = [
        node
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("re.")
    ]
    patterns = [ast.literal_eval(call.args[0]) for call in calls]
    assert patterns
    assert not [pattern for pattern in patterns if not reads_once(pattern)]
    assert not any(reads_once(slow) for slow in (r"[ .]+$", r"\s+$", r"(a+)+b", r"x{2,}y"))


def reads_once(pattern: str) -> bool:
    plain = re.sub(r"\[[^\]]*\]", "c", re.sub(r"\\.", "e", pattern))
    return re.search(r"([+*]|\{\d+,\}).", plain) is None


def test_a_word_stands_by_itself_where_no_letter_touches_it():
    draw = random.Random(0)
    letters = ["a", "aa", "_", "1", " ", "[", "é", "\u732b", "\U0001d49c", "\U0001f408", "."]
    found = 0
    for _ in range(5000):
        text = "".join(draw.choices(letters, k=draw.randrange(12)))
        for word in ("a", "aa", "[", "\U0001d49c"):
            expected = re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None
            assert has_word(text, word) == expected, (text, word)
            found += expected
    assert found > 1000


def test_a_number_of_thousands_of_digits_is_no_panel():
    with pytest.raises(ValueError, match=r"'given' must list panel numbers from 1 to 2.*got '1{20}\.\.\.'"):
        parse_given("1" * 5000, 2)
    assert parse_given("0" * 5000 + "2", 2) == (1,)
