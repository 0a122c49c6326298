"""ComfyUI's page draws nodes in two ways. Tests that ask for both run all in one of them, then all in the other."""

import pytest

RENDERINGS = {"classic": False, "Nodes 2.0": True}


@pytest.fixture(scope="module", params=RENDERINGS)
def rendering(request, page):
    """The name of the way in which the page draws nodes."""
    choose(page, RENDERINGS[request.param])
    yield request.param
    page.clear()
    choose(page, False)


def choose(page, vue: bool) -> None:
    page.evaluate("await app.extensionManager.setting.set('Comfy.VueNodes.Enabled', a)", vue)
    page.wait_until(f"!!LiteGraph.vueNodesMode === {str(vue).lower()}", "the page draws nodes as it was told to")
