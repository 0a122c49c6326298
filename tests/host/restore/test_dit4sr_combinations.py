"""DiT4SR times every step cache, times how the base is loaded, in one piece and in tiles in turn.

Neutral values are bit-identical in each cell. A node at its neutral value hands its MODEL back, so what it hangs on the
MODEL is attached here with a schedule that computes everything: its hooks are there and still change nothing. Two
features at a time, and what is refused: `tests/host/promises.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from dit_toolkit.host.accelerate import accelerate
from dit_toolkit.host.accelerate.step_cache_report import StepCacheReport
from dit_toolkit.models.accelerate.cg_taylor import FirstBlockGate
from dit_toolkit.models.accelerate.input_change import InputChange
from dit_toolkit.models.accelerate.policies import Interval
from dit_toolkit.nodes.accelerate import AccelerateDiT
from dit_toolkit.nodes.step_cache import ConfidenceGatedTaylor, TaylorSeer
from dit_toolkit.tests.host.accelerate.caching import cached, strip
from dit_toolkit.tests.host.promises import lora_of_every_block
from dit_toolkit.tests.host.restore.tiny_dit4sr import base, latent, published, restored, sample
from dit_toolkit.tests.host.shared import shared
from dit_toolkit.tests.nodes.calling import run_node

pytestmark = pytest.mark.comfy

SIZE, STEPS, CFG = (12, 12), 6, 3.0  # 4 tiles
LR = latent(12, SIZE)


@dataclass(frozen=True)
class Accelerator:
    """`neutral` hangs it on a MODEL with everything computed, `fast` is its node with a setting that saves work.

    marks: what of six evaluations is computed (#) and forecast (.).
    """

    neutral: Callable[[ModelPatcher], ModelPatcher]
    node: Any
    settings: dict[str, Any]
    marks: str

    def fast(self, model: ModelPatcher) -> ModelPatcher:
        return run_node(self.node, model=model, **self.settings)[0]


def computing(tap: str) -> Callable[[ModelPatcher], ModelPatcher]:
    """A step cache that stores everything and forecasts nothing."""
    residual = {"compare": "residual"} if tap == "gated residual" else {}
    gate = FirstBlockGate(threshold=1e-12, warm_up=1, **residual)
    return lambda model: cached(model, gate if tap.startswith("gated") else Interval(1, 1), tap, 1)


def accelerating(model: ModelPatcher) -> ModelPatcher:
    """What Accelerate DiT picks, at interval 1."""
    picked = accelerate.preset(model, "balanced")
    return accelerate.accelerated(model, replace(picked, amount=1), StepCacheReport("Test"))


OLD = {"order": 1, "spacing": "to the last step", "forecast": "Taylor (paper)"}  # every other one is computed
TAYLOR = {"interval": 2, "first_full": 2, "last_full": 1, **OLD}
GATED = {"threshold": 2.0, "warm_up": 2, "max_consecutive": 1}
ACCELERATORS = {
    "prediction": Accelerator(computing("prediction"), TaylorSeer, {**TAYLOR, "tap": "prediction"}, "##.#.#"),
    "last block": Accelerator(computing("last block"), TaylorSeer, {**TAYLOR, "tap": "last block"}, "##.#.#"),
    "gated": Accelerator(computing("gated"), ConfidenceGatedTaylor, GATED, "##.#.#"),
    "gated residual": Accelerator(
        computing("gated residual"), ConfidenceGatedTaylor, {**GATED, "compare": "residual"}, "##.#.#"
    ),
    "input change": Accelerator(
        lambda model: cached(model, InputChange(0.0, 2)),
        ConfidenceGatedTaylor,
        {**GATED, "compare": "input change"},
        "##.#.#",
    ),
    "Accelerate DiT": Accelerator(accelerating, AccelerateDiT, {"quality": "quality"}, "#.#.#."),
}


@shared
def in_fp8() -> ModelPatcher:
    """As Load Diffusion Model has it with weight_dtype fp8_e4m3fn."""
    state = {name: weight.clone() for name, weight in published().items()}
    model = comfy.sd.load_diffusion_model_state_dict(state, model_options={"dtype": torch.float8_e4m3fn})
    assert model is not None
    assert model.model.diffusion_model.joint_blocks[0].x_block.attn.qkv.weight.dtype == torch.float8_e4m3fn
    return model


def with_lora(model: ModelPatcher) -> ModelPatcher:
    return comfy.sd.load_lora_for_models(model, None, lora_of_every_block(model), 1.0, 0.0)[0]


BASES: dict[str, Callable[[], ModelPatcher]] = {
    "as it is": base,
    "a LoRA": lambda: with_lora(base()),
    "fp8": in_fp8,
    "a LoRA on fp8": lambda: with_lora(in_fp8()),
}


def drawn(model: ModelPatcher) -> Tensor:
    return sample(model, STEPS, size=SIZE, cfg=CFG)


@cache
def plain(loaded: str, tile: int) -> Tensor:
    """Without an accelerator."""
    return drawn(restored(BASES[loaded](), lr=LR, tile=tile))


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


MATRIX = [  # one base after the other, so that core does not exchange weights all the time
    (loaded, name, (0, 8)[(i + j) % 2]) for i, loaded in enumerate(BASES) for j, name in enumerate(ACCELERATORS)
]


@pytest.mark.parametrize(("loaded", "name", "tile"), MATRIX)
@pytest.mark.sweep
def test_a_step_cache_over_dit4sr(loaded, name, tile):
    """Neutral: not a bit differs. With something saved it differs, and is nearer than the same without the photo."""
    accelerator, whole = ACCELERATORS[name], plain(loaded, tile)
    assert whole.isfinite().all()
    model = restored(BASES[loaded](), lr=LR, tile=tile)
    neutral, fast = accelerator.neutral(model), accelerator.fast(model)
    assert torch.equal(drawn(neutral), whole)
    assert strip(neutral) == "#" * STEPS
    error = apart(drawn(fast), whole)
    assert strip(fast) == accelerator.marks
    assert 0 < error < apart(drawn(accelerator.fast(BASES[loaded]())), whole)


@pytest.mark.parametrize("tile", [0, 8])
def test_each_way_to_load_the_base_shows(tile):
    pictures = [plain(loaded, tile) for loaded in BASES]
    for i, one in enumerate(pictures):
        for other in pictures[:i]:
            assert apart(one, other) > 1e-3
