"""Whether what Autotune finds holds on prompts that it has not seen.

    python -m benchmarks.autotune          minutes on two CPU cores

It tunes on one picture and on four, for several floors, models and guidance scales. What it picks is judged on other
prompts and other noise, beside *Apply TaylorSeer* with its defaults at the same interval. There is no clock.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import sys
from dataclasses import dataclass

import torch

from dit_toolkit.scripts import places

RESULTS = places.ROOT / "benchmarks" / "results"
FLOORS = (45.0, 38.0, 32.0)
TRIALS = 8
STEPS = 28


@dataclass(frozen=True)
class Case:
    model: str
    sampler: str
    cfg: float


CASES = [
    *(Case("FLUX.1", sampler, cfg) for sampler in ("euler", "dpmpp_2m") for cfg in (1.0, 2.5)),
    *(Case("SD3.5", "euler", cfg) for cfg in (1.0, 3.0)),
]


def rows_of(case: Case, floors, counts, judged: int) -> list[dict]:
    """A row for each floor and number of pictures that were tuned on."""
    from dit_toolkit.host.accelerate import accelerate
    from dit_toolkit.host.accelerate.step_cache_report import StepCacheReport

    from .race import arena as arenas

    arena = arenas.tiny(judged, max(counts), case.model)

    def drawn(model, heats) -> torch.Tensor:
        latent = arena.sample(model, arenas.together(heats), STEPS, case.sampler, case.cfg)
        return torch.stack([torch.from_numpy(arena.decode(each)) for each in latent.split(1)])

    def kept(setting) -> float:
        return accelerate.psnr_db(
            drawn(accelerate.accelerated(arena.model, setting, StepCacheReport("")), arena.heats), wanted
        )

    wanted = drawn(arena.model, arena.heats)
    rows = []
    for count in counts:
        heats = arena.calibration[:count]
        for floor in floors:
            picked, trials = accelerate.tune(arena.model, lambda model, heats=heats: drawn(model, heats), floor, TRIALS)
            if picked.method == "none":
                continue
            (trial,) = [each for each in trials if each.setting.words == picked.words]
            same = accelerate.every(int(picked.amount), "") if picked.method == "TaylorSeer" else None
            rows.append(
                {
                    **vars(case),
                    "pictures": count,
                    "floor": floor,
                    "picked": picked.words,
                    "computed": round(trial.computed, 4),
                    "tuned_db": round(trial.psnr_db, 2),
                    "judged_db": round(kept(picked), 2),
                    "default_db": None if same is None else round(kept(same), 2),
                    "spent": round(1 + sum(each.computed for each in trials), 2),
                }
            )
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


@torch.inference_mode()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--floors", type=float, nargs="+", default=FLOORS, help="in dB")
    parser.add_argument("--pictures", type=int, nargs="+", default=(1, 4), help="that are tuned on")
    parser.add_argument("--judged", type=int, default=6, help="other pictures")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args(argv)
    sys.path.append(str(places.comfyui()))
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    logging.getLogger().setLevel(logging.ERROR)
    rows = [row for case in CASES for row in rows_of(case, options.floors, options.pictures, options.judged)]
    if not options.no_save:
        file = RESULTS / f"autotune-{datetime.date.today().isoformat()}-{'cpu' if args.cpu else 'gpu'}.json"
        file.write_text("[\n" + ",\n".join(f" {json.dumps(row)}" for row in rows) + "\n]\n", encoding="utf-8")
        print(f"Saved as {file.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
