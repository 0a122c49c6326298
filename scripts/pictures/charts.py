"""Drawings that need no model: what a method does, and plots of results files. Words are large."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from ..figures import results
from ..places import ROOT
from . import sheet
from .studio import Picture, Studio

INCHES = 5.64, 3.9  # at 100 dots an inch
BLUE, ORANGE, RED, GREY = "#2f6fd0", "#e8862a", "#c8402f", "#e4e7ec"


def plotted(draw, size: tuple[float, float] = INCHES) -> Picture:
    """What `draw(axes)` draws with matplotlib, in letters that can be read at half the size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"font.size": 20, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = pyplot.subplots(figsize=size, dpi=100)
        draw(axes)
        figure.tight_layout()
        data = io.BytesIO()
        figure.savefig(data, format="png")
        pyplot.close(figure)
    return Image.open(data).convert("RGB")


def clear_patterns(_: Studio) -> Picture:
    """What one token of a picture of 1024 pixels sees, and the share of all pairs that is kept, text included."""
    from dit_toolkit.models.accelerate import sparse_attention as core

    grid, asked = core.Grid(64, 64, before=512), (28, 30)
    patterns = {
        "radius 8": core.Disc(8),
        "radius 16": core.Disc(16),
        "radius 32": core.Disc(32),
        "8 and cells of 4": core.PooledDisc(8, 4),
    }
    cells, labels = [], []
    for name, pattern in patterns.items():
        made = Image.new("RGB", (64, 64), GREY)
        cell = pattern.pool
        for y in range(64):
            for x in range(64):
                if (y - asked[0]) ** 2 + (x - asked[1]) ** 2 < pattern.radius**2:
                    made.putpixel((x, y), (0x2F, 0x6F, 0xD0))
                elif cell > 1 and (y // cell + x // cell) % 2:
                    made.putpixel((x, y), (0xB9, 0xD0, 0xF2))
        large = made.resize((276, 276), Image.Resampling.NEAREST)
        at = [round((n + 0.5) * 276 / 64) for n in reversed(asked)]
        ImageDraw.Draw(large).ellipse((at[0] - 7, at[1] - 7, at[0] + 7, at[1] + 7), fill=ORANGE)
        cells.append(large)
        labels.append(f"{name}: {100 * core.kept_ratio(pattern, grid):.0f} %")
    return sheet.sheet(cells, labels)


def cogvideox_steps(_: Studio) -> Picture:
    """How much of the latent is picture at each of 25 steps, from CogVideoX's own noise levels."""
    from dit_toolkit.models.animate.cogvideox_sampling import trailing

    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    root = np.sqrt(np.cumprod(1 - betas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])  # zero terminal SNR
    share = [100 * root[at] for at in trailing(25)]

    def draw(axes):
        axes.plot(range(1, 26), share, marker="o", color=BLUE)
        axes.set(xlabel="step of 25", ylabel="picture, %", ylim=(-3, 103))
        axes.annotate("pure noise", (1, 0), (2.5, 42), arrowprops={"arrowstyle": "->"})
        axes.grid(alpha=0.3)

    return plotted(draw)


def dit4sr_tiles(_: Studio) -> Picture:
    """How a picture of 1024 x 768 is cut, and how much each tile counts where: a colour for each tile."""
    from dit_toolkit.models.restore.dit4sr_tiles import weights, windows

    colours = np.array([[230, 90, 80], [70, 130, 230], [80, 190, 110], [240, 170, 50], [150, 90, 200], [60, 190, 190]])
    height, width = 96, 128
    total, weight = np.zeros((height, width, 3)), np.zeros((height, width, 1))
    cuts = windows((height, width), 64, 24)
    for number, window in enumerate(cuts):
        share = weights(window.height, window.width).numpy()[..., None]
        where = np.s_[window.top : window.top + window.height, window.left : window.left + window.width]
        total[where] += share * colours[number % len(colours)]
        weight[where] += share
    made = Image.fromarray((total / weight).round().astype(np.uint8)).resize((564, 423), Image.Resampling.BICUBIC)
    draw, scale = ImageDraw.Draw(made), 564 / width
    for window in cuts:
        box = (window.left, window.top, window.left + window.width, window.top + window.height)
        draw.rectangle([round(side * scale) - (side > 0) for side in box], outline="white", width=2)
    return made


def dynamictrl_stream(_: Studio) -> Picture:
    """The pose video passes the same embedding as the video; in each block its norm is added to the video's."""
    made = Image.new("RGB", (564, 520), "white")
    draw = ImageDraw.Draw(made)

    def box(left: int, top: int, text: str, fill: str, wide: int = 250, high: int = 74) -> None:
        draw.rounded_rectangle((left, top, left + wide, top + high), 12, fill=fill, outline="#445")
        for number, line in enumerate(lines := text.split("\n")):
            at = top + high / 2 + (number - (len(lines) - 1) / 2) * 28
            draw.text((left + wide / 2, at), line, fill=sheet.INK, font=sheet.font(24), anchor="mm")

    def arrow(start: tuple[int, int], end: tuple[int, int]) -> None:
        draw.line((*start, *end), fill="#445", width=3)
        along = (0, -1) if start[0] == end[0] else (-1, 0)
        x, y = end
        wing = [(x - 8, y + 12 * along[1]), (x + 8, y + 12 * along[1])] if along[1] else \
               [(x + 12 * along[0], y - 8), (x + 12 * along[0], y + 8)]  # fmt: skip
        draw.polygon([end, *wing], fill="#445")

    box(12, 10, "noise, picture", "#d6e6fb")
    box(302, 10, "pose video", "#fbe3cc")
    box(12, 128, "VAE and patch embedding, the same for both", "#eceff3", 540)
    arrow((137, 84), (137, 128))
    arrow((427, 84), (427, 128))
    for number, name in enumerate(("block 1", "block 42")):
        top = 246 + number * 118
        box(12, top, f"{name}:\nnorm, attention, MLP", "#d6e6fb")
        box(352, top, "pose norm", "#fbe3cc", 200)
        arrow((352, top + 37), (262, top + 37))
        draw.text((307, top + 18), "+", fill=sheet.INK, font=sheet.font(28), anchor="mm")
        arrow((137, top - 44), (137, top))
        arrow((452, top - 44), (452, top))
    box(12, 456, "video", "#d6e6fb", high=52)
    arrow((137, 438), (137, 456))
    return made


def panel_layouts(_: Studio) -> Picture:
    """The ten published canvases, each as large as fits."""
    from dit_toolkit.models.control.panel_layout import PRESETS

    cells, labels = [], []
    for name, preset in PRESETS.items():
        scale = min(250 / (preset.columns * preset.width), 146 / (preset.rows * preset.height))
        made = Image.new("RGB", (278, 150), "white")
        wide, high = preset.width * scale, preset.height * scale
        left, top = (278 - wide * preset.columns) / 2, (150 - high * preset.rows) / 2
        draw = ImageDraw.Draw(made)
        for row in range(preset.rows):
            for column in range(preset.columns):
                x, y = left + column * wide, top + row * high
                fill = ("#cfe0f8", "#f8dcc0", "#d9eedd", "#eadcf3")[(row * preset.columns + column) % 4]
                draw.rectangle((x, y, x + wide, y + high), fill=fill, outline="#556")
        size = f"{preset.columns * preset.width} x {preset.rows * preset.height}"
        sheet.words(draw, size, (0, 0, 278, 150), 24, "#222222")
        cells.append(made)
        labels.append(name)
    return sheet.sheet(cells, labels, size=22)


def training_gradients(_: Studio) -> Picture:
    """Cosine of the LoRA's gradients with the right ones, from the results of one step."""
    found = results.tree()["once"]["training gradients"]

    def draw(axes):
        depths = ["1", "2", "3"]
        for number, (name, colour) in enumerate({"batch 1": ORANGE, "batch 4": RED}.items()):
            at = [n + 0.36 * number - 0.18 for n in range(3)]
            middle = [found[name][depth]["median"] for depth in depths]
            least = [found[name][depth]["smallest"] for depth in depths]
            axes.bar(at, middle, 0.34, color=colour, label=f"{name}, without")
            axes.plot(at, least, "v", color="black", markersize=9)
        axes.axhline(1, color=BLUE, linewidth=4)
        axes.text(2.5, 1.04, "with the node", ha="right", color=BLUE)
        axes.set(xticks=range(3), xticklabels=[f"depth {d}" for d in depths], ylim=(-0.7, 1.25), ylabel="cosine")
        axes.legend(fontsize=16, loc="lower right", framealpha=0.9)

    return plotted(draw, (5.64, 4.6))


def race_plot(_: Studio) -> Picture:
    """As `benchmarks.accelerators` saves it, from its newest results file: the first sampler and number of steps."""
    from dit_toolkit.benchmarks.race import curves, report

    path = results.newest("tuned")
    lines = results.read(path)["curves"]
    first = curves.run_of(lines[0])
    runs = [run for run in dict.fromkeys(map(curves.run_of, lines)) if (run.sampler, run.steps) == first.key[:2]]
    return Image.open(report.plot(lines, runs, path.with_suffix(".png"))).convert("RGB")


def dit4sr_plot(_: Studio) -> Picture:
    from dit_toolkit.benchmarks import dit4sr

    path = results.newest("dit4sr")
    found = results.read(path)
    return Image.open(dit4sr.plot(found["cost"], found["memory"], path.with_suffix(".png"))).convert("RGB")


def dynamictrl_plot(_: Studio) -> Picture:
    from dit_toolkit.benchmarks import dynamictrl

    path = results.newest("dynamictrl")
    found = results.read(path)
    made = dynamictrl.plot(*(found[part] for part in dynamictrl.PARTS), path.with_suffix(".png"))
    return Image.open(made).convert("RGB")


PLOTS = {"tuned": race_plot, "dit4sr": dit4sr_plot, "dynamictrl": dynamictrl_plot}


def files() -> dict[str, Callable[[Studio], Picture]]:
    plots = {}
    for kind, function in PLOTS.items():
        if path := results.newest(kind):
            plots[str(path.with_suffix(".png").relative_to(ROOT))] = function
    return {
        "web/docs/cogvideox_steps.jpg": cogvideox_steps,
        "web/docs/training.jpg": training_gradients,
        "docs/pictures/clear_patterns.png": clear_patterns,
        "docs/pictures/dit4sr_tiles.png": dit4sr_tiles,
        "docs/pictures/dynamictrl_stream.png": dynamictrl_stream,
        "docs/pictures/panel_layouts.png": panel_layouts,
        **plots,
    }
