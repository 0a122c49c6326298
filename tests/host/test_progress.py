"""Loops that take seconds: their bar moves on the node, and an interrupt stops them with nothing half done."""

from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.comfy

import comfy.model_management  # noqa: E402
import comfy.utils  # noqa: E402
import folder_paths  # noqa: E402
from comfy.model_management import InterruptProcessingException  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from dit_toolkit.host import progress  # noqa: E402
from dit_toolkit.host.accelerate.accelerate import tune  # noqa: E402
from dit_toolkit.host.animate import dynamictrl_files  # noqa: E402
from dit_toolkit.host.control.in_context_lora import EXAMPLE, read_sets  # noqa: E402
from dit_toolkit.host.restore.dit4sr_extract import extract, target_of  # noqa: E402
from dit_toolkit.models.control.panel_layout import Layout  # noqa: E402
from dit_toolkit.models.control.panel_pictures import encode_panels  # noqa: E402
from dit_toolkit.models.control.try_on_image import composite, prepare  # noqa: E402
from dit_toolkit.models.image_difference import compare  # noqa: E402
from dit_toolkit.nodes.dynamictrl import DynamiCtrlConditioning  # noqa: E402
from dit_toolkit.tests.host import tiny  # noqa: E402
from dit_toolkit.tests.host.animate import tiny_dynamictrl as video  # noqa: E402
from dit_toolkit.tests.host.restore.tiny_dit4sr import base, published  # noqa: E402
from dit_toolkit.tests.nodes.calling import run_node  # noqa: E402


class Bar:
    """What the page would be told. Presses Cancel when the bar has reached `cancel_at`."""

    def __init__(self, cancel_at=None):
        self.seen, self.cancel_at = [], cancel_at

    def __call__(self, value, total, preview, node_id=None):
        self.seen.append((value, total))
        if value == self.cancel_at:
            comfy.model_management.interrupt_current_processing(True)


@pytest.fixture
def bar(monkeypatch):
    """Watches all progress bars of a test; throttling is off, since tests are fast."""
    watcher = Bar()
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", watcher)
    monkeypatch.setattr(
        comfy.utils.ProgressBar,
        "update_absolute",
        lambda self, value, total=None, preview=None: (
            setattr(self, "current", value),
            self.hook(value, self.total, preview),
        ),
    )
    yield watcher
    comfy.model_management.interrupt_current_processing(False)


class Vae:
    """Counts what it encodes."""

    def __init__(self):
        self.calls = 0

    def encode(self, pictures):
        self.calls += 1
        return pictures.movedim(-1, 1)[..., ::8, ::8]

    def decode(self, latents):
        self.calls += 1
        return latents.movedim(1, -1)


def pictures(count=3, side=32):
    return torch.rand(count, side, side, 3)


def masks(count=3, side=32):
    mask = torch.zeros(count, side, side)
    mask[:, 8:24, 8:24] = 1
    return mask


def try_on(each):
    return prepare(pictures(), masks(), pictures(), None, margin=0.5, size=(32, 32), dilation=2, fill="grey", each=each)


LAYOUT = Layout(1, 3, 32, 32, ("[A]", "[B]", "[C]"))
PAIR = Layout(1, 2, 96, 96, ("[LEFT]", "[RIGHT]"))

LOOPS = {
    "conditions": lambda: progress.encoded(Vae(), pictures()),
    "decoding of panels": lambda: progress.decoded(Vae(), torch.rand(3, 4, 4, 4)),
    "panels": lambda: encode_panels(LAYOUT, dict(enumerate(pictures().split(1))), None, Vae().encode, progress.each_of),
    "panel sets": lambda: read_sets(EXAMPLE, PAIR, "crop"),
    "try-on, cutting out": lambda: try_on(progress.each_of),
    "try-on, pasting back": lambda: composite(pictures(), pictures(), try_on(iter).paste, 2, each=progress.each_of),
    "image difference": lambda: compare(pictures(), pictures(), 0.05, each=progress.each_of),
    "fp8": lambda: dynamictrl_files._in_fp8(
        {f"blocks.{i}.attn1.to_q.weight": torch.rand(4, 4) for i in range(3)}, "fp8_e4m3fn"
    ),
}


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_the_bar_moves_to_its_end(loop, bar):
    loop()
    values, totals = zip(*bar.seen, strict=True)
    assert totals[-1] >= 3
    assert values[-1] == totals[-1]


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_an_interrupt_stops_it(loop, bar):
    bar.cancel_at = 1
    with pytest.raises(InterruptProcessingException):
        loop()
    assert [value for value, _ in bar.seen] == [1]


