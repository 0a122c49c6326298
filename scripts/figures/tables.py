"""Tables for the pages, by name. Each is made of results files alone, or of what the pack knows about itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import places, workflows
from . import results
from .results import Tree

Format = Callable[[float], str]


def decimals(digits: int, unit: str = "") -> Format:
    return lambda value: f"{value:.{digits}f}{unit}"


def percent(digits: int) -> Format:
    return lambda value: f"{100 * value:.{digits}f} %"


def trimmed(value: float) -> str:
    """In percent, with a decimal; all is 100 %."""
    return f"{100 * value:.1f} %".replace("100.0", "100")


FORMATS: dict[str, Format] = {
    "%": trimmed,
    "whole %": percent(0),
    "whole": decimals(0),
    "1 decimal": decimals(1),
    "2 decimals": decimals(2),
}


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], rule: str = "") -> str:
    lines = [head, *rows]
    text = [f"| {' | '.join(line)} |".replace("|  |", "| |").replace("|  |", "| |") for line in lines]
    return "\n".join([text[0], rule or "|---" * len(head) + "|", *text[1:]])


# Quality of the embedded models


@dataclass(frozen=True)
class Quality:
    """A table of the model card. rows and columns: what the page calls them, and their keys in the results file."""

    at: str
    corner: str
    rows: dict[str, str]
    columns: dict[str, tuple[str, Format]]

    def __call__(self, found: Tree) -> str:
        here = found
        for part in filter(None, self.at.split("/")):
            here = here[part]
        rows = []
        for title, key in self.rows.items():
            cells = ((here[key].get(name), shown) for name, shown in self.columns.values())
            rows.append([title, *("" if value is None else shown(value) for value, shown in cells)])
        return markdown([self.corner, *self.columns], rows)


ONE, WHOLE = percent(1), percent(0)
SCENE = {
    "all right": ("all", ONE),
    "object": ("object", ONE),
    "colour": ("colour", ONE),
    "position": ("position", ONE),
    "two objects": ("all, two objects", ONE),
    "doll and object": ("all, doll and object", ONE),
    "pattern": ("pattern", ONE),
    "garment": ("garment", ONE),
    "pose": ("pose", ONE),
    "hair length": ("hairstyle", ONE),
}
CONTROLLED = {
    "with the condition": "with",
    "without": "without",
    "with somebody else's": "somebody else's",
    "with an untrained LoRA": "untrained LoRA",
}
SUBJECT = "positive prompt only"
RESTORED = {
    "after the autoencoder": "autoencoder",
    "bicubic": "bicubic",
    "Lanczos": "Lanczos",
    "DiT4SR": "DiT4SR",
    "DiT4SR, somebody else's small picture": "somebody else's",
}
NEARNESS = {
    "PSNR, dB": ("PSNR, dB", decimals(2)),
    "SSIM": ("SSIM", decimals(3)),
    "edge distance, px": ("edge distance, px", decimals(2)),
}
DB = decimals(1, " dB")

QUALITY = {
    "prompts": Quality(
        "shipped/prompts",
        "",
        {
            "world's own pictures": "ground truth",
            "after the autoencoder": "autoencoder",
            "drawn, cfg 1": "cfg 1.0",
            "drawn, cfg 2.5": "cfg 2.5",
        },
        SCENE,
    ),
    "edges": Quality(
        "shipped/control: edge",
        "",
        CONTROLLED,
        {
            "edge distance, px": ("edge distance, pixels", decimals(2)),
            "edge F1": ("edge F1", decimals(2)),
            "silhouette IoU": ("silhouette IoU", decimals(2)),
            "all right": ("all", ONE),
            "pose": ("pose", ONE),
        },
    ),
    "pose": Quality(
        "shipped/control: pose",
        "",
        CONTROLLED,
        {"pose right": ("pose", ONE), "silhouette IoU": ("silhouette IoU", decimals(2)), "all right": ("all", ONE)},
    ),
    "subject": Quality(
        "shipped/control: subject",
        "",
        CONTROLLED,
        {
            "colours right": ("colour", ONE),
            "pattern": ("pattern", ONE),
            "garment": ("garment", ONE),
            "hair length": ("hairstyle", ONE),
        },
    ),
    "freecus, one doll": Quality(
        "freecus/one doll",
        "",
        {
            "prompt alone": "prompt alone",
            "FreeCus, positive prompt only": SUBJECT,
            "FreeCus, both prompts": "both prompts",
            "positive only, key scale 1.0": "positive only, key scale 1.0",
        },
        {
            "colours": ("colour", trimmed),
            "shirt": ("shirt", trimmed),
            "bottom": ("bottom", trimmed),
            "hair": ("hair", trimmed),
            "pattern": ("pattern", trimmed),
            "garment": ("garment", trimmed),
            "hair length": ("hairstyle", trimmed),
            "pose": ("pose", trimmed),
            "doll": ("doll", trimmed),
        },
    ),
    "freecus, with objects": Quality(
        "freecus/a doll, sometimes with an object beside it",
        "",
        {
            "prompt alone": "prompt alone",
            "FreeCus, positive prompt only": SUBJECT,
            "FreeCus, both prompts": "both prompts",
            "both prompts, key scale 1.3": "both prompts, key scale 1.3",
            "both prompts, key scale 1.6": "both prompts, key scale 1.6",
            "both prompts, shift *normal*": "both prompts, shift normal",
            "both prompts, shift *twice*": "both prompts, shift twice",
        },
        {
            "colours": ("colour", trimmed),
            "pattern": ("pattern", trimmed),
            "garment": ("garment", trimmed),
            "pose": ("pose", trimmed),
            "things right": ("object", trimmed),
        },
    ),
    "in context": Quality(
        "in_context",
        "",
        {
            "silent": "with, silent",
            "silent, left panel of another case: chance": "with, silent, left panel of another case",
            "silent, two separate 96 x 96 pictures, no LoRA": "two separate pictures",
            "silent, no LoRA, same canvas and seeds": "without, silent",
            "named": "with, named",
            "named, left panel of another case: chance": "with, named, left panel of another case",
            "named, no LoRA": "without, named",
            "given": "with, given",
            "given, another case's picture: chance": "with, given, left panel of another case",
            "given, no LoRA": "without, given",
        },
        {
            name: (name, WHOLE)
            for name in (
                *("outfit", "hair", "shirt", "bottom", "garment", "pattern", "skin", "dolls", "pose", "ground"),
            )
        },
    ),
    "try-on": Quality(
        "try_on",
        "",
        {
            "world's own pictures": "world's own pictures",
            "after the autoencoder": "after the autoencoder",
            "20 steps, cfg 2.5": "20 steps",
            "20 steps, cfg 1": "20 steps, cfg 1",
            "8 steps, cfg 2.5": "8 steps",
            "8 steps, cfg 1": "8 steps, cfg 1",
            "4 steps, cfg 1": "4 steps, cfg 1",
            "2 steps, cfg 1": "2 steps, cfg 1",
            "without both, 20 steps, cfg 2.5": "without",
            "with somebody else's garment": "somebody else's garment",
            "the same, judged by that garment": "the same, judged by that garment",
            "with untrained LoRAs": "untrained LoRA",
        },
        {
            "garment": ("garment", trimmed),
            "pose": ("pose", trimmed),
            "hair": ("hair", trimmed),
            "bottom": ("trousers or skirt", trimmed),
            "skin": ("skin", trimmed),
            "ground and things": ("ground and things", trimmed),
            "outside the mask": ("outside the mask, dB", DB),
            "under the mask": ("under the mask, dB", DB),
        },
    ),
    "prompts, SD3.5": Quality("dit4sr/prompts", "", {"cfg 1.0": "cfg 1.0", "cfg 2.5": "cfg 2.5"}, SCENE),
    "dit4sr, scenes": Quality("dit4sr/scenes", "scenes", RESTORED, NEARNESS),
    "dit4sr, photographs": Quality("dit4sr/photographs", "photographs", RESTORED, NEARNESS),
    "dynamictrl": Quality(
        "dynamictrl",
        "",
        {
            "the true clips": "the clips themselves",
            "after the autoencoder": "autoencoder",
            "DynamiCtrl": "DynamiCtrl",
            "without poses": "without poses",
            "somebody else's poses": "somebody else's",
        },
        {"pose error": ("pose error", ONE), "same doll": ("same doll", ONE)},
    ),
}


SETS = ("outfit", "shirt", "dolls", "outfit, given", "shirt, given")


def sets(found: Tree) -> str:
    """How many sets an In-Context LoRA needs: a row for each run of the training, by its step."""
    rows = []
    for count, steps in found["once"]["in_context"]["sets"].items():
        for step, line in steps.items():
            cells = ("" if line.get(name) is None else WHOLE(line[name]) for name in SETS)
            rows.append([count, step, *cells])
    head = ["sets", "steps", "outfit, silent", "shirt, silent", "dolls", "outfit, given", "shirt, given"]
    return markdown(head, sorted(rows, key=lambda row: (int(row[1]), int(row[0].split()[0].replace(",", "")))))


# Benchmarks


def race_cost(found: Tree) -> str:
    if "race cost" not in found:
        return "*Not measured yet: `python -m benchmarks.accelerators --part cost` writes the results file.*"
    rows = [
        [
            row["method"],
            row["peer"] or "ours",
            f"{row['computed']:.2f}",
            f"{row['speedup']:.2f}",
            f"{row['efficiency']:.2f}",
        ]
        for row in found["race cost"].values()
        if isinstance(row, dict) and "method" in row
    ]
    return markdown(["method", "whose", "computed", "speed-up", "efficiency"], rows)


def race_curves(found: Tree) -> str:
    """The race with the sampler and the number of steps that most people take, without guidance and with it."""
    if "race curves" not in found:
        return "*Not measured yet: `python -m benchmarks.accelerators --part quality` writes the results file.*"
    from dit_toolkit.benchmarks.race.curves import table

    pictures, lines = found["race curves"]["pictures"], found["race curves"]["lines"]
    counts = f"Settings were chosen on {pictures['calibration']} pictures and judged on {pictures['judged']} others."
    return f"{counts}\n\n{table([each for each in lines if (each['sampler'], each['steps']) == ('euler', 28)])}"


def race_runs(found: Tree) -> str:
    """Ours as they come, the best peer and fewer steps, for every sampler, number of steps and guidance scale."""
    if "race curves" not in found:
        return race_curves(found)
    from dit_toolkit.benchmarks.race.curves import summary

    return summary(found["race curves"]["lines"])


def race_elsewhere(found: Tree) -> str:
    """The same on the embedded SD3.5 model; the peers are ComfyUI's own caches."""
    if "race on SD3.5" not in found:
        return "*Not measured yet: `python -m benchmarks.accelerators --part quality --model SD3.5` does.*"
    from dit_toolkit.benchmarks.race.curves import summary

    return summary(found["race on SD3.5"]["lines"])


