"""DiT Toolkit: control, speed and repair for diffusion transformers. ComfyUI enters here."""

from .nodes import DiTToolkit

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> DiTToolkit:
    return DiTToolkit()
