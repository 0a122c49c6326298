"""What DiT4SR costs: time of a step with and without a step cache, and memory over the size of the picture.

    python -m benchmarks.dit4sr                    both parts, some minutes on a CPU
    python -m benchmarks.dit4sr --part memory
    python -m benchmarks.dit4sr --megapixels 1 64  sizes of your own

Time: the embedded SD3.5 model brings back held-out photographs, worn and made four times smaller, through the nodes and
ComfyUI's sampler. The processor's time on one thread counts, so other programs do not. "x base" is over the model
without DiT4SR, in one piece. PSNR is that of the picture to the one without a cache.

Memory: bytes of all tensors that are made and alive, counted one by one, the same on every machine. A random model in
SD3.5's layout runs one step. "call" is the most that a call of the transformer holds beyond what was there before it,
"run" the most of the whole run, which holds some latents of the picture's size in any case. Weights are left out, and
so is the VAE. Attention hands back its queries: fused kernels hold nothing of the picture's size but their result, and
at 16 megapixels they would take an hour.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dit_toolkit.scripts import places

from .attention import single_thread

RESULTS = places.ROOT / "benchmarks" / "results"
MEGAPIXELS = (1, 2, 4, 8, 16)
TILE, OVERLAP = 64, 24  # of the node
CELL, TOKEN = 8, 16  # pixels
BASE, PLAIN, WHOLE = "base alone", "DiT4SR", "DiT4SR, one piece"
MIB = 2**20

Row = dict[str, Any]
Model = Any  # ComfyUI's ModelPatcher


# Time


class Form(NamedTuple):
    """One way to draw. `peer` is the row that its picture and its time are compared with."""

    name: str
    tap: str
    interval: int
    peer: str
    put: Callable[[Model], Model]


def forms() -> list[Form]:
    from dit_toolkit.nodes.step_cache import TaylorSeer

    defaults = {entry.id: entry.default for entry in TaylorSeer.GET_SCHEMA().inputs if hasattr(entry, "default")}

    def cached(tap: str, interval: int) -> Callable[[Model], Model]:
        values = {**defaults, "tap": tap, "interval": interval}
        return lambda model: TaylorSeer.PREPARE_CLASS_CLONE(None).execute(**{**values, "model": model}).args[0]

    plain = [Form(name, "", 1, PLAIN, lambda model: model) for name in (BASE, WHOLE, PLAIN)]
    settings = ((tap, interval) for tap in ("prediction", "last block") for interval in (2, 3))
    return plain + [Form(f"{PLAIN}, TaylorSeer", tap, by, PLAIN, cached(tap, by)) for tap, by in settings]


class Stage:
    """The embedded SD3.5 model, and worn photographs that its patch was not trained on."""

    def __init__(self, pictures: int, steps: int):
        from dit_toolkit.training.measure.dit4sr import Upscaler, photos

        self.upscaler, self.cases, self.steps = Upscaler(steps), photos(pictures), steps

    def made(self, form: Form, picture: int) -> tuple[Model, Tensor]:
        """The MODEL that restores this picture, and the latent that it begins with."""
        from dit_toolkit.training.measure.dit4sr import FACTOR, TILES

        tiles = {**TILES, "tile": 0} if form.name == WHOLE else TILES
        given = {"upscale_by": float(FACTOR), "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
        up, image = self.upscaler, torch.from_numpy(self.cases[picture].small)[None] / 255
        patched, latent, *_ = up.apply.execute(
            model=up.model, dit4sr=up.patch, vae=up.vae, image=image, cross_stream_scale=1.0, **given, **tiles
        ).result
        return form.put(up.model if form.name == BASE else patched), latent["samples"]

    def draw(self, form: Form, picture: int) -> tuple[Tensor, float]:
        """The latent, and seconds of the sampler's loop."""
        import comfy.sample
        from comfy.patcher_extension import WrappersMP

        model, latent = self.made(form, picture)
        model, sampler, sigmas, cfg = self.upscaler.sampling.execute(model, self.steps, self.upscaler.cfg, 3.0).result
        seconds = []

        def clock(executor, *args, **kwargs):
            start = time.process_time()
            out = executor(*args, **kwargs)
            seconds.append(time.process_time() - start)
            return out

        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "bench", clock)  # innermost: hooks are there already
        words, noise = self.upscaler.words([""]), comfy.sample.prepare_noise(latent, picture)
        drawn = comfy.sample.sample_custom(
            model, noise, cfg, sampler, sigmas, words, words, latent, disable_pbar=True, seed=picture
        )
        return drawn, seconds[0]

    def shown(self, latent: Tensor) -> np.ndarray:
        """`[H, W, 3]` in 0..1."""
        return self.upscaler.vae.decode(latent)[0].clamp(0, 1).numpy()