def autotune(found: Tree) -> str:
    if "autotune" not in found:
        return "*Not measured yet: `python -m benchmarks.autotune` writes the results file.*"
    rows = []
    for row in found["autotune"]["rows"]:
        default = row["default_db"]
        judged = f"{row['judged_db']:.1f}"
        ahead = default is not None and round(row["judged_db"], 1) > round(default, 1)
        rows.append(
            [
                f"{row['model']}, {row['sampler']}, CFG {row['cfg']:g}",
                f"{row['pictures']}",
                f"{row['floor']:g}",
                row["picked"].removeprefix("TaylorSeer, ").partition(", first_full")[0],
                f"{row['computed']:.2f}",
                f"**{judged}**" if ahead else judged,
                "" if default is None else f"{default:.1f}",
                f"{row['spent']:.1f}",
            ]
        )
    head = ["run", "tuned on", "floor", "picked", "computed", "judged, dB", "defaults, dB", "cost"]
    return markdown(head, rows)


def easycontrol(found: Tree) -> str:
    head = ["conditions", "form", "ms per step", "x no condition", "first step, ms", "max difference"]
    rows = []
    for row in found["easycontrol cost"].values():
        drift = "" if row["difference"] is None else f"{row['difference']:.1e}"
        times = f"{row['milliseconds']:.1f}", f"{row['relative']:.2f}", f"{row['first']:.1f}"
        rows.append([str(row["conditions"]), row["form"], *times, drift])
    return markdown(head, rows, "|---:|---|---:|---:|---:|---:|")


