"""How the embedded default is made. Not shipped, and nothing that is shipped imports it.

The small world (`world`) and its judge (`score`); the models as plain torch modules, which can be trained (`flux`,
`embedded`, `try_on_model`); one stage per file, named as its STAGE in `python -m training STAGE` (`vae`, `base`,
`easycontrol` for `edge`, `pose` and `subject`, `try_on`, `try_on_8_steps`, `in_context`); and `measure/`, which prints
the tables of the model card.

The repository is importable here as `dit_toolkit`, as in `scripts/`.
"""

import sys

if "dit_toolkit" not in sys.modules:  # run by `python -m`, from the repository's root
    import scripts  # noqa: F401  names the repository `dit_toolkit`
