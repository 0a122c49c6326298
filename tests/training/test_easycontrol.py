"""The stages of the EasyControl adapters: they train, go on where they were stopped, and know their base."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dit_toolkit.models.control.easycontrol_keys import parse
from dit_toolkit.models.tiny_vae import TinyVAE
from dit_toolkit.training import checkpoints, easycontrol, loop
from dit_toolkit.training.base import size_of
from dit_toolkit.training.embedded import WIDTHS, Base

pytestmark = pytest.mark.long


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """Folders of its own, and no compilation."""
    monkeypatch.setattr(checkpoints, "WORK", tmp_path / "work")
    monkeypatch.setattr(checkpoints, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setattr(loop, "device_of", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch, "compile", lambda model: model)
    vae = TinyVAE(8, WIDTHS, operations=nn).requires_grad_(False)
    monkeypatch.setattr(easycontrol, "load_vae", lambda recipe: vae)
    return tmp_path / "weights"


def keep_base(recipe: checkpoints.Recipe, seed: int) -> None:
    """A checkpoint of a base that never learned anything."""
    torch.manual_seed(seed)
    model = Base(size_of(recipe))
    for weight in model.parameters():  # as made, its last layer is zero and passes no gradient on
        nn.init.normal_(weight, std=0.05)
    checkpoints.save(checkpoints.work(recipe) / "base.pt", {"ema": model.state_dict()})


@pytest.mark.parametrize("kind", easycontrol.KINDS)
def test_an_adapter_trains_resumes_and_is_exported_in_the_published_layout(kind, workshop):
    base, recipe = checkpoints.Recipe(pixels=32), easycontrol.AdapterRecipe(pool=500, steps=2, batch=4, rank=4)
    keep_base(base, 0)
    for _ in range(2):  # the second time there is nothing left to do but the export
        easycontrol.train_adapter(kind, base, recipe)
    checkpoint = parse(load_file(workshop / "easycontrol" / f"tiny_{kind}.safetensors"))
    ups = [weight for key, weight in checkpoint.slots[0].weights.items() if key.endswith("up.weight")]
    assert (checkpoint.dim, checkpoint.double, checkpoint.single) == (128, 2, 6)
    assert sum(bool(weight.any()) for weight in ups) >= len(ups) - 4  # they start at 0; the last block needs no proj


def test_another_base_gets_an_adapter_of_its_own_and_the_first_base_its_own_again(workshop):
    base, recipe = checkpoints.Recipe(pixels=32), easycontrol.AdapterRecipe(pool=500, steps=1, batch=2, rank=2)
    made = []
    for seed in (0, 1, 0):
        keep_base(base, seed)
        easycontrol.train_adapter("pose", base, recipe)
        made.append(load_file(workshop / "easycontrol" / "tiny_pose.safetensors"))
    first, second, again = made
    assert any(not torch.equal(first[key], second[key]) for key in first)
    assert all(torch.equal(first[key], again[key]) for key in first)