ATTENTION = {
    "CLEAR, radius 8": "CLEAR r=8",
    "CLEAR, radius 16": "CLEAR r=16",
    "CLEAR, radius 32": "CLEAR r=32",
    "CLEAR, radius 8, pooled by 4": "CLEAR r=8, cells of 4",
    "Re-ttention 1/32, period of 5": "Re-ttention 1/32, mean of a period of 5",
}


def attention(found: Tree) -> str:
    """A column for each number of tokens; where dense attention took too long, seconds instead of a ratio."""
    every = found["attention"]
    columns = {"1024": "1,024", "4096": "4,096 (1024 px)", "16384": "16,384 (2048 px)", "65536": "65,536 (4096 px)"}
    rows = [["dense", *(seconds(every["dense"][tokens]) for tokens in columns)]]
    for title, method in ATTENTION.items():
        cells = [gain(every[method][tokens]) if tokens in every[method] else "skipped" for tokens in columns]
        rows.append([title, *cells])
    return markdown(["picture tokens", *columns.values()], rows)


def seconds(row: dict) -> str:
    return f"{row['seconds']:.3g} s" if row["seconds"] is not None else row["note"].removesuffix(" a call")


def gain(row: dict) -> str:
    if row["speedup"] is None:
        return seconds(row)
    return f"{row['speedup']:#.2g} x, at most {row['bound']:#.2g}".replace(". x", " x").rstrip(".")


