"""Where things are, for every script and test. Standard library only: set-up runs this before anything is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACK = "dit-toolkit"
VENV = ROOT / ".venv"
CACHE = ROOT / ".cache"
BASE = ROOT / ".comfyui" / "base"  # models, input, output and user files of `make serve`
WORKFLOWS = ROOT / "workflows"
BLUEPRINTS = ROOT / "subgraphs"
DEMO_INPUTS = ROOT / "web" / "examples"  # shipped: help pages and notes show them
DEMO_PROMPTS = ROOT / "scripts" / "demo_prompts"

MODEL_FOLDERS = ("diffusion_models", "dit4sr", "easycontrol", "loras", "model_patches", "text_encoders", "vae")


def comfyui() -> Path:
    """The ComfyUI to run: the user's own if COMFYUI_PATH is set, else the one that set-up unpacks."""
    own = os.environ.get("COMFYUI_PATH")
    return Path(own).expanduser().resolve() if own else ROOT / ".comfyui" / "ComfyUI"


def python() -> Path:
    return VENV / "bin" / "python"


def prepare_base(base: Path) -> Path:
    """Make `base` a ComfyUI base directory that holds this pack and nothing else.

    ComfyUI reads models, nodes, inputs and settings from there, so its own folder stays as it is.
    """
    for folder in ("custom_nodes", "input", "output", "temp", "user/default"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    for kind in MODEL_FOLDERS:
        (base / "models" / kind).mkdir(parents=True, exist_ok=True)

    link = base / "custom_nodes" / PACK
    if link.is_symlink() and link.resolve() != ROOT:
        link.unlink()
    if not link.exists():
        link.symlink_to(ROOT, target_is_directory=True)

    for picture in (comfyui() / "input").glob("*.png"):  # every ComfyUI has example.png; examples may load it
        if not (base / "input" / picture.name).exists():
            shutil.copy(picture, base / "input")

    settings = base / "user" / "default" / "comfy.settings.json"
    if not settings.exists():  # without this, a first visit opens the template browser over the page
        settings.write_text(json.dumps({"Comfy.TutorialCompleted": True}), encoding="utf-8")
    return base


def has_accelerator() -> bool:
    """True when torch will find a device: an NVIDIA GPU that answers, or Apple silicon."""
    if sys.platform == "darwin":
        return os.uname().machine == "arm64"
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    listed = subprocess.run([command, "-L"], capture_output=True, text=True)
    return listed.returncode == 0 and "GPU" in listed.stdout


def chromium() -> str | None:
    """The browser of the tests: CHROMIUM_PATH, else the first Chromium or Chrome on PATH."""
    own = os.environ.get("CHROMIUM_PATH")
    if own:
        return own if Path(own).exists() else None
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    for path in (shutil.which(name) for name in names):
        if path:
            return path
    mac = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
    return mac if Path(mac).exists() else None
