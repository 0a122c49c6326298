"""How good the files in `weights/` are, on held-out prompts and scenes: each module prints tables of the model card.

    python -m training.measure.shipped      autoencoder, prompts, and the EasyControl adapters
    python -m training.measure.try_on       the try-on LoRAs, at 20 steps and at few
    python -m training.measure.in_context   the In-Context LoRA, by ComfyUI's nodes
    python -m training.measure.freecus      FreeCus, which has no weights, on the base
    python -m training.measure.dit4sr       the SD3.5 base, and DiT4SR on it
    python -m training.measure.dynamictrl   the CogVideoX base, and DynamiCtrl on it

Pictures are judged by `training.score`, from the world's definition and without a model. The tests use the same one.

Each prints what it found as JSON. `--save` also writes the results file that the model card, README and docs are filled
from (`make figures`): `benchmarks/results/quality-<module>.json`.
"""

from __future__ import annotations

import json
from typing import Any

from dit_toolkit.scripts import places

RESULTS = places.ROOT / "benchmarks" / "results"
SAVE = "write the results file that README, docs and model card are filled from"


def tell(name: str, found: dict[str, Any], save: bool = False) -> None:
    """Print what a module found, and write its results file if that was asked for."""
    text = json.dumps(found, indent=1)
    print(text)
    if save:
        (RESULTS / f"quality-{name}.json").write_text(text + "\n", encoding="utf-8")
