"""The page in Chinese: our nodes speak it, and can still be found by English words."""

import json
import urllib.request

import pytest

pytestmark = pytest.mark.comfy

ASK = """
const root = [...document.querySelectorAll('*')].map(element => element.__vue_app__).find(Boolean);
const defs = root.config.globalProperties.$pinia._s.get('nodeDef');
const node = LiteGraph.createNode('DiTAccelerate');
return {
    title: node.title,
    description: defs.nodeDefsByName.DiTAccelerate.description,
    category: defs.nodeDefsByName.DiTPoseVideo.category,
    found: defs.nodeSearchService.searchNode('teacache').map(found => found.name)[0],
};
"""


def choose(server, language: str) -> None:
    """As Settings does."""
    body = json.dumps(language).encode()
    address = f"{server.url}/settings/Comfy.Locale"
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"}, method="POST")
    urllib.request.urlopen(request, timeout=30).read()


def test_the_page_shows_chinese_names(server, browser):
    choose(server, "zh")
    try:
        said = browser.open(server.url).evaluate(ASK)
    finally:
        choose(server, "en")
    said["description"] = said["description"][:18]
    assert said == {
        "title": "DiT 加速",
        "description": "让扩散 transformer 更快",
        "category": "DiT Toolkit/动画",
        "found": "DiTAccelerate",
    }
