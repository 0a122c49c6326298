"""The features of the pack. `test_promises.py` holds each of them to the promises that all of them keep.

A new feature is one entry in `FEATURES`: its node, what it is given, the families it runs on, its neutral values. Its
own test file says what no other feature says: its method, its memory, its messages.

    promise        what is tried
    ---------------------------------------------------------------------------------------------------------
    neutral        a neutral value gives the MODEL back; hooks that are there and idle change no bit
    acts           the picture is another one, and with each other value of an input another one again
    untouched      the MODEL that comes in keeps its weights, options, patches and hooks
    interrupt      a run that broke off leaves nothing: the next equals a fresh one
    second run     of another size, batch or prompt on the same MODEL: as fresh
    batch          pictures of a batch are those drawn alone
    samplers       of every kind: one evaluation a step and more, with noise added and without, with a memory
    part           start_percent and end_percent mean the steps that ComfyUI would choose; outside it costs nothing
    stacked        on any other feature: both act, in either order of the nodes; an idle one leaves the other alone
    refused        what cannot go together says so, in either order of the nodes
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from safetensors.torch import save_file

from dit_toolkit.host import adapters, embedded
from dit_toolkit.host.accelerate import re_ttention
from dit_toolkit.host.accelerate.step_cache_taps import SpanTap, block_hooks
from dit_toolkit.host.animate import dynamictrl
from dit_toolkit.host.families.family import Sizes
from dit_toolkit.host.restore import dit4sr_files
from dit_toolkit.host.run import attached
from dit_toolkit.host.transformer import transformer_of
from dit_toolkit.models.accelerate.cg_taylor import FirstBlockGate
from dit_toolkit.models.accelerate.delta_dit import Stages
from dit_toolkit.models.accelerate.input_change import InputChange
from dit_toolkit.models.accelerate.policies import Interval
from dit_toolkit.models.accelerate.re_ttention import Schedule
from dit_toolkit.models.animate.dynamictrl import PoseNorms
from dit_toolkit.nodes.dit4sr import ApplyDiT4SR, DiT4SRSampling
from dit_toolkit.nodes.dynamictrl import CogVideoXLora, CogVideoXSampling, DynamiCtrlConditioning
from dit_toolkit.nodes.easycontrol import ApplyEasyControl
from dit_toolkit.nodes.freecus import ApplyFreeCus
from dit_toolkit.nodes.re_ttention import ApplyReTtention
from dit_toolkit.nodes.sparse_attention import ApplyClear
from dit_toolkit.nodes.step_cache import ConfidenceGatedTaylor, DeltaDiT, TaylorSeer
from dit_toolkit.nodes.try_on import ApplyTryOn
from dit_toolkit.tests.host import tiny
from dit_toolkit.tests.host.accelerate.caching import cached, last_run, strip
from dit_toolkit.tests.host.animate.tiny_dynamictrl import VideoVae
from dit_toolkit.tests.host.control.test_try_on import file_of
from dit_toolkit.tests.host.families import ALL, POOLED, TEXT, weight
from dit_toolkit.tests.models.restore import dit4sr_reference
from dit_toolkit.tests.nodes.calling import run_node

Values = Mapping[str, Any]
Put = Callable[[ModelPatcher], ModelPatcher]

STEPS = 4  # of a run, unless a test says otherwise: enough for a forecast, and for an evaluation after it
FLUX1 = tuple(name for name, family in ALL.items() if family.of == "FLUX.1")
WITH_BLOCKS = tuple(name for name, family in ALL.items() if family.answers.kinds)
WITH_GRID = tuple(name for name, family in ALL.items() if family.grid is not None)
RIVALS = {  # features of one kind on one MODEL, and what the second one says
    "step cache": "cannot work on a model that .* already caches",
    "sparse attention": "the model's attention is sparse already. Remove one of the two nodes",
}


@dataclass(frozen=True)
class Idle:
    """Hooks that hang on a MODEL and are to change nothing.

    put: the nodes themselves leave such a feature out, so it is attached here.
    there: whether the hooks of the last run on this MODEL did run: "changes nothing" alone proves little.
    """

    put: Put
    there: Callable[[ModelPatcher], bool]


@dataclass(frozen=True, eq=False)
class Feature:
    """A feature, in a setting that acts in a run of `STEPS` steps.

    name: in the names of the tests.
    node: that hangs it on a MODEL; None where core's does.
    given: the inputs of the node beside the MODEL, where they are not its defaults.
    families: of `families.ALL`. It is idle and it acts on all of them; the other promises are tried on the first.
    off: neutral values, at which the node gives its MODEL back.
    others: values each of which makes another picture than `given` does.
    often: values for runs in which a step more or less of its part is seen.
    worked: whether the last run on this MODEL did what the feature is for, beyond another picture.
    rival: of `RIVALS`: features of one kind refuse each other on one MODEL.
    refuses: other features, or kinds of them, by what the sampler says when they meet.
    other_size: what the sampler says of a picture of another size, where a feature is made for one.
    adds_keys: to attention, in the order of the nodes. Two such features sum up in that order, too.
    beneath: another feature that it is put upon, to make two of a kind.
    """

    name: str
    node: type[io.ComfyNode] | None
    given: Callable[[], Values]
    families: tuple[str, ...] = FLUX1
    off: tuple[Values, ...] = ()
    idle: Mapping[str, Idle] = field(default_factory=dict)
    others: Callable[[], tuple[Values, ...]] = tuple
    often: Values = field(default_factory=dict)
    worked: Callable[[ModelPatcher], bool] = lambda model: True
    rival: str = ""
    refuses: Mapping[str, str] = field(default_factory=dict)
    other_size: str = ""
    adds_keys: bool = False
    beneath: Feature | None = None

    def __str__(self) -> str:
        return self.name

    def put(self, model: ModelPatcher, **values: Any) -> ModelPatcher:
        """`model` behind the node."""
        model = model if self.beneath is None else self.beneath.put(model)
        assert self.node is not None
        return run_node(self.node, model=model, **{**self.given(), **values})[0]

    @property
    def has_part(self) -> bool:
        inputs = self.node.GET_SCHEMA().inputs if self.node and self.beneath is None else []
        return "start_percent" in {entry.id for entry in inputs}


class Lora(Feature):
    """A LoRA on the MODEL, which core loads: what an In-Context LoRA is beside its panels."""

    def put(self, model: ModelPatcher, **values: Any) -> ModelPatcher:
        strength = {**self.given(), **values}["strength"]
        return comfy.sd.load_lora_for_models(model, None, lora_of_every_block(model), strength, 0.0)[0]


class Animated(Feature):
    """DynamiCtrl: the pose norms hang on the MODEL, and the poses on the prompts that its node gives."""

    def put(self, model: ModelPatcher, **values: Any) -> ModelPatcher:
        given = {**self.given(), **values}
        norms, made_for = given.pop("norms")
        patched = dynamictrl.attach(model, norms, made_for, "random.safetensors")

        def posed(positive: list, negative: list) -> tuple[list, list]:
            assert self.node is not None
            found = run_node(self.node, positive=positive, negative=negative, **given)
            return found[0], found[1]

        patched.set_attachments(PROMPTS, posed)
        return patched


PROMPTS = "dit_toolkit.tests.prompts"  # on a MODEL: (positive, negative) to those that its feature wants


def prompts_of(model: ModelPatcher, positive: list, negative: list) -> tuple[list, list]:
    """The prompts for a run of this MODEL: some features hang on them, too."""
    change = model.get_attachment(PROMPTS)
    return (positive, negative) if change is None else change(positive, negative)


class CogVideoXLoraOfFile(Feature):
    """A LoRA in a file for CogVideoX, in the names of diffusers."""

    def put(self, model: ModelPatcher, **values: Any) -> ModelPatcher:
        with cogvideox_lora_in_a_file(model):
            return super().put(model, **values)


COGVIDEOX_LORA = "cogvideox_of_the_promises.safetensors"


@contextmanager
def cogvideox_lora_in_a_file(model: ModelPatcher) -> Iterator[None]:
    """In the list of LoRAs for as long as the node reads it: it would be the first that other loaders find there."""
    generator, state = torch.Generator().manual_seed(5), {}
    for i, block in enumerate(transformer_of(model).blocks):
        for part in ("q", "k", "v"):
            rows, columns = getattr(block, part).weight.shape
            for leaf, size in (("lora_A", (4, columns)), ("lora_B", (rows, 4))):
                name = f"transformer.transformer_blocks.{i}.attn1.to_{part}.{leaf}.weight"
                state[name] = torch.randn(size, generator=generator) * 0.2
    path = Path(folder_paths.get_folder_paths("loras")[0]) / COGVIDEOX_LORA
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)
    folder_paths.filename_list_cache.pop("loras", None)
    try:
        yield
    finally:
        path.unlink()
        folder_paths.filename_list_cache.pop("loras", None)


def lora_of_every_block(model: ModelPatcher) -> dict[str, torch.Tensor]:
    """For the layers that make the picture's queries, keys and values."""
    generator, state = torch.Generator().manual_seed(5), {}
    for name, layer in transformer_of(model).named_modules():
        if name.endswith(("img_attn.qkv", "linear1", "x_block.attn.qkv")):
            rows, columns = layer.weight.shape
            for part, size in (("down", (4, columns)), ("up", (rows, 4))):
                weight = torch.randn(size, generator=generator) * 0.07
                state[f"diffusion_model.{name}.lora_{part}.weight"] = weight
    return state


