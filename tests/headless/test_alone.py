"""`headless/` runs by itself: without torch, without ComfyUI, and without the other rooms, which never ask for it."""

import ast
import re
import shlex
import subprocess
import sys

import pytest

from dit_toolkit.headless import cli, tables
from dit_toolkit.scripts.places import DEMO_INPUTS, ROOT

FILES = sorted((ROOT / "headless").rglob("*.py"))
ROOMS = {"nodes", "host", "models", "scripts", "tests", "training", "benchmarks"}
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
OPTIONAL = {"ray": "on_ray.py", "pyarrow": "tables.py results.py", "comfy_cli": "workflow.py", "PIL": "results.py"}


def imports(path):
    """Every module that a file of headless/ imports, with whether it does so at once."""
    for module, level, at_once in found(path):
        assert level <= 1, f"{path.name} looks outside of headless/"
        if not level:
            yield module, at_once


def found(path):
    """Every module that a file names in an import, with its dots, and whether it is imported at once."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0, node in tree.body) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level, node in tree.body


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_it_imports_nothing_of_torch_comfyui_and_the_pack(path):
    for module, at_once in imports(path):
        name = module.partition(".")[0]
        assert name not in {"torch", "numpy", "dit_toolkit", *ROOMS, *COMFYUI}, module
        assert name not in OPTIONAL or (not at_once and path.name in OPTIONAL[name].split()), module
        assert name in {*sys.stdlib_module_names, *OPTIONAL, "aiohttp", "headless"}, (
            f"{module} is a package that nobody named"
        )


@pytest.mark.parametrize("room", ["", "nodes", "host", "models"])
def test_no_other_room_asks_for_it(room):
    """ComfyUI, which imports these, never imports what starts processes and speaks over the network."""
    for path in (ROOT / room).rglob("*.py") if room else ROOT.glob("*.py"):
        assert not any("headless" in f"{module}.{names}" for module, names in named(path)), path
        assert not re.search(r"import_module|__import__|spec_from|runpy", path.read_text(encoding="utf-8")), path


def named(path):
    """Every module that a file imports from, and what of it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


def test_it_runs_in_place_from_anywhere(tmp_path):
    code = "import runpy, sys; sys.argv = sys.argv[1:]; "
    code += "\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'comfy', 'nodes', 'ray', 'pyarrow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code, str(ROOT / "headless"), "run", "--help"],
                          capture_output=True, text=True, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--dry-run" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_example_table_names_pictures_that_are_shipped():
    rows = [row for _, row in tables.rows_of(ROOT / "headless" / "example" / "jobs.csv")]
    assert len(rows) == 20
    assert len({row["key"] for row in rows}) == 20
    assert all((DEMO_INPUTS / row["outline"]).is_file() for row in rows)


@pytest.mark.parametrize("page", ["README.md", "docs/headless.md"])
def test_the_example_of_a_page_names_files_that_are_there(page):
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    command = re.search(r"python custom_nodes/dit-toolkit/headless (run \"[^`\n]+)", text)[1]
    options = cli.parser().parse_args(shlex.split(command))
    for path in (options.workflow, options.table, options.files):
        assert (ROOT / path.relative_to("custom_nodes/dit-toolkit")).exists(), path
    assert options.settings == cli_settings()


def cli_settings() -> list[str]:
    """What the command's own help binds."""
    return re.findall(r'--set "([^"]+)"', cli.EXAMPLE)


def test_it_is_shipped():
    ignored = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    assert not [line for line in ignored if line.startswith("headless")]
