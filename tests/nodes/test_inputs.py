"""What comes into nodes: every node holds what it is given to its own schema, whoever wrote it and whenever.

The tests walk over all nodes of the pack and over all their inputs, so a node that is added later is held to them too.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.comfy

from comfy_api.latest import io  # noqa: E402

from dit_toolkit.host.accelerate.step_cache_report import StepCacheReport  # noqa: E402
from dit_toolkit.host.control import easycontrol_files  # noqa: E402
from dit_toolkit.models.control.panel_layout import panel_layout  # noqa: E402
from dit_toolkit.models.control.try_on_image import fitted_masks, plan  # noqa: E402
from dit_toolkit.nodes import DiTToolkit  # noqa: E402
from dit_toolkit.nodes.accelerate import AccelerateDiT, Autotune  # noqa: E402
from dit_toolkit.nodes.dit4sr import ApplyDiT4SR, DiT4SRSampling, ExtractDiT4SR  # noqa: E402
from dit_toolkit.nodes.dynamictrl import (  # noqa: E402
    CogVideoXLora,
    CogVideoXSampling,
    DynamiCtrlConditioning,
    LoadDynamiCtrl,
)
from dit_toolkit.nodes.easycontrol import ApplyEasyControl  # noqa: E402
from dit_toolkit.nodes.embedded import LoadEmbedded  # noqa: E402
from dit_toolkit.nodes.freecus import ApplyFreeCus  # noqa: E402
from dit_toolkit.nodes.image_difference import ImageDifference  # noqa: E402
from dit_toolkit.nodes.in_context_lora import PanelLayout, PanelSets, SplitPanels  # noqa: E402
from dit_toolkit.nodes.inputs import GIVERS, shown  # noqa: E402
from dit_toolkit.nodes.step_cache import AccelerationReport, ConfidenceGatedTaylor, TaylorSeer  # noqa: E402
from dit_toolkit.tests.host import tiny  # noqa: E402
from dit_toolkit.tests.host.animate import tiny_dynamictrl  # noqa: E402
from dit_toolkit.tests.host.control.test_try_on import file_of  # noqa: E402
from dit_toolkit.tests.host.restore import tiny_dit4sr  # noqa: E402
from dit_toolkit.tests.models.animate.people import dancing  # noqa: E402
from dit_toolkit.tests.nodes.calling import run_node  # noqa: E402

NODES = asyncio.run(DiTToolkit().get_node_list())
every_node = pytest.mark.parametrize("node", NODES, ids=lambda node: node.__name__)

NAN, INF = math.nan, math.inf
PICTURE = torch.linspace(0, 1, 3 * 32 * 32).view(1, 32, 32, 3)
MASK = torch.zeros(1, 32, 32)
MASK[:, 8:20, 8:20] = 1
LATENT = {"samples": torch.zeros(1, 16, 8, 8)}


POSES = dancing(13)

OF_SD3 = {ApplyDiT4SR, DiT4SRSampling, ExtractDiT4SR}  # all others take FLUX.1, or any model
OF_COGVIDEOX = {CogVideoXSampling, CogVideoXLora}
OF_VIDEOS = {DynamiCtrlConditioning}  # whose VAE is one of videos
NOT_BOTH = {(ApplyEasyControl, "latent"), (SplitPanels, "latent")}  # where an image is given
FILES = {CogVideoXLora: tiny_dynamictrl.LORA}  # where the first of the list is another kind of file
CAPS = {  # so that no call takes long
    "width": 64, "height": 64, "megapixels": 0.01, "condition_size": 64, "person_size": 64, "garment_size": 64,
    "panel_width": 64, "panel_height": 64, "batch_size": 2, "trials": 1, "steps": 2, "min_side": 64, "upscale_by": 2.0,
    "tile": 64, "frames": 4,
    "length": 13,
}  # fmt: skip


class Vae:
    """8 pixels to one latent pixel, 16 channels."""

    latent_channels = 16

    def spacial_compression_encode(self):
        return 8

    def encode(self, pixels):
        return torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8).repeat(1, 6, 1, 1)[:, :16]

    def decode(self, latent):
        return latent[:, :3].movedim(1, -1).repeat_interleave(8, 1).repeat_interleave(8, 2)


@pytest.fixture(scope="module")
def stand_ins(tiny_flux) -> dict[str, Any]:
    """What there is to connect, by type: small and good. Files of DiT4SR are beside what ships."""
    tiny_dit4sr.write_files()
    tiny_dynamictrl.write_files()
    return {
        "MODEL": tiny_flux,
        "MODEL of SD3": tiny_dit4sr.base(),
        "MODEL of CogVideoX": tiny_dynamictrl.loaded(),
        "VAE": Vae(),
        "VAE of videos": tiny_dynamictrl.VideoVae(),
        "CONDITIONING": tiny.prompt(),
        "IMAGE": PICTURE,
        "MASK": MASK,
        "LATENT": LATENT,
        "DIT_EASYCONTROL": easycontrol_files.from_state(tiny.lora_state(), "canny.safetensors"),
        "DIT_TRY_ON": file_of(),
        "DIT_DIT4SR": tiny_dit4sr.file(),
        "DIT_REPORT": StepCacheReport("Test"),
        "DIT_PANELS": panel_layout("custom", 1, 2, 16, 32, "auto", "", "1"),
        "DIT_CROP": plan(fitted_masks(MASK, PICTURE), 0.5, (32, 32)),
        "POSE_KEYPOINT": POSES,
        "*": None,
    }


def kind_for(node: type[io.ComfyNode], entry: io.Input) -> str:
    """What is connected to an input: its type, and of which model where that matters."""
    kind = entry.get_io_type()
    if kind == "MODEL":
        return "MODEL of SD3" if node in OF_SD3 else "MODEL of CogVideoX" if node in OF_COGVIDEOX else kind
    return "VAE of videos" if kind == "VAE" and node in OF_VIDEOS else kind


def good(node: type[io.ComfyNode], stand_ins: dict[str, Any]) -> dict[str, Any]:
    """A value for every input: its default, its first choice, or what there is to connect."""
    values: dict[str, Any] = {}
    for entry in node.define_schema().inputs:
        if isinstance(entry, io.Autogrow.Input):
            values[entry.id] = {}
        elif isinstance(entry, io.Combo.Input):
            values[entry.id] = (
                FILES.get(node) if entry.id == "file" and node in FILES else entry.default or entry.options[0]
            )
        else:
            kind = kind_for(node, entry)
            values[entry.id] = stand_ins.get(kind, getattr(entry, "default", None))
        if (node, entry.id) in NOT_BOTH:
            values[entry.id] = None
        if entry.id in CAPS:
            values[entry.id] = min(values[entry.id], CAPS[entry.id])
    return values


# What a schema does not allow


NO_PICTURES = [
    7, None, "picture", [PICTURE], PICTURE[0], PICTURE[None], PICTURE[..., :2], PICTURE.repeat(1, 1, 1, 2),
    PICTURE[:0], PICTURE[:, :0], PICTURE[:, :, :0], PICTURE[..., :0], (PICTURE * 255).byte(),
    PICTURE.clone().index_fill_(2, torch.tensor(3), NAN), PICTURE.clone().index_fill_(1, torch.tensor(0), -INF),
]  # fmt: skip
NO_MASKS = [
    7, None, "mask", MASK[None], MASK[0, 0], MASK[:0], MASK[:, :0], MASK[:, :, :0],
    MASK.clone().index_fill_(2, torch.tensor(3), NAN), MASK.clone().index_fill_(1, torch.tensor(0), INF),
]  # fmt: skip
NO_LATENTS = [
    7, None, LATENT["samples"], {}, {"samples": None}, {"samples": LATENT["samples"][:0]},
    {"samples": LATENT["samples"][..., :0]}, {"samples": LATENT["samples"] + NAN}, {"samples": LATENT["samples"] + INF},
]  # fmt: skip


def wrong(entry: Any) -> list[Any]:
    """Values that come over links and that this input does not take."""
    match entry:
        case io.Int.Input():
            return [entry.min - 1, entry.max + 1, -1 if entry.min > -1 else entry.min - 2, -(2**63), 2**64, 10**5000,
                    0.5, NAN, INF, 1e308, "1", "", None, True, [1], np.float32(0.5)]  # fmt: skip
        case io.Float.Input():
            return [entry.min - 0.001, entry.max + 0.001, -1.0 if entry.min > -1 else -1e9, NAN, INF, -INF, 1e308,
                    2**63, 10**5000, "0.5", "", None, True, [0.5], 0.5j, np.float32("nan")]  # fmt: skip
        case io.Boolean.Input():
            return ["", "false", 2, NAN, None, [True]]
        case io.String.Input():
            return [None, 1, 0.5, b"text", ["text"], True]
        case io.Combo.Input():
            return ["unknown", "", " ", "\0", None, 0, True, NAN, ["auto"], entry.options[0].upper() + "!",
                    np.array(entry.options), PICTURE]  # fmt: skip
        case io.Image.Input():
            return NO_PICTURES
        case io.Mask.Input():
            return NO_MASKS
        case io.Latent.Input():
            return NO_LATENTS
    return []


def checked_inputs(node: type[io.ComfyNode]) -> list[tuple[Any, str, str]]:
    """The inputs that have something to be checked: each, its id, and its name where it is called."""
    found = []
    for entry in node.define_schema().inputs:
        if isinstance(entry, io.Autogrow.Input):
            found.append((entry.template.input, entry.id, entry.template.names[0]))
        elif wrong(entry):
            found.append((entry, entry.id, entry.id))
    return found


@every_node
def test_what_the_schema_does_not_allow_is_refused_by_name(node, stand_ins):
    title = node.define_schema().display_name
    for entry, id, name in checked_inputs(node):
        for value in wrong(entry):
            if value is None and entry.optional:
                continue
            bad = value if id == name else {name: value}
            with pytest.raises((ValueError, FileNotFoundError)) as refused:
                run_node(node, **{**good(node, stand_ins), id: bad})
            said = str(refused.value)
            if refused.type is FileNotFoundError:  # a file that the list does not know may be there: who opens it says
                assert isinstance(entry, io.Combo.Input), name
                assert str(value) in said, (name, shown(value))
            else:
                assert refused.type is ValueError, (name, refused.type)
                assert said.startswith(f"{title}: '{name}' "), (name, shown(value), said)
                assert said.endswith("."), said
                assert len(said) < 300, said


# What it allows


LEFT_TO_CORE = {(Autotune, "latent")}  # sampled as it is, with whatever core says of a latent of another model
TEXTS = [
    "", " ", "\0", "\n", "0", "1", "1, 2", "0-1", "0, 3", "-1", "1-0", "110", "0-999999999999", "1" * 5000,
    "0-" + "9" * 5000,
    "\u0661", "\u00b2", "\u2028", "all", "published", "[LEFT]", "x" * 10_000, "(" * 500, "{a|b}", "\ud800",
]  # fmt: skip


def allowed(entry: Any, dice: random.Random) -> Any:
    """A value that the schema allows: often at its edge, sometimes as another pack's arithmetic would hand it over."""
    match entry:
        case io.Int.Input():
            most = min(entry.max, CAPS.get(entry.id, entry.max))
            return dice.choice(
                [entry.min, most, entry.default, dice.randint(entry.min, most), np.int64(min(most, 2**40))]
            )
        case io.Float.Input():
            most = min(entry.max, CAPS.get(entry.id, entry.max))
            among = dice.uniform(entry.min, most)
            return dice.choice([entry.min, most, entry.default, among, np.float32(most), int(most)])
        case io.Boolean.Input():
            return dice.choice([True, False, np.bool_(True)])
        case io.String.Input():
            return dice.choice(TEXTS)
        case io.Combo.Input():
            return dice.choice(entry.options[:60])
        case io.Image.Input():
            channels, batch = dice.choice([1, 3, 4]), dice.choice([1, 1, 2])
            sides = dice.choice([(1, 1), (32, 32), (5, 33)])
            return torch.full((batch, *sides, channels), dice.choice([0.0, 0.5, 1.0, -3.0, 1e6]))
        case io.Mask.Input():
            one = torch.ones(1, 1, 1)
            return dice.choice([MASK, 1 - MASK, MASK[0], MASK > 0, MASK * 0, MASK + 1, one, MASK * 1e30])
        case io.Latent.Input():
            size = dice.choice([(1, 16, 8, 8), (2, 16, 8, 8), (1, 4, 8, 8), (1, 16, 2, 8, 8), (1, 16, 1, 1), (16, 8)])
            return {"samples": torch.full(size, dice.choice([0.0, 1.0, 1e30, -1e5]))}
    return None


