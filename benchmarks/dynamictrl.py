"""What DynamiCtrl costs, and what accelerators and context windows do on it.

    python -m benchmarks.dynamictrl                all three parts, some minutes on a CPU
    python -m benchmarks.dynamictrl --part poses   one of them
    python -m benchmarks.dynamictrl --quick        small and short: to see that it runs, its figures mean nothing

Poses: a random CogVideoX 1.5 image-to-video runs single evaluations. In batch 2 both guidance branches are one call.
"x base" is over ComfyUI's own model without DynamiCtrl. "MiB" is what a call of the transformer holds at its worst
beyond the worst of the base, all tensors counted one by one; "streams" is the same in pose streams of one video.

Accelerators: the embedded CogVideoX brings held-out dolls to life, through the nodes and ComfyUI's sampler; without its
file, a random model of the same size. PSNR is that of the decoded clip to the clip of the same noise with nothing
skipped. Every method has its node's defaults, or the setting in its row. Nothing was tuned here, on these scenes and
seeds or on others, and no training saw the scenes.

Context windows: the random model of the first part, with poses, on a long clip.

Time is the processor's time on one thread, so other programs do not count. Forms take turns, in another order each
round. Ratios are medians over the rounds of the ratio to the base of the same round; in brackets the quartiles.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from dit_toolkit.scripts import places

from .attention import single_thread

RESULTS = places.ROOT / "benchmarks" / "results"
CHANNELS, PAIR, TOKEN = 16, 2, 2  # of a latent; latent frames of a token; cells along its sides
PARTS = ("poses", "accelerators", "windows")
MIB = 2**20

Row = dict[str, Any]
Model = Any  # ComfyUI's ModelPatcher
Key = TypeVar("Key", bound=Hashable)


# Time


def in_turn(forms: Sequence[Key], measure: Callable[[Key], float], rounds: int) -> dict[Key, list[float]]:
    """What each form takes, round by round: whatever else the machine does hits all forms alike."""
    taken: dict[Key, list[float]] = {form: [] for form in forms}
    for number in range(rounds):
        first = number % len(forms)
        for form in [*forms[first:], *forms[:first]]:
            taken[form].append(measure(form))
    return taken


def times(taken: list[float], base: list[float]) -> Row:
    """milliseconds, and its ratio to the base: relative, low, high."""
    ratios = [mine / peer for mine, peer in zip(taken, base, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else 3 * ratios
    return {
        "milliseconds": round(1000 * statistics.median(taken), 2),
        "relative": round(middle, 3),
        "low": round(low, 3),
        "high": round(high, 3),
    }


def shown_times(row: Row) -> str:
    return f"{row['milliseconds']:.1f} | {row['relative']:.2f} ({row['low']:.2f}-{row['high']:.2f})"


def clocked(model: Model, kind: str, seconds: list[float]) -> Model:
    """A clone that notes how long each call of this kind takes."""

    def clock(executor, *args, **kwargs):
        start = time.process_time()
        out = executor(*args, **kwargs)
        seconds.append(time.process_time() - start)
        return out

    model = model.clone()
    model.add_wrapper_with_key(kind, "bench", clock)
    return model


# A random model


@dataclass(frozen=True)
class Size:
    """Of a random CogVideoX, and of what it is given. height, width: of the latent; text: tokens."""

    heads: int = 4  # of 64 channels
    blocks: int = 6
    time_dim: int = 256
    text_dim: int = 256
    text: int = 226
    frames: int = 6
    height: int = 24
    width: int = 24

    @property
    def dim(self) -> int:
        return 64 * self.heads

    @property
    def tokens(self) -> int:
        """Of the video."""
        return self.frames // PAIR * (self.height // TOKEN) * (self.width // TOKEN)

    @property
    def stream(self) -> int:
        """Bytes of the pose stream of one video, in float32."""
        return 4 * self.tokens * self.dim


MODERATE = Size()
EMBEDDED = Size(heads=3, blocks=5, time_dim=64, text_dim=128, text=20, height=12, width=12)
SMALL = Size(heads=1, blocks=2, time_dim=32, text_dim=32, text=16, height=8, width=8)


def random_models(size: Size) -> tuple[Model, Model]:
    """A CogVideoX 1.5 image-to-video as ComfyUI loads it, and the same with pose norms. Random weights."""
    import comfy.model_management
    import comfy.ops
    import comfy.sd
    from comfy.ldm.cogvideo.model import CogVideoXTransformer3DModel

    from dit_toolkit.host.animate import dynamictrl_files
    from dit_toolkit.host.animate.cogvideox_sampling import mended
    from dit_toolkit.models.animate.dynamictrl import PoseNorms

    layers = {"operations": comfy.ops.disable_weight_init, "dtype": torch.float32, "device": "meta"}
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=size.heads, in_channels=2 * CHANNELS, time_embed_dim=size.time_dim,
        ofs_embed_dim=size.time_dim, text_embed_dim=size.text_dim, num_layers=size.blocks, patch_size_t=PAIR,
        use_rotary_positional_embeddings=True, sample_height=96, sample_width=170, sample_frames=81, **layers,
    )  # fmt: skip
    norms = PoseNorms(size.dim, size.time_dim, size.blocks, **layers)
    generator = torch.Generator().manual_seed(0)

    def filled(module: torch.nn.Module) -> dict[str, Tensor]:
        return {name: filling(name, weight) for name, weight in module.state_dict().items()}

    def filling(name: str, weight: Tensor) -> Tensor:
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim == 1:
            return 1 + 0.1 * noise if name.endswith("weight") else 0.1 * noise
        return noise / weight[0].numel() ** 0.5

    state, added = filled(transformer), filled(norms)
    base = mended(comfy.sd.load_diffusion_model_state_dict(dict(state)))
    posed = dynamictrl_files.from_state({**state, **added}, "random.safetensors").model
    comfy.model_management.load_models_gpu([base, posed])
    return base, posed


def randomly(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def video(seed: int, size: Size) -> Tensor:
    """A random latent."""
    return randomly(seed, 1, CHANNELS, size.frames, size.height, size.width)


def prompt(seed: int, size: Size, pose: Any = None) -> list:
    """CONDITIONING with a random text, a random picture, and the pose."""
    from dit_toolkit.host.animate.dynamictrl_conditions import with_pose
    from dit_toolkit.host.animate.dynamictrl_inputs import with_picture

    shown = torch.zeros(1, CHANNELS, size.frames, size.height, size.width)
    shown[:, :, :1] = randomly(2, 1, CHANNELS, 1, size.height, size.width)
    said = with_picture([[randomly(seed, 1, size.text, size.text_dim), {}]], shown)
    return said if pose is None else with_pose(said, pose)


def evaluated(model: Model, positive: list, negative: list, size: Size, batch: int) -> float:
    """Seconds of one evaluation. batch: 2 lets guidance ask for both prompts, in one call."""
    import comfy.sample
    from comfy.patcher_extension import WrappersMP

    seconds: list[float] = []
    noise = video(7, size)
    comfy.sample.sample(
        clocked(model, WrappersMP.PREDICT_NOISE, seconds), noise, 1, float(batch), "euler", "simple", positive,
        negative, torch.zeros_like(noise), disable_pbar=True, seed=0,
    )  # fmt: skip
    return seconds[0]


# What poses cost

BASE, WITHOUT, POSED = "base alone", "DynamiCtrl without poses", "poses"
SHARED, APART = "poses, one for both prompts", "poses, one for each prompt"
ZERO, OUTSIDE = "poses at strength 0", "poses outside of their part of the run"


class Posed(NamedTuple):
    """A form, and how many prompts a call has."""

    form: str
    batch: int


def posed_forms() -> list[Posed]:
    names = {1: (BASE, WITHOUT, POSED, ZERO, OUTSIDE), 2: (BASE, WITHOUT, SHARED, APART, ZERO, OUTSIDE)}
    return [Posed(name, batch) for batch, each in names.items() for name in each]


def poses_of(form: str, size: Size) -> tuple[Any, Any]:
    """Of the positive and of the negative prompt."""
    from dit_toolkit.host.animate.dynamictrl_settings import Pose
    from dit_toolkit.host.part_of_run import PartOfRun

    if form in (BASE, WITHOUT):
        return None, None
    if form == APART:
        return Pose(video(20, size)), Pose(video(20, size))
    values = {ZERO: {"strength": 0.0}, OUTSIDE: {"part": PartOfRun(0.9999, 1.0)}}
    pose = Pose(video(20, size), **values.get(form, {}))
    return pose, pose


@torch.inference_mode()
def pose_costs(size: Size, rounds: int) -> list[Row]:
    """A row per form and batch: form, batch, calls, computed, bytes, streams, and `times`.

    calls: of the transformer. computed: multiplications of all linear layers, over those of the base. bytes: the most
    that a call holds, beyond that of the base.
    """
    from dit_toolkit.host.transformer import transformer_of

    from .dit4sr import Calls
    from .race.measure import Memory, Multiplications

    base, posed = random_models(size)
    every = posed_forms()
    pairs = {form: poses_of(form.form, size) for form in every}
    prompts = {form: (prompt(3, size, one), prompt(4, size, other)) for form, (one, other) in pairs.items()}

    def run(form: Posed) -> float:
        return evaluated(base if form.form == BASE else posed, *prompts[form], size, form.batch)

    work, peak, calls = {}, {}, {}
    for form in every:  # to warm up, and everything that is not time
        with Multiplications() as counter:
            run(form)
        with Memory() as memory, (held := Calls(memory)).of(transformer_of(base if form.form == BASE else posed)):
            run(form)
        work[form], peak[form], calls[form] = counter.total, held.peak, held.count
    with single_thread():
        taken = in_turn(every, run, rounds)

    rows = []
    for form in every:
        peer = Posed(BASE, form.batch)
        rows.append({
            **form._asdict(),
            "calls": calls[form],
            "computed": round(work[form] / work[peer], 4),
            "bytes": peak[form] - peak[peer],
            "streams": round((peak[form] - peak[peer]) / size.stream, 2),
            **times(taken[form], taken[peer]),
        })  # fmt: skip
    return rows


def pose_table(rows: list[Row]) -> str:
    lines = ["| form | batch | computed | ms per evaluation | x base | MiB | streams |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        lines.append(
            f"| {row['form']} | {row['batch']} | {row['computed']:.3f} | {shown_times(row)} | {row['bytes'] / MIB:.2f} "
            f"| {row['streams']:.2f} |"
        )
    return "\n".join(lines)


# Accelerators

PLAIN, FEWER, TAYLOR = "nothing skipped", "fewer steps", "TaylorSeer"
SCENES = 71  # seed of the scenes; the model card has others


class Stage(Protocol):
    """A model, and clips to draw with it. given: positive, negative and the empty latent of each clip."""

    name: str
    model: Model
    given: list[tuple[list, list, Tensor]]

    def shown(self, latent: Tensor) -> np.ndarray:
        """`[F, H, W, 3]` in 0..1."""
        ...


class EmbeddedStage:
    """The embedded video model, and dolls whose movements it was not trained on."""

    name = "tiny_dynamictrl"

    def __init__(self, clips: int):
        from dit_toolkit.training.measure.dynamictrl import Animation, cases

        self.animation = Animation()
        self.model = self.animation.model
        self.given = []
        for case in cases(clips, SCENES):
            positive, negative, latent = self.animation.conditions(case.picture, case.poses, case.text)
            self.given.append((positive, negative, latent["samples"]))

    def shown(self, latent: Tensor) -> np.ndarray:
        return self.animation.frames(latent) / 255


class RandomStage:
    """A random model, where the file of the embedded one is missing. Its latents are shown as if they were colours."""

    name = "random"

    def __init__(self, clips: int, size: Size = EMBEDDED):
        from dit_toolkit.host.animate.dynamictrl_settings import Pose

        _, self.model = random_models(size)
        self.given = [
            (prompt(10 + k, size, pose), prompt(4, size, pose), torch.zeros_like(pose.latent))
            for k, pose in enumerate(Pose(video(20 + k, size)) for k in range(clips))
        ]

    def shown(self, latent: Tensor) -> np.ndarray:
        return (latent[0, :3] / 6 + 0.5).clamp(0, 1).movedim(0, -1).numpy()


def stage_of(clips: int) -> Stage:
    trained = places.ROOT / "weights" / "dynamictrl" / f"{EmbeddedStage.name}.safetensors"
    return EmbeddedStage(clips) if trained.is_file() else RandomStage(clips)


class Form(NamedTuple):
    """One way to draw. setting: in words. put: makes the accelerated MODEL. steps: of the sampler."""

    name: str
    setting: str
    steps: int
    put: Callable[[Model], Model]


def applied(kind: Any, **values: Any) -> Callable[[Model], Model]:
    """A node with its defaults, and these values."""
    defaults = {entry.id: entry.default for entry in kind.GET_SCHEMA().inputs if hasattr(entry, "default")}
    given = {**defaults, **values}
    return lambda model: kind.PREPARE_CLASS_CLONE(None).execute(**{**given, "model": model}).args[0]


def plain_form(steps: int) -> Form:
    return Form(PLAIN, f"{steps} steps", steps, lambda model: model)


def accelerated_forms(steps: int) -> list[Form]:
    from dit_toolkit.nodes.re_ttention import ApplyReTtention
    from dit_toolkit.nodes.sparse_attention import ApplyClear
    from dit_toolkit.nodes.step_cache import TaylorSeer

    from .race.contenders import with_easycache

    forms = [
        Form(TAYLOR, f"interval {by}", steps, applied(TaylorSeer, tap="prediction", interval=by)) for by in (2, 3, 5)
    ]
    default = 0.2  # of EasyCache's node
    forms.append(Form("EasyCache", f"threshold {default}", steps, lambda model: with_easycache(model, default)))
    # Of 36 tokens in a plane, a radius of 2 keeps up to 13. By default both leave so few tokens alone.
    forms.append(Form("CLEAR, mask only", "radius 2", steps, applied(ApplyClear, radius=2, min_tokens=0)))
    first = max(1, round(steps / 4))
    thin = applied(ApplyReTtention, min_tokens=0, first_full=first)
    forms.append(Form("Re-ttention", f"keep 0.0625, first full {first}", steps, thin))
    return forms


class Drawn(NamedTuple):
    """latent: `[1, 16, T, h, w]`. seconds: of the sampler's loop. evaluations: that were computed."""

    latent: Tensor
    seconds: float
    evaluations: int


