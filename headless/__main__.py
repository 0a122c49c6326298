"""`python custom_nodes/dit-toolkit/headless run ...`: a folder that runs in place, whatever lies beside it."""

import sys
from pathlib import Path

if not __package__:
    # The pack's root is on the path only until the package is found: it has folders with names of others, as `nodes`.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import headless.cli as cli

    del sys.path[0]
else:
    from . import cli

if __name__ == "__main__":
    sys.exit(cli.main())
