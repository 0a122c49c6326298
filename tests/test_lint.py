"""Rules that the ecosystem's tools hold packs to, as far as they can be read from the files.

comfy-test's lint (syntax and JavaScript), `comfy node validate`, and what the registry takes. The tools themselves are
not needed here.
"""

import ast
import re
import tokenize

import pytest
import tomllib

from dit_toolkit.scripts.places import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PYTHON = [path for path in sorted(ROOT.rglob("*.py")) if not {".venv", ".comfyui", ".cache"} & set(path.parts)]
SCRIPTS = sorted((ROOT / "web").rglob("*.js"))
ACCELERATORS = {"NVIDIA CUDA", "AMD ROCm", "Intel Arc", "Apple Metal"}
SHARED = ("app", "api", "LiteGraph", "window", "globalThis", "document")

every_python = pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
every_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)


@every_python
def test_it_can_be_read_on_a_windows_of_the_west(path):
    path.read_text(encoding="utf-8").encode("cp1252")


SHIPPED = [path for path in PYTHON if path.relative_to(ROOT).parts[0] in ("__init__.py", "nodes", "host", "models")]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_text_as_code_or_asks_for_a_shell(path):
    """Ruff's S102, S307 and E702, which `comfy node validate` runs."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("exec", "eval")
    with path.open("rb") as file:
        assert not [token for token in tokenize.tokenize(file.readline) if token.string == ";"]


@every_script
def test_extensions_have_names_of_the_pack(path):
    names = re.findall(r"registerExtension\(\{\s*name: \"([^\"]+)\"", path.read_text(encoding="utf-8"))
    assert names == ([f"dittoolkit.{path.stem}"] if path.parent.name == "web" else [])


@every_script
def test_nothing_is_put_into_the_page_beside_the_nodes(path):
    """Styles come with the element of a widget."""
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"document\.(head|body|documentElement)\b", text)
    assert not re.search(r"\bdocument\.(write|append|adoptedStyleSheets)", text)


@every_script
def test_what_all_packs_share_is_left_as_it_is(path):
    text = path.read_text(encoding="utf-8")
    written = re.findall(rf"^\s*((?:{'|'.join(SHARED)})(?:\.\w+)+) = ", text, re.M)
    written += re.findall(rf"Object\.(?:assign|define\w+)\(((?:{'|'.join(SHARED)})(?:\.\w+)*),", text)
    assert written == []


@every_script
def test_styles_are_of_our_own_classes(path):
    """A rule for somebody else's element would change their nodes. Nothing is filled in, so that a lint can read it."""
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"createElement\(.style|insertRule|CSSStyleSheet", text)
    for style in re.findall(r"<style>(.*?)</style>", text, re.S):
        assert "${" not in style
        selectors = re.findall(r"([^{}]+)\{", style)
        assert selectors
        for part in ",".join(selectors).split(","):
            assert ".dittoolkit-" in part, part.strip()


def test_the_registry_takes_the_project():
    project, comfy = PROJECT["project"], PROJECT["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9-]{0,99}", project["name"])
    assert "comfyui" not in project["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["urls"]["Repository"].startswith("https://")
    assert comfy["PublisherId"]
    assert comfy["DisplayName"]
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])
    for classifier in project["classifiers"]:
        if classifier.startswith("Environment ::"):
            assert classifier.removeprefix("Environment :: GPU :: ") in ACCELERATORS, classifier
    known = {"PublisherId", "DisplayName", "Icon", "Banner", "requires-comfyui", "includes", "web"}
    assert set(comfy) <= known
