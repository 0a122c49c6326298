"""Where pictures are made: a real ComfyUI, its real page, and the embedded models. Both start when first needed.

with Studio() as studio:
    graph = studio.graph()
    model, clip, vae = graph.embedded()
    graph.show("doll", graph.drawn(model, clip, vae, "a doll waving"))
    picture = studio.run(graph)["doll"][0]
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from ..browser import Browser, Page
from ..client import VIDEOS, Result
from ..places import CACHE, DEMO_INPUTS
from ..server import Server

Picture = Image.Image
SIDE = 96  # of the embedded FLUX.1's pictures


class Node:
    """A node of a graph. `node[i]` is its output i; the node itself stands for the first one."""

    def __init__(self, identifier: str):
        self.id = identifier

    def __getitem__(self, output: int) -> list:
        return [self.id, output]


def link(value: Any) -> Any:
    return value[0] if isinstance(value, Node) else value


class Graph:
    """A prompt in API format. Inputs that are not named have the defaults of the node."""

    def __init__(self, info: dict):
        self.info, self.prompt = info, {}
        self.shown: dict[str, str] = {}

    def add(self, kind: str, **inputs: Any) -> Node:
        every = self.info[kind]["input"]
        values = {}
        for name, spec in {**every.get("required", {}), **every.get("optional", {})}.items():
            if name in inputs:
                continue
            options = spec[1] if len(spec) > 1 else {}
            choices = spec[0] if isinstance(spec[0], list) else options.get("options")
            if "default" in options:
                values[name] = options["default"]
            elif choices and name in every.get("required", {}):
                values[name] = choices[0]
        identifier = str(len(self.prompt) + 1)
        values |= {name: link(value) for name, value in inputs.items() if value is not None}
        self.prompt[identifier] = {"class_type": kind, "inputs": values}
        return Node(identifier)

    def embedded(self, base: str = "FLUX.1") -> tuple[list, list, list]:
        node = self.add("DiTLoadEmbedded", base=base)
        return node[0], node[1], node[2]

    def example(self, name: str) -> Node:
        return self.add("DiTExamplePicture", picture=name)

    def words(self, clip: Any, text: str = "") -> Node:
        return self.add("CLIPTextEncode", clip=clip, text=text)

    def drawn(
        self, model: Any, clip: Any, vae: Any, text: str, seed: int = 1, steps: int = 20, cfg: float = 2.5,
        size: tuple[int, int] = (SIDE, SIDE), latent: Any = None,
    ) -> Node:  # fmt: skip
        """The picture of a prompt, by KSampler."""
        latent = latent or self.add("EmptySD3LatentImage", width=size[0], height=size[1], batch_size=1)
        sampled = self.add(
            "KSampler", model=model, positive=self.words(clip, text), negative=self.words(clip), latent_image=latent,
            seed=seed, steps=steps, cfg=cfg, sampler_name="euler", scheduler="simple", denoise=1.0,
        )  # fmt: skip
        return self.add("VAEDecode", samples=sampled, vae=vae)

    def show(self, name: str, image: Any) -> None:
        """Name a picture that is wanted."""
        self.shown[name] = self.add("PreviewImage", images=image).id


class Studio:
    def __init__(self):
        self._open: list = []

    def __enter__(self) -> Studio:
        return self

    def __exit__(self, *_) -> None:
        while self._open:
            self._open.pop().__exit__(None, None, None)

    @cached_property
    def server(self) -> Server:
        server = Server(CACHE / "pictures", cpu=True).__enter__()
        self._open.append(server)
        for picture in DEMO_INPUTS.iterdir():
            if picture.suffix in (".png", ".jpg"):
                server.client.upload(picture)
        return server

    @cached_property
    def page(self) -> Page:
        browser = Browser().__enter__()
        self._open.append(browser)
        return browser.open(self.server.url)

    @cached_property
    def info(self) -> dict:
        return self.server.client.object_info()

    def graph(self) -> Graph:
        return Graph(self.info)

    def upload(self, picture: Picture, name: str) -> str:
        """A picture in ComfyUI's input folder, for LoadImage."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, name)
            picture.save(file)
            return self.server.client.upload(file)

    def run(self, graph: Graph) -> dict[str, list[Picture]]:
        """The pictures that the graph shows, by their names."""
        result = self.server.client.run(graph.prompt)
        every = self.pictures(result)
        return {name: every.get(identifier, []) for name, identifier in graph.shown.items()}

    def pictures(self, result: Result) -> dict[str, list[Picture]]:
        """All pictures of a run, by node. Of a clip its frames."""
        found: dict[str, list[Picture]] = {}
        for file in [*result.images, *result.videos]:
            data = self.server.client.fetch(file)
            shown = frames(data) if file.filename.endswith(VIDEOS) else [Image.open(io.BytesIO(data)).convert("RGB")]
            found.setdefault(file.node_id, []).extend(shown)
        return found


