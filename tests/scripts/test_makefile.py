"""What the Makefile runs, and what README, docs and model card tell to run, is there."""

import importlib.machinery
import re
import subprocess
import sys

import pytest

from dit_toolkit.scripts.figures.tables import pages
from dit_toolkit.scripts.places import ROOT

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
ROOMS = ("scripts", "training", "benchmarks")
TOLD = [page.read_text(encoding="utf-8") for page in pages(ROOT)]
MODULES = sorted(set(re.findall(rf"-m ((?:{'|'.join(ROOMS)})(?:\.\w+)*)", "\n".join([MAKEFILE, *TOLD]))))
TARGETS = {name for names in re.findall(r"^([\w -]+):(?!=)", MAKEFILE, re.MULTILINE) for name in names.split()}


def spec_of(module: str):
    """Where Python would find a module of ours, without importing it or its package."""
    *folders, name = module.split(".")
    return importlib.machinery.PathFinder.find_spec(name, [str(ROOT.joinpath(*folders))])


def test_it_runs_modules_of_ours():
    assert {"scripts.setup", "scripts.demo", "scripts.server", "benchmarks.accelerators", "training"} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_that_it_runs_can_be_found_and_run(module):
    spec = spec_of(module)
    assert spec is not None
    if spec.submodule_search_locations:  # a package runs by its __main__
        assert spec_of(f"{module}.__main__") is not None


def test_a_module_that_is_not_there_is_not_found():
    assert spec_of("benchmarks.bench") is None


@pytest.mark.parametrize("room", ROOMS)
def test_the_repository_has_its_name_in_what_runs_from_its_root(room):
    code = f"import {room}, dit_toolkit.scripts.places as places; print(places.ROOT)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == str(ROOT), done.stderr


def test_every_target_is_phony_and_help_names_real_ones():
    (phony,) = re.findall(r"^\.PHONY: (.+)$", MAKEFILE, re.MULTILINE)
    assert set(phony.split()) == TARGETS
    assert set(re.findall(r"@echo 'make ([\w-]+)", MAKEFILE)) <= TARGETS


@pytest.mark.parametrize("target", sorted({name for text in TOLD for name in re.findall(r"`make ([\w-]+)", text)}))
def test_a_target_that_a_page_tells_to_make_is_there(target):
    assert target in TARGETS
