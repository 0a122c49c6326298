"""What the accelerators win and the nodes cost, measured here: a table per file, `results/` beside them. Not shipped.

    python -m benchmarks.accelerators   step caches against each other and against fewer steps, in `race/`
    python -m benchmarks.attention      sparse attention against dense attention
    python -m benchmarks.dit4sr         a step of DiT4SR with and without a step cache; memory with and without tiles
    python -m benchmarks.easycontrol    a step with conditions against a step without
    python -m benchmarks.load           how long ComfyUI waits for the pack when it starts

`make bench` runs all six. The repository is importable here as `dit_toolkit`, as in `scripts/`.
"""

import sys

if "dit_toolkit" not in sys.modules:  # run by `python -m`, from the repository's root
    import scripts  # noqa: F401  names the repository `dit_toolkit`
