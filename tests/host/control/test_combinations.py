"""Everything on one MODEL: the control features of the embedded default, times EasyControl, times every accelerator.

The features: an In-Context LoRA (two panels, also with one of them given), FreeCus, try-on. What hangs on the MODEL
comes from the nodes themselves, with the weights that ship. A subset covers the matrix: every feature meets every
accelerator, and EasyControl's edge and pose take turns, so that both meet each of either. Batches, precision and
further LoRAs meet every feature, each under another accelerator. Two features at a time, on random weights:
`tests/host/promises.py`.

Neutral values are bit-identical. Where a node at its neutral value would hand its model back, what it hangs on the
MODEL is attached here with a schedule that computes everything, so that its hooks are there and still change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.sd
import nodes as core
import numpy as np
import pytest
import torch
from torch import Tensor

from dit_toolkit.host import embedded
from dit_toolkit.host.accelerate import accelerate, re_ttention
from dit_toolkit.host.accelerate.accelerate import psnr_db
from dit_toolkit.host.accelerate.re_ttention_run import ReTtentionRun
from dit_toolkit.host.accelerate.step_cache_report import StepCacheReport
from dit_toolkit.host.control.easycontrol_files import load as load_easycontrol
from dit_toolkit.host.control.try_on_files import load as load_try_on
from dit_toolkit.host.model_files import offer_loras
from dit_toolkit.models.accelerate.cg_taylor import FirstBlockGate
from dit_toolkit.models.accelerate.policies import Interval
from dit_toolkit.models.accelerate.re_ttention import Schedule
from dit_toolkit.nodes.accelerate import AccelerateDiT
from dit_toolkit.nodes.easycontrol import ApplyEasyControl
from dit_toolkit.nodes.freecus import ApplyFreeCus
from dit_toolkit.nodes.in_context_lora import PanelLatent, PanelLayout
from dit_toolkit.nodes.re_ttention import ApplyReTtention
from dit_toolkit.nodes.sparse_attention import ApplyClear
from dit_toolkit.nodes.step_cache import ConfidenceGatedTaylor, DeltaDiT, TaylorSeer
from dit_toolkit.nodes.try_on import ApplyTryOn
from dit_toolkit.tests.host.accelerate.caching import cached, strip
from dit_toolkit.tests.nodes.calling import run_node
from dit_toolkit.training import world

pytestmark = [pytest.mark.comfy, pytest.mark.sweep(together=True)]

SIDE, STEPS, CFG = 96, 6, 2.5
LORA, TRY_ON = "dit_toolkit_demo_in_context.safetensors", "tiny_try_on.safetensors"

Make = Callable[[Any], Any]  # MODEL to MODEL

IN_CONTEXT, GIVEN, FREECUS, DRESSED = "in-context", "in-context, a panel given", "FreeCus", "try-on"
FEATURES, CONTROLS = (IN_CONTEXT, GIVEN, FREECUS, DRESSED), ("edge", "pose")


def image(picture: np.ndarray) -> Tensor:
    """uint8 `[H, W]` or `[H, W, 3]` as IMAGE `[1, H, W, 3]`."""
    shown = torch.from_numpy(picture).float() / 255
    return (shown if shown.ndim == 3 else shown[..., None].expand(-1, -1, 3))[None]


class Stage:
    """The embedded models, the pictures that the features are given, and MODELs that carry them."""

    def __init__(self):
        offer_loras()
        self.model, self.clip, self.vae = embedded.load_model(), embedded.load_clip(), embedded.load_vae()
        self.scenes = next(world.sets(seed=3))
        first, second = self.scenes
        drawn, other = world.render(first, SIDE), world.render(second, SIDE)
        shirt = world.garment_mask(drawn, 1)
        self.doll, self.subject = image(drawn.image), image((drawn.owners > 0).astype(np.uint8) * 255)[..., 0]
        self.person = image(np.where(shirt[..., None] > 0, np.uint8(127), drawn.image))
        self.garment = image(world.garment_flat(world.Thing("doll", 0.5, 0.5, 0.9, "red", "striped"), SIDE))
        self.conditions = {"edge": image(world.edge_map(other)), "pose": image(world.pose_map(second, SIDE))}
        self.negative = self.words("")

    def words(self, text: str):
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def put(self, name: str, model: Any, **values: Any) -> Any:
        """`model` behind the node of a feature."""
        if name in (IN_CONTEXT, GIVEN):
            return core.LoraLoaderModelOnly().load_lora_model_only(model, LORA, values.get("strength", 1.0))[0]
        if name == FREECUS:
            given = {"vae": self.vae, "reference": self.doll, "subject": self.subject}
            return run_node(ApplyFreeCus, model=model, **{**given, **values})[0]
        if name == DRESSED:
            given = {"try_on": load_try_on(TRY_ON), "vae": self.vae, "person": self.person, "garment": self.garment}
            return run_node(ApplyTryOn, model=model, **{**given, **values})[0]
        given = {"easycontrol": load_easycontrol(f"tiny_{name}.safetensors"), "image": self.conditions[name]}
        given |= {"vae": self.vae, "condition_size": SIDE}
        return run_node(ApplyEasyControl, model=model, **{**given, **values})[0]

    def latent(self, names: tuple[str, ...], batch: int) -> dict[str, Any]:
        """What KSampler is given: two panels where there is an In-Context LoRA, else one picture."""
        if GIVEN in names:
            values = {"batch_size": batch, "images": {"image_1": self.doll}}
        elif IN_CONTEXT in names:
            values = {"batch_size": batch}
        else:
            return {"samples": torch.zeros(batch, 16, SIDE // 8, SIDE // 8)}
        panels = {"preset": "custom", "rows": 1, "columns": 2, "panel_width": SIDE, "panel_height": SIDE}
        (layout, *_) = run_node(PanelLayout, **panels, given="1" if GIVEN in names else "")
        return run_node(PanelLatent, panels=layout, vae=self.vae, **values)[0]

    @torch.inference_mode()
    def draw(self, model: Any, names: tuple[str, ...], *, steps=STEPS, cfg=CFG, sampler="euler", batch=1) -> Tensor:
        """Latents `[batch, 16, h, w]`."""
        canvas = {IN_CONTEXT, GIVEN} & set(names)
        text = world.set_caption(self.scenes, named=True) if canvas else world.caption(self.scenes[1])
        latent = self.latent(names, batch)
        samples = latent["samples"]
        return comfy.sample.sample(
            model, comfy.sample.prepare_noise(samples, 1), steps, cfg, sampler, "simple", self.words(text),
            self.negative, samples, noise_mask=latent.get("noise_mask"), seed=1, disable_pbar=True,
        )  # fmt: skip

    @torch.inference_mode()
    def made(self, *names: str, model: Any = None) -> Any:
        """A MODEL behind these nodes, the first of `names` first."""
        model = self.model if model is None else model
        for name in names:
            # On two panels, the doll of both is to be dressed.
            both = {"person": self.person.repeat(1, 1, 2, 1)} if name == DRESSED and IN_CONTEXT in names else {}
            model = self.put(name, model, **both)
        return model

    @torch.inference_mode()
    def likeness(self, a: Tensor, b: Tensor) -> float:
        """PSNR of two latents, decoded, in dB."""
        return psnr_db(self.vae.decode(a), self.vae.decode(b))


@dataclass(frozen=True)
class Accelerator:
    """`neutral` hangs it on a MODEL with everything computed, `fast` is its node with a setting that saves work.

    floor: PSNR of the picture against that of the MODEL without it, dB; about 3 below the least that was measured.
    marks: what a step cache computes (#) and forecasts (.) of six evaluations.
    """

    neutral: Make
    node: Any
    settings: dict[str, Any]
    floor: float
    marks: str = ""

    def fast(self, model: Any) -> Any:
        return run_node(self.node, model=model, **self.settings)[0]


def computing(tap: str, order: int = 1) -> Make:
    """A step cache that stores everything and forecasts nothing."""
    gated = FirstBlockGate(threshold=1e-12, warm_up=1)
    return lambda model: cached(model, gated if tap == "gated" else Interval(1, 1), tap, order)


def accelerating(model: Any) -> Any:
    """What Accelerate DiT picks for the embedded model, at interval 1."""
    picked = accelerate.preset(model, "balanced")
    return accelerate.accelerated(model, replace(picked, amount=1), StepCacheReport("Test"))


def clear(radius: int) -> Make:
    return lambda model: run_node(ApplyClear, model=model, radius=radius, min_tokens=0)[0]


def all_in_full(model: Any) -> Any:
    """Re-ttention that never comes to its first sparse evaluation."""
    return re_ttention.attach(model, re_ttention.ReTtention(0.5, Schedule(99), min_tokens=0))


OLD = {"order": 1, "spacing": "to the last step", "forecast": "Taylor (paper)"}  # every other one is computed
TAYLOR = {"interval": 2, "first_full": 2, **OLD}
ACCELERATORS = {
    "prediction": Accelerator(
        computing("prediction"), TaylorSeer, {**TAYLOR, "tap": "prediction"}, 27, "##.#.#"
    ),
    "last block": Accelerator(
        computing("last block"), TaylorSeer, {**TAYLOR, "tap": "last block"}, 27, "##.#.#"
    ),
    "every module": Accelerator(
        computing("every module"), TaylorSeer, {**TAYLOR, "tap": "every module", "max_memory": 1.0}, 27,
        "##.#.#",
    ),
    "gated": Accelerator(
        computing("gated"), ConfidenceGatedTaylor, {"threshold": 2.0, "warm_up": 2, "max_consecutive": 1}, 27,
        "##.#.#",
    ),
    "Delta-DiT": Accelerator(computing("span", 0), DeltaDiT, {}, 25, "#.##.#"),
    "CLEAR": Accelerator(clear(64), ApplyClear, {"radius": 4, "min_tokens": 0}, 18),
    "Re-ttention": Accelerator(
        all_in_full, ApplyReTtention, {"keep": 0.5, "interval": 2, "first_full": 2, "min_tokens": 0}, 30
    ),
    "Accelerate DiT": Accelerator(accelerating, AccelerateDiT, {"quality": "quality"}, 19, "#.#.#."),
}  # fmt: skip
FLOOR = 19  # dB, with any accelerator: 21.3 is the least that was measured over pairs, samplers, batches and precisions


@pytest.fixture(scope="module")
def stage() -> Stage:
    return Stage()


@pytest.fixture(scope="module")
def drawn(stage):
    """Latents of a MODEL behind the nodes that are named, an accelerator last; drawn once.

    on: the features whose canvas and prompt are taken, where not those on the MODEL.
    """
    known: dict[tuple, Tensor] = {}

    def draw(*names: str, accelerator: str = "", on: tuple[str, ...] = ()) -> Tensor:
        key = (names, accelerator, on)
        if key not in known:
            model = stage.made(*names)
            model = ACCELERATORS[accelerator].fast(model) if accelerator else model
            known[key] = stage.draw(model, on or names)
            marks = ACCELERATORS[accelerator].marks if accelerator else ""
            assert not marks or strip(model) == marks
        return known[key]

    return draw


# the matrix

MATRIX = [
    (feature, CONTROLS[(i + j) % 2], name)
    for i, feature in enumerate(FEATURES)
    for j, name in enumerate(ACCELERATORS)
]  # fmt: skip


@pytest.mark.parametrize(("feature", "control", "name"), MATRIX)
def test_a_feature_and_easycontrol_under_an_accelerator(stage, drawn, feature, control, name):
    """Neutral: not a bit differs. With something saved it differs, and is the same picture."""
    accelerator, names = ACCELERATORS[name], (feature, control)
    plain = drawn(*names)
    assert torch.isfinite(plain).all()
    assert torch.equal(stage.draw(accelerator.neutral(stage.made(*names)), names), plain)
    fast = drawn(*names, accelerator=name)
    assert torch.isfinite(fast).all()
    assert not torch.equal(fast, plain)
    likeness = stage.likeness(fast, plain)
    assert likeness > accelerator.floor
    if accelerator.node is not AccelerateDiT:  # it computes 3 of 6 evaluations, far fewer than it is made for
        assert likeness > stage.likeness(drawn(feature), plain) + 2  # which lost EasyControl altogether


# features together

PAIRS = ((FREECUS, IN_CONTEXT), (FREECUS, DRESSED), (DRESSED, IN_CONTEXT), (FREECUS, GIVEN))


@pytest.mark.parametrize(
    ("names", "name"), [(PAIRS[i % len(PAIRS)], name) for i, name in enumerate(ACCELERATORS)]
)  # fmt: skip
def test_two_features_under_an_accelerator(stage, drawn, names, name):
    accelerator, both = ACCELERATORS[name], drawn(*names)
    assert torch.isfinite(both).all()
    for alone in names:
        assert (drawn(alone, on=names) - both).abs().mean() > 0.1
    assert torch.equal(stage.draw(accelerator.neutral(stage.made(*names)), names), both)
    fast = drawn(*names, accelerator=name)
    assert torch.isfinite(fast).all()
    assert not torch.equal(fast, both)
    assert stage.likeness(fast, both) > FLOOR


# batches, precision, LoRAs

VARIANTS: dict[str, dict[str, Any]] = {"a batch of 2": {"batch": 2}, "another LoRA": {}, "fp8": {}}


def another_lora(model: Any) -> Any:
    """`model` with an ordinary LoRA on a double and a single block, strong enough to show."""
    generator = torch.Generator().manual_seed(5)
    lora = {}
    for layer, rows in (("double_blocks.1.img_attn.qkv", 384), ("single_blocks.2.linear1", 896)):
        for part, size in (("down", (4, 128)), ("up", (rows, 4))):
            weight = torch.randn(size, generator=generator)
            lora[f"diffusion_model.{layer}.lora_{part}.weight"] = weight * (0.09 if part == "down" else 0.05)
    return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]


@pytest.fixture(scope="module")
def fp8():
    """As Load Diffusion Model has it with weight_dtype fp8_e4m3fn."""
    path = str(embedded.WEIGHTS / "tiny_flux.safetensors")
    model = comfy.sd.load_diffusion_model(path, model_options={"dtype": torch.float8_e4m3fn})
    assert model.model.diffusion_model.single_blocks[0].linear1.weight.dtype == torch.float8_e4m3fn
    return model


@pytest.mark.parametrize(
    ("variant", "feature", "name"),
    [
        (variant, feature, list(ACCELERATORS)[(3 * i + j) % len(ACCELERATORS)])
        for i, feature in enumerate((GIVEN, FREECUS, DRESSED))
        for j, variant in enumerate(VARIANTS)
    ],
)
def test_other_ways_to_sample(stage, drawn, fp8, variant, feature, name):
    """Neutral bit for bit, and something saved, whichever it is."""
    accelerator, names, options = ACCELERATORS[name], (feature, "edge"), VARIANTS[variant]
    base = fp8 if variant == "fp8" else stage.model
    model = stage.made(*names, model=base)
    model = another_lora(model) if variant == "another LoRA" else model
    plain = stage.draw(model, names, **options)
    assert plain.shape[0] == options.get("batch", 1)
    if variant in ("another LoRA", "fp8"):
        assert not torch.equal(plain, drawn(*names))
    assert torch.equal(stage.draw(accelerator.neutral(model), names, **options), plain)
    fast = stage.draw(accelerator.fast(model), names, **options)
    assert torch.isfinite(fast).all()
    assert not torch.equal(fast, plain)
    assert stage.likeness(fast, plain) > FLOOR


# life cycle


@pytest.mark.parametrize(
    ("names", "name"),
    [
        ((GIVEN, "edge"), "last block"),
        ((FREECUS, "pose"), "every module"),
        ((DRESSED, "edge"), "gated"),
        ((FREECUS, DRESSED), "Re-ttention"),
        ((FREECUS, IN_CONTEXT), "Delta-DiT"),
    ],
)
def test_a_run_after_an_interrupt_equals_a_fresh_one(stage, drawn, monkeypatch, names, name):
    """From inside a block, in the third evaluation that is computed; in the reference's pass where there is one."""
    model = ACCELERATORS[name].fast(stage.made(*names))
    layer, calls = model.model.diffusion_model.single_blocks[3].linear2, [0]
    forward, at = layer.forward, 5 if FREECUS in names else 3

    def stop(*args, **kwargs):
        calls[0] += 1
        if calls[0] == at:
            raise comfy.model_management.InterruptProcessingException()
        return forward(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", stop)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            stage.draw(model, names)
    assert torch.equal(stage.draw(model, names), drawn(*names, accelerator=name))


def test_the_reference_of_freecus_is_as_sparse_as_the_picture(stage, monkeypatch):
    """Full, refreshed and sparse in the same evaluations: Re-ttention keeps what it took of both."""
    kinds: dict[bool, list] = {False: [], True: []}
    find = ReTtentionRun._kind

    def watched(self, call):
        kind = find(self, call)
        if call.own.layer[:2] == ("double", 0):
            kinds[call.chunk.conditions[0].role is not None].append(kind)
        return kind

    monkeypatch.setattr(ReTtentionRun, "_kind", watched)
    stage.draw(ACCELERATORS["Re-ttention"].fast(stage.made(FREECUS)), (FREECUS,), steps=8)
    assert kinds[True] == kinds[False] == ["full", "full", *3 * ["refresh", "sparse"]]
