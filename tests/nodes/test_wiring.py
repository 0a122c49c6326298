"""What a node is given reaches its result: each input by itself, changed to another value that is allowed, shows.

It shows in what hangs on the MODEL where the node gives one, and else in what the node gives. Words do not count: a
report that names a number does not prove that the number acts.

The tests walk over all nodes of the pack and over all their inputs, so a node that is added later is held to them too.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any
from uuid import UUID

import pytest
import safetensors.torch
import torch
from PIL import Image

pytestmark = pytest.mark.comfy

import comfy.sample  # noqa: E402
import folder_paths  # noqa: E402
from comfy.model_patcher import ModelPatcher  # noqa: E402
from comfy_api.latest import io  # noqa: E402

from dit_toolkit.host.accelerate.report import NodeReport  # noqa: E402
from dit_toolkit.host.accelerate.step_cache_report import StepCacheReport  # noqa: E402
from dit_toolkit.host.animate.dynamictrl_run import norms_of  # noqa: E402
from dit_toolkit.host.control import easycontrol_files  # noqa: E402
from dit_toolkit.host.run import attached  # noqa: E402
from dit_toolkit.models.control.panel_layout import panel_layout  # noqa: E402
from dit_toolkit.models.control.try_on_image import fitted_masks, plan  # noqa: E402
from dit_toolkit.nodes.accelerate import Autotune  # noqa: E402
from dit_toolkit.nodes.dit4sr import ApplyDiT4SR, DiT4SRPrompt, DiT4SRSampling, ExtractDiT4SR, LoadDiT4SR  # noqa: E402
from dit_toolkit.nodes.dynamictrl import (  # noqa: E402
    CogVideoXLora,
    CogVideoXSampling,
    DynamiCtrlConditioning,
    LoadDynamiCtrl,
)
from dit_toolkit.nodes.easycontrol import ApplyEasyControl, LoadEasyControl  # noqa: E402
from dit_toolkit.nodes.embedded import LoadEmbedded  # noqa: E402
from dit_toolkit.nodes.freecus import ApplyFreeCus, SubjectDescription  # noqa: E402
from dit_toolkit.nodes.image_difference import ImageDifference  # noqa: E402
from dit_toolkit.nodes.in_context_lora import PanelLatent, PanelLayout, PanelSets, SplitPanels  # noqa: E402
from dit_toolkit.nodes.pose_video import PoseKeyframes, PosePreview, PoseVideo  # noqa: E402
from dit_toolkit.nodes.sparse_attention import ApplyClear  # noqa: E402
from dit_toolkit.nodes.step_cache import TaylorSeer  # noqa: E402
from dit_toolkit.nodes.try_on import ApplyTryOn, TryOnComposite, TryOnPrepare  # noqa: E402
from dit_toolkit.tests.host import tiny  # noqa: E402
from dit_toolkit.tests.host.animate import tiny_dynamictrl  # noqa: E402
from dit_toolkit.tests.host.control.test_try_on import file_of  # noqa: E402
from dit_toolkit.tests.host.restore import tiny_dit4sr  # noqa: E402
from dit_toolkit.tests.models.accelerate.test_clear_keys import published  # noqa: E402
from dit_toolkit.tests.models.animate.people import crowded, dancing  # noqa: E402
from dit_toolkit.tests.nodes import test_inputs  # noqa: E402
from dit_toolkit.tests.nodes.calling import run_node  # noqa: E402
from dit_toolkit.tests.nodes.test_inputs import LATENT, MASK, NODES, PICTURE, Vae, every_node, good  # noqa: E402

stand_ins = test_inputs.stand_ins


class OtherVideoVae(tiny_dynamictrl.VideoVae):
    """The same for videos."""

    def encode(self, pixels):
        return super().encode(pixels**2 - pixels.mean())


class OtherVae(Vae):
    """Other numbers, and not by a factor alone; each depends on the whole picture."""

    def encode(self, pixels):
        return super().encode(pixels**2 - pixels.mean())

    def decode(self, latent):
        return super().decode(latent) ** 2


def easycontrol_file(name="mine.safetensors", slots=1):
    """Of a name that does not say its kind."""
    return lambda: easycontrol_files.from_state(tiny.lora_state(slots=slots), name)


CLEAR_FILE = "clear_local_2_down_4.safetensors"
SPOTS = PICTURE.clone()
SPOTS[:, 2:8, 2:8] += 0.2
SPOTS[:, 2:8, 13:16] += 0.2  # near the first
SPOTS[:, 24:30, 2:6] += 0.2  # small and alone
SPOTS[:, 24:30, 20:26] += 0.04  # faint
OBLONG = PICTURE[:, :20]

MANY = 8  # choices; of longer lists two are tried

# Where inputs are read only beside other values than the defaults: all of a node, then one by one. What is loaded for a
# test stands here as a function.
BESIDE: dict[tuple[type[io.ComfyNode], str | None], dict[str, Any]] = {
    (ApplyDiT4SR, None): {"upscale_by": 2.4, "tile": 16, "overlap": 8},  # a tenth more is one token more
    (ExtractDiT4SR, "file"): {"model": None},
    (DiT4SRPrompt, "filter"): {"caption": "A cat. The background is blurred."},
    (DynamiCtrlConditioning, None): {"reference": OBLONG},  # of another shape than the video
    (Autotune, None): {"steps": 5, "cfg": 2.0, "trials": 1},
    (ImageDifference, None): {"image": SPOTS},
    (PanelLatent, None): {"images": {"image_1": PICTURE}},
    (ApplyEasyControl, "latent"): {"image": None, "vae": None, "latent": LATENT},
    (ApplyEasyControl, "kind"): {"easycontrol": easycontrol_file(), "kind": "spatial"},
    (ApplyEasyControl, "slot"): {"easycontrol": easycontrol_file("canny.sft", slots=2)},
    (ApplyEasyControl, "pad_color"): {"easycontrol": easycontrol_file(), "kind": "subject", "image": OBLONG},
    (ApplyFreeCus, "noise_seed"): {"noise": "own seed"},
    (Autotune, "floor"): {"floor": 0.0},
    (PanelLatent, "fit"): {"images": {"image_1": OBLONG}},
    (PanelLatent, "encode"): {"vae": OtherVae()},
    (SplitPanels, "latent"): {"image": None, "latent": {"samples": torch.zeros(1, 16, 4, 4)}},
    (SplitPanels, "vae"): {"image": None, "latent": {"samples": torch.ones(1, 16, 4, 4) / 2}, "canvas": None},
    (PosePreview, None): {"frames": 5, "columns": 2, "tile": 32},
    (PoseKeyframes, "reach"): {"poses": dancing(13), "text": '[{"frame": 4, "joints": {"nose": [0.9, 0.1]}}]'},
    (PoseKeyframes, "text"): {"poses": None, "text": '[{"frame": 4, "joints": {"nose": [0.9, 0.1]}}]'},
    (PoseKeyframes, None): {"poses": None, "length": 9},
    (PoseKeyframes, "poses"): {"text": "", "poses": dancing(13)},
    (PoseVideo, None): {"length": 0, "width": 48, "height": 64, "reference": dancing(1, turn=0.2)},
    (PoseVideo, "person"): {"poses": crowded(5)},
    (PoseVideo, "crop"): {"reference": dancing(1, width=64, height=200)},
    (PoseVideo, "length"): {"length": 5},
    (SubjectDescription, "subject"): {"text": "a grey cat"},
    (TaylorSeer, "max_memory"): {"tap": "every module"},
    (TryOnComposite, None): {"result": PICTURE.flip(1)},
    (TryOnComposite, "feather"): {"crop": plan(fitted_masks(MASK, PICTURE, 4), 0.5, (32, 32), 4), "feather": 2},
    (TryOnPrepare, None): {"dilation": 1},
    (TryOnPrepare, "width"): {"size": "fixed"},
    (TryOnPrepare, "height"): {"size": "fixed"},
}

# Another value than the next one or the other choices, where that would be refused or be the same case.
ANOTHER: dict[tuple[type[io.ComfyNode], str], Any] = {
    (ApplyFreeCus, "layers"): "0-1",
    (LoadDynamiCtrl, "file"): tiny_dynamictrl.OTHER,
    (CogVideoXLora, "file"): tiny_dynamictrl.OTHER_LORA,
    (ExtractDiT4SR, "file"): "c_another_transformer.safetensors",
    (ExtractDiT4SR, "model"): None,
    (Autotune, "floor"): 100.0,
    (ImageDifference, "merge_gap"): 0,
    (ImageDifference, "min_pixels"): 30,
    (SplitPanels, "latent"): {"samples": torch.ones(1, 16, 4, 4)},
    (ImageDifference, "threshold"): 0.02,
    (ApplyEasyControl, "kind"): "subject",
    (TryOnPrepare, "margin"): 0.1,
    (LoadEasyControl, "file"): "tiny_pose.safetensors",
    (PanelLayout, "given"): "1",
    (PoseVideo, "length"): 13,
    (PoseVideo, "frame_rate"): 24.0,
    (PoseVideo, "smoothing"): 1.0,
    (PoseKeyframes, "text"): '[{"frame": 4, "joints": {"nose": [0.8, 0.1]}}]',
    (PoseKeyframes, "width"): 1024,
    (PoseKeyframes, "height"): 1024,
    (PanelSets, "folder"): "mine",
    (TaylorSeer, "schedule"): "0, 3",
}

# What makes no difference, and why.
SILENT: dict[tuple[type[io.ComfyNode], str, Any], str] = {
    (ApplyClear, "below_min_tokens", "dense"): "auto is dense without a file",
    (LoadDiT4SR, "variant", "v1"): "auto is v1 for a v1 file",
    (ImageDifference, "resize", "image to reference"): "read for pictures of two sizes, which 'off' refuses",
    (ApplyTryOn, "garment_position", "beside"): "auto is beside for a file that was trained so",
    (PanelLayout, "tags", "position"): "auto is position for two panels in a row",
}


def fingerprint(value: Any) -> Any:
    """All that a value says, as something that can be compared. Reports are left out: they are words and runs."""
    match value:
        case torch.Tensor():
            data = value.detach().cpu().contiguous()
            return tuple(data.shape), hashlib.sha256(data.float().numpy().tobytes()).hexdigest()
        case ModelPatcher():
            return (
                id(value.model) if hasattr(value.model, "diffusion_model") else fingerprint(value.model),
                fingerprint(attached(value)),
                fingerprint({repr(key): each for key, each in value.patches.items()}),
                [fingerprint(other.model) for models in value.additional_models.values() for other in models],
            )
        case torch.nn.Module():
            return fingerprint(value.state_dict())
        case NodeReport() | UUID():
            return type(value).__name__
        case dict():
            return [(repr(key), fingerprint(each)) for key, each in value.items()]
        case list() | tuple():
            return [fingerprint(each) for each in value]
        case frozenset() | set():
            return sorted(repr(each) for each in value)
        case FunctionType() | MethodType() | type():
            return value.__qualname__
    if is_dataclass(value):
        return type(value).__name__, [fingerprint(getattr(value, field.name)) for field in fields(value)]
    if hasattr(value, "__dict__"):
        return type(value).__name__, fingerprint(vars(value))
    return repr(value)


@pytest.fixture(scope="module")
def others(stand_ins) -> dict[str, Any]:
    """Something else to connect, by type."""
    return {
        "MODEL": tiny.load_flux(tiny.flux_state(5)),
        "MODEL of SD3": tiny_dit4sr.base(1),
        "MODEL of CogVideoX": tiny_dynamictrl.loaded(seed=1),
        "VAE": OtherVae(),
        "VAE of videos": OtherVideoVae(),
        "CONDITIONING": tiny.prompt(8),
        "IMAGE": PICTURE.flip(2),
        "MASK": MASK.roll(3, 2),
        "LATENT": {"samples": LATENT["samples"] + 1},
        "DIT_EASYCONTROL": easycontrol_files.from_state(tiny.lora_state(2), "canny.safetensors"),
        "DIT_TRY_ON": file_of(3, 4),
        "DIT_DIT4SR": tiny_dit4sr.file("v1", 1),
        "DIT_REPORT": StepCacheReport("Other", "other settings"),
        "DIT_PANELS": panel_layout("custom", 2, 1, 32, 16, "auto", "", "1"),
        "DIT_CROP": plan(fitted_masks(MASK, PICTURE), 0.1, (32, 32)),
        "POSE_KEYPOINT": dancing(13, turn=0.4),
        "*": 5,
    }


def beside(node: type[io.ComfyNode], name: str | None) -> dict[str, Any]:
    special = BESIDE.get((node, name), {})
    return {name: value() if isinstance(value, FunctionType) else value for name, value in special.items()}


def others_of(node: type[io.ComfyNode], entry: Any, now: Any, others: dict[str, Any]) -> list[Any]:
    """Other values that the schema allows: every other choice, the next number, another text or connection."""
    if (node, entry.id) in ANOTHER:
        return [ANOTHER[node, entry.id]]
    match entry:
        case io.Combo.Input():
            options = [each for each in entry.options if each not in (tiny_dynamictrl.LORA, tiny_dynamictrl.OTHER_LORA)]
            options = options if len(options) <= MANY else options[:3]
            return [option for option in options if option != now]
        case io.Int.Input() | io.Float.Input():
            step = entry.step or 1
            return [now + step if now + step <= entry.max else now - step]
        case io.Boolean.Input():
            return [not now]
        case io.String.Input():
            return [f"{now} teapot"]
        case io.Autogrow.Input():
            return [{name: others["IMAGE"] for name in now}]
    return [others[test_inputs.kind_for(node, entry)]]


@pytest.fixture
def clear_file(tmp_path, monkeypatch):
    """A file of CLEAR's beside the choice to have none."""
    state = published(tiny.DOUBLE, tiny.SINGLE, factor=4, dim=tiny.HIDDEN)
    (tmp_path / "clear").mkdir()
    safetensors.torch.save_file(state, tmp_path / "clear" / CLEAR_FILE)
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "clear", ([], set()))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})


