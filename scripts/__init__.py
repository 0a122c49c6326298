"""What runs ComfyUI with the pack: set-up, server, client, browser, demo. Not shipped, and not imported by the pack.

The repository is importable here as `dit_toolkit`, whatever its folder is called: ComfyUI and other packs also have
modules named `nodes` and `models`.
"""

import sys
from pathlib import Path
from types import ModuleType

if "dit_toolkit" not in sys.modules:
    _package = ModuleType("dit_toolkit")
    _package.__path__ = [str(Path(__file__).resolve().parents[1])]
    sys.modules["dit_toolkit"] = _package
