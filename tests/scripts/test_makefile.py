"""What the Makefile runs is there."""

import importlib.machinery
import re

import pytest

from dit_toolkit.scripts.places import ROOT

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
MODULES = sorted(set(re.findall(r"-m ((?:scripts|benchmarks|training)(?:\.\w+)*)", MAKEFILE)))
TARGETS = set(re.findall(r"^([\w-]+):(?!=)", MAKEFILE, re.MULTILINE))


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


def test_every_target_is_phony_and_help_names_real_ones():
    (phony,) = re.findall(r"^\.PHONY: (.+)$", MAKEFILE, re.MULTILINE)
    assert set(phony.split()) == TARGETS
    assert set(re.findall(r"@echo 'make ([\w-]+)", MAKEFILE)) <= TARGETS
