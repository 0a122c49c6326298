"""Sparse attention: CLEAR, which lets a picture's tokens attend to their surroundings only.

Paper: CLEAR, arXiv:2412.16112. The method is in `clear.py` and `sparse_attention.py` of `models/accelerate/`, its hooks
are in `sparse_attention.py` of `host/accelerate/`, its files in `clear_files.py` there.
"""

from __future__ import annotations

import logging
from typing import Literal

from comfy_api.latest import io

from ..host import model_files
from ..host.accelerate.clear_files import FOLDER, load, with_weights
from ..host.accelerate.own_attention import require_known_tokens
from ..host.accelerate.sparse_attention import Scale, SparseAttention, attach, report
from ..host.part_of_run import PartOfRun
from ..models.accelerate.clear import Variant
from .inputs import check, choice, min_tokens, model_input, part_of_run

logger = logging.getLogger(__name__)

MASK_ONLY = "none (mask only)"
MASK_ONLY_RADIUS = 32

Below = Literal["auto", "dense", "local"]  # what attention over fewer tokens than `min_tokens` is
BELOW = {"dense": "dense, which this file was not trained for", "local": "local too, as this file was trained"}


class ApplyClear(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiTClear",
            display_name="Apply CLEAR",
            category="DiT Toolkit/model/patch",
            description=(
                "Lets the tokens of a picture attend to their surroundings only, which makes large pictures faster: "
                "2048 pixels and more. At 1024 pixels there is nothing to gain. Published weights for FLUX.1-dev adapt "
                "the model to it; without them it is an approximation."
            ),
            search_aliases=[
                "clear", "local attention", "linear attention", "sparse attention flux", "4k", "8k", "large picture",
                "high resolution",
            ],
            inputs=[
                model_input("FLUX.1-dev or a fine-tune for a file; most diffusion transformers without one."),
                choice("file", [MASK_ONLY, *model_files.names(FOLDER)], MASK_ONLY,
                       "A CLEAR file in models/clear or models/loras. Without one the model is not adapted."),
                io.Int.Input("radius", default=0, min=0, max=1024,
                             tooltip="How far a token sees, in tokens of 16 pixels. 0: as the file's name says, 32 "
                             "without one. Beyond the picture's diagonal the node is off."),
                io.Int.Input("pooling", default=0, min=0, max=16,
                             tooltip="Tokens also see the whole picture, averaged over cells of this side. 0: as the "
                             "file was trained, none without one."),
                choice("scale", Scale, "as trained", advanced=True,
                       tooltip="log-proportional sharpens attention in pictures larger than the 1024 pixels of the "
                       "training. The authors use it there, starting from an upscaled picture."),
                min_tokens(step=256,
                           tooltip="Attention over fewer tokens than this, text included, follows 'below_min_tokens'. "
                           "0 turns that off."),
                *part_of_run(
                    "Where in the run attention becomes sparse. 0 is the start.",
                    "Where in the run it becomes dense again. 1 is the end.",
                    advanced=True,
                ),
                # Optional: prompts saved before it was there have none.
                choice("below_min_tokens", Below, "auto", optional=True, advanced=True,
                       tooltip="How attention works in pictures below min_tokens. auto: local with a file, as its "
                       "weights were trained; dense without one, since there is little to gain."),
            ],
            outputs=[
                io.Model.Output(tooltip="The model, with local attention."),
                io.String.Output(display_name="report",
                                 tooltip="What the file holds, the share of attention that the pattern keeps, and the "
                                 "most it can save."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        file: str,
        radius: int,
        pooling: int,
        scale: Scale,
        min_tokens: int,
        start_percent: float,
        end_percent: float,
        below_min_tokens: Below = "auto",
    ) -> io.NodeOutput:
        check(cls, locals(), files=("file",))
        require_known_tokens(model, "Apply CLEAR")
        if file == MASK_ONLY:
            variant, found, cells, patched = Variant(radius or MASK_ONLY_RADIUS, pooling), "mask only", {}, model
        else:
            loaded = load(file)
            variant, found = loaded.variant(radius, pooling), loaded.weights.summary
            cells, patched = loaded.weights.cells, with_weights(model, loaded)
        trained = file != MASK_ONLY
        dense = below_min_tokens == "dense" or (below_min_tokens == "auto" and not trained)
        part = PartOfRun(start_percent, end_percent)
        settings = SparseAttention(
            f"CLEAR {file}", variant.pattern, min_tokens if dense else 0, scale, part, cells=cells
        )
        text = f"{file}: {found}\n{report(model, settings)}"
        if trained:
            text += f"\nbelow {min_tokens} tokens: {BELOW['dense' if dense else 'local']}"
        logger.info("CLEAR %s", text.splitlines()[0])
        return io.NodeOutput(attach(patched, settings), text)


NODES = [ApplyClear]
