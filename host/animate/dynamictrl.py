"""DynamiCtrl on ComfyUI's MODEL: pose norms beside the model, and an override of every block's `norm1` in a run.

Hooks: an APPLY_MODEL wrapper takes the poses out of a call, and hands them to the blocks through their first norm. The
override hangs on the modules from the first call with poses to the end of the run, however it ends. CALC_COND_BATCH
looks which prompts may share a stream.

Settings: `dynamictrl_settings.py`. State: `dynamictrl_run.py`. The pose norms are an additional model of the MODEL:
core moves, counts and offloads them.
"""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from .. import adapters
from ..families import cogvideox
from ..families.family import Sizes
from ..run import KEY, Run, attached
from ..run import attach as attach_description
from ..transformer import transformer_of
from .dynamictrl_run import Animator, odd
from .dynamictrl_settings import ADAPTER, LOADER, DynamiCtrl


def bind(settings: DynamiCtrl, run: Run, model_options: dict) -> None:
    """Raises ValueError at a video of an odd number of latent frames, where the model takes them in pairs."""
    if run.model is not None and run.noise is not None and run.noise.ndim == 5:
        frames = run.noise.shape[2]
        if frames % cogvideox.frames_per_token(transformer_of(run.model)):
            raise ValueError(odd(frames))
    animator = Animator(settings, run)
    for kind, wrapper in (
        (WrappersMP.CALC_COND_BATCH, animator.look),
        (WrappersMP.APPLY_MODEL, animator.apply_model),
    ):
        add_wrapper_with_key(kind, KEY, wrapper, model_options, is_model_options=True)


def attach(model: ModelPatcher, norms: ModelPatcher, made_for: Sizes, name: str) -> ModelPatcher:
    """A clone of `model` that reads the poses of its conditions.

    Args:
        norms: the pose norms, `made_for` a model of these sizes. name: of their file.

    Raises:
        ValueError: another model, or one that has pose norms already.
    """
    has = cogvideox.sizes(cogvideox.COGVIDEOX.require(model, LOADER))
    if has != made_for:
        raise ValueError(f"{name} is made for {made_for}; the model has {has}. Load both from one file.")
    if any(isinstance(each, DynamiCtrl) for each in attached(model)):
        raise ValueError(f"The model has the pose norms of DynamiCtrl already. Use one {LOADER}.")
    norms = adapters.beside(model, norms)
    patched = attach_description(model, DynamiCtrl(norms.clone_base_uuid, name), bind)
    patched.set_additional_models(ADAPTER, [norms])
    return patched