def dit4sr_cost(found: Tree) -> str:
    rows = []
    for row in found["dit4sr cost"].values():
        name = row["form"] if not row["tap"] else f"{row['form']} at the {row['tap']}, interval {row['interval']}"
        quality = "" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"
        rows.append([name, f"{row['computed']:.2f}", f"{row['milliseconds']:.0f}", f"{row['speedup']:.2f}", quality])
    head = ["form", "computed", "ms per step", "speed-up over DiT4SR", "PSNR, dB"]
    return markdown(head, rows, "|---|---:|---:|---:|---:|")


def dit4sr_memory(found: Tree) -> str:
    rows = []
    for row in found["dit4sr memory"]:
        if row["tile"]:
            whole = next(r for r in found["dit4sr memory"] if not r["tile"] and r["megapixels"] == row["megapixels"])
            cells = (f"{value / 1e6:.0f}" for value in (row["call"], whole["call"], row["run"], whole["run"]))
            rows.append([f"{row['megapixels']:.0f}", str(row["calls"]), *cells])
    head = ["megapixels", "tiles", "a tile, MB", "in one piece, MB", "run in tiles, MB", "run in one piece, MB"]
    return markdown(head, rows, "|---:|---:|---:|---:|---:|---:|")


def dynamictrl_cost(found: Tree) -> str:
    if "dynamictrl cost" not in found:
        return "*Not measured yet: `python -m benchmarks.dynamictrl` writes the results file.*"
    from dit_toolkit.benchmarks import dynamictrl

    report = found["dynamictrl cost"]
    parts = {
        "**Poses**": dynamictrl.pose_table(report["poses"]),
        "**Accelerators**": dynamictrl.acceleration_table(report["accelerators"]),
        "**Context windows**": dynamictrl.window_table(report["windows"]),
    }
    return "\n\n".join(f"{title}\n\n{text}" for title, text in parts.items())


def plot(kind: str, words: str) -> Callable[[Tree], str]:
    """The picture that a benchmark saved beside its newest results, addressed from docs/."""

    def made(_: Tree) -> str:
        path = results.newest(kind)
        picture = None if path is None else path.with_suffix(".png")
        if picture is None or not picture.is_file():
            return ""
        return f"![{words}](../benchmarks/results/{picture.name})"

    return made


def families(_: Tree) -> str:
    from ..families import table

    return table()


# Workflows

COMMON = {"clip_l.safetensors", "t5xxl_fp16.safetensors", "ae.safetensors"}  # README says where to get them
WHOLE_FOLDERS = {  # loaders of files that users make, or copy in whole folders
    "DiTLoadDiT4SR": "[DiT4SR](https://huggingface.co/acceptee/DiT4SR)",
    "DiTLoadDynamiCtrl": "[DynamiCtrl](https://huggingface.co/gulucaptain/DynamiCtrl)",
}


