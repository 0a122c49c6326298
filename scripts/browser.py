"""Drive headless Chromium, and in it ComfyUI's own page, through the DevTools protocol.

with Browser() as browser:
    page = browser.open(server.url)
    page.load_workflow(workflow)
    prompt = page.prompt()
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from .client import Client, Result
from .places import chromium
from .websocket import WebSocket

FLAGS = (
    *("--headless", "--no-first-run", "--no-default-browser-check", "--disable-gpu", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"),
    *("--disable-extensions", "--disable-dev-shm-usage", "--mute-audio", "--lang=en-US"),
    *("--window-size=1400,900", "--remote-debugging-port=0"),
)
HOW_TO_INSTALL = (
    "The browser tests need Chromium or Chrome. On Debian: `apt-get install chromium`. Elsewhere: install either, or "
    "set CHROMIUM_PATH to its program."
)
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


class BrowserError(RuntimeError):
    """The browser is missing or died, or the page did not do what was asked."""


class Browser:
    """A Chromium with a profile of its own that is gone afterwards."""

    def __init__(self):
        program = chromium()
        if program is None:
            raise BrowserError(HOW_TO_INSTALL)
        self._profile = tempfile.mkdtemp(prefix="dit-toolkit-browser-")
        sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        self._log = Path(self._profile, "browser.log")
        with self._log.open("wb") as log:
            command = [program, *FLAGS, *sandbox, f"--user-data-dir={self._profile}", "about:blank"]
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        self._pages: list[Page] = []
        try:
            self._port = self._wait_for_port()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def open(self, url: str) -> Page:
        """ComfyUI's page at `url` in a new tab, ready to be used."""
        request = urllib.request.Request(f"http://127.0.0.1:{self._port}/json/new?about:blank", method="PUT")
        with _open(request, timeout=30) as answer:
            page = Page(json.load(answer)["webSocketDebuggerUrl"])
        self._pages.append(page)
        page.open(url)
        return page

    def close(self) -> None:
        for page in self._pages:
            page.close()
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._profile, ignore_errors=True)

    def _wait_for_port(self, timeout: float = 90) -> int:
        """Chromium writes the port that it chose into its profile."""
        file, deadline = Path(self._profile, "DevToolsActivePort"), time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                tail = self._log.read_text(errors="replace")[-2000:]
                raise BrowserError(f"Chromium stopped while it started:\n{tail}")
            if file.exists() and (text := file.read_text()):
                return int(text.splitlines()[0])
            time.sleep(0.1)
        raise BrowserError(f"Chromium did not start within {timeout:.0f} s")


@dataclass(frozen=True)
class Template:
    """A card of the template browser."""

    title: str
    width: int  # of its picture, in pixels


