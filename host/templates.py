"""The pack's templates in the order of their names.

ComfyUI lists the templates of packs as the disk happens to list its folders, and the page keeps that order. On most
Linux disks it is a random one, and the first template a newcomer meets would be any of them.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiohttp import web

ROUTES = ("/workflow_templates", "/api/workflow_templates")
PACK = Path(__file__).parents[1].name  # the folder, which is the pack's name there


async def in_order(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """A middleware: the answer of ComfyUI with our own names sorted. Whatever else is in it stays as it is."""
    from aiohttp import web

    response = await handler(request)
    if request.path not in ROUTES or not isinstance(response, web.Response) or response.status != 200:
        return response
    templates = json.loads(response.text or "null")
    if isinstance(templates, dict) and isinstance(templates.get(PACK), list):
        response.text = json.dumps(templates | {PACK: sorted(templates[PACK])})
    return response


def sort_templates() -> None:
    """Ask ComfyUI's server for it, once. Without a server, or with one that has started, nothing happens."""
    from aiohttp import web
    from server import PromptServer

    app = getattr(getattr(PromptServer, "instance", None), "app", None)
    if app is not None and not app.frozen and in_order not in app.middlewares:
        app.middlewares.append(web.middleware(in_order))
