"""How the embedded default is made. Not shipped, and nothing that is shipped imports it.

    world, score                  the small world, and the judge of its pictures
    flux, embedded, try_on_model  the models as plain torch modules, which can be trained
    vae, base, easycontrol, try_on, try_on_8_steps, in_context, sd3, dit4sr
                                  a stage each: `python -m training STAGE`; easycontrol has edge, pose, subject
    data, pictures, fittings, photographs, degrade
                                  what the stages train on
    checkpoints, loop, optim      what they share; in_context and the tables also share ComfyUI itself: comfyui
    measure/                      the tables of the model card

The repository is importable here as `dit_toolkit`, as in `scripts/`.
"""

import sys

if "dit_toolkit" not in sys.modules:  # run by `python -m`, from the repository's root
    import scripts  # noqa: F401  names the repository `dit_toolkit`