def drawn(node: type[io.ComfyNode], stand_ins: dict[str, Any], dice: random.Random) -> dict[str, Any]:
    """Good values, and here and there another one that is allowed."""
    values = good(node, stand_ins)
    for entry in node.define_schema().inputs:
        if (node, entry.id) in LEFT_TO_CORE:
            continue
        if isinstance(entry, io.Autogrow.Input):
            chosen = dice.sample(entry.template.names[:4], dice.choice([0, 1, 1, 2]))
            values[entry.id] = {name: allowed(entry.template.input, dice) for name in chosen}
        elif entry.optional and dice.random() < 0.3:
            values[entry.id] = good(node, stand_ins)[entry.id] if values[entry.id] is None else None
        elif dice.random() < 0.25 and (value := allowed(entry, dice)) is not None:
            values[entry.id] = value
    return values


def sampled(node: type[io.ComfyNode], model: Any, others: list[Any]) -> torch.Tensor:
    """What a sampler makes of a node's MODEL."""
    if node is LoadEmbedded:
        words = others[0].encode_from_tokens_scheduled(others[0].tokenize("a red ball"))
        video = hasattr(model.model.diffusion_model, "patch_size_t")
        noise = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(7)) if video else None
        return tiny.sample(model, 1, positive=words, negative=words, noise=noise)
    if node in OF_COGVIDEOX or node is LoadDynamiCtrl:
        return tiny_dynamictrl.sample(model, 1)
    if node not in OF_SD3:
        return tiny.sample(model, 2)
    latent = next((each["samples"] for each in others if isinstance(each, dict)), LATENT["samples"])
    return tiny_dit4sr.sample(model, 1, size=latent.shape[-2:], batch=latent.shape[0])