# What features are given


@cache
def vae():
    return embedded.load_vae()


@cache
def picture(seed: int) -> torch.Tensor:
    return torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(seed))


@cache
def middle() -> torch.Tensor:
    """A mask: four of the sixteen tokens of a picture of 64 x 64."""
    mask = torch.zeros(1, 64, 64)
    mask[:, 16:48, 16:48] = 1
    return mask


easycontrol_file = cache(tiny.lora_file)
try_on_file = cache(file_of)


def condition(seed: int) -> Values:
    return {"samples": tiny.latent(seed)}


def an_easycontrol() -> Values:
    return {"easycontrol": easycontrol_file(1), "latent": condition(11), "kind": "spatial"}


def a_second_easycontrol() -> Values:
    return {"easycontrol": easycontrol_file(2), "latent": condition(12), "kind": "subject"}


def other_easycontrols() -> tuple[Values, ...]:
    given = {"easycontrol": easycontrol_file(5)}, {"latent": condition(99)}, {"kind": "subject"}
    return *given, {"strength": 0.5}, {"influence": 0.5}


def a_try_on() -> Values:
    pictures = {"person": picture(20), "garment": picture(21)[:, :, :48]}
    return {"try_on": try_on_file(1, 2), "vae": vae(), "person_size": 0, "garment_size": 0, **pictures}


