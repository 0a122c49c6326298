"""How the embedded default is made: the small world, its judge, and one training stage per file. Not shipped.

`python -m training STAGE` trains, see `__main__.py`. The repository is importable here as `dit_toolkit`, as in
`scripts/`. Nothing that is shipped imports this.
"""

import sys

if "dit_toolkit" not in sys.modules:  # run by `python -m`, from the repository's root
    import scripts  # noqa: F401  names the repository `dit_toolkit`