def outcome(node: type[io.ComfyNode], values: dict[str, Any], plain: Any) -> Exception | None:
    """What the node says to these values; None where it takes them, and what it gives can be sampled and read."""
    try:
        with torch.inference_mode():
            first, *others = run_node(node, **values)
            if isinstance(first, type(plain)) and first not in (plain, values.get("model")):
                assert sampled(node, first, others).isfinite().all()
        for report in (other for other in others if hasattr(other, "json")):
            report.text()
            report.json()
    except Exception as error:
        return error
    return None


@every_node
def test_what_it_allows_works_or_is_answered_with_a_sentence(node, stand_ins):
    """Values that are right one by one need not go together."""
    if not checked_inputs(node):
        return
    dice, accepted = random.Random(f"{node.__name__} 8"), 0
    for _ in range(20):
        values = drawn(node, stand_ins, dice)
        error = outcome(node, values, stand_ins["MODEL"])
        accepted += error is None
        if error is not None:
            where = {name: shown(value) for name, value in values.items()}, repr(error)[:500]
            assert type(error) in (ValueError, FileNotFoundError), where
            assert str(error).endswith("."), where  # a sentence of ours, not the words of Python or of torch
            assert len(str(error)) < 500, where
    assert accepted


# Values that found their way in, or were refused with the wrong words