def other_try_ons() -> tuple[Values, ...]:
    files = {"try_on": try_on_file(7, 2)}, {"try_on": try_on_file(1, 8)}
    pictures = {"person": picture(30)}, {"garment": picture(31)[:, :, :48]}
    strengths = tuple({f"{branch}_strength": by} for branch in ("person", "garment") for by in (0.0, 0.5))
    return *files, *pictures, *strengths, {"garment_position": "below"}


def a_subject() -> Values:
    return {"vae": vae(), "reference": picture(20), "subject": middle()}


def other_subjects() -> tuple[Values, ...]:
    return (
        {"reference": picture(20).flip(1)},
        {"subject": None},
        {"key_scale": 1.5},
        {"text_key_scale": 1.5},
        {"layers": "1-2"},
        {"shift_mode": "twice"},
        {"reference_shift": 1.0},
        {"prompts": "positive and negative"},
        {"noise": "own seed", "noise_seed": 3},
    )


@cache
def dit4sr_file(seed: int) -> dit4sr_files.DiT4SRFile:
    """A random patch for the tiny SD3.5."""
    weights = dit4sr_reference.random_weights(blocks=3, dual=(0,), text=TEXT, pooled=POOLED, side=16, seed=seed)
    return dit4sr_files.from_state(weights, f"random{seed}.safetensors")


def a_photo() -> Values:
    """A sixteenth of the picture that the tiny SD3.5 draws."""
    settings = {"upscale_by": 4.0, "min_side": 16}
    return {"dit4sr": dit4sr_file(1), "vae": vae(), "image": picture(20)[:, 24:40, 24:40], **settings}


def other_photos() -> tuple[Values, ...]:
    given = {"dit4sr": dit4sr_file(2)}, {"image": picture(20)[:, 40:56, 24:40]}
    return *given, {"strength": 0.5}, {"cross_stream_scale": 0.0}, {"tile": 4, "overlap": 2}


def looking_never(model: ModelPatcher) -> ModelPatcher:
    return run_node(ApplyDiT4SR, model=model, **a_photo(), start_percent=0.9999)[0]


@cache
def pose_norms(seed: int):
    """Random pose norms for the tiny CogVideoX 1.5, and the sizes they are made for."""
    shapes = PoseNorms(128, 64, 3, operations=torch.nn, device=torch.device("meta")).state_dict()
    generator = torch.Generator().manual_seed(seed)
    weights = {name: weight(name, like.shape, 0.7, generator) for name, like in shapes.items()}
    return adapters.patcher(partial(PoseNorms, 128, 64, 3), weights), Sizes(128, 3)


@cache
def video(seed: int) -> torch.Tensor:
    """13 pictures, four latent frames, for the tiny CogVideoX 1.5."""
    return torch.rand(13, 48, 48, 3, generator=torch.Generator().manual_seed(seed))


