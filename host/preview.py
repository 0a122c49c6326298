"""Pictures on a node while another node runs, such as what a sampler shows the model."""

from __future__ import annotations

from comfy_api.latest import ui
from torch import Tensor

from .execution import running


def show_picture(node: str | None, picture: Tensor) -> None:
    """Put an IMAGE `[N, H, W, 3]` on the node, as if it had just run. Without a page, nothing happens."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if node is None or server is None or server.client_id is None:
        return
    shown = {"node": node, "display_node": node, "output": ui.PreviewImage(picture).as_dict()}
    server.send_sync("executed", {**shown, "prompt_id": running().prompt}, server.client_id)
