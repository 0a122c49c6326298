"""What a race leaves behind: rows as data, a plot of quality over speed, and a table for people."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

MB = 1e6


@dataclass(frozen=True)
class Row:
    """One contender at one setting. `foreground_db` is for the table; everything else is data.

    peer: whose it is, None for ours. computed: part of the multiplications of all linear layers that ran, so that a
    gate's own block and a model's head count as what they are. speedup: over the same modules without a cache.
    efficiency: `speedup` over the ideal one, `1 / computed`. of: the steps of the run that was to be made cheaper;
    fewer steps have fewer `steps`. cfg: scale of the guidance, 1 for none. Pictures: None when there is none, or no
    difference.
    """

    method: str
    peer: str | None
    model: str
    sampler: str
    steps: int
    computed: float
    speedup: float
    psnr_db: float | None
    foreground_db: float | None
    ssim: float | None
    extra_bytes: int
    of: int = 28
    cfg: float = 1.0

    @property
    def name(self) -> str:
        """The method without its setting, and whose it is."""
        name = self.method.split(",")[0]
        return f"{name} ({self.peer})" if self.peer else name

    @property
    def efficiency(self) -> float:
        return self.speedup * self.computed

    def data(self) -> dict:
        return {
            "method": self.method,
            "peer": self.peer,
            "model": self.model,
            "sampler": self.sampler,
            "steps": self.steps,
            "of": self.of,
            "cfg": self.cfg,
            "computed": round(self.computed, 4),
            "speedup": round(self.speedup, 3),
            "efficiency": round(self.efficiency, 3),
            "psnr_db": rounded(self.psnr_db, 2),
            "ssim": rounded(self.ssim, 4),
            "extra_mb": round(self.extra_bytes / MB, 3),
        }


def rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def stem(date: str, device: torch.device) -> str:
    """Name of the files of a race, without their ending."""
    name = device_name(device) if device.type == "cuda" else "cpu"
    return f"{date}-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}"


def save(rows: list[Row], folder: Path, name: str) -> list[Path]:
    """The rows as JSON, and their plot where there is a picture to judge. Returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    lines = ",\n".join(f"  {json.dumps(row.data())}" for row in rows)
    file.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    judged = [row for row in rows if row.psnr_db is not None and not row.method.startswith("No cache")]
    return [file, plot(judged, folder / f"{name}.png")] if judged else [file]


def grouped(rows: Iterable[Row], key) -> dict:
    groups: dict = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def run_of(row: Row) -> tuple[str, str, int, float]:
    """What rows have in common that may be compared."""
    return row.model, row.sampler, row.of, row.cfg


def title_of(model: str, sampler: str, steps: int, cfg: float) -> str:
    return f"{model}, {sampler}, {steps} steps, cfg {cfg:g}"


def plot(rows: list[Row], file: Path) -> Path:
    """Quality over speed-up, one line per method, one panel per run. Ours are drawn through, the others dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = grouped(rows, run_of)
    legend = 2.8  # inches
    width = 5.6 * len(panels) + legend
    figure, axes = pyplot.subplots(1, len(panels), figsize=(width, 6), squeeze=False, sharey=True)
    names = list(dict.fromkeys(row.name for row in rows))
    ours = [name for name in names if not name.endswith(")")]
    handles = {}
    for ax, (run, members) in zip(axes[0], panels.items(), strict=True):
        for name, line in grouped(members, lambda row: row.name).items():
            line = sorted(line, key=lambda row: -row.computed)
            speed, quality = [row.speedup for row in line], [row.psnr_db for row in line]
            (handles[name],) = ax.plot(speed, quality, label=name, **style_of(name, names, ours))
        ax.set(xlabel="measured speed-up", title=title_of(*run))
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("PSNR to the picture without a cache, dB")
    figure.tight_layout(rect=(0, 0, 1 - legend / width, 1))
    figure.legend(handles.values(), handles.keys(), loc="center right", fontsize=8)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
    return file


def style_of(name: str, names: list[str], ours: list[str]) -> dict:
    """Colour from one map for ours and another for the others; marks tell the lines of one colour apart."""
    from matplotlib import pyplot

    marks = "osD^vP*X<>"
    if name.startswith("Fewer steps"):
        return {"color": "black", "marker": "x", "linewidth": 2.5}
    if name in ours:
        i = ours.index(name)
        colour = pyplot.get_cmap("viridis")(0.9 * i / max(1, len(ours) - 1))
        return {"color": colour, "marker": marks[i % len(marks)], "markersize": 5}
    peers = [each for each in names if each not in ours]
    i = peers.index(name)
    colour = pyplot.get_cmap("autumn")(0.8 * i / max(1, len(peers) - 1))
    return {"color": colour, "marker": marks[i % len(marks)], "markersize": 5, "linestyle": "--"}


HEAD = "| method | whose | computed | speed-up | efficiency | PSNR, dB | foreground, dB | SSIM | extra MB |"
RULE = "|---|---|---:|---:|---:|---:|---:|---:|---:|"


def table(rows: list[Row]) -> str:
    """Markdown, one table for each model, sampler, steps and cfg, fewest computed last."""
    parts = []
    for run, members in grouped(rows, run_of).items():
        parts.append(f"**{title_of(*run)}**\n\n{HEAD}\n{RULE}")
        parts[-1] += "".join(f"\n{cells(row)}" for row in sorted(members, key=lambda row: -row.computed))
    return "\n\n".join(parts)


def cells(row: Row) -> str:
    def shown(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    return (
        f"| {row.method} | {row.peer or 'ours'} | {row.computed:.2f} | {row.speedup:.2f} | {row.efficiency:.2f} | "
        f"{shown(row.psnr_db, 1)} | {shown(row.foreground_db, 1)} | {shown(row.ssim, 4)} | {row.extra_bytes / MB:.2f} |"
    )


NOTES = """\
computed: part of the multiplications of all linear layers that ran. speed-up: over the same modules without a cache, \
in the sampler's loop. efficiency: speed-up over the ideal one, 1 / computed. PSNR and SSIM: of the picture, to \
ComfyUI's without a cache, mean over the pictures; foreground: without the flat ground. EasyCache runs with its input \
copied: it adds in place, and on ComfyUI 0.30.0 that spoils float32 runs. Caches of diffusers and cache-dit run in \
diffusers' modules with the same weights, under ComfyUI's sampler."""
