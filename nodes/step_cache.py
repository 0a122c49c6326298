"""Step caches: compute some evaluations of the model, and forecast the others.

Papers: TaylorSeer, arXiv:2503.06923; CG-Taylor, arXiv:2508.02240; Delta-DiT, arXiv:2406.01125. Their maths is in
`models/` under the names of the methods, the common core in `host/accelerate/step_cache.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from comfy_api.latest import io

from ..host.accelerate.report import NodeReport
from ..host.accelerate.step_cache import attach
from ..host.accelerate.step_cache_report import StepCacheReport
from ..host.accelerate.step_cache_settings import StepCache, Tap
from ..host.accelerate.step_cache_taps import LastBlockTap, PredictionTap, SpanTap, TapName, require_blocks, tap_for
from ..host.execution import running, runs_before
from ..host.part_of_run import PartOfRun
from ..models.accelerate.cg_taylor import Compared, FirstBlockGate, Reduce
from ..models.accelerate.delta_dit import Stages
from ..models.accelerate.input_change import InputChange
from ..models.accelerate.policies import Guard, Interval, Listed, Policy, Spread
from ..models.accelerate.taylorseer import FORECASTS, Forecaster
from .inputs import (
    UNSET,
    ReportType,
    bytes_of,
    check,
    choice,
    interval,
    max_memory,
    model_input,
    part_of_run,
    report_outputs,
    share,
)

CATEGORY = "DiT Toolkit/model/patch"
ANY_MODEL = "Any diffusion model, with whatever LoRAs and patches it has."
NO_REPORT = "There is no report: the node that accelerates the model is bypassed, muted or not connected."
SPACINGS: dict[str, Callable[[int, int], Policy]] = {  # of interval and first_full
    "by noise and step": Spread,
    "to the last step": partial(Interval, to_end=True),
    "as published": Interval,
}
Compare = Literal[Compared, "input change"]


def outputs() -> list[io.Output]:
    return report_outputs("The model, forecasting what it skips.", "What was computed and what was forecast.")


def range_inputs() -> list[io.Input]:
    """Where in the run forecasts are allowed."""
    return part_of_run(
        "Before this part of the run, every evaluation is computed.",
        "From this part of the run on, every evaluation is computed.",
        advanced=True,
    )


def order_input(name: str, tooltip: str, default: int = 1, *, advanced: bool = UNSET) -> io.Input:
    """Of a forecast."""
    return io.Int.Input(name, default=default, min=0, max=4, advanced=advanced, tooltip=tooltip)


def last_full_input(default: int) -> io.Input:
    return io.Int.Input(
        "last_full",
        default=default,
        min=0,
        max=50,
        advanced=True,
        tooltip="Steps always computed at the end, where the finest details are set. 0 guards none.",
    )


def offload_input() -> io.Input:
    return io.Boolean.Input(
        "offload",
        default=False,
        advanced=True,
        tooltip="Keep what is stored in the computer's memory instead of the GPU's. Same picture, a little slower.",
    )


class TaylorSeer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiTTaylorSeer",
            display_name="Apply TaylorSeer",
            category=CATEGORY,
            description="Computes one evaluation in every few and forecasts the others. No training, no extra weights.",
            search_aliases=["taylor", "taylorseer", "forecast steps", "skip steps", "newton", "cache every few steps"],
            inputs=[
                model_input(ANY_MODEL),
                interval(3, 20),
                order_input("order",
                            "0 repeats the last result, 1 follows its slope, 2 its bend. "
                            "Higher ones want small steps.", 2),
                io.Int.Input("first_full", default=1, min=1, max=50,
                             tooltip="Evaluations always computed at the start, where the layout is decided."),
                last_full_input(0),
                choice("spacing", SPACINGS, "by noise and step", advanced=True,
                       tooltip="by noise and step: one in every few on average, more of them where the noise falls "
                       "fastest. to the last step: even gaps, the last evaluation is computed. as published: count "
                       "from the start."),
                choice("tap", TapName, "prediction", advanced=True,
                       tooltip="What is forecast. prediction: the model's output, of every model. auto: the last "
                       "block's result where the model allows it, else the prediction. every module: as the authors do "
                       "it, FLUX.1 only; needs gigabytes."),
                choice("forecast", FORECASTS, "Newton, damped", advanced=True,
                       tooltip="Taylor counts evaluations, as in the paper. Newton is exact at uneven steps, and may "
                       "follow the noise level (sigma) instead. Damped: follows the slope less, the wider the gaps "
                       "and the higher the CFG."),
                io.String.Input("schedule", default="", advanced=True,
                                tooltip="Instead of interval and first_full: the evaluations to compute, such as 0-3, "
                                "6, 9, 12, or a mask such as 1110010. Empty: the interval."),
                *range_inputs(),
                offload_input(),
                max_memory("Most GiB that 'every module' may hold. 0: a quarter of what is free."),
            ],
            outputs=outputs(),
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # the report belongs to this node, and ComfyUI leaves the id out of its cache
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model: Any,
        interval: int,
        order: int,
        first_full: int,
        last_full: int,
        spacing: str,
        tap: TapName,
        forecast: str,
        schedule: str,
        start_percent: float,
        end_percent: float,
        offload: bool,
        max_memory: float,
    ) -> io.NodeOutput:
        check(cls, locals())
        listed = bool(schedule.strip())
        policy = Listed.parse(schedule) if listed else SPACINGS[spacing](interval, first_full)
        chosen = tap_for(model, tap, "Apply TaylorSeer", bytes_of(max_memory))
        report = StepCacheReport(
            "TaylorSeer", f"TaylorSeer at the {chosen.name}, order {order}, {forecast}", cls.hidden.unique_id
        )
        cache = StepCache(
            "TaylorSeer",
            policy,
            chosen,
            replace(FORECASTS[forecast], order=order, derivatives_from=0 if listed else first_full - 1),
            Guard(last_full),
            PartOfRun(start_percent, end_percent),
            offload,
            report,
        )
        if not listed and interval == 1:
            return io.NodeOutput(model, replace(report, off=True))
        return io.NodeOutput(attach(model, cache), report)


class ConfidenceGatedTaylor(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiTCGTaylor",
            display_name="Apply Confidence-Gated Taylor",
            category=CATEGORY,
            description=(
                "Runs the first block at every evaluation. If its result was predictable, forecasts all other blocks. "
                "How many evaluations that skips depends on the model and the picture."
            ),
            search_aliases=["cg-taylor", "confidence", "gate", "gate like first block cache", "gate like teacache"],
            inputs=[
                model_input(ANY_MODEL),
                io.Float.Input("threshold", default=0.08, min=0.0, max=2.0, step=0.005,
                               tooltip="The other blocks are forecast while the error of the first block's forecast "
                               "is below this. Higher is faster, 0 turns the node off. Each model and number "
                               "of steps has its own scale: the report shows the errors."),
                io.Int.Input("warm_up", default=5, min=1, max=50, tooltip="Evaluations always computed at the start."),
                io.Int.Input("max_consecutive", default=0, min=0, max=50,
                             tooltip="Most forecasts in a row. 0 sets no limit, as in the paper."),
                last_full_input(1),
                order_input("first_order", advanced=True,
                            tooltip="Order of the first block's forecast. The paper takes 1 on FLUX.1 and 3 on Wan."),
                order_input("last_order", advanced=True,
                            tooltip="Order of the last block's forecast. 0 repeats its last result."),
                choice("forecast", FORECASTS, "Taylor (paper)", advanced=True,
                       tooltip="How the last block is forecast. Newton is exact at uneven steps."),
                choice("compare", Compare, "output", advanced=True,
                       tooltip="output: compares the first block's result, as in the paper. residual: compares its "
                       "change with its last change, and forecasts the other blocks' change, like First Block "
                       "Cache and DBCache. input change: measures how far the latent has moved, like "
                       "EasyCache; works on every model."),
                choice("gate_rows", Reduce, "max", advanced=True,
                       tooltip="How the pictures of a batch decide together. max: the worst one decides. mean: their "
                       "average; cond is the same, for older workflows. published: the paper's ratio over the "
                       "whole batch. With CFG, the prompt that ComfyUI computes first decides for both, "
                       "mostly the negative one. Not read with 'input change'."),
                *range_inputs(),
                offload_input(),
            ],
            outputs=outputs(),
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # the report belongs to this node, and ComfyUI leaves the id out of its cache
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model: Any,
        threshold: float,
        warm_up: int,
        max_consecutive: int,
        last_full: int,
        first_order: int,
        last_order: int,
        forecast: str,
        compare: Compare,
        gate_rows: Reduce,
        start_percent: float,
        end_percent: float,
        offload: bool,
    ) -> io.NodeOutput:
        check(cls, locals())
        threshold = float(threshold)  # JSON takes no numbers of numpy
        words = f"Confidence-Gated Taylor by {compare}, threshold {threshold:g}, order {last_order}, {forecast}"
        report = StepCacheReport("Confidence-Gated Taylor", words, cls.hidden.unique_id)
        policy: Policy
        tap: Tap
        if compare == "input change":
            policy, tap = InputChange(threshold, max(warm_up, 2)), PredictionTap()
        else:
            policy = FirstBlockGate(threshold, warm_up, first_order, compare, gate_rows)
            if threshold == 0:
                return io.NodeOutput(model, replace(report, off=True))
            blocks = require_blocks(model, "Apply Confidence-Gated Taylor", "compare 'input change'")
            tap = LastBlockTap(*blocks, gated=True, residual=compare == "residual")
        cache = StepCache(
            "Confidence-Gated Taylor",
            policy,
            tap,
            replace(FORECASTS[forecast], order=last_order),
            Guard(last_full, max_consecutive or None),
            PartOfRun(start_percent, end_percent),
            offload,
            report,
        )
        if threshold == 0:
            return io.NodeOutput(model, replace(report, off=True))
        return io.NodeOutput(attach(model, cache), report)


class DeltaDiT(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiTDeltaDiT",
            display_name="Apply Delta-DiT",
            category=CATEGORY,
            description=(
                "Skips a part of the blocks on most evaluations, and adds what they changed the last time: the rear "
                "blocks early in the run, the front blocks late. For runs of 4 to 20 steps."
            ),
            search_aliases=["delta", "delta-dit", "few steps", "lcm", "skip blocks", "cache of blocks"],
            inputs=[
                model_input(ANY_MODEL),
                interval(2, 12),
                share("share", 0.75, "Part of the blocks that is skipped. 0 turns the node off."),
                share("boundary", 0.5,
                      "Part of the run after which the front blocks are skipped instead of the rear ones."),
                io.Int.Input("first_full", default=1, min=1, max=50, tooltip="Evaluations computed at the start."),
                last_full_input(0),
                io.Int.Input("order", default=0, min=0, max=3, advanced=True,
                             tooltip="0 adds the last change, as in the paper; 1 follows how it moves."),
                *range_inputs(),
                offload_input(),
            ],
            outputs=outputs(),
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # the report belongs to this node, and ComfyUI leaves the id out of its cache
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model: Any,
        interval: int,
        share: float,
        boundary: float,
        first_full: int,
        last_full: int,
        order: int,
        start_percent: float,
        end_percent: float,
        offload: bool,
    ) -> io.NodeOutput:
        check(cls, locals())
        if interval == 1 or share == 0:
            return io.NodeOutput(model, StepCacheReport("Delta-DiT", "", cls.hidden.unique_id, off=True))
        family, keys = require_blocks(model, "Apply Delta-DiT", "Apply TaylorSeer with tap 'prediction'")
        stages, schedule = Stages(share, boundary), Interval(interval, first_full)
        skipped = round(share * len(keys))
        words = f"Delta-DiT on {family.name}, {skipped} of {len(keys)} blocks, every {interval}, order {order}"
        report = StepCacheReport("Delta-DiT", words, cls.hidden.unique_id)
        cache = StepCache(
            "Delta-DiT",
            schedule,
            SpanTap(family, keys, stages=stages),
            Forecaster(order),
            Guard(last_full),
            PartOfRun(start_percent, end_percent),
            offload,
            report,
        )
        if not skipped:
            return io.NodeOutput(model, replace(report, off=True))
        return io.NodeOutput(attach(model, cache), report)


class AccelerationReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiTAccelerationReport",
            display_name="Acceleration Report",
            category="DiT Toolkit/utils",
            description="Shows as text what an accelerated model did in the connected sampler.",
            search_aliases=["report", "statistics", "gate error", "how fast was it"],
            inputs=[
                ReportType.Input("report", optional=True,
                                 tooltip="From the node that accelerates the model. While that one is "
                                 "bypassed, the text says so."),
                io.AnyType.Input("after",
                                 tooltip="The latent of the sampler, or a picture made from it. This node reads the "
                                 "run of that sampler."),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="Several lines, for Preview as Text."),
                io.String.Output(display_name="json", tooltip="Every evaluation, as JSON, for scripts."),
                io.AnyType.Output(display_name="after", tooltip="What came in at 'after', unchanged."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )  # fmt: skip

    @classmethod
    def execute(cls, report: NodeReport | None = None, after: Any = None) -> io.NodeOutput:
        if report is None:
            return io.NodeOutput(NO_REPORT, StepCacheReport("none").json(), after)
        runs = cls.runs_of(report)
        return io.NodeOutput(report.text(runs), report.json(runs), after)

    @classmethod
    def runs_of(cls, report: NodeReport) -> list | None:
        """The runs of the samplers that 'after' leads back to; None if nothing tells what is connected."""
        prompt = cls.hidden and cls.hidden.dynprompt
        if prompt is None:
            return None
        link = prompt.get_node(cls.hidden.unique_id)["inputs"].get("after")
        return runs_before(report.runs, link, lambda node: prompt.get_node(node)["inputs"], running().item)


NODES = [TaylorSeer, ConfidenceGatedTaylor, DeltaDiT, AccelerationReport]
