"""README and docs lead to what is there: files, headings, folders, workflows, nodes, addresses of core's templates."""

import asyncio
import json
import re
from importlib.metadata import files
from urllib.parse import unquote

import pytest

from dit_toolkit.scripts import workflows
from dit_toolkit.scripts.figures.tables import pages
from dit_toolkit.scripts.places import ROOT

PAGES = [*pages(ROOT), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(text: str) -> set[str]:
    return {anchor(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@every_page
def test_a_link_leads_to_a_file_and_a_heading_that_are_there(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in (link for link in links if not link.startswith(("https://", "http://"))):
        path, _, part = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not part or part in anchors(target.read_text(encoding="utf-8")), link


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 90


def test_what_has_not_been_tried_is_said_once_and_asks_for_reports():
    assert len(re.findall("could not get them", README)) == 1
    assert "https://github.com/dit-toolkit/dit-toolkit/issues" in README
    assert not re.search(r"nobody has", README, re.IGNORECASE)


def named() -> set[str]:
    """Workflows in bold in the README's table."""
    section = README.partition("## Begin here")[2].partition("\n## ")[0]
    return set(re.findall(r"^\| \*\*(.+?)\*\* \|", section, re.MULTILINE))


def test_the_readme_names_five_workflows_that_are_there():
    assert len(named()) == 5
    assert named() <= set(workflows.stems())


# Files for real pictures


def rows() -> list[tuple[str, list[str]]]:
    """The file's cell, and the folders, of each row of the README's table."""
    section = README.partition("## Files for real pictures")[2].partition("\n## ")[0]
    cells = [line.split("|")[1:-1] for line in section.splitlines() if "https://" in line and line.startswith("|")]
    return [(file, re.findall(r"`([\w/]+)", folder)) for _, file, folder, _ in cells]


@pytest.mark.comfy
def test_the_folders_are_folders_that_loaders_look_into():
    import folder_paths

    from dit_toolkit.nodes import DiTToolkit

    for node in asyncio.run(DiTToolkit().get_node_list()):
        node.GET_SCHEMA()  # lists files, and with that registers the folders of the pack
    found = rows()
    assert len(found) == 13
    for cell, folders in found:
        assert folders, cell
        assert {folder.partition("/")[0] for folder in folders} <= set(folder_paths.folder_names_and_paths), cell


def models(here) -> list[dict]:
    if isinstance(here, dict):
        own = [m for m in here.get("models") or () if isinstance(m, dict) and "url" in m]
        return own + [model for value in here.values() for model in models(value)]
    return [model for value in here for model in models(value)] if isinstance(here, list) else []


@pytest.mark.comfy
def test_files_that_cores_templates_use_have_their_address_and_folder():
    known: dict[str, set] = {}
    for package in ("comfyui_workflow_templates_core", "comfyui_workflow_templates_json"):
        for file in files(package) or ():
            if file.name.endswith(".json"):
                text = file.read_text(encoding="utf-8")
                for model in models(json.loads(text)) if '"models"' in text else ():
                    address = model["url"].removesuffix("?download=true")
                    known.setdefault(address.rpartition("/")[2], set()).add((address, model.get("directory")))
    compared = 0
    for cell, folders in rows():
        for address in re.findall(r"\((https://[^)]+\.safetensors)\)", cell):
            places = known.get(address.rpartition("/")[2], set())
            if places:
                compared += 1
                assert any((address, folder) in places for folder in folders), address
    assert compared >= 6


@pytest.mark.comfy
@every_page
def test_nodes_are_called_by_their_names(page):
    """The nodes that papers.md lists are nodes of the pack."""
    from dit_toolkit.nodes import DiTToolkit

    names = {node.GET_SCHEMA().display_name for node in asyncio.run(DiTToolkit().get_node_list())}
    told = set(
        re.findall(r"\b((?:Apply|Load|Extract) [A-Z][\w-]+(?: (?:LoRA|Patch|Model))?)\b", page.read_text("utf-8"))
    )
    core = {"Load LoRA", "Load Image", "Load Checkpoint", "Load Diffusion", "Load VAE", "Load CLIP"}
    unknown = {each for each in told if each not in names | core and not any(name.startswith(each) for name in names)}
    assert not unknown