class Page:
    """One tab with ComfyUI's page. It starts with an empty canvas."""

    def __init__(self, socket_url: str):
        self._socket = WebSocket(socket_url)
        self._open = True
        self._calls = 0
        self._errors: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self.call(f"{domain}.enable")
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        self.call("Emulation.setEmulatedMedia", features=[still])  # moving parts cost more than the samplers

    def close(self) -> None:
        """Close the tab: one that stays open draws its canvas sixty times a second."""
        if self._open:
            self._open = False
            self.call("Page.close", 10)
            self._socket.close()

    # the browser

    def call(self, method: str, timeout: float = 120, **parameters) -> dict:
        """One DevTools command. Events that arrive meanwhile are noted."""
        self._calls += 1
        self._socket.send(json.dumps({"id": self._calls, "method": method, "params": parameters}))
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            text = self._socket.receive(left)
            if text is None:
                break
            message = json.loads(text)
            if message.get("id") == self._calls:
                if "error" in message:
                    raise BrowserError(f"{method}: {message['error']['message']}")
                return message["result"]
            self._note(message)
        raise BrowserError(f"{method} did not answer within {timeout:.0f} s")

    def evaluate(self, script: str, *arguments, timeout: float = 120):
        """The value of the body of an asynchronous function that is called with `arguments` as `a`, `b`, `c`."""
        values = ", ".join(json.dumps(argument) for argument in arguments)
        names = ", ".join("abc"[: len(arguments)])
        answer = self.call(
            "Runtime.evaluate",
            timeout,
            expression=f"(async ({names}) => {{ {script} }})({values})",
            awaitPromise=True,
            returnByValue=True,
        )
        if "exceptionDetails" in answer:
            raise BrowserError(_describe(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def wait_until(self, condition: str, what: str, timeout: float = 120):
        """Wait until the expression `condition` is truthy in the page; returns its value."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            value = self.evaluate(f"return {condition}")
            if value:
                return value
            time.sleep(0.1)
        raise BrowserError(f"{what}: not so after {timeout:.0f} s. Errors on the page: {self._errors or 'none'}")

    def screenshot(self, file: Path) -> Path:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
        return file

    def settle(self, quiet: float = 0.7, timeout: float = 30) -> None:
        """Wait until nothing has happened on the page, no request either, for `quiet` seconds."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            text = self._socket.receive(quiet)
            if text is None:
                return
            self._note(json.loads(text))

    def errors(self) -> list[str]:
        """Errors on the console, uncaught exceptions, and requests that failed, once the page has settled."""
        self.settle()
        return list(self._errors)

    def forget_errors(self) -> None:
        self.settle()
        self._errors.clear()

    def complaints(self) -> list[str]:
        """All that the page finds wrong with the workflow on its canvas, and errors since the last call."""
        found = [*self.red_nodes(), *self.missing_nodes(), *self._errors]
        self._errors.clear()
        return found

    def _note(self, message: dict) -> None:
        method, event = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self._errors.append(_describe(event["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and event["type"] in ("error", "assert"):
            texts = (str(part.get("value", part.get("description", ""))) for part in event["args"])
            self._errors.append("console: " + " ".join(texts))
        elif method == "Log.entryAdded" and event["entry"]["level"] == "error":
            self._errors.append(f"{event['entry']['text']} {event['entry'].get('url', '')}".strip())

    # ComfyUI's page

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait_until(
            "document.readyState === 'complete' && window.app?.graph && window.LiteGraph"
            " && Object.keys(LiteGraph.registered_node_types).length > 100 && app.extensionManager?.command && true",
            "ComfyUI's page is ready",
        )
        # A first visit shows ComfyUI's default workflow and asks the network for the sizes of its models.
        self.settle()
        self.clear()
        self.forget_errors()

    def clear(self) -> None:
        """Empty the canvas."""
        self.load_workflow({"version": 0.4, "nodes": [], "links": [], "last_node_id": 0, "last_link_id": 0})

    def node_types(self) -> list[str]:
        return self.evaluate("return Object.keys(LiteGraph.registered_node_types)")

    def load_workflow(self, workflow: dict) -> None:
        """Open a workflow in UI format, as a click in the workflow list does."""
        self.evaluate("await app.loadGraphData(a)", workflow)

    def load_file(self, file: Path) -> None:
        """Drop a file on the canvas, as a hand does: the browser makes the events and reads the file from disk."""
        middle = {"x": 700, "y": 450}
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, data=data, **middle)

    def graph(self) -> dict:
        """The graph on the canvas, in UI format."""
        return self.evaluate("return app.graph.serialize()")

    def prompt(self) -> dict:
        """The graph on the canvas in API format, converted by ComfyUI's page itself."""
        return self.evaluate("return (await app.graphToPrompt()).output")

    def missing_nodes(self) -> list[str]:
        """Types of nodes on the canvas, also in subgraphs, that ComfyUI does not know."""
        return self.evaluate("""
            const missing = [];
            const look = graph => {
                for (const node of graph.nodes) {
                    if (node.subgraph) look(node.subgraph);
                    else if (!(node.type in LiteGraph.registered_node_types)) missing.push(node.type);
                }
            };
            look(app.graph);
            return missing;
        """)

    def red_nodes(self) -> list[str]:
        """Nodes that the page frames in red, as when a file that they name is missing, with their values."""
        self.settle()  # the page looks for the files after it has drawn the graph
        return self.evaluate("""
            return app.graph.nodes.filter(node => node.has_errors)
                .map(node => `${node.title}: ${(node.widgets ?? []).map(widget => widget.value).join(", ")}`);
        """)

    def queue(self) -> str:
        """Press Run; returns the id of the prompt, for `Client.wait`."""
        return self.evaluate("""
            const queued = new Promise(resolve =>
                app.api.addEventListener("promptQueued", () => resolve(), { once: true }));
            const { fetchApi } = app.api;
            let answer;
            app.api.fetchApi = async function (route, ...rest) {
                const response = await fetchApi.call(this, route, ...rest);
                if (route === "/prompt") answer = await response.clone().json();
                return response;
            };
            try {
                await app.queuePrompt(0);
                await Promise.race([queued, new Promise(done => setTimeout(done, 1000))]);
            } finally {
                app.api.fetchApi = fetchApi;
            }
            if (!answer?.prompt_id || Object.keys(answer.node_errors).length)
                throw new Error("the server did not take all of the prompt: " + JSON.stringify(answer));
            return answer.prompt_id;
        """)

    def run(self, client: Client) -> Result:
        """Press Run and wait. Nothing is drawn meanwhile, which would take longer than the prompt."""
        prompt = self.queue()
        self.evaluate("document.body.style.contentVisibility = 'hidden'")
        try:
            return client.wait(prompt)
        finally:
            self.evaluate("document.body.style.contentVisibility = ''")

    def browse_templates(self, pack: str) -> None:
        """Open the template browser at a node pack."""
        self.evaluate("await app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        name = json.dumps(pack)
        entry = f"""[...document.querySelectorAll('[role=dialog] nav [role=button]')]
            .find(button => button.textContent.trim() === {name})"""
        self.wait_until(f"!!{entry}", f"{pack} is listed in the template browser", timeout=60)
        self.evaluate(f"{entry}.click()")

    def templates(self, pack: str) -> list[Template]:
        """The cards of a node pack in the template browser, which stays open, once all their pictures are there."""
        self.browse_templates(pack)
        name = json.dumps(pack)
        count = self.evaluate("return (await (await app.api.fetchApi('/workflow_templates')).json())[a].length", pack)
        self.evaluate("globalThis.picturesSeen = {}")
        cards = f"""(() => {{
            const seen = globalThis.picturesSeen;
            const title = [...document.querySelectorAll('[role=dialog] span')]
                .find(span => span.textContent.trim() === {name} && !span.closest('nav'));
            const all = [...document.querySelectorAll('[role=dialog] [data-testid^="template-workflow-"]')];
            const cards = all.map(
                card => ({{
                    title: card.querySelector('h3').textContent.trim(),
                    width: card.querySelector('img')?.naturalWidth ?? 0,
                }}));
            for (const card of cards)  // a picture is there only while its card is in view
                card.width = seen[card.title] = Math.max(seen[card.title] ?? 0, card.width);
            const waiting = cards.findIndex(card => !card.width);
            if (waiting >= 0) all[waiting].scrollIntoView();
            return title && cards.length === {count} && waiting < 0 && cards;
        }})()"""
        found = self.wait_until(cards, f"the template browser shows the pictures of {pack}", timeout=60)
        return [Template(**card) for card in found]

    def open_template(self, stem: str) -> None:
        """Click a card of the template browser, and wait until its workflow is on the canvas."""
        card = f"document.querySelector('[data-testid=' + CSS.escape('template-workflow-{stem}') + ']')"
        found = f"""(() => {{
            const all = document.querySelectorAll('[role=dialog] [data-testid^="template-workflow-"]');
            if (!{card}) [...all].at(-1)?.scrollIntoView();  // more cards come when the last one is in view
            return !!{card};
        }})()"""
        self.wait_until(found, f"{stem} is listed in the template browser", timeout=60)
        self.evaluate(f"{card}.click()")
        self.wait_until("!document.querySelector('[role=dialog]')", "the template browser closed", timeout=60)


def _describe(details: dict) -> str:
    return details.get("exception", {}).get("description") or details.get("text", "an exception without text")