def draw(stage: Stage, form: Form, clip: int, seed: int) -> Drawn:
    import comfy.sample
    from comfy.patcher_extension import WrappersMP

    from dit_toolkit.host.transformer import transformer_of
    from dit_toolkit.nodes.dynamictrl import CogVideoXSampling

    positive, negative, empty = stage.given[clip]
    seconds: list[float] = []
    # The clock goes on last, so it is innermost: hooks are there already.
    model = clocked(form.put(stage.model), WrappersMP.OUTER_SAMPLE, seconds)
    model, sampler, sigmas, *_ = CogVideoXSampling.execute(model, "DDIM", form.steps).result
    computed: list[None] = []
    hook = transformer_of(stage.model).blocks[0].register_forward_pre_hook(lambda *_: computed.append(None))
    try:
        latent = comfy.sample.sample_custom(
            model, comfy.sample.prepare_noise(empty, seed), 1.0, sampler, sigmas, positive, negative, empty,
            disable_pbar=True, seed=seed,
        )  # fmt: skip
    finally:
        hook.remove()
    return Drawn(latent, seconds[0], len(computed))


@torch.inference_mode()
def accelerations(stage: Stage, seeds: int, steps: int, rounds: int) -> list[Row]:
    """A row per form: form, setting, evaluations, computed, psnr_db, worst_db, and `times` of a clip.

    computed: multiplications of all linear layers, over those with nothing skipped. psnr_db: mean over the clips,
    worst_db: of the worst one. TaylorSeer has a peer with as many steps as it computes evaluations.
    """
    from .race.measure import Multiplications, psnr

    plain, runs = plain_form(steps), [(clip, seed) for clip in range(len(stage.given)) for seed in range(1, seeds + 1)]
    evaluations: dict[Form, float] = {}
    work: dict[Form, int] = {}
    likeness: dict[Form, list[float]] = {}
    wanted: dict[tuple[int, int], np.ndarray] = {}

    def look(form: Form) -> None:
        """Warms up as well."""
        with Multiplications() as counter:
            drawn = {run: draw(stage, form, *run) for run in runs}
        shown = {run: stage.shown(each.latent) for run, each in drawn.items()}
        if form == plain:
            wanted.update(shown)
        work[form] = counter.total
        evaluations[form] = statistics.fmean(each.evaluations for each in drawn.values())
        likeness[form] = [psnr(shown[run], wanted[run]) for run in runs]

    every = [plain, *accelerated_forms(steps)]
    for form in every:
        look(form)
    counts = dict.fromkeys(round(evaluations[form]) for form in every if form.name == TAYLOR)
    for count in counts:
        every.append(Form(FEWER, f"{count} steps", count, plain.put))
        look(every[-1])

    taken: dict[Form, list[float]] = {form: [] for form in every}
    with single_thread():
        for run in runs:
            one = in_turn(every, lambda form, run=run: draw(stage, form, *run).seconds, rounds)
            for form in every:
                taken[form] += one[form]
    return [
        {
            "form": form.name,
            "setting": form.setting,
            "evaluations": round(evaluations[form], 1),
            "computed": round(work[form] / work[plain], 3),
            "psnr_db": None if form == plain else round(statistics.fmean(likeness[form]), 1),
            "worst_db": None if form == plain else round(min(likeness[form]), 1),
            **times(taken[form], taken[plain]),
        }
        for form in every
    ]


