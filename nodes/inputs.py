"""Inputs that several nodes have, said once: same name, same range, same step."""

from __future__ import annotations

from comfy_api.latest import io


def part_of_run(begins: str, stops: str, advanced: bool | None = None) -> list[io.Input]:
    """`start_percent` and `end_percent`: the part of the run that a node acts in. The texts are their tooltips."""
    bounds = {"min": 0.0, "max": 1.0, "step": 0.001, "advanced": advanced}
    return [
        io.Float.Input("start_percent", default=0.0, tooltip=begins, **bounds),
        io.Float.Input("end_percent", default=1.0, tooltip=stops, **bounds),
    ]


def kv_cache(whose: str) -> io.Input:
    """Where the keys and values of conditions are kept. `whose`: as the tooltip names them."""
    return io.Combo.Input(
        "kv_cache",
        options=["on GPU", "offload to CPU", "off"],
        default="on GPU",
        advanced=True,
        tooltip=f"Where {whose} keys and values are kept during a run; the picture is the same. "
        "'offload to CPU' saves memory, 'off' computes them anew in each step and is slow.",
    )