def needs(workflow: dict) -> str:
    links = {m["name"]: m["url"] for m in workflows.models_of(workflow) if m["name"] not in COMMON}
    shown = [f"[{name.removesuffix('.safetensors')}]({url})" for name, url in links.items()]
    kinds = {node["type"] for node in workflows.nodes_of(workflow)}
    if "DiTLoadEmbedded" not in kinds:
        shown += [text for kind, text in WHOLE_FOLDERS.items() if kind in kinds]
    return ", ".join(shown) or "nothing"


def workflow_table(found: Tree) -> str:
    """A row for each file, in the order of the template browser."""
    times, rows = found.get("workflows", {}), []
    for path in sorted(workflows.WORKFLOWS.glob("*.json"), key=lambda path: path.stem):
        if path.name.endswith(".app.json"):
            continue
        seconds = times.get(path.stem)
        rows.append([path.stem, needs(workflows.read(path.stem)), "" if seconds is None else f"{seconds:.0f}"])
    return markdown(["workflow", "needs", "seconds"], rows, "|---|---|---:|")


WAYS = {
    "directly": "queued directly on one server",
    "one server": "the command, the same server",
    "1 worker": "the command, one worker of its own",
    "2 workers": "the command, two workers",
    "1 worker, Ray": "one worker on Ray",
    "2 workers, Ray": "two workers on Ray",
}


def headless_ways(found: Tree) -> str:
    rows = []
    for name, title in WAYS.items():
        rounds = found["headless"]["ways"][name]

        def each(key: str, form: str, rounds=rounds) -> str:
            return ", ".join(f"{row[key]:{form}}" for row in rounds if key in row)

        driver = [row["driver_cpu"] / found["headless"]["jobs"] for row in rounds if "driver_cpu" in row]
        shown = ", ".join(f"{seconds:.3f}" for seconds in driver)
        rows.append([title, each("jobs_per_minute", ".0f"), each("server_cpu_per_job", ".2f"), shown])
    head = ["way", "jobs per minute", "processor seconds a job: ComfyUI", "the driver"]
    return markdown(head, rows, "|---|---:|---:|---:|")


def headless_scale(found: Tree) -> str:
    rows = []
    for row in found["headless"]["scale"]["workers"]:
        cells = f"{row['rows_per_second']:.1f}", f"{row['ideal']:.1f}", f"{1000 * row['driver_cpu_per_row']:.1f}"
        rows.append([f"{row['workers']:,}", *cells])
    head = ["workers", "rows per second", "if the driver took no time", "driver's processor time per row, ms"]
    return markdown(head, rows, "|---:|---:|---:|---:|")


def blueprints(_: Tree) -> str:
    found = sorted(places.BLUEPRINTS.glob("*.json"))
    return "\n".join(f"- *{path.stem}*" for path in found)


TABLES: dict[str, Callable[[Tree], str]] = {
    **QUALITY,
    "in context, sets": sets,
    "race, cost": race_cost,
    "race, curves": race_curves,
    "race, runs": race_runs,
    "autotune": autotune,
    "race, SD3.5": race_elsewhere,
    "race, plot": plot("tuned", "quality over the part that is computed, one line per method"),
    "easycontrol cost": easycontrol,
    "attention": attention,
    "dit4sr cost": dit4sr_cost,
    "dit4sr memory": dit4sr_memory,
    "dit4sr, plot": plot("dit4sr", "DiT4SR: speed with TaylorSeer, and memory over size"),
    "dynamictrl cost": dynamictrl_cost,
    "dynamictrl, plot": plot("dynamictrl", "DynamiCtrl: what poses cost, accelerators, and context windows"),
    "families": families,
    "workflows": workflow_table,
    "headless ways": headless_ways,
    "headless scale": headless_scale,
    "blueprints": blueprints,
}
NEEDS_COMFYUI = {"families"}


def pages(root: Path) -> list[Path]:
    return [root / "README.md", *sorted((root / "docs").glob("*.md")), root / "weights" / "README.md"]
