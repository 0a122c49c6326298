"""The import graph of what is shipped, drawn from its source: rooms look down, nothing goes in circles or sideways.

Every import counts: those inside of functions, which are only late, and those under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

import pytest

from dit_toolkit.scripts.places import PACK, ROOT

ROOMS = ("nodes", "host", "models")  # each may import from itself and from those behind it
NOT_SHIPPED = {"scripts", "training", "benchmarks", "tests"}
COMFYUI = {
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "execution",
    "folder_paths",
    "node_helpers",
    "server",
}

# A feature's files. What is not here is shared, and knows no feature; the door to the nodes knows them all.
FEATURES = {
    "step caches": (
        "nodes.step_cache",
        "nodes.accelerate",  # chooses among them
        "host.accelerate.step_cache*",
        "host.accelerate.accelerate",
        "host.accelerate.charts",
        "host.accelerate.foreign_caches",
        "models.accelerate.policies",
        "models.accelerate.taylorseer",
        "models.accelerate.cg_taylor",
        "models.accelerate.delta_dit",
        "models.accelerate.input_change",
    ),
    "CLEAR": ("nodes.sparse_attention", "host.accelerate.sparse_attention", "*.accelerate.clear*"),
    "Re-ttention": ("*.re_ttention*",),
    "EasyControl": ("*.easycontrol*",),
    "try-on": ("*.try_on*", "models.control.mc_vton*"),
    "FreeCus": ("*.freecus*", "models.control.subject_description"),
    "In-Context LoRA": ("*.in_context_lora", "host.control.training", "models.control.panel_*"),
    "DiT4SR": ("*.dit4sr*",),
    "pose video": ("nodes.pose_video", "*.animate.pose*"),
    "DynamiCtrl": ("*.dynamictrl*", "*.cogvideox_*"),
    "image difference": ("*.image_difference*",),
    "embedded default": ("*.embedded", "models.tiny_*"),
}
DOOR = "nodes"  # nodes/__init__.py

SECTIONS = ("control", "accelerate", "restore", "animate")
Graph = dict[str, set[str]]  # modules by their dotted names from the root, and what each imports


def files() -> dict[str, Path]:
    """Every module that is shipped, the root's `__init__` under the name of the pack."""
    found = {PACK: ROOT / "__init__.py"}
    for path in sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


FILES = files()
SOURCES = {module: path.read_text(encoding="utf-8") for module, path in FILES.items()}
PACKAGES = {module for module, path in FILES.items() if path.name == "__init__.py"}


def graph_of(sources: Mapping[str, str]) -> Graph:
    return {module: set(imports_of(module, source, sources)) for module, source in sources.items()}


