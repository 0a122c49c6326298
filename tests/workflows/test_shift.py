"""FLUX.1 shifts its schedule by the size of the picture: every workflow samples with the shift that its size wants."""

from __future__ import annotations

import pytest

from dit_toolkit.models.control.panel_layout import PRESETS
from dit_toolkit.scripts import workflows

FLUX = [stem for stem in workflows.stems() if "FLUX.1" in stem and not workflows.is_embedded(stem)]
# CLEAR's authors sample large pictures with a fixed shift of 10, whose logarithm this is.
FIXED = {("FLUX.1 09 speed up large pictures", (2048, 2048)): 2.3}


class Graph:
    """A workflow in UI format, walked against the links."""

    def __init__(self, stem: str):
        self.nodes, self.sources = workflows.flat(workflows.read(stem))
        self.ids = {id(node): node_id for node_id, node in self.nodes.items()}

    def before(self, node: dict, name: str) -> dict | None:
        """The node that feeds an input."""
        source = self.sources.get((self.ids[id(node)], name))
        return None if source is None else self.nodes[source[0]]

    def of_type(self, kind: str) -> list[dict]:
        return [node for node in self.nodes.values() if node["type"] == kind]

    def size(self, latent: dict) -> tuple[int, int]:
        """Width and height in pixels of the picture that a node's latent is for."""
        values = latent["widgets_values"]
        if latent["type"] in ("EmptySD3LatentImage", "EmptyLatentImage"):
            return values[0], values[1]
        if latent["type"] == "DiTPanelLatent":
            return self.canvas(self.before(latent, "panels"))
        if latent["type"] == "VAEEncode":
            scaled = self.before(latent, "pixels")
            assert scaled["type"] == "ImageScale"
            return scaled["widgets_values"][1], scaled["widgets_values"][2]
        if latent["type"] == "InpaintModelConditioning":
            return self.size(self.before(latent, "pixels"))
        raise AssertionError(f"say here what size a {latent['type']} gives")

    def canvas(self, layout: dict) -> tuple[int, int]:
        preset, rows, columns, width, height, *_ = layout["widgets_values"]
        if preset != "custom":
            rows, columns = PRESETS[preset].rows, PRESETS[preset].columns
            width, height = PRESETS[preset].width, PRESETS[preset].height
        return columns * width, rows * height

    def shift(self, model: dict | None) -> float:
        """mu of the MODEL that comes out of a node; a FLUX.1 as loaded has 1.15."""
        while model is not None and model["type"] != "ModelSamplingFlux":
            model = self.before(model, "model")
        return 1.15 if model is None else mu(*model["widgets_values"])


def mu(most: float, least: float, width: int, height: int) -> float:
    """FLUX.1: straight from `least` at 256 tokens to `most` at 4096. Source: black-forest-labs/flux, `sampling.py`."""
    return least + (most - least) * (width * height / 256 - 256) / (4096 - 256)


@pytest.mark.parametrize("stem", FLUX)
def test_the_shift_is_that_of_the_size(stem):
    graph = Graph(stem)
    samplers = graph.of_type("KSampler")
    assert samplers
    for sampler in samplers:
        size = graph.size(graph.before(sampler, "latent_image"))
        wanted = FIXED.get((stem, size), mu(1.15, 0.5, *size))
        assert graph.shift(graph.before(sampler, "model")) == pytest.approx(wanted, abs=0.01), size


def test_a_linked_size_is_also_the_one_that_stands_in_the_node():
    """The test above reads the widget; with a link, the page would show another number."""
    for stem in FLUX:
        graph = Graph(stem)
        for node in graph.of_type("ModelSamplingFlux"):
            source = graph.before(node, "width")
            if source is not None:
                assert tuple(node["widgets_values"][2:]) == graph.canvas(source)