def a_pose() -> Values:
    """Its picture is grey, which the tiny VAE takes for nothing: so poses alone make the difference."""
    given = {"vae": VideoVae(), "reference": torch.full((1, 48, 48, 3), 0.5), "pose": video(1), "norms": pose_norms(1)}
    return {**given, "width": 48, "height": 48, "length": 13}


def other_poses() -> tuple[Values, ...]:
    pictures = {"pose": video(2)}, {"reference": picture(30)}
    return *pictures, {"norms": pose_norms(2)}, {"pose_strength": 0.5}


# Step caches. Every other evaluation is computed, and the one between is forecast.


def stored_and_computed(model: ModelPatcher) -> bool:
    return set(strip(model)) == {"#"} and last_run(model).bytes_held > 0


def computed(model: ModelPatcher) -> bool:
    return set(strip(model)) == {"#"}


def computed_and_not_stored(model: ModelPatcher) -> bool:
    return computed(model) and last_run(model).bytes_held == 0


def asked_each_time(model: ModelPatcher) -> bool:
    return computed(model) and len([error for error in last_run(model).errors if error > 1e-12]) == STEPS - 1


def asked_never(model: ModelPatcher) -> bool:
    return computed(model) and not any(error > 1e-12 for error in last_run(model).errors)


def skipped(model: ModelPatcher) -> bool:
    return {"#", "."} == set(strip(model))


def at_interval_1(tap: str) -> dict[str, Idle]:
    return {"interval 1": Idle(lambda model: cached(model, Interval(1, 1), tap, 1), stored_and_computed)}


def gate_shut(tap: str, threshold: float, there: Callable[[ModelPatcher], bool]) -> Idle:
    """At threshold 0 nobody is asked; just above, block 0 is forecast and compared each time."""
    gate = FirstBlockGate(threshold, warm_up=1, compare="residual" if tap == "gated residual" else "output")
    return Idle(lambda model: cached(model, gate, tap, 1), there)


def no_block(model: ModelPatcher) -> ModelPatcher:
    return cached(model, Interval(2, 1), SpanTap(*block_hooks(model), stages=Stages(0.0)))


def taylorseer(tap: str, families: tuple[str, ...]) -> Feature:
    setting = {"interval": 2, "first_full": 1, "spacing": "as published", "tap": tap}
    return Feature(
        f"TaylorSeer, {tap}",
        TaylorSeer,
        lambda: {**setting, "max_memory": 1.0},
        families,
        off=({"interval": 1}, {"interval": 1, "order": 4}),
        idle=at_interval_1(tap),
        others=lambda: ({"interval": 3}, {"first_full": 2}, {"last_full": 1}, {"schedule": "0, 1"}),
        often={"interval": 12, "first_full": 2},
        worked=skipped,
        rival="step cache",
    )


def gated(compare: str, families: tuple[str, ...], idle: Mapping[str, Idle]) -> Feature:
    setting = {"threshold": 2.0, "warm_up": 1, "last_full": 0, "max_consecutive": 1, "compare": compare}
    return Feature(
        f"Confidence-Gated Taylor, {compare}",
        ConfidenceGatedTaylor,
        lambda: setting,
        families,
        off=({"threshold": 0.0},),
        idle=idle,
        others=lambda: ({"threshold": 0.001}, {"max_consecutive": 0}, {"warm_up": 3}),
        often={"max_consecutive": 0},
        worked=skipped,
        rival="step cache",
    )


# Sparse attention


def evaluations(model: ModelPatcher) -> str:
    """Of Re-ttention: # full, R refreshed, . sparse, - left to a step cache."""
    (settings,) = (each for each in attached(model) if isinstance(each, re_ttention.ReTtention))
    return settings.report.runs[-1].evaluations


def never_sparse(model: ModelPatcher) -> ModelPatcher:
    return re_ttention.attach(model, re_ttention.ReTtention(0.3, Schedule(99), min_tokens=0))


def clear(pooling: int = 0) -> Feature:
    given = {"radius": 1, "pooling": pooling, "min_tokens": 0}
    whole = Idle(lambda model: run_node(ApplyClear, model=model, radius=64, min_tokens=0)[0], lambda model: True)
    return Feature(
        f"CLEAR{', pooled' * bool(pooling)}",
        ApplyClear,
        lambda: given,
        WITH_GRID if not pooling else FLUX1,
        idle={} if pooling else {"a radius beyond the picture": whole},
        others=lambda: ({"radius": 2}, {"min_tokens": 4096}, {"scale": "log-proportional"}),
        rival="sparse attention",
    )