@pytest.fixture
def own_sets(tmp_path, monkeypatch):
    """An input folder that holds one folder of sets, whatever other tests have left in the usual one."""
    one = tmp_path / "input" / "mine" / "1"
    one.mkdir(parents=True)
    for name, colour in (("1", "red"), ("2", "blue")):
        Image.new("RGB", (32, 16), colour).save(one / f"{name}.png")
        (one / f"{name}.txt").write_text(colour, encoding="utf-8")
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))


@pytest.fixture
def sampled(monkeypatch) -> list:
    """What core's sampling was asked for, call by call."""
    calls, sample = [], comfy.sample.sample

    def watched(*args, **kwargs):
        calls.append(fingerprint((args, kwargs)))
        return sample(*args, **kwargs)

    monkeypatch.setattr(comfy.sample, "sample", watched)
    return calls


def shown(node: type[io.ComfyNode], values: dict[str, Any], sampled: list) -> Any:
    """What a node makes of its inputs. Beside a MODEL, other outputs say in words what hangs on it."""
    sampled.clear()
    shutil.rmtree(Path(folder_paths.get_output_directory(), "dit4sr"), ignore_errors=True)  # names are counted through
    with torch.inference_mode():
        found = run_node(node, **values)
    if node is LoadEmbedded:  # new objects each time
        model, clip, vae = found
        modules = model.model, clip.cond_stage_model, vae.first_stage_model
        return fingerprint([module.state_dict() for module in modules])
    if node is LoadDynamiCtrl:  # so here
        return fingerprint([found[0].model.state_dict(), norms_of(found[0])])
    if node is DynamiCtrlConditioning:
        return fingerprint(found[:3])
    if not isinstance(found[0], ModelPatcher) or node in (DiT4SRSampling, CogVideoXSampling):
        return fingerprint(found)
    if node is Autotune:
        picked = re.sub(r", [\d.]+ x faster", "", found[2])  # by the clock
        return fingerprint((found[0], picked, found[3])), list(sampled)
    return fingerprint(found[0])


