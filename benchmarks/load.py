"""How long ComfyUI waits for the pack when it starts: processor time of the first load in a new process.

    python -m benchmarks.load

The first process may have to write the byte code and is not counted.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile

from dit_toolkit.scripts.places import ROOT, comfyui

PROCESSES = 6
LOAD = """
import asyncio, importlib.util, sys, time
sys.path.insert(0, {host!r})
from comfy.cli_args import args
args.cpu, args.base_directory = True, {base!r}
import nodes, comfy.sd, comfy_api.latest  # what ComfyUI has loaded by the time it reads the first pack
start = time.process_time()
spec = importlib.util.spec_from_file_location("pack", {root!r} + "/__init__.py", submodule_search_locations=[{root!r}])
module = importlib.util.module_from_spec(spec)
sys.modules["pack"] = module
spec.loader.exec_module(module)
asyncio.run(asyncio.run(module.comfy_entrypoint()).get_node_list())
print("SECONDS", time.process_time() - start)
"""


def seconds_of_one_load() -> float:
    with tempfile.TemporaryDirectory() as base:
        code = LOAD.format(host=str(comfyui()), base=base, root=str(ROOT))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=base)
    return float(done.stdout.rsplit("SECONDS", 1)[1])


def main() -> None:
    _, *times = [seconds_of_one_load() for _ in range(PROCESSES)]
    low, high = min(times), max(times)
    print(f"Loading the pack: {1000 * statistics.median(times):.0f} ms ({1000 * low:.0f} to {1000 * high:.0f})")


if __name__ == "__main__":
    main()