EASYCONTROL = Feature(
    "EasyControl",
    ApplyEasyControl,
    an_easycontrol,
    off=({"strength": 0.0}, {"influence": 0.0}),
    others=other_easycontrols,
    adds_keys=True,
)


def with_poses(**values: Any) -> Idle:
    """Pose norms and poses that change nothing; the same prompts on the base model have only the picture."""
    return Idle(lambda model: DYNAMICTRL.put(model, **values), lambda model: bool(attached(model)))


DYNAMICTRL = Animated(
    "DynamiCtrl",
    DynamiCtrlConditioning,
    a_pose,
    ("cogvideox_i2v",),
    idle={"strength 0": with_poses(pose_strength=0.0), "a start that never comes": with_poses(start_percent=0.9999)},
    others=other_poses,
    other_size="DynamiCtrl Conditioning: the reference has a latent of .* Connect the 'latent' of DynamiCtrl",
)

FEATURES = (
    EASYCONTROL,
    Feature("EasyControl, a second one", ApplyEasyControl, a_second_easycontrol, beneath=EASYCONTROL, adds_keys=True),
    Feature(
        "Try-On",
        ApplyTryOn,
        a_try_on,
        off=({"person_strength": 0.0, "garment_strength": 0.0},),
        others=other_try_ons,
        adds_keys=True,
    ),
    Feature("FreeCus", ApplyFreeCus, a_subject, others=other_subjects, adds_keys=True),
    Lora("In-Context LoRA", None, lambda: {"strength": 1.0}, (*FLUX1, "sd35"), others=lambda: ({"strength": 0.5},)),
    Feature(
        "DiT4SR",
        ApplyDiT4SR,
        a_photo,
        ("sd35",),
        off=({"strength": 0.0},),
        idle={"a start that never comes": Idle(looking_never, lambda model: bool(attached(model)))},
        others=other_photos,
        refuses={
            "Delta-DiT": "cannot work with a step cache that skips blocks in the middle, such as Apply Delta-DiT",
            "sparse attention": "puts a second picture into the attention, and a sparse pattern knows only one",
        },
        other_size="Apply DiT4SR prepared .* Connect the 'latent' of Apply DiT4SR to the sampler",
    ),
    Feature(
        "DiT4SR Sampling",
        DiT4SRSampling,
        lambda: {"shift": 1.0},
        ("sd35",),
        others=lambda: ({"shift": 6.0},),
    ),
    DYNAMICTRL,
    Feature("CogVideoX Sampling Preset", CogVideoXSampling, dict, ("cogvideox",)),
    CogVideoXLoraOfFile(
        "Load CogVideoX LoRA",
        CogVideoXLora,
        lambda: {"file": COGVIDEOX_LORA},
        ("cogvideox_i2v",),
        others=lambda: ({"strength": 0.5},),
    ),
    taylorseer("prediction", tuple(ALL)),
    taylorseer("last block", WITH_BLOCKS),
    taylorseer("every module", FLUX1),
    gated(
        "output",
        WITH_BLOCKS,
        {"above 0": gate_shut("gated", 1e-12, asked_each_time), "at 0": gate_shut("gated", 0.0, asked_never)},
    ),
    gated("residual", WITH_BLOCKS, {"above 0": gate_shut("gated residual", 1e-12, asked_each_time)}),
    gated("input change", tuple(ALL), {"at 0": Idle(lambda model: cached(model, InputChange(0.0, 2)), computed)}),
    Feature(
        "Delta-DiT",
        DeltaDiT,
        lambda: {"boundary": 0.5},
        WITH_BLOCKS,
        off=({"interval": 1}, {"share": 0.0}),
        idle={**at_interval_1("span"), "share 0": Idle(no_block, computed_and_not_stored)},
        others=lambda: ({"share": 0.5}, {"first_full": 2}, {"boundary": 0.0}, {"boundary": 1.0}),
        often={"interval": 12, "first_full": 2, "boundary": 1.0},
        worked=skipped,
        rival="step cache",
    ),
    clear(),
    clear(pooling=2),
    Feature(
        "Re-ttention",
        ApplyReTtention,
        lambda: {"keep": 0.3, "first_full": 0, "min_tokens": 0, "max_memory": 1.0},
        WITH_GRID,
        off=({"keep": 1.0}, {"interval": 1}),
        idle={"a start without end": Idle(never_sparse, lambda model: set(evaluations(model)) <= {"#", "-"})},
        others=lambda: ({"keep": 0.6}, {"first_full": 2}, {"interval": 2}, {"drift": 0.3}, {"storage": "8 bits"}),
        worked=lambda model: "." in evaluations(model),
        rival="sparse attention",
    ),
)
