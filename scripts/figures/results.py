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

Tree = dict[str, Any]


def newest(kind: str, folder: Path = RESULTS) -> Path | None:
    """The last results file of a benchmark on a CPU."""
    found = [path for path in folder.glob("*.json") if re.fullmatch(rf"{re.escape(kind)}-{DATE}-cpu\.json", path.name)]
    return max(found, default=None, key=lambda path: path.name)


@cache
def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def curves(report: dict) -> Tree:
    """What each method of the tuned race keeps at the fixed fractions, by run, then method and choice of settings."""
    tree: Tree = {}
    for line in report["curves"]:
        run = f"{line['sampler']}, {line['steps']} steps, cfg {line['cfg']:g}"
        whose = f" ({line['peer']})" if line["peer"] else ""
        kept = {name: value for name, value in line["at"].items() if value is not None}
        tree.setdefault(run, {})[f"{line['method']}{whose}, {line['choice']}"] = kept
    return tree


def autotuned(rows: list[dict]) -> Tree:
    """All rows, and how often and by how much they beat the defaults, for each number of pictures tuned on."""
    tree: Tree = {"rows": rows}
    for count in sorted({row["pictures"] for row in rows}):
        gains = [row["judged_db"] - row["default_db"] for row in rows if row["pictures"] == count and row["default_db"]]
        won, lost = (sum(sign * gain > 0.05 for gain in gains) for sign in (1, -1))
        tree[str(count)] = {"of": len(gains), "won": won, "lost": lost, "gain": sum(gains) / max(len(gains), 1)}
    return tree


def tree(folder: Path = RESULTS) -> Tree:
    """All that pages may name."""
    found: Tree = {}
    for path in sorted(folder.glob("quality-*.json")):
        found[path.stem.removeprefix("quality-")] = read(path)
    if path := newest("cost", folder):
        report = read(path)
        names = {
            row["method"] if row["peer"] is None else f"{row['method']} ({row['peer']})": row for row in report["rows"]
        }
        found["race cost"] = names | {"shape": report["shape"], "steps": report["steps"]}
    if path := newest("tuned", folder):
        report = read(path)
        found["race curves"] = curves(report) | {"pictures": report["pictures"], "lines": report["curves"]}
    if path := newest("tuned-SD3.5", folder):
        report = read(path)
        found["race on SD3.5"] = curves(report) | {"pictures": report["pictures"], "lines": report["curves"]}
    if path := newest("autotune", folder):
        found["autotune"] = autotuned(read(path))
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