def acceleration_table(rows: list[Row]) -> str:
    lines = ["| form | setting | evaluations | computed | ms per clip | x nothing skipped | PSNR, dB | worst |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        quality = (" | " if row[name] is None else f"{row[name]:.1f} | " for name in ("psnr_db", "worst_db"))
        lines.append(
            f"| {row['form']} | {row['setting']} | {row['evaluations']:g} | {row['computed']:.2f} | "
            f"{shown_times(row)} | {''.join(quality)}".rstrip()
        )
    return "\n".join(lines)


# Context windows


class Windows(NamedTuple):
    """A clip of so many latent frames, in windows; length 0: in one piece."""

    frames: int
    length: int
    overlap: int


def windowed(model: Model, windows: Windows) -> Model:
    """ComfyUI's own node, as DynamiCtrl needs it."""
    if not windows.length:
        return model
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    return applied(
        ContextWindowsManualNode, context_length=windows.length, context_overlap=windows.overlap, dim=2,
        context_schedule="standard_static", fuse_method="pyramid", causal_window_fix=False,
    )(model)  # fmt: skip


@torch.inference_mode()
def window_costs(size: Size, window: int, rounds: int) -> list[Row]:
    """Clips of one window and of three: frames, length, overlap, calls, computed, and `times` of a latent frame.

    calls: of the transformer. computed: multiplications of all linear layers for a frame, over those of a clip that is
    one window; `relative` likewise.
    """
    from dit_toolkit.host.animate.dynamictrl_settings import Pose
    from dit_toolkit.host.transformer import transformer_of

    from .race.measure import Multiplications

    long = 3 * window
    every = [Windows(window, 0, 0), Windows(long, 0, 0)]
    every += [Windows(long, window, overlap) for overlap in dict.fromkeys((0, PAIR, window // 2))]
    _, posed = random_models(size)
    sizes = {form: Size(**{**asdict(size), "frames": form.frames}) for form in every}
    prompts = {form: prompt(3, sizes[form], Pose(video(20, sizes[form]))) for form in every}
    calls: list[None] = []

    def run(form: Windows) -> float:
        return evaluated(windowed(posed, form), prompts[form], prompts[form], sizes[form], 1) / form.frames

    work, count = {}, {}
    hook = transformer_of(posed).register_forward_pre_hook(lambda *_: calls.append(None))
    for form in every:
        calls.clear()
        with Multiplications() as counter:
            run(form)
        work[form], count[form] = counter.total / form.frames, len(calls)
    hook.remove()
    with single_thread():
        taken = in_turn(every, run, rounds)
    return [
        {
            **form._asdict(),
            "calls": count[form],
            "computed": round(work[form] / work[every[0]], 3),
            **times(taken[form], taken[every[0]]),
        }
        for form in every
    ]


def window_table(rows: list[Row]) -> str:
    lines = ["| latent frames | windows of | overlap | calls | computed per frame | ms per frame | x one window |"]
    lines.append("|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        length, overlap = (row["length"], row["overlap"]) if row["length"] else ("one piece", "")
        lines.append(
            f"| {row['frames']} | {length} | {overlap} | {row['calls']} | {row['computed']:.2f} | {shown_times(row)} |"
        )
    return "\n".join(lines)


# Results


def plot(poses: list[Row], accelerators: list[Row], windows: list[Row], file: Path) -> Path:
    """Time over the base, quality over speed-up, and time per frame in windows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(16, 4.5))
    bars(left, poses, [f"{row['form']}, batch {row['batch']}" for row in poses])
    left.set(xlabel="time of an evaluation, x base", title="poses, a random model")
    for name in dict.fromkeys(row["form"] for row in accelerators if row["psnr_db"] is not None):
        line = [row for row in accelerators if row["form"] == name]
        speed, quality = [1 / row["relative"] for row in line], [row["psnr_db"] for row in line]
        middle.plot(speed, quality, marker="o", linestyle="--" if name == FEWER else "-", label=name)
    middle.set(xlabel="measured speed-up", ylabel="PSNR to nothing skipped, dB", title="accelerators")
    middle.grid(alpha=0.3)
    if middle.get_legend_handles_labels()[0]:
        middle.legend(fontsize=8)
    bars(right, windows, [window_name(row) for row in windows])
    right.set(xlabel="time of a latent frame, x one window", title="context windows, a random model")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
    return file


def bars(ax: Any, rows: list[Row], names: list[str]) -> None:
    """The ratios, the first row on top, with their quartiles."""
    at = range(len(rows))
    middle = [row["relative"] for row in rows]
    reach = [[row["relative"] - row["low"] for row in rows], [row["high"] - row["relative"] for row in rows]]
    ax.barh(at, middle, xerr=reach, color="tab:blue", ecolor="black", capsize=2)
    ax.set_yticks(at, names, fontsize=8)
    ax.invert_yaxis()
    ax.grid(alpha=0.3, axis="x")
    ax.axvline(1, color="black", linewidth=0.8)


def window_name(row: Row) -> str:
    if not row["length"]:
        return f"{row['frames']} frames in one piece"
    return f"{row['frames']} frames, windows of {row['length']}, overlap {row['overlap']}"


def save(report: Row, folder: Path = RESULTS) -> list[Path]:
    """dynamictrl-<date>-cpu.json and its plot. Returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"dynamictrl-{report['date']}-cpu.json"
    file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return [file, plot(*(report[part] for part in PARTS), file.with_suffix(".png"))]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, help="else all three")
    parser.add_argument("--steps", type=int, default=24, help="of a clip")
    parser.add_argument("--clips", type=int, default=2, help="scenes")
    parser.add_argument("--seeds", type=int, default=2, help="of the noise, for each scene")
    parser.add_argument("--rounds", type=int, default=9, help="timed runs of each form; a quarter of them for clips")
    parser.add_argument("--quick", action="store_true", help="small and short, nothing saved: to see that it runs")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args(argv)
    for name in ("steps", "clips", "seeds", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.quick:
        options.steps, options.clips, options.seeds, options.rounds, options.no_save = 8, 1, 1, 1, True
    return options


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    from dit_toolkit.training.comfyui import comfyui

    comfyui()  # on the CPU
    logging.getLogger().setLevel(logging.ERROR)
    size = SMALL if options.quick else MODERATE
    parts = PARTS if options.part is None else (options.part,)
    found: dict[str, list[Row]] = {part: [] for part in PARTS}
    name = None
    if "poses" in parts:
        found["poses"] = pose_costs(size, options.rounds)
        print(f"{size}: {size.tokens} tokens of the video, one CPU thread\n\n{pose_table(found['poses'])}\n")
    if "accelerators" in parts:
        stage = stage_of(options.clips)
        name = stage.name
        rounds = max(1, options.rounds // 4)
        found["accelerators"] = accelerations(stage, options.seeds, options.steps, rounds)
        clips = f"{options.clips} scenes with {options.seeds} seeds each"
        print(f"{name}, {clips}, DDIM, one CPU thread\n\n{acceleration_table(found['accelerators'])}\n")
    if "windows" in parts:
        found["windows"] = window_costs(size, 4 if options.quick else 8, options.rounds)
        print(window_table(found["windows"]))
    if not options.no_save:
        report = {
            "benchmark": "dynamictrl",
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "size": asdict(size),
            "model": name,
            **{each: getattr(options, each) for each in ("steps", "clips", "seeds", "rounds")},
            **found,
        }
        for file in save(report):
            print(f"Saved as {file.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
