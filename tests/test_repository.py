"""Promises of the repository as a whole: what is shipped, how big it is, what it loads, what a workflow carries."""

import ast
import re
import subprocess
import sys
from urllib.parse import unquote

import pytest
import tomllib
from PIL import Image

from dit_toolkit.scripts import workflows
from dit_toolkit.scripts.places import PACK, ROOT, WORKFLOWS, comfyui

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
STEMS = workflows.stems()
ROOMS = [ROOT / room for room in ("nodes", "host", "models")]
SHIPPED = [ROOT / "__init__.py", *sorted(path for room in ROOMS for path in room.rglob("*.py"))]
HELP_PAGES = sorted((ROOT / "web" / "docs").rglob("*.md"))
NEVER_SHIPPED = {"benchmarks", "scripts", "tests", "training"}
DOWNLOADS = ("https://huggingface.co/", "https://civitai.com/")
EXTENSIONS = (".safetensors", ".sft")

# Where the note asks to look at the same seed with and without something, or at what a change does to one picture.
COMPARED = {
    *(f"CPU {number:02d} {name}" for number, name in (
        (4, "speed up, same picture"), (5, "speed up, gate decides"), (6, "speed up, autotune"),
        (7, "speed up canny control"), (8, "speed up, methods compared"), (9, "consistent character"),
        (10, "consistent character, given"), (11, "subject in a new scene"), (12, "try on clothes"),
        (14, "pose to video"), (15, "pose, subject, speed up"), (16, "train a character LoRA"))),
    "FLUX.1 06 speed up", "FLUX.1 07 speed up, gate decides", "FLUX.1 08 speed up canny control",
}  # fmt: skip

every_workflow = pytest.mark.parametrize("stem", STEMS)


def tracked_files() -> list:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def texts():
    for path in tracked_files():
        try:
            yield path.relative_to(ROOT), path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


# Workflows


@every_workflow
def test_nodes_say_which_pack_and_version_they_come_from(stem):
    workflow = workflows.read(stem)
    subgraphs = {subgraph["id"] for subgraph in workflows.subgraphs_of(workflow)}
    for node in workflows.nodes_of(workflow):
        if node["type"] in subgraphs or node["type"] in ("Note", "MarkdownNote", "Reroute", "PrimitiveNode"):
            continue
        properties, where = node["properties"], f"node {node['id']} ({node['type']})"
        ours = node["type"].startswith("DiT")
        assert properties.get("cnr_id") == (PACK if ours else "comfy-core"), where
        assert re.fullmatch(r"\d+\.\d+\.\d+", properties.get("ver", "")), where
        assert properties.get("Node name for S&R") == node["type"], where
        known = {"cnr_id", "ver", "Node name for S&R", "models"}
        assert set(properties) <= known, f"{where} carries the marks of other packs"


@every_workflow
def test_model_files_can_be_downloaded_from_where_they_are_missing(stem):
    for node in workflows.nodes_of(workflows.read(stem)):
        for model in node.get("properties", {}).get("models", ()):
            assert model["name"] in node["widgets_values"], model["name"]
            assert model["url"].startswith(DOWNLOADS)
            assert model["url"].partition("?")[0].endswith(EXTENSIONS)
            assert model["directory"]


@every_workflow
def test_a_workflow_is_a_finished_example(stem):
    workflow = workflows.read(stem)
    types = [node["type"] for node in workflow["nodes"]]
    assert workflow["version"] == 0.4
    assert "MarkdownNote" in types
    assert {"SaveImage", "SaveVideo"} & set(types)
    assert any(kind.startswith("DiT") for kind in types)
    assert not set(stem) & set("#?%")


@every_workflow
def test_seeds_are_fixed_where_pictures_are_compared_and_change_elsewhere(stem):
    kinds = ("KSampler", "SamplerCustom")
    samplers = [node for node in workflows.nodes_of(workflows.read(stem)) if node["type"] in kinds]
    wanted = "fixed" if stem in COMPARED else "randomize"
    for sampler in samplers:
        assert wanted in sampler["widgets_values"], sampler["type"]


@every_workflow
def test_a_workflow_has_a_thumbnail(stem):
    thumbnail = WORKFLOWS / f"{stem}.jpg"
    picture = Image.open(thumbnail)
    assert picture.format == "JPEG" or (picture.format == "WEBP" and picture.is_animated)  # browsers look inside
    assert thumbnail.stat().st_size < 200_000


# Help pages


