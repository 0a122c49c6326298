"""The page in Chinese: our nodes speak it, and can still be found by English words."""

import json
import urllib.request
from contextlib import closing

import pytest

from dit_toolkit.scripts.locales import FOLDER, table

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
        with closing(browser.open(server.url)) as page:
            said = page.evaluate(ASK)
    finally:
        choose(server, "en")
    written = json.loads((FOLDER / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))["DiTAccelerate"]
    assert said == {
        "title": written["display_name"],
        "description": written["description"],
        "category": f"DiT Toolkit/{table('categories')['animate']['zh']}",
        "found": "DiTAccelerate",
    }
    assert not said["title"].isascii()
