"""Image Difference as a workflow meets it: what goes in, what comes out, and the sentences in between."""

import math
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.comfy

from comfy_extras.nodes_rtdetr import DrawBBoxes  # noqa: E402
from server import PromptServer  # noqa: E402

from dit_toolkit.nodes.image_difference import ImageDifference  # noqa: E402
from dit_toolkit.tests.nodes.calling import defaults  # noqa: E402

SCHEMA = ImageDifference.define_schema()


def images(batch=1, height=32, width=48, channels=3, value=0.5):
    return torch.full((batch, height, width, channels), value)


def with_spot(pictures, x, y, width, height, change=0.3):
    changed = pictures.clone()
    changed[:, y : y + height, x : x + width] += change
    return changed


def run(reference, image, **values):
    result = ImageDifference.execute(reference=reference, image=image, **{**defaults(ImageDifference), **values})
    return SimpleNamespace(
        ui=result.ui,
        **{output.display_name: value for output, value in zip(SCHEMA.outputs, result.args, strict=True)},
    )


def test_inputs_and_outputs_keep_their_places():
    assert [entry.id for entry in SCHEMA.inputs] == [
        "reference", "image", "threshold", "resize", "heat_range", "merge_gap", "min_pixels",
    ]  # fmt: skip
    assert [output.display_name for output in SCHEMA.outputs] == [
        "heat_map", "marked", "boxes", "report", "psnr", "ssim",
    ]  # fmt: skip


def test_one_changed_spot_is_measured_marked_and_boxed():
    first = images()
    second = with_spot(first, x=10, y=6, width=12, height=8)
    found = run(first, second)
    expected = 10 * math.log10(32 * 48 / (12 * 8 * 0.09))
    assert found.psnr == pytest.approx(expected, abs=1e-3)
    assert 0 < found.ssim < 1
    assert found.boxes == [[{"x": 10, "y": 6, "width": 12, "height": 8}]]
    assert found.report == (
        f"PSNR {expected:.1f} dB, SSIM {found.ssim:.3f}, 6.2 % of pixels changed, largest in (10, 6, 12, 8)"
    )
    assert found.ui.as_dict() == {"text": (found.report,)}
    assert found.heat_map.shape == found.marked.shape == (1, 32, 48, 3)
    hot = found.heat_map.sum(-1)[0] > 1
    assert int(hot.sum()) == 12 * 8
    assert bool(hot[6:14, 10:22].all())
    assert torch.equal(found.marked[0, 6:14, 10:22], second[0, 6:14, 10:22])
    assert not torch.equal(found.marked, second)


def test_nothing_is_written_into_what_came_in():
    first, second = images(), with_spot(images(), 4, 4, 9, 9)
    before = first.clone(), second.clone()
    run(first, second)
    assert torch.equal(first, before[0])
    assert torch.equal(second, before[1])


def test_identical_pictures_are_said_to_be_identical():
    found = run(images(), images())
    assert found.report == "identical, PSNR infinite, SSIM 1, no pixel changed"
    assert (found.psnr, found.ssim) == (math.inf, pytest.approx(1))
    assert found.boxes == [[]]
    assert torch.equal(found.marked, images())
    assert len(found.heat_map.flatten(0, 2).unique(dim=0)) == 1
    assert run(images(3), images(3)).report.startswith("3 pictures: identical, PSNR infinite")


def test_a_difference_below_the_threshold_counts_in_the_numbers_only():
    found = run(images(), images(value=0.501))
    assert found.boxes == [[]]
    assert found.psnr == pytest.approx(60, abs=0.01)
    assert found.report == "PSNR 60.0 dB, SSIM above 0.9999, no pixel changed by more than 0.05"
    assert run(images(), images(value=0.501), threshold=0.0).boxes[0][0]["width"] == 48


def test_settings_act():
    first = images()
    second = with_spot(with_spot(first, 4, 4, 6, 6), 20, 4, 6, 6, change=0.1)
    assert len(run(first, second).boxes[0]) == 2
    assert len(run(first, second, merge_gap=10).boxes[0]) == 1
    assert len(run(first, second, threshold=0.2).boxes[0]) == 1
    assert run(first, second, min_pixels=37).boxes == [[]]
    brightest = [float(run(first, second, heat_range=value).heat_map.max()) for value in (1.0, 0.3, 0.0)]
    assert brightest[0] < brightest[1] == pytest.approx(brightest[2], abs=0.01)