def frames(data: bytes) -> list[Picture]:
    import av

    with av.open(io.BytesIO(data)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


# The page

BUILD = """
globalThis.shot = {};
let top = 0;
for (const { name, type, values, width, height, title, left, at } of a) {
    const node = LiteGraph.createNode(type);
    app.graph.add(node);
    if (title) node.title = title;
    for (const [key, value] of Object.entries(values ?? {})) {
        const widget = node.widgets.find(each => each.name === key);
        widget.value = value;
        widget.callback?.(value);
    }
    await new Promise(done => setTimeout(done, 150));
    const size = node.computeSize();
    node.setSize([width ?? Math.max(size[0], 300), height ?? size[1]]);
    node.pos = [left ?? 0, at ?? top + 40];
    top = node.pos[1] + node.size[1] + 30;
    shot[name] = node;
}
for (const [from, output, to, input] of b) {
    const [source, target] = [shot[from], shot[to]];
    const slot = typeof input === "number" ? input : target.inputs.findIndex(each => each.name === input);
    source.connect(output, target, slot);
}
app.canvas.deselectAll?.();
app.canvas.links_render_mode = c ? LiteGraph.HIDDEN_LINK : LiteGraph.SPLINE_LINK;
"""
PLACE = """
const nodes = a.map(name => shot[name]);
const box = [
    Math.min(...nodes.map(n => n.pos[0])) - 12, Math.min(...nodes.map(n => n.pos[1])) - 44,
    Math.max(...nodes.map(n => n.pos[0] + n.size[0])) + 12, Math.max(...nodes.map(n => n.pos[1] + n.size[1])) + 12,
];
app.canvas.ds.scale = 1;
app.canvas.ds.offset = [440 - box[0], 120 - box[1]];
app.canvas.deselectAll?.();
app.canvas.setDirty(true, true);
await new Promise(done => setTimeout(done, 600));
const canvas = app.canvas.canvas.getBoundingClientRect();
return { x: canvas.x + 440, y: canvas.y + 120, width: box[2] - box[0], height: box[3] - box[1] };
"""


def screenshot(page: Page, names: Sequence[str]) -> Picture:
    """The nodes that `build` made, at twice their size."""
    import base64

    box = page.evaluate(PLACE, list(names))
    page.call(
        "Emulation.setDeviceMetricsOverride", deviceScaleFactor=2, mobile=False,
        width=max(1400, round(box["x"] + box["width"] + 60)), height=max(900, round(box["y"] + box["height"] + 80)),
    )  # fmt: skip
    page.settle()
    box = page.evaluate(PLACE, list(names))
    data = page.call("Page.captureScreenshot", format="png", clip={**box, "scale": 1})["data"]
    page.call("Emulation.clearDeviceMetricsOverride")
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


def build(page: Page, nodes: Sequence[dict], links: Sequence[tuple] = (), hide_links: bool = False) -> None:
    """Nodes on the canvas: name, type, values, and where. Links are (from, output, to, input by name or number)."""
    page.clear()
    page.evaluate(BUILD, list(nodes), [list(each) for each in links], hide_links)
    page.settle()
