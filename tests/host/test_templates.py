"""Templates in the order of their names, whatever the disk's order is; nothing else of ComfyUI's answers changes."""

import asyncio
import json
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.comfy

import server  # noqa: E402
from aiohttp import web  # noqa: E402

from dit_toolkit.host import templates  # noqa: E402

OURS = ["CPU 09 b", "FLUX.1 01 d", "CPU 09 b.app", "CPU 01 a", "CogVideoX 01 c"]
LISTED = {"other": ["b", "a"], templates.PACK: OURS}


def answer(path, response):
    async def handler(request):
        return response

    return asyncio.run(templates.in_order(SimpleNamespace(path=path), handler))


@pytest.mark.parametrize("path", templates.ROUTES)
def test_our_own_are_sorted_and_those_of_others_stay(path):
    sorted_ = json.loads(answer(path, web.json_response(LISTED)).text)
    assert sorted_["other"] == ["b", "a"]
    assert sorted_[templates.PACK] == ["CPU 01 a", "CPU 09 b", "CPU 09 b.app", "CogVideoX 01 c", "FLUX.1 01 d"]
    assert list(sorted_) == list(LISTED)


@pytest.mark.parametrize(
    ("path", "response"),
    [
        ("/api/other", web.json_response(LISTED)),
        (templates.ROUTES[0], web.json_response(LISTED, status=500)),
        (templates.ROUTES[0], web.json_response({"other": ["b", "a"]})),
        (templates.ROUTES[0], web.json_response(["b", "a"])),
        (templates.ROUTES[0], web.Response()),
        (templates.ROUTES[0], web.StreamResponse()),
    ],
    ids=["another route", "an error", "without us", "another form", "empty", "a stream"],
)
def test_other_answers_stay_as_they_are(path, response):
    before = getattr(response, "body", None)
    assert answer(path, response) is response
    assert getattr(response, "body", None) == before


def test_the_server_is_asked_once_and_only_before_it_starts(monkeypatch):
    app = web.Application()
    monkeypatch.setattr(server.PromptServer, "instance", SimpleNamespace(app=app), raising=False)
    templates.sort_templates()
    templates.sort_templates()
    assert list(app.middlewares) == [templates.in_order]

    started = web.Application()
    started.freeze()
    monkeypatch.setattr(server.PromptServer, "instance", SimpleNamespace(app=started), raising=False)
    templates.sort_templates()
    assert list(started.middlewares) == []

    monkeypatch.delattr(server.PromptServer, "instance")
    templates.sort_templates()  # a run without a server: nothing to ask