@pytest.mark.parametrize("one_first", [True, False])
def test_one_picture_is_compared_with_many(one_first):
    one = images()
    many = torch.cat([one, with_spot(one, 3, 3, 5, 5), with_spot(one, 20, 8, 16, 10)])
    found = run(one, many) if one_first else run(many, one)
    assert [len(boxes) for boxes in found.boxes] == [0, 1, 1]
    assert found.marked.shape == found.heat_map.shape == (3, 32, 48, 3)
    pooled = 10 * math.log10(3 * 32 * 48 / ((25 + 160) * 0.09))
    assert found.psnr == pytest.approx(pooled, abs=1e-3)
    assert found.ssim == pytest.approx(sum(run(one, many[i : i + 1]).ssim for i in range(3)) / 3, abs=1e-6)
    worst = run(one, many[2:]).psnr
    assert found.report == (
        f"3 pictures: PSNR {pooled:.1f} dB, SSIM {found.ssim:.3f}, 4.0 % of pixels changed, worst is picture 3 with "
        f"{worst:.1f} dB, 1 identical, largest in (20, 8, 16, 10) of picture 3"
    )


def test_a_picture_of_another_size_is_stretched_when_asked():
    y, x = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 96), indexing="ij")
    large = torch.stack([x, y, x * y], dim=-1)[None]
    small = torch.nn.functional.interpolate(large.movedim(-1, 1), (32, 48), mode="area").movedim(1, -1)
    found = run(small, large, resize="image to reference")
    assert found.marked.shape == (1, 32, 48, 3)
    assert found.psnr > 40


def test_pictures_with_alpha_or_in_grey_are_compared_and_marked_in_colour():
    for channels in (1, 4):
        found = run(images(channels=channels), with_spot(images(channels=channels), 4, 4, 8, 8))
        assert found.marked.shape == (1, 32, 48, 3)
        assert len(found.boxes[0]) == 1


def test_colours_beyond_the_displayable_are_compared_as_they_are_shown():
    assert run(images(value=1.0), images(value=1.7)).psnr == math.inf


@pytest.mark.parametrize(
    ("reference", "image", "message"),
    [
        (
            images(),
            images(width=40),
            r"of one size, got 48 x 32 for 'reference' and 40 x 32 for 'image'\. Set",
        ),
        (images(2), images(3), r"one by one, or one picture with many, got 2 for 'reference' and 3 for 'image'"),
        (images(), images(channels=4), r"same colour channels, got 3 for 'reference' and 4 for 'image'\. Split Image"),
        (images(value=math.nan), images(), r"'reference' has pixels that are no numbers"),
        (images(), images(value=math.inf), r"'image' has pixels that are no numbers"),
    ],
)
def test_pictures_that_cannot_be_compared_are_answered_with_a_sentence(reference, image, message):
    with pytest.raises(ValueError, match=message):
        run(reference, image)


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.5])
@pytest.mark.parametrize("name", ["threshold", "heat_range"])
def test_numbers_that_mean_nothing_are_answered_with_a_sentence(name, value):
    with pytest.raises(ValueError, match=f"'{name}' must be a number from 0.0 to 1.0, got {value}"):
        run(images(), images(value=0.7), **{name: value})


def test_core_draws_the_boxes():
    """The output is of the core's own kind: a list of boxes for each picture."""
    first = torch.cat([images(), images()])
    second = torch.cat([images(), with_spot(images(), 10, 6, 12, 8)])
    drawn = DrawBBoxes.execute(bboxes=run(first, second).boxes, image=images(2)).args[0]
    assert [bool((picture - 0.5).abs().max() > 0.1) for picture in drawn] == [False, True]


def test_the_line_is_shown_on_the_node_in_two_rows(monkeypatch):
    sent = []
    server = SimpleNamespace(send_progress_text=lambda text, node: sent.append((text, node)))
    monkeypatch.setattr(PromptServer, "instance", server, raising=False)
    monkeypatch.setattr(ImageDifference, "hidden", SimpleNamespace(unique_id="7:12"))
    found = run(images(), with_spot(images(), 4, 4, 8, 8))
    ((text, node),) = sent
    assert text.count("\n") == 1
    assert text.replace("\n", ", ") == found.report
    assert node == "7:12"
