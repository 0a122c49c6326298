"""The results files, read into one tree of numbers.

Benchmarks write a dated file a run, and the newest one of a CPU counts: `easycontrol-2026-11-21-cpu.json` is
`easycontrol`. What `training.measure` says of the embedded models is `quality-<name>.json`, and is called `<name>`.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from ..places import ROOT

RESULTS = ROOT / "benchmarks" / "results"
DATE = r"\d{4}-\d\d-\d\d"

# What the race calls "about a half": a part of the multiplications. The best setting in it counts.
RANGES = {"half": (0.45, 0.65), "third": (0.30, 0.41), "fifth": (0.19, 0.27)}
RACERS = {  # its row in the table: whose it is, the methods of the results file, and the one timed in FLUX.1's shape
    "fewer steps": ("ComfyUI", "Fewer steps", "Fewer steps"),
    "EasyCache, its input copied": ("ComfyUI", "EasyCache", "EasyCache"),
    "LazyCache": ("ComfyUI", "LazyCache", "LazyCache"),
    "TaylorSeer": ("diffusers", "TaylorSeer", "TaylorSeer"),
    "TaylorSeer Lite": ("diffusers", "TaylorSeer Lite", "TaylorSeer Lite"),
    "FirstBlockCache": ("diffusers", "FirstBlockCache", "FirstBlockCache"),
    "MagCache": ("diffusers", "MagCache", "MagCache"),
    "DBCache + Taylor": ("cache-dit", "DBCache + Taylor", "DBCache + Taylor"),
    "Accelerate DiT": ("ours", "Accelerate DiT", "Accelerate DiT"),
    "TaylorSeer order 2, last block": ("ours", "TaylorSeer order 2", "TaylorSeer order 1"),
    "TaylorSeer, prediction": ("ours", "TaylorSeer at the prediction", "TaylorSeer at the prediction"),
    "Confidence-Gated Taylor": ("ours", "Confidence-Gated Taylor", "Confidence-Gated Taylor"),
    "Delta-DiT": ("ours", "Delta-DiT", "Delta-DiT"),
}

Tree = dict[str, Any]


def newest(kind: str, folder: Path = RESULTS) -> Path | None:
    """The last results file of a benchmark on a CPU. The race has no name in front of its date."""
    front = f"{kind}-" if kind != "race" else ""
    found = [path for path in folder.glob("*.json") if re.fullmatch(rf"{front}{DATE}-cpu\.json", path.name)]
    return max(found, default=None, key=lambda path: path.name)


@cache
def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def run_rows(rows: list[dict], sampler: str, steps: int = 28, cfg: float = 1.0) -> list[dict]:
    """The rows of one run. Older files name neither steps nor guidance: they had 28 and none."""
    return [r for r in rows if (r["sampler"], r.get("of", 28), r.get("cfg", 1.0)) == (sampler, steps, cfg)]


def raced(rows: list[dict], sampler: str, steps: int = 28, cfg: float = 1.0) -> Tree:
    """For each racer its best row near a half, a third and a fifth, and its efficiency in FLUX.1's shape."""
    tree: Tree = {}
    judged = run_rows(rows, sampler, steps, cfg)
    for name, (whose, method, timed) in RACERS.items():
        peer = None if whose == "ours" else whose
        own = [row for row in judged if row["peer"] == peer]
        line: Tree = {"whose": whose}
        for part, (low, high) in RANGES.items():
            near = [row for row in of(own, method, "tiny_flux") if low <= row["computed"] <= high]
            if near:
                line[part] = max(near, key=lambda row: row["psnr_db"])
        timings = [row for row in rows if row["peer"] == peer]
        for row in of(timings, timed, "flux1-shape (random)"):
            line["efficiency"] = row["efficiency"]
        tree[name] = line
    return tree


def curves(report: dict) -> Tree:
    """What each method of the tuned race keeps at the fixed fractions, by run, then method and choice of settings."""
    tree: Tree = {}
    for line in report["curves"]:
        run = f"{line['sampler']}, {line['steps']} steps, cfg {line['cfg']:g}"
        whose = f" ({line['peer']})" if line["peer"] else ""
        kept = {name: value for name, value in line["at"].items() if value is not None}
        tree.setdefault(run, {})[f"{line['method']}{whose}, {line['choice']}"] = kept
    return tree


def of(rows: list[dict], method: str, model: str) -> list[dict]:
    return [row for row in rows if row["method"].split(",")[0] == method and row["model"] == model]


def tree(folder: Path = RESULTS) -> Tree:
    """All that pages may name."""
    found: Tree = {}
    for path in sorted(folder.glob("quality-*.json")):
        found[path.stem.removeprefix("quality-")] = read(path)
    if path := newest("race", folder):
        rows = read(path)
        found["race"] = raced(rows, "euler")
        found["race with dpmpp_2m"] = raced(rows, "dpmpp_2m")
        fast = [row for row in run_rows(rows, "euler") if row["method"] == "Accelerate DiT, fast"]
        found["race"]["Accelerate DiT, fast"] = fast[0]
    if path := newest("tuned", folder):
        report = read(path)
        found["race curves"] = curves(report) | {"pictures": report["pictures"], "lines": report["curves"]}
    if path := newest("easycontrol", folder):
        found["easycontrol cost"] = {f"{row['conditions']} {row['form']}": row for row in read(path)["rows"]}
    if path := newest("attention", folder):
        found["attention"] = {}
        for row in read(path):
            found["attention"].setdefault(row["method"], {})[str(row["tokens"])] = row
    if path := newest("dit4sr", folder):
        report = read(path)
        found["dit4sr cost"] = {
            ", ".join(filter(None, (row["form"], row["tap"], f"{row['interval']}"))): row for row in report["cost"]
        }
        found["dit4sr memory"] = report["memory"]
    if path := newest("dynamictrl", folder):
        found["dynamictrl cost"] = read(path)
    if path := newest("headless", folder):
        found["headless"] = read(path)
    if path := newest("workflows", folder):
        found["workflows"] = read(path)
    weights = [path.stat().st_size for path in (ROOT / "weights").rglob("*.safetensors")]
    found["weights"] = {"MB": sum(weights) / 1e6}
    return found


def look_up(path: str, found: Tree) -> float:
    """The number at `path`, parts between slashes. Raises KeyError with what is there instead."""
    here: Any = found
    for part in path.split("/"):
        if not isinstance(here, dict) or part not in here:
            known = ", ".join(here) if isinstance(here, dict) else "a number"
            raise KeyError(f"no figure '{path}': '{part}' is not among {known}")
        here = here[part]
    if isinstance(here, bool) or not isinstance(here, (int, float)):
        raise KeyError(f"'{path}' is not a number")
    return here
