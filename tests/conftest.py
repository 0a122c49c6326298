"""Makes the pack importable as `dit_toolkit` and ComfyUI as itself; starts the server and the browser once for all.

Everything runs on the CPU, and gives the same numbers on every machine. The tests marked `gpu` are a run of their own,
`pytest -m gpu`, because ComfyUI chooses its device once per process.
"""

import gc
import json
import random
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
MADE = (  # model files that users make, or copy in whole folders: no workflow says where to get them
    "dit4sr/dit4sr_q.safetensors",
    "diffusion_models/DynamiCtrl/transformer/diffusion_pytorch_model-00001-of-00003.safetensors",
)

# ComfyUI has a nodes.py of its own. With the repository on sys.path, `import nodes` would find ours.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
package = ModuleType("dit_toolkit")
package.__path__ = [str(ROOT)]
sys.modules["dit_toolkit"] = package

from dit_toolkit.scripts import places, workflows  # noqa: E402
from dit_toolkit.scripts.browser import Browser, Page  # noqa: E402
from dit_toolkit.scripts.server import Server  # noqa: E402
from dit_toolkit.tests.selection import left_out  # noqa: E402


def gpu_alone(config: pytest.Config) -> bool:
    return config.getoption("markexpr").strip() == "gpu"


def pytest_configure(config):
    """For tests that import ComfyUI. Those of models/ need torch only, and pass when there is none."""
    if not (places.comfyui() / "main.py").exists():
        return
    sys.path.append(str(places.comfyui()))
    from comfy.cli_args import args  # parses nothing: only main.py does

    args.cpu = not (gpu_alone(config) and places.has_accelerator())
    args.base_directory = str(places.prepare_base(places.CACHE / "tests"))


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="every combination, and the long tests: make test-all")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--all"):
        gone = left_out(items)
        config.hook.pytest_deselected(items=gone)
        items[:] = [item for item in items if item not in gone]
    for node in (node for item in items for node in item.listchain()):
        if isinstance(node, pytest.Package) and node.path == ROOT:
            node.setup = lambda: None  # pytest would import the root __init__.py, and with it ComfyUI


def pytest_collection_finish():
    """What is imported by now stays. ComfyUI collects garbage in every run, and need not look at it again."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") is None:
        return
    if not places.has_accelerator():
        pytest.skip("no accelerator")
    if not gpu_alone(item.config):
        pytest.skip("runs on its own: pytest -m gpu")


def pytest_unconfigure():
    """While Python is shut down, core could not take its models apart any more."""
    if shared := sys.modules.get("dit_toolkit.tests.host.shared"):
        shared.SHARED.clear()


@contextmanager
def seeded() -> Iterator[None]:
    """The global random generators begin at 0, and go on afterwards as if nobody had drawn from them."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        yield
    random.setstate(before[0]), np.random.set_state(before[1])


@pytest.fixture(autouse=True, scope="module")
def seeded_module() -> Iterator[None]:
    """What the fixtures of a file draw does not depend on the files before it."""
    with seeded():
        yield


@pytest.fixture(autouse=True)
def seeded_test() -> Iterator[None]:
    """What a test draws does not depend on the tests before it."""
    with seeded():
        yield


@pytest.fixture(autouse=True)
def forgotten_patchers() -> Iterator[None]:
    """ComfyUI forgets what it loaded through a patcher that is gone while the model lives on, as shared models do.

    Else it would collect garbage, a second each, before every run of the tests that follow.
    """
    yield
    if management := sys.modules.get("comfy.model_management"):
        loaded = management.current_loaded_models
        loaded[:] = [each for each in loaded if not each.is_dead()]


@pytest.fixture(autouse=True, scope="module")
def shared_models() -> Iterator[None]:
    """A file of tests leaves the models that all share as they were."""
    yield
    shared = sys.modules.get("dit_toolkit.tests.host.shared")  # a file that needs torch only has none
    assert not shared or not (found := shared.changed()), f"A test has changed what all share: {', '.join(found)}"


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Server:
    """A real ComfyUI with this pack, the example pictures, and an empty file for every model that is not embedded."""
    base = places.prepare_base(tmp_path_factory.mktemp("comfyui"))
    if places.DEMO_INPUTS.exists():
        shutil.copytree(places.DEMO_INPUTS, base / "input", dirs_exist_ok=True)
    for path in (*places.WORKFLOWS.glob("*.json"), *places.BLUEPRINTS.glob("*.json")):
        for model in workflows.models_of(json.loads(path.read_text(encoding="utf-8"))):
            file = base / "models" / model["directory"] / model["name"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    for made in MADE:
        (base / "models" / made).parent.mkdir(parents=True, exist_ok=True)
        (base / "models" / made).touch()
    with Server(base, cpu=True, quiet=True) as running:
        yield running


@pytest.fixture(scope="session")
def browser() -> Browser:
    with Browser() as running:
        yield running


@pytest.fixture(scope="session")
def tab(browser: Browser, server: Server) -> Page:
    """Opened once: a page takes ten seconds to load."""
    return browser.open(server.url)


@pytest.fixture(scope="module")
def page(tab: Page) -> Page:
    """ComfyUI's page as each file of tests finds it: an empty canvas, in the classic rendering, no errors."""
    tab.evaluate("await app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")
    tab.clear()
    tab.forget_errors()
    return tab


@pytest.fixture(scope="session")
def prompts() -> dict[str, dict]:
    """Example workflows in API format, by name, as far as a test has opened them in the page."""
    return {}


@pytest.fixture(scope="session")
def tiny_state():
    from dit_toolkit.tests.host import tiny

    return tiny.flux_state()


@pytest.fixture(scope="session")
def tiny_flux(tiny_state):
    """A MODEL as UNETLoader gives it. Nobody may change it: every test shares it."""
    from dit_toolkit.tests.host import tiny
    from dit_toolkit.tests.host.shared import share

    return share("tiny_flux", tiny.load_flux(tiny_state))


@pytest.fixture(scope="session")
def file():
    """A random EasyControl LoRA for the tiny model."""
    from dit_toolkit.tests.host import tiny
    from dit_toolkit.tests.host.shared import share

    made = tiny.lora_file()
    share("file", made.patchers[0])
    return made