def test_a_number_of_thousands_of_digits_can_be_spoken_of():
    assert shown(10**5000) == "a value of type int that is too long to show"
    assert shown("x" * 1000) == "'" + "x" * 59 + "..."


def test_a_choice_of_few_is_named_and_one_of_many_is_not(stand_ins):
    with pytest.raises(
        ValueError, match=r"'quality' must be one of 'off', 'quality', 'balanced', 'fast'; got 'best'\."
    ):
        run_node(AccelerateDiT, model=None, quality="best")
    with pytest.raises(ValueError, match=r"'preset' must be one of the choices in its list; got 'unknown'\."):
        run_node(PanelLayout, **{**good(PanelLayout, stand_ins), "preset": "unknown"})


def test_numbers_of_another_kind_are_taken_as_numbers(stand_ins):
    """As nodes that calculate with numpy give them, and whole numbers where a fraction may be."""
    for value in (np.int64(5), np.uint8(5)):
        assert run_node(TaylorSeer, **{**good(TaylorSeer, stand_ins), "interval": value})
    for value in (1, np.float32(0.5), np.float64(0.5), np.int64(1)):
        assert run_node(ConfidenceGatedTaylor, **{**good(ConfidenceGatedTaylor, stand_ins), "threshold": value})


@pytest.mark.parametrize(
    "latent",
    [torch.full((1, 16, 8, 8), 1e30), torch.full((1, 16, 8, 8), -1e5), torch.ones(16, 8, 8), torch.ones(1, 4, 8, 8)],
)
def test_a_condition_that_no_vae_gives_is_refused(stand_ins, latent):
    values = {**good(ApplyEasyControl, stand_ins), "image": None, "vae": None}
    with pytest.raises(ValueError, match=r"far larger ones than any VAE gives|must be \[N, 16, h, w\]"):
        run_node(ApplyEasyControl, **{**values, "latent": {"samples": latent}})


