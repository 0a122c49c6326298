"""The race: every step cache on the same model, prompts and sampler, against no cache and against fewer steps.

    python -m benchmarks.accelerators                    cost, and the race with euler and 28 steps: half an hour
    python -m benchmarks.accelerators --part quality --samplers euler dpmpp_2m heun --steps 28 20 40      hours
    python -m benchmarks.accelerators --part quality --model SD3.5 --cfg 1 3                 minutes
    python -m benchmarks.accelerators --only TaylorSeer  methods whose name begins so, next to fewer steps

Quality is judged on the embedded model, without a clock, each method with the settings that it documents and with those
that are best for it on other prompts. Cost is measured on random weights with all of FLUX.1's blocks. Rows and a plot
go to benchmarks/results. The race may be stopped and started again: what was measured is in .cache/race-tuned*.jsonl.
Delete the lines of a method that has changed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import sys
import time
from collections.abc import Callable

import torch

from dit_toolkit.scripts import places

RESULTS = places.ROOT / "benchmarks" / "results"
COST_STEPS = 10  # in which thresholds and intervals of three skip about two of three


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=["quality", "cost"], help="one of the two; else both")
    parser.add_argument("--model", choices=["FLUX.1", "SD3.5"], default="FLUX.1", help="the embedded model that races")
    parser.add_argument("--samplers", nargs="+", default=("euler",), metavar="NAME", help="of the race")
    parser.add_argument("--steps", type=int, nargs="+", default=(28,), help="of the race")
    parser.add_argument("--cfg", type=float, nargs="+", default=(1.0, 2.5), help="guidance scales; 1 is none")
    parser.add_argument("--pictures", type=int, default=6, help="that are judged")
    parser.add_argument("--calibration", type=int, default=4, help="others, that settings are chosen on")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each method")
    parser.add_argument("--only", nargs="+", default=(), metavar="METHOD", help="names, or how they begin")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args(argv)
    for name in ("steps", "pictures", "rounds", "calibration", "cfg"):
        values = getattr(options, name)
        for value in values if isinstance(values, (list, tuple)) else [values]:
            if not value >= 1:
                parser.error(f"--{name} must be at least 1, got {value}")
    return options


@torch.inference_mode()
def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    sys.path.append(str(places.comfyui()))
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    logging.getLogger().setLevel(logging.ERROR)

    from .race import grids

    start = time.monotonic()

    def note(words: str) -> None:
        print(f"{time.monotonic() - start:5.0f} s  {words}", file=sys.stderr, flush=True)

    try:
        methods = grids.chosen(options.only)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    device = torch.device("cpu" if args.cpu else "cuda")
    if options.part != "quality":
        cost(options, device, note)
    if options.part != "cost":
        quality(options, device, methods, note)
    return 0


def cost(options: argparse.Namespace, device: torch.device, note: Callable[[str], None]) -> None:
    """On a CPU with one thread, so that its own time can be told from that of other programs."""
    from .race import arena, report
    from .race import cost as costs

    if device.type == "cpu":
        torch.set_num_threads(1)
    shape, dtype = arena.SHAPES[device.type], torch.float32 if device.type == "cpu" else torch.bfloat16
    shaped = arena.flux1_shape(shape, dtype)
    rows: list[dict] = []

    def tell(row: dict) -> None:
        rows.append(row)
        note(json.dumps(row))

    costs.race(shaped, costs.chosen(options.only), COST_STEPS, options.rounds, 3, tell)
    print(f"{costs.table(rows)}\n")
    if not options.no_save and not options.only:
        found = {"shape": vars(shape), "dtype": str(dtype).removeprefix("torch."), "steps": COST_STEPS, "rows": rows}
        file = RESULTS / f"cost-{report.stem(datetime.date.today().isoformat(), device)}.json"
        RESULTS.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        note(f"saved as {file.name}")


def quality(options: argparse.Namespace, device: torch.device, methods: list, note: Callable[[str], None]) -> None:
    """Saved anew after every sampler, number of steps and guidance scale."""
    from .race import arena, curves, report, tuned

    kind = "tuned" if options.model == "FLUX.1" else f"tuned-{options.model}"
    tiny = arena.tiny(options.pictures, options.calibration, options.model)
    diary = tuned.Diary(places.CACHE / f"race-{kind}.jsonl")
    file = RESULTS / f"{kind}-{report.stem(datetime.date.today().isoformat(), device)}.json"
    if options.model != "FLUX.1":
        methods = [each for each in methods if not each.twin]  # diffusers' modules are FLUX.1's
    rows: list[dict] = []
    for steps in options.steps:
        for sampler in options.samplers:
            for cfg in options.cfg:
                tuned.race(tiny, methods, curves.Run(sampler, steps, cfg), diary, rows.append, note)
                if not options.no_save and not options.only:
                    tuned.save(rows, options.calibration, options.pictures, file)
                    note(f"saved as {file.name}")
    lines = curves.curves(rows)
    if not options.no_save and not options.only and kind == "tuned":
        first = list(dict.fromkeys(map(curves.run_of, lines)))[: len(options.cfg)]
        report.plot(lines, first, file.with_suffix(".png"))
    print(curves.table(lines))
    print(f"\n{curves.summary(lines)}")


if __name__ == "__main__":
    sys.exit(main())