@pytest.mark.parametrize("page", HELP_PAGES, ids=lambda page: page.stem)
def test_a_help_page_shows_a_picture_that_is_there(page):
    """The page serves `web/`, and takes addresses as relative to the help page."""
    pictures = re.findall(r"!\[[^\]]+\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    assert pictures
    for picture in pictures:
        file = (page.parent / unquote(picture)).resolve()
        assert file.is_relative_to(ROOT / "web"), picture
        assert file.is_file(), picture


# What is shipped


def test_the_pack_needs_nothing_but_what_draws_poses():
    """ComfyUI's manager reads one of the files, the registry the other."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    needed = [line for line in lines if line and not line.startswith("#")]
    assert needed == PROJECT["project"]["dependencies"] == ["opencv-python-headless"]


def test_the_changelog_names_the_version():
    version = PROJECT["project"]["version"]
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_weights_are_small_enough_to_ship():
    size = sum(path.stat().st_size for path in (ROOT / "weights").rglob("*") if path.is_file())
    assert size <= 40e6


def test_no_machine_and_no_registry_is_named():
    machine = r"(?:^|[^\w.])/(?:work|root|farm|home/\w+|Users/\w+)/"
    registry = r"pypi\.org/simple|files\.pythonhosted\.org|registry\.npmjs\.org"
    forbidden = re.compile(f"{machine}|{registry}")
    found = {str(name): match[0] for name, text in texts() if (match := forbidden.search(text))}
    assert not found


def test_there_is_no_lock_file_with_addresses():
    assert not [path for path in tracked_files() if path.name in ("uv.lock", "poetry.lock", "Pipfile.lock")]


def test_the_rooms_of_developers_are_never_shipped():
    ignored = set((ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines())
    assert {f"{room}/" for room in NEVER_SHIPPED} <= ignored
    assert all((ROOT / room).is_dir() for room in NEVER_SHIPPED)


def rooms_imported(path) -> set[str]:
    """The rooms that a file of ours imports from, wherever in it."""
    rooms, here = set(), path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = here[: len(here) - node.level + 1] if node.level else ()
            modules = [[*start, *(node.module or "").split("."), alias.name] for alias in node.names]
        else:
            continue
        ours = [[part for part in module if part not in ("", "dit_toolkit")] for module in modules]
        rooms |= {module[0] for module in ours if module}
    return rooms


def test_shipped_code_imports_nothing_of_the_rooms_of_developers():
    found = {str(path.relative_to(ROOT)): rooms_imported(path) & NEVER_SHIPPED for path in SHIPPED}
    assert not {name: rooms for name, rooms in found.items() if rooms}


def test_imports_are_seen_in_all_their_forms(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "host" / "control" / "one.py"
    path.parent.mkdir(parents=True)
    lines = "import a", "from dit_toolkit.c import d", "from ...e.f import g", "from ... import h", "from ..i import j"
    path.write_text("\n".join(lines))
    assert rooms_imported(path) == {"a", "c", "e", "h", "host"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_code_does_nothing_that_a_scanner_flags(path):
    """The registry's scanner, and what makes weights load badly: see the conventions of the ecosystem."""
    source = path.read_text(encoding="utf-8")
    source.encode("cp1252")
    for node in ast.walk(ast.parse(source)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
        bad = {"subprocess", "pickle", "ctypes", "socket", "urllib", "requests", "importlib"}
        assert not {module.partition(".")[0] for module in modules} & bad
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            assert call not in ("eval", "exec", "torch.load", "print", "os.system")
            assert not re.fullmatch(r"(torch\.)?nn\.(Linear|Conv\dd|LayerNorm|GroupNorm|Embedding)", call), call
            assert not call.endswith((".cuda", "empty_cache"))


# Loading

IMPORT = """
import asyncio, importlib.util, sys
sys.path.insert(0, {host!r})
from comfy.cli_args import args
args.cpu, args.base_directory = True, {base!r}
import nodes, comfy.sd, comfy_api.latest  # what ComfyUI has loaded by the time it reads the first pack, and less
before, opened = set(sys.modules), []
sys.addaudithook(lambda event, found: event == "open" and opened.append(str(found[0])))
comfy.utils.load_torch_file = lambda path, *_, **__: opened.append(str(path))  # opens files behind Python's back
spec = importlib.util.spec_from_file_location("pack", {root!r} + "/__init__.py", submodule_search_locations=[{root!r}])
module = importlib.util.module_from_spec(spec)
sys.modules["pack"] = module
spec.loader.exec_module(module)
asyncio.run(asyncio.run(module.comfy_entrypoint()).get_node_list())
new = {{name.partition(".")[0] for name in set(sys.modules) - before}} - {{"pack"}} - sys.stdlib_module_names
print("MODULES", *sorted(new))
print("FILES", *sorted({{path for path in opened if not path.endswith(".py") and ".pyc" not in path}}), sep="\\n")
"""


@pytest.mark.comfy
def test_the_pack_loads_without_bringing_modules_or_reading_files(tmp_path):
    """In a new process: nothing is imported that ComfyUI has not loaded, and no weights or pictures are opened.

    How long it takes is measured by `make bench`.
    """
    code = IMPORT.format(host=str(comfyui()), base=str(tmp_path), root=str(ROOT))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    modules, files = done.stdout.split("MODULES")[1].split("FILES")
    assert not modules.split()
    assert not [path for path in files.splitlines() if path.startswith(str(ROOT))]
