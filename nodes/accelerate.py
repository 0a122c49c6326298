"""One front door to the step caches: pick by model and quality, or by trying.

Methods and their papers: `nodes/step_cache.py`. Presets and where they come from: `host/accelerate/accelerate.py`.
"""

from __future__ import annotations

from typing import Any, Literal

import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy_api.latest import io
from torch import Tensor

from ..host.accelerate.accelerate import Quality, accelerated, family_name, preset, tune
from ..host.accelerate.charts import trade_off
from ..host.accelerate.step_cache_report import StepCacheReport
from .inputs import check, choice, model_input, seed
from .step_cache import ANY_MODEL, CATEGORY, outputs

AskedQuality = Literal["off", Quality]


class AccelerateDiT(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiTAccelerate",
            display_name="Accelerate DiT",
            category=CATEGORY,
            description="Makes a diffusion transformer faster: picks a step cache and its numbers for this model.",
            search_aliases=[
                "speed", "speed up", "fast", "faster", "accelerate", "cache", "teacache", "wavespeed", "magcache",
                "first block cache", "fbcache", "easycache", "step cache", "taylorseer",
            ],
            inputs=[
                model_input(ANY_MODEL),
                choice("quality", AskedQuality, "balanced",
                       "quality: hard to tell from the slow picture. balanced: small details may differ. fast: "
                       "another picture of the same idea. off: the model as it is."),
            ],
            outputs=[
                *outputs(),
                io.String.Output(display_name="picked", tooltip="What was picked, and where its numbers come from."),
            ],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # the report belongs to this node, and ComfyUI leaves the id out of its cache
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, quality: AskedQuality) -> io.NodeOutput:
        check(cls, locals())
        report = StepCacheReport("Accelerate DiT", "", cls.hidden.unique_id, off=True)
        if quality == "off":
            return io.NodeOutput(model, report, "off")
        setting = preset(model, quality)
        picked = f"{setting.words}, for {family_name(model)}, {quality}. Source: {setting.source}."
        if setting.method != "none":
            report = StepCacheReport(setting.method, f"Accelerate DiT picked {picked}", cls.hidden.unique_id)
        return io.NodeOutput(accelerated(model, setting, report), report, picked)


class Autotune(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiTAccelerateAutotune",
            display_name="Accelerate DiT: Autotune",
            category=CATEGORY,
            description=(
                "Samples your prompt a few times with different step caches. Gives back the model with the fastest one "
                "that keeps the quality you ask for, and a chart of the trade-off."
            ),
            search_aliases=["autotune", "calibrate", "benchmark", "speed up by measuring", "trade-off"],
            inputs=[
                model_input(ANY_MODEL),
                io.Conditioning.Input("positive", tooltip="A prompt like those the model will be used for."),
                io.Conditioning.Input("negative", tooltip="The negative prompt; not read at cfg 1."),
                io.Latent.Input("latent", tooltip="Sets the size. A small one makes the trials short."),
                io.Vae.Input("vae", optional=True,
                             tooltip="Compares pictures. Without it, latents are compared, which is stricter."),
                io.Float.Input("floor", default=30.0, min=0.0, max=100.0, step=0.5,
                               tooltip="Quality to keep, as PSNR against the picture that is computed in full, in dB. "
                               "40: hard to tell apart. 30: small differences. 20: another picture of the same idea."),
                io.Int.Input("trials", default=7, min=1, max=12,
                             tooltip="How many settings to try, beside the full run."),
                seed("seed", "Of the noise, for all trials."),
                io.Int.Input("steps", default=28, min=1, max=1000, tooltip="As you will sample later."),
                io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="As you will sample later."),
                choice("sampler_name", comfy.samplers.KSampler.SAMPLERS, "euler", "As you will sample later."),
                choice("scheduler", comfy.samplers.KSampler.SCHEDULERS, "simple", "As you will sample later."),
            ],
            outputs=[
                *outputs(),
                io.String.Output(display_name="picked", tooltip="What was picked, and every trial, one per line."),
                io.Image.Output(display_name="chart", tooltip="Quality over speed-up, one point per trial."),
            ],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # the report belongs to this node, and ComfyUI leaves the id out of its cache
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        latent: dict,
        floor: float,
        trials: int,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        vae: Any = None,
    ) -> io.NodeOutput:
        check(cls, locals())
        seed = int(seed)  # torch takes no numbers of numpy
        samples = comfy.sample.fix_empty_latent_channels(
            model, latent["samples"], latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal")
        )
        noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
        mask = latent.get("noise_mask")

        def sample(candidate: Any) -> Tensor:
            result = comfy.sample.sample(
                candidate, noise, steps, cfg, sampler_name, scheduler, positive, negative, samples,
                noise_mask=mask, disable_pbar=True, seed=seed,
            )  # fmt: skip
            shown = result if vae is None else vae.decode(result)
            return torch.as_tensor(shown).float().cpu()

        progress = comfy.utils.ProgressBar(trials + 1)
        setting, found = tune(model, sample, floor, trials, tell=progress.update_absolute)
        words, off = f"Autotune picked {setting.words}", setting.method == "none"
        report = StepCacheReport("Autotune" if off else setting.method, words, cls.hidden.unique_id, off=off)
        lines = [f"{setting.words}. Floor {floor:g} dB, {steps} steps, {sampler_name}."]
        lines += [
            f"{number}. {trial.setting.words}: {trial.computed:.0%} computed, {trial.psnr_db:.1f} dB"
            + ("" if trial.speedup is None else f", {trial.speedup:.2f} x faster")
            for number, trial in enumerate(found, 1)
        ]
        runs = 1 + sum(trial.computed for trial in found)
        spent = round(found[0].evaluations * runs)
        lines.append(f"Trying took {spent} computed evaluations, as many as {runs:.1f} full runs.")
        points = [(1 / trial.computed, trial.psnr_db, trial.setting.words) for trial in found]
        chosen = next((i for i, trial in enumerate(found) if trial.setting.words == setting.words), None)
        chart = trade_off(points, floor, chosen)
        return io.NodeOutput(accelerated(model, setting, report), report, "\n".join(lines), chart)


NODES = [AccelerateDiT, Autotune]