def test_a_reference_that_the_vae_breaks_is_refused(stand_ins):
    class Broken(Vae):
        def encode(self, pixels):
            return super().encode(pixels) * NAN

    (model,) = run_node(ApplyFreeCus, **{**good(ApplyFreeCus, stand_ins), "vae": Broken()})
    with pytest.raises(ValueError, match="Apply FreeCus: the reference holds NaN or infinite values"):
        tiny.sample(model, 1)


@pytest.mark.parametrize("folder", [".", "..", "./", "unheard of", "../../etc"])
def test_a_folder_of_sets_lies_inside_the_input_folder(stand_ins, folder):
    with pytest.raises((ValueError, FileNotFoundError), match=r"input folder\. (Choose one that is|Refresh the page)"):
        run_node(PanelSets, folder=folder, panels=stand_ins["DIT_PANELS"], fit="crop")


def test_grey_pictures_are_stretched_too():
    grey, large = torch.rand(2, 8, 8, 1), torch.rand(1, 20, 12, 1)
    values = good(ImageDifference, {"IMAGE": grey})
    marked = run_node(ImageDifference, **{**values, "image": large, "resize": "image to reference"})[1]
    assert marked.shape == (2, 8, 8, 3)


# Nodes that are bypassed or muted: what they gave is missing then


def own_types() -> list[tuple[type[io.ComfyNode], io.Input]]:
    return [(n, entry) for n in NODES for entry in n.define_schema().inputs if entry.get_io_type().startswith("DIT_")]


@pytest.mark.parametrize(("node", "entry"), own_types(), ids=lambda each: getattr(each, "id", None) or each.__name__)
def test_without_what_a_bypassed_node_gives_it_runs_or_says_whom_to_connect(node, entry, stand_ins):
    """ComfyUI leaves the input out of the call, and of a required one it only says that it is missing."""
    assert entry.optional
    values = good(node, stand_ins)
    del values[entry.id]
    giver = GIVERS.get(entry.get_io_type())
    if giver is None:
        assert run_node(node, **values)
        return
    assert giver in {other.define_schema().display_name for other in NODES}
    with pytest.raises(
        ValueError, match=f"'{entry.id}' is missing. Connect {giver}, or bypass this node, too, if that"
    ):
        run_node(node, **values)


def test_a_report_without_a_node_that_accelerates_says_so():
    text, values, after = run_node(AccelerationReport, after=5)
    assert text == "There is no report: the node that accelerates the model is bypassed, muted or not connected."
    assert json.loads(values)["evaluations"] == []
    assert after == 5


# Masks of a cut-out


@pytest.mark.parametrize("background", [True, False])
def test_a_mask_of_the_background_is_noticed_by_freecus_too(caplog, stand_ins, background):
    """As Load Image gives it of a cut-out: 1 where the picture is transparent."""
    mask = 1 - MASK if background else MASK
    for shape in (mask, mask[0]):
        run_node(ApplyFreeCus, **{**good(ApplyFreeCus, stand_ins), "subject": shape})
    run_node(ApplyFreeCus, **{**good(ApplyFreeCus, stand_ins), "subject": torch.ones(1, 32, 32)})
    said = [record.getMessage() for record in caplog.records if "put Invert Mask between" in record.getMessage()]
    assert len(said) == 2 * background
    assert all(text.startswith("Apply FreeCus: 'subject' covers all corners of its picture") for text in said)
