"""Run ComfyUI's main.py in a process that ends when the one that started it does, however that ends.

    python guard.py FOLDER MAIN.PY ARGUMENTS...     with a pipe as standard input that nobody writes into

The pipe closes when the other side is gone, be it by SIGKILL. A ComfyUI without a driver would keep its device. FOLDER
holds its log and its pictures, and goes with it.
"""

from __future__ import annotations

import os
import runpy
import shutil
import sys
import threading


def _until_the_pipe_closes(pipe: int, folder: str) -> None:
    while os.read(pipe, 1):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    pipe = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    threading.Thread(target=_until_the_pipe_closes, args=(pipe, sys.argv[1]), daemon=True).start()
    sys.argv = sys.argv[2:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
