"""The race: every step cache on the same model, prompts and sampler, against no cache and against fewer steps.

    python -m benchmarks.accelerators                    everything, minutes on two CPU cores
    python -m benchmarks.accelerators --only TaylorSeer  methods whose name begins so, next to fewer steps
    python -m benchmarks.accelerators --part tuned       settings found on other prompts, without a clock: hours

Quality is judged on the embedded model, whose blocks are so cheap that a cache's own work shows. Speed is measured
there, and once more on random weights in FLUX.1's shape. Rows and a plot go to benchmarks/results. The tuned race may
be stopped and started again: what was measured is in .cache/race-tuned.jsonl. Delete that when a method has changed.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import os
import sys
import time

import torch

from dit_toolkit.scripts import places

RESULTS = places.ROOT / "benchmarks" / "results"
DIARY = places.CACHE / "race-tuned.jsonl"
SAMPLERS = ("euler", "dpmpp_2m")  # the second is of second order, and asks the model once a step as well
TUNED_SAMPLERS = (*SAMPLERS, "heun")  # the third asks it twice
STEPS, TUNED_STEPS = (28,), (28, 20, 40)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", help="28; when tuned also 20 and 40")
    parser.add_argument("--cfg", type=float, nargs="+", default=(1.0, 2.5), help="guidance scales; 1 is none")
    parser.add_argument("--pictures", type=int, default=8, help="with the first sampler; a quarter of them with others")
    parser.add_argument("--rounds", type=int, default=2, help="timed runs of each setting")
    parser.add_argument("--calibration", type=int, default=4, help="pictures that settings are chosen on when tuned")
    parser.add_argument("--samplers", nargs="+", metavar="NAME", help="euler and dpmpp_2m; when tuned also heun")
    parser.add_argument("--only", nargs="+", default=(), metavar="METHOD", help="names, or how they begin")
    parser.add_argument(
        "--part",
        choices=["quality", "cost", "tuned"],
        help="the embedded model, FLUX.1's shape, or tuned settings on the embedded model; else the first two",
    )
    parser.add_argument("--cost-steps", type=int, help="steps in FLUX.1's shape: 10 on a CPU, else as --steps")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args(argv)
    tuned = options.part == "tuned"
    options.steps = options.steps or (TUNED_STEPS if tuned else STEPS)
    options.samplers = options.samplers or (TUNED_SAMPLERS if tuned else SAMPLERS)
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

    from .race import arena, contenders, report, run

    device = torch.device("cpu" if args.cpu else "cuda")
    if options.part == "tuned":
        return tuned_race(options, device)
    try:
        chosen = contenders.chosen(options.only)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    rows: list[report.Row] = []
    start = time.monotonic()

    def tell(row: report.Row) -> None:
        rows.append(row)
        print(f"{time.monotonic() - start:5.0f} s  {report.cells(row)}", file=sys.stderr, flush=True)

    if options.part != "cost":
        tiny = arena.tiny(options.pictures)
        for i, sampler in enumerate(options.samplers):
            tiny.heats = tiny.heats[: options.pictures if i == 0 else max(1, options.pictures // 4)]
            for steps in options.steps:
                for cfg in options.cfg:
                    run.race(tiny, chosen, sampler, steps, options.rounds, 2, tell, cfg)
    if options.part != "quality":
        dtype = torch.bfloat16
        shaped = arena.flux1_shape(arena.SHAPES[device.type], dtype)
        scaled = [each.scaled() for each in chosen]
        steps = options.cost_steps or (10 if args.cpu else options.steps[0])
        run.race(shaped, scaled, "euler", steps, 2 if args.cpu else options.rounds, 3, tell)

    print(report.table(rows))
    print(f"\n{report.NOTES}")
    if not options.no_save:
        name = report.stem(datetime.date.today().isoformat(), device)
        for file in report.save(rows, RESULTS, name):
            print(f"Saved as {file.name}")
    return 0


def tuned_race(options: argparse.Namespace, device: torch.device) -> int:
    """Saved anew after every sampler, number of steps and guidance scale."""
    from .race import arena, curves, grids, report, tuned

    try:
        chosen = grids.chosen(options.only)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    tiny, diary = arena.tiny(options.pictures, options.calibration), tuned.Diary(DIARY)
    file = RESULTS / f"tuned-{report.stem(datetime.date.today().isoformat(), device)}.json"
    rows: list[dict] = []
    start = time.monotonic()

    def note(words: str) -> None:
        print(f"{time.monotonic() - start:5.0f} s  {words}", file=sys.stderr, flush=True)

    for steps in options.steps:
        for sampler in options.samplers:
            for cfg in options.cfg:
                tuned.race(tiny, chosen, curves.Run(sampler, steps, cfg), diary, rows.append, note)
                if not options.no_save and not options.only:
                    tuned.save(rows, options.calibration, options.pictures, file)
                    note(f"saved as {file.name}")
    print(curves.table(curves.curves(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