def imports_of(module: str, source: str, known: Mapping[str, str]):
    """What a module names in its imports: modules of the pack by their names from the root, others as they are."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = ".".join(filter(None, (package_of(module, node.level), node.module)))
            for alias in node.names:
                inner = f"{origin}.{alias.name}".lstrip(".")
                yield inner if inner in known or not origin else origin


def package_of(module: str, level: int) -> str:
    """The package that a relative import of so many dots begins at, "" for the root; none for an absolute one."""
    if not level:
        return ""
    parts = [] if module == PACK else module.split(".")
    up = level - 1 if module in PACKAGES else level
    return ".".join(parts[: len(parts) - up])


def room_of(module: str) -> str:
    return module.split(".")[0]


def upward(graph: Graph) -> set[tuple[str, str]]:
    """Imports from a room of one that lies before it."""
    order = {room: number for number, room in enumerate(ROOMS)}
    edges = ((module, other) for module, others in graph.items() for other in others if other in graph)
    return {(a, b) for a, b in edges if order.get(room_of(a), -1) > order.get(room_of(b), -1)}


def circles(graph: Graph) -> set[str]:
    """Modules that an import leads back to, through others or at once."""

    def behind(start: str) -> set[str]:
        seen: set[str] = set()
        rest = [start]
        while rest:
            fresh = (graph[rest.pop()] & graph.keys()) - seen
            seen |= fresh
            rest += fresh
        return seen

    return {module for module in graph if module in behind(module)}


def feature_of(module: str) -> str | None:
    """The feature that a module belongs to; None where it is shared."""
    return next((name for name, patterns in FEATURES.items() if any(fnmatch(module, each) for each in patterns)), None)


def section_of(module: str) -> str | None:
    """The section of its room that a module lies in: control, accelerate, restore, animate."""
    parts = module.split(".")
    return parts[1] if len(parts) > 2 and parts[1] in SECTIONS else None


def sideways(graph: Graph) -> set[tuple[str, str]]:
    """Imports of one feature by another, or by what is shared; imports of one section by another."""
    edges = {(module, other) for module, others in graph.items() for other in others if other in graph}
    features = {(a, b) for a, b in edges if feature_of(b) and feature_of(a) != feature_of(b)}
    sections = {(a, b) for a, b in edges if section_of(a) and section_of(b) and section_of(a) != section_of(b)}
    return {(a, b) for a, b in features | sections if a not in (DOOR, PACK)}


def strangers(graph: Graph) -> set[tuple[str, str]]:
    """Imports of what is not shipped, and of ComfyUI by the maths."""
    edges = {(module, other) for module, others in graph.items() for other in others}
    banned = {(a, b) for a, b in edges if room_of(b.removeprefix(f"{PACK}.")) in NOT_SHIPPED}
    return banned | {(a, b) for a, b in edges if room_of(a) == "models" and room_of(b) in COMFYUI}


FINDERS = (upward, circles, sideways, strangers)


@pytest.mark.parametrize("find", FINDERS, ids=lambda find: find.__name__)
def test_no_import_goes_the_wrong_way(find):
    assert not find(graph_of(SOURCES))


@pytest.mark.parametrize(
    ("module", "line", "find"),
    [
        ("models.checkpoint", "from ..host import run", upward),
        ("host.run", "from ..nodes.inputs import check", upward),
        ("host.run", "def late():\n    from .token_grid import TOKENS", circles),
        ("host.run", "if TYPE_CHECKING:\n    from . import token_grid", circles),
        ("host.accelerate.step_cache_settings", "from .step_cache_run import Visit", circles),
        ("models.control.mc_vton", "from .easycontrol import ConditionLora", sideways),
        ("host.accelerate.re_ttention", "from . import sparse_attention", sideways),
        ("host.accelerate.own_attention", "from .sparse_attention import SparseAttention", sideways),
        ("host.restore.dit4sr", "from ..accelerate import own_attention", sideways),
        ("models.control.pixels", "import comfy.utils", strangers),
        ("models.control.pixels", "def late():\n    from comfy import utils", strangers),
        ("host.embedded", "from ..scripts import places", strangers),
        ("nodes", "from ..tests import conftest", strangers),
        (PACK, "from .scripts.places import ROOT", strangers),
        (PACK, "from . import benchmarks", strangers),
    ],
)
def test_an_import_that_goes_the_wrong_way_is_found(module, line, find):
    planted = graph_of({**SOURCES, module: f"{SOURCES[module]}\n{line}\n"})
    assert find(planted)


def test_the_table_of_features_is_that_of_the_rooms():
    for name, patterns in FEATURES.items():
        for pattern in patterns:
            assert any(fnmatch(module, pattern) for module in SOURCES), f"{name}: no file is {pattern}"
    for module in SOURCES:
        owners = [name for name, patterns in FEATURES.items() if any(fnmatch(module, each) for each in patterns)]
        assert len(owners) <= 1, f"{module} belongs to {owners}"
    nodes = [module for module in SOURCES if module.startswith("nodes.") and module != "nodes.inputs"]
    assert all(map(feature_of, nodes)), "a node's file belongs to a feature"