@torch.inference_mode()
def costs(stage: Stage, rounds: int) -> list[Row]:
    """A row per form: form, tap, interval, computed, milliseconds, relative, speedup, psnr_db.

    computed: multiplications of all linear layers, over those of DiT4SR in the same tiles.
    """
    from .race.measure import Multiplications, psnr

    every, pictures = forms(), range(len(stage.cases))
    work: dict[Form, int] = {}
    seconds: dict[Form, list[float]] = {form: [] for form in every}
    shown: dict[tuple[Form, int], np.ndarray] = {}
    for form in every:  # to warm up, and everything that is not time
        for picture in pictures:
            with Multiplications() as counter:
                latent, _ = stage.draw(form, picture)
            work[form], shown[form, picture] = counter.total, stage.shown(latent)
    with single_thread():
        for _ in range(rounds):  # whatever else the machine does hits all forms alike
            for picture in pictures:
                for form in every:
                    seconds[form].append(stage.draw(form, picture)[1] / stage.steps)

    median = {form: statistics.median(seconds[form]) for form in every}
    named = {form.name: form for form in every if not form.tap}
    rows = []
    for form in every:
        peer = named[form.peer]
        likeness = [psnr(shown[form, picture], shown[peer, picture]) for picture in pictures]
        rows.append({
            "form": form.name,
            "tap": form.tap,
            "interval": form.interval,
            "computed": round(work[form] / work[peer], 3),
            "milliseconds": round(1000 * median[form], 2),
            "relative": round(median[form] / median[named[BASE]], 2),
            "speedup": round(median[peer] / median[form], 2),
            "psnr_db": round(statistics.fmean(likeness), 1) if form.tap else None,
        })  # fmt: skip
    return rows


def cost_table(rows: list[Row]) -> str:
    lines = ["| form | tap | interval | computed | ms per step | x base | speed-up | PSNR, dB |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        quality = "" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"
        lines.append(
            f"| {row['form']} | {row['tap']} | {row['interval'] if row['tap'] else ''} | {row['computed']:.2f} | "
            f"{row['milliseconds']:.1f} | {row['relative']:.2f} | {row['speedup']:.2f} | {quality} |"
        )
    return "\n".join(lines)


# Memory


def random_model(blocks: int = 2, most: int = 256) -> tuple[Model, Any]:
    """A MODEL in SD3.5's layout and a DiT4SR patch for it. `most`: tokens along a side that there are positions for."""
    import comfy.ldm.modules.diffusionmodules.mmdit as mmdit
    import comfy.model_management
    import comfy.ops
    import comfy.sd

    from dit_toolkit.host.restore import dit4sr_files
    from dit_toolkit.models.restore.dit4sr import ControlBranch

    dim, dual, operations = 64 * blocks, (0,), comfy.ops.disable_weight_init
    context = {"target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": dim}}
    transformer = mmdit.OpenAISignatureMMDITWrapper(
        depth=blocks, input_size=None, in_channels=16, out_channels=16, adm_in_channels=32, qk_norm="rms",
        context_embedder_config=context, num_patches=most**2, pos_embed_max_size=most, x_block_self_attn_layers=dual,
        operations=operations, dtype=torch.float32, device="meta",
    )  # fmt: skip
    branch = ControlBranch(dim, blocks, dual, "r1", operations=operations, dtype=torch.float32, device="meta")
    generator = torch.Generator().manual_seed(0)

    def filled(module: torch.nn.Module) -> dict[str, Tensor]:
        return {
            name: torch.randn(weight.shape, generator=generator) * 0.5 / dim**0.5
            for name, weight in module.state_dict().items()
        }

    model = comfy.sd.load_diffusion_model_state_dict(filled(transformer))
    patch = dit4sr_files.from_state(filled(branch), "random.safetensors")
    comfy.model_management.load_models_gpu([model, patch.patcher])
    return model, patch


class Calls:
    """The most that a call of the transformer holds beyond what was there when it began: `peak`, in bytes."""

    def __init__(self, memory: Any):
        self.memory, self.peak, self.count = memory, 0, 0
        self.earlier = self.before = 0

    @contextmanager
    def of(self, transformer: torch.nn.Module) -> Iterator[None]:
        hooks = transformer.register_forward_pre_hook(self.begin), transformer.register_forward_hook(self.end)
        yield
        for hook in hooks:
            hook.remove()

    def begin(self, *_) -> None:
        self.earlier, self.before = self.memory.peak, self.memory.held
        self.memory.peak = self.before

    def end(self, *_) -> None:
        self.peak = max(self.peak, self.memory.peak - self.before)
        self.memory.peak = max(self.earlier, self.memory.peak)
        self.count += 1


def queries(func, q: Tensor, *args, **kwargs) -> Tensor:
    """In the place of attention: a result of the right size, at no cost."""
    return q.clone()


