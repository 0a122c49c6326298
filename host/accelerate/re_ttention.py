"""Re-ttention on ComfyUI's models: puts its settings on the MODEL.

Hooks and state are in `re_ttention_run.py`, the method in `models/accelerate/re_ttention.py`.
"""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher

from ..attention import makes_sparse
from ..run import Run, attached, descriptions_in
from ..run import attach as attach_description
from .own_attention import require_known_tokens
from .re_ttention_run import ReTtentionRun
from .re_ttention_settings import ReTtention

CONFLICT = "Apply Re-ttention: the model's attention is sparse already. Remove one of the two nodes."


def bind(settings: ReTtention, run: Run, model_options: dict) -> None:
    if any(makes_sparse(other) for other in descriptions_in(model_options) if other is not settings):
        raise ValueError(CONFLICT)
    ReTtentionRun(settings, run).install(model_options)


def attach(model: ModelPatcher, settings: ReTtention) -> ModelPatcher:
    """A clone of `model` that samples with these settings.

    Raises:
        ValueError: the model's attention is sparse already, or out of reach.
    """
    require_known_tokens(model, "Apply Re-ttention")
    if any(makes_sparse(other) for other in attached(model)):
        raise ValueError(CONFLICT)
    return attach_description(model, settings, bind)