@every_node
def test_each_input_shows_in_what_the_node_gives(node, stand_ins, others, clear_file, own_sets, sampled):
    if not node.define_schema().inputs:
        return
    plain = {**good(node, stand_ins), **beside(node, None)}
    usual = shown(node, plain, sampled)
    assert shown(node, plain, sampled) == usual  # nothing but an input makes a difference
    for entry in node.define_schema().inputs:
        special = beside(node, entry.id)
        values = {**plain, **special}
        before = shown(node, values, sampled) if special else usual
        for other in others_of(node, entry, values[entry.id], others):
            after = shown(node, {**values, entry.id: other}, sampled)
            silent = isinstance(other, str) and (node, entry.id, other) in SILENT
            assert (after == before) == silent, (entry.id, values[entry.id], other)


def test_the_tables_name_inputs_that_there_are():
    known = {(node, entry.id) for node in NODES for entry in node.define_schema().inputs}
    named = {*BESIDE, *ANOTHER, *((node, name) for node, name, _ in SILENT)}
    assert {(node, name) for node, name in named if name is not None} <= known


@every_node
def test_a_node_that_knows_its_id_is_run_for_each_of_two_equal_ones(node):
    """ComfyUI leaves the id out of its cache: two equal nodes would share one report."""
    schema = node.define_schema()
    gives_report = any(output.io_type == "DIT_REPORT" for output in schema.outputs)
    if io.Hidden.unique_id in (schema.hidden or ()) and (gives_report or schema.is_output_node):
        assert schema.not_idempotent


def test_prompts_of_panels_take_choices_in_braces():
    """As the text of core's own prompt node does."""
    taking = {entry.id for entry in PanelLayout.define_schema().inputs if getattr(entry, "dynamic_prompts", False)}
    assert taking == {"summary", "panel_prompts"}