@torch.inference_mode()
def held(
    model: Model,
    patch: Any,
    sides: tuple[int, int],
    tile: int,
    overlap: int = OVERLAP,
    attention: Callable[..., Tensor] = queries,
) -> Row:
    """One step for a picture of `sides` pixels: megapixels, tile, calls, call, run; the last two in bytes."""
    import comfy.sample

    from dit_toolkit.host.restore import dit4sr
    from dit_toolkit.host.restore.dit4sr_settings import DiT4SR
    from dit_toolkit.host.transformer import transformer_of

    from .race.measure import Memory

    height, width = (side // CELL for side in sides)
    noise = torch.randn(1, 16, height, width, generator=torch.Generator().manual_seed(0))
    prompt = [[torch.zeros(1, 77, 32), {"pooled_output": torch.zeros(1, 32)}]]
    settings = DiT4SR(None, "random", noise.clone(), tile=tile, overlap=overlap)
    patched = dit4sr.attach(model, patch.patcher, patch.made_for, settings)
    patched.model_options["transformer_options"]["optimized_attention_override"] = attention
    empty = torch.zeros_like(noise)
    memory = Memory()
    calls = Calls(memory)
    with memory, calls.of(transformer_of(model)):
        comfy.sample.sample(patched, noise, 1, 1.0, "euler", "simple", prompt, prompt, empty, disable_pbar=True, seed=0)
    megapixels = round(sides[0] * sides[1] / MIB, 3)
    return {"megapixels": megapixels, "tile": tile, "calls": calls.count, "call": calls.peak, "run": memory.peak}


def square(megapixels: float) -> tuple[int, int]:
    """Sides of a square picture, in pixels: whole tokens."""
    side = TOKEN * round(1024 / TOKEN * math.sqrt(megapixels))
    return side, side


def memories(megapixels: tuple[float, ...]) -> Iterator[Row]:
    model, patch = random_model(most=max(square(max(megapixels))) // TOKEN)
    held(model, patch, (512, 512), TILE)  # core makes some things once
    for size in megapixels:
        for tile in (TILE, 0):
            yield held(model, patch, square(size), tile)


def memory_table(rows: list[Row]) -> str:
    lines = ["| megapixels | tile | calls | call, MiB | run, MiB |", "|---:|---:|---:|---:|---:|"]
    for row in rows:
        tile = row["tile"] or "one piece"
        lines.append(
            f"| {row['megapixels']:.1f} | {tile} | {row['calls']} | {row['call'] / MIB:.1f} | {row['run'] / MIB:.1f} |"
        )
    return "\n".join(lines)


# Results


def plot(cost: list[Row], memory: list[Row], file: Path) -> Path:
    """Quality over speed-up, and memory over the picture's size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for tap, marker in (("prediction", "o"), ("last block", "s")):
        line = [row for row in cost if row["tap"] == tap]
        left.plot([row["speedup"] for row in line], [row["psnr_db"] for row in line], marker=marker, label=tap)
        for row in line:
            left.annotate(f"{row['interval']}", (row["speedup"], row["psnr_db"]), (6, 4), textcoords="offset points")
    left.set(
        xlabel="measured speed-up", ylabel="PSNR to DiT4SR without a cache, dB", title="TaylorSeer, interval 2 and 3"
    )
    for tile, name, colour in ((0, "one piece", "tab:red"), (TILE, f"tiles of {TILE}", "tab:blue")):
        line = [row for row in memory if row["tile"] == tile]
        size = [row["megapixels"] for row in line]
        for kind, style in (("call", "-"), ("run", "--")):
            mib = [row[kind] / MIB for row in line]
            right.plot(size, mib, style, color=colour, marker="o", label=f"{name}, a {kind}")
    right.set(xscale="log", yscale="log", xlabel="megapixels", ylabel="MiB", title="peak memory, a small random model")
    right.set_xticks(MEGAPIXELS, [str(size) for size in MEGAPIXELS])
    for ax in (left, right):
        ax.grid(alpha=0.3)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
    return file


def save(report: Row, folder: Path = RESULTS) -> list[Path]:
    """dit4sr-<date>-cpu.json and its plot. Returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"dit4sr-{report['date']}-cpu.json"
    file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return [file, plot(report["cost"], report["memory"], file.with_suffix(".png"))]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=["cost", "memory"], help="time, or memory; else both")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pictures", type=int, default=4, help="worn photographs")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each form on each picture")
    parser.add_argument("--megapixels", type=float, nargs="+", default=MEGAPIXELS, help="sizes of square pictures")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args(argv)
    for name in ("steps", "pictures", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if not all(0.25 <= size <= 64 for size in options.megapixels):
        parser.error("--megapixels must be from 0.25 to 64")
    return options


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    from dit_toolkit.training.comfyui import comfyui

    comfyui()  # on the CPU
    logging.getLogger().setLevel(logging.ERROR)
    cost: list[Row] = []
    memory: list[Row] = []
    if options.part != "memory":
        cost = costs(Stage(options.pictures, options.steps), options.rounds)
        print(f"{options.pictures} photographs, {options.steps} steps, one CPU thread\n\n{cost_table(cost)}\n")
    if options.part != "cost":
        memory = list(memories(tuple(options.megapixels)))
        print(memory_table(memory))
    if not options.no_save:
        report = {
            "benchmark": "dit4sr",
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            **{name: getattr(options, name) for name in ("steps", "pictures", "rounds")},
            "cost": cost,
            "memory": memory,
        }
        for file in save(report):
            print(f"Saved as {file.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