def test_pictures_are_encoded_as_they_were_in_one_batch():
    given = pictures(3)
    one, two = progress.encoded(Vae(), given[:1], given[1:])
    assert torch.equal(torch.cat([one, two]), Vae().encode(given))


# Where the bar is a part of a feature


@pytest.fixture
def output(tmp_path, monkeypatch) -> Path:
    """A folder for patches, and a published transformer to make them of."""
    known = {**folder_paths.folder_names_and_paths, "dit4sr": ([str(tmp_path)], {".safetensors"})}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    save_file(published(), tmp_path / "whole.safetensors")
    return tmp_path / "output"


def test_extracting_shows_the_tensors_and_leaves_nothing_behind_an_interrupt(output, bar):
    bar.cancel_at = 5
    with pytest.raises(InterruptProcessingException):
        extract("whole.safetensors", target_of("mine"), "float16")
    assert bar.seen[-1][0] == 5
    assert not list(output.rglob("*.*"))
    bar.cancel_at = None
    comfy.model_management.interrupt_current_processing(False)
    extract("whole.safetensors", target_of("mine"), "float16")
    assert bar.seen[-1][0] == bar.seen[-1][1] > 5


def test_the_base_of_a_patch_is_compared_on_the_bar(output, bar):
    extract("whole.safetensors", target_of("mine"), "float16", base())
    assert bar.seen[:3] == [(1, 3), (2, 3), (3, 3)]  # blocks


def test_a_condition_is_encoded_block_by_block_and_after_an_interrupt_anew(tiny_flux, file, bar):
    blocks = tiny.DOUBLE + tiny.SINGLE
    whole = tiny.sample(tiny.controlled(tiny_flux, file=file), 2)
    assert [seen for seen in bar.seen if seen[1] == blocks][:blocks] == [(i + 1, blocks) for i in range(blocks)]
    bar.cancel_at = 2
    model = tiny.controlled(tiny_flux, file=file)
    with pytest.raises(InterruptProcessingException):
        tiny.sample(model, 2)
    bar.cancel_at = None
    comfy.model_management.interrupt_current_processing(False)
    assert torch.equal(tiny.sample(model, 2), whole)


def test_without_a_cache_conditions_leave_the_bar_to_the_sampler(tiny_flux, file, bar):
    tiny.sample(tiny.controlled(tiny_flux, file=file, cache="off"), 2)
    assert not [seen for seen in bar.seen if seen[1] == tiny.DOUBLE + tiny.SINGLE]


def conditioned(**values):
    prompts = {"positive": video.prompt(3), "negative": video.prompt(4)}
    given = {**prompts, "vae": video.VideoVae(), "reference": pictures(1)}
    return run_node(DynamiCtrlConditioning, **{**given, "width": 64, "height": 48, "length": 13, **values})


def test_what_dynamictrl_encodes_is_counted(bar):
    conditioned()
    assert bar.seen == [(1, 1)]
    bar.seen.clear()
    conditioned(pose=pictures(13), background_mask=torch.ones(1, 48, 64))
    assert bar.seen == [(1, 3), (2, 3), (3, 3)]


def test_autotune_stops_between_its_runs(tiny_flux, bar):
    bar.cancel_at = 2
    runs = []

    def sample(model):
        runs.append(model)
        return tiny.sample(model, 4)

    with pytest.raises(InterruptProcessingException):
        tune(tiny_flux, sample, 10.0, 3, tell=comfy.utils.ProgressBar(4).update_absolute)
    assert len(runs) == 3  # the third has asked the model, which stops there
    assert [value for value, total in bar.seen if total == 4] == [1, 2]
