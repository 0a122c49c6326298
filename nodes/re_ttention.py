"""Re-ttention: attend to a few percent of the keys, with what the last full attention knew about the others.

Paper: Re-ttention, arXiv:2505.22918. The method is in `models/accelerate/re_ttention.py`, its
hooks are in `host/accelerate/re_ttention.py`.
"""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..host.accelerate.re_ttention import attach
from ..host.accelerate.re_ttention_report import ReTtentionReport
from ..host.accelerate.re_ttention_settings import STORAGE, ReTtention
from ..models.accelerate.re_ttention import DRIFT, Schedule, Window
from .inputs import bytes_of, check, choice, interval, max_memory, min_tokens, model_input, report_outputs


class ApplyReTtention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiTReTtention",
            display_name="Apply Re-ttention",
            category="DiT Toolkit/model/patch",
            description=(
                "On most evaluations each token attends to a few percent of the others, and adds what the rest "
                "contributed at the last full attention. For video and large pictures. No training, no extra weights."
            ),
            search_aliases=["re-ttention", "rettention", "sparse attention", "attention cache", "video attention"],
            inputs=[
                model_input("FLUX, SD3, Qwen-Image, Wan, HunyuanVideo, CogVideoX and their kin."),
                io.Float.Input("keep", default=0.0625, min=0.002, max=1.0, step=0.001, round=0.00001,
                               tooltip="Share of the picture's tokens that each token attends to. Published: 0.03125 "
                               "for video, and 0.0625 for images. 1 turns the node off."),
                interval(5, 50, "full attention"),
                io.Int.Input("first_full", default=8, min=0, max=100,
                             tooltip="Evaluations at the start with full attention. Published: 20 "
                             "to 30 percent of the steps."),
                choice("pattern", Window, "auto", advanced=True,
                       tooltip="Which tokens are kept. band: the nearest in reading order. tube: the "
                       "same, at the same place in all frames. disc: the nearest in the plane. auto: tube "
                       "for video, band for images."),
                io.Float.Input("drift", default=DRIFT, min=0.0, max=0.5, step=0.005, advanced=True,
                               tooltip="Added to the weight of the kept tokens after each sparse evaluation. 0.04 is "
                               "published, 0 adds nothing."),
                io.Boolean.Input("as_published", default=False, advanced=True,
                                 tooltip="Lets that weight grow beyond 1, as the authors' code does. Text is then "
                                 "overscaled by up to 12 percent."),
                io.Float.Input("sigma_ratio", default=0.0, min=0.0, max=0.99, step=0.01, advanced=True,
                               tooltip="Also computes full attention when the noise level falls below this part of "
                               "its value at the last one. 0 goes by interval alone."),
                choice("storage", STORAGE, "full precision", advanced=True,
                       tooltip="How the contribution of the other tokens is kept. 'share only' does not keep it: "
                       "little memory, worse pictures."),
                min_tokens("Attention over fewer tokens stays full: there is little to gain. 1024 x 1024 pixels are "
                           "4096 in most models."),
                max_memory("Most GiB of memory to use. 0: a quarter of what is free when sampling starts."),
            ],
            outputs=report_outputs(
                "The model, with sparse attention on most evaluations.",
                "What was computed in full, pairs kept and memory held.",
            ),
            is_experimental=True,  # its kernels on a GPU are others, and nobody has measured them
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model: Any,
        keep: float,
        interval: int,
        first_full: int,
        pattern: Window,
        drift: float,
        as_published: bool,
        sigma_ratio: float,
        storage: str,
        min_tokens: int,
        max_memory: float,
    ) -> io.NodeOutput:
        check(cls, locals())
        off = keep == 1 or interval == 1
        words = (
            f"keep {keep:.4g}, full at the first {first_full} evaluations and every {interval} then, storage {storage}"
        )
        report = ReTtentionReport("off" if off else words, off=off)
        if off:
            return io.NodeOutput(model, report)
        settings = ReTtention(
            keep,
            Schedule(first_full, interval, sigma_ratio),
            pattern,
            drift,
            clamp=not as_published,
            storage=STORAGE[storage],
            min_tokens=min_tokens,
            max_bytes=bytes_of(max_memory),
            report=report,
        )
        return io.NodeOutput(attach(model, settings), report)


NODES = [ApplyReTtention]
