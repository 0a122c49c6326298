"""The picture of a tuned race, and the names of results files."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch

from .curves import FRACTIONS, HEADS, Run, run_of


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def stem(date: str, device: torch.device) -> str:
    """Name of the files of a race, without their ending."""
    name = device_name(device) if device.type == "cuda" else "cpu"
    return f"{date}-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}"


def plot(lines: list[dict], runs: list[Run], file: Path) -> Path:
    """What is kept at the fixed fractions, a panel for each run. Ours are drawn through, the others dashed.

    lines: those of `curves.curves`. Of a method that has both, the tuned line is drawn.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    legend = 2.6  # inches
    width = 5.6 * len(runs) + legend
    figure, axes = pyplot.subplots(1, len(runs), figsize=(width, 6), squeeze=False, sharey=True)
    shown = [each for each in lines if run_of(each) in runs]
    names = list(dict.fromkeys(named(each) for each in shown))
    handles = {}
    for ax, run in zip(axes[0], runs, strict=True):
        best = {named(each): each for each in shown if run_of(each) == run}  # tuned comes last
        for name, line in best.items():
            points = [(1 / part, line["at"][which]) for which, part in FRACTIONS.items()]
            points = [(x, y) for x, y in points if y is not None]
            if points:
                (handles[name],) = ax.plot(*zip(*points, strict=True), label=name, **style_of(name, names))
        ax.set(xlabel="computed", title=run.title, xticks=[1 / part for part in FRACTIONS.values()])
        ax.set_xticklabels(HEADS)
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("PSNR to the picture without a cache, dB")
    figure.tight_layout(rect=(0, 0, 1 - legend / width, 1))
    figure.legend(handles.values(), handles.keys(), loc="center right", fontsize=8)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
    return file


def named(line: dict) -> str:
    return f"{line['method']} ({line['peer']})" if line["peer"] else line["method"]


def style_of(name: str, names: list[str]) -> dict:
    """Colour from one map for ours and another for the others; marks tell the lines of one colour apart."""
    from matplotlib import pyplot

    marks = "osD^vP*X<>"
    if name.startswith("Fewer steps"):
        return {"color": "black", "marker": "x", "linewidth": 2.5}
    own = not name.endswith(")")
    group = [each for each in names if each.endswith(")") != own]
    i = group.index(name)
    colour = pyplot.get_cmap("viridis" if own else "autumn")(0.85 * i / max(1, len(group) - 1))
    return {"color": colour, "marker": marks[i % len(marks)], "markersize": 5, "linestyle": "-" if own else "--"}
