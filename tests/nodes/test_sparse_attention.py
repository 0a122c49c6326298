"""The node Apply CLEAR, as a workflow calls it."""

import pytest
import safetensors.torch
import torch

pytestmark = pytest.mark.comfy

import folder_paths  # noqa: E402

from dit_toolkit.host.run import attached  # noqa: E402
from dit_toolkit.models.accelerate.sparse_attention import Disc, PooledDisc  # noqa: E402
from dit_toolkit.nodes.sparse_attention import MASK_ONLY, ApplyClear  # noqa: E402
from dit_toolkit.tests.host import tiny  # noqa: E402
from dit_toolkit.tests.host.families import FAMILIES  # noqa: E402
from dit_toolkit.tests.models.accelerate.test_clear_keys import published  # noqa: E402
from dit_toolkit.tests.nodes.calling import run_node  # noqa: E402

DEFAULTS = {
    "file": MASK_ONLY,
    "radius": 0,
    "pooling": 0,
    "scale": "as trained",
    "min_tokens": 4096,
    "start_percent": 0.0,
    "end_percent": 1.0,
    "below_min_tokens": "auto",
}


def apply(model, **inputs):
    return run_node(ApplyClear, model=model, **inputs)


@pytest.fixture
def down_4(tmp_path, monkeypatch):
    """A random file in the published layout, in models/clear."""
    name = "clear_local_2_down_4.safetensors"
    state = published(tiny.DOUBLE, tiny.SINGLE, factor=4, dim=tiny.HIDDEN)
    (tmp_path / "clear").mkdir()
    safetensors.torch.save_file({key: value * 0.05 for key, value in state.items()}, tmp_path / "clear" / name)
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "clear", ([], set()))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return name


def test_defaults_of_the_schema_are_these():
    inputs = {entry.id: entry.default for entry in ApplyClear.define_schema().inputs if entry.id != "model"}
    assert inputs == DEFAULTS


def test_without_a_file_the_model_keeps_its_weights(tiny_flux):
    patched, report = apply(tiny_flux)
    assert not patched.patches
    assert attached(patched)[0].pattern == Disc(32)
    assert report.startswith(f"{MASK_ONLY}: mask only\n")
    assert "2048 px: 20.6% of the pairs kept" in report


def test_with_a_file_weights_and_pattern_come_from_it(tiny_flux, down_4):
    patched, report = apply(tiny_flux, file=down_4, min_tokens=0)
    assert attached(patched)[0].pattern == PooledDisc(2, 4)
    assert len(attached(patched)[0].cells) == 4
    assert report.startswith(f"{down_4}: 2+2 blocks, hidden size 128, 28 tensors, pooled cells of 4\n")
    found = tiny.sample(patched, size=(16, 16))
    assert found.isfinite().all()
    assert not torch.allclose(found, tiny.sample(tiny_flux, size=(16, 16)), atol=1e-2)


def test_a_radius_beyond_the_picture_is_off(tiny_flux):
    patched, _ = apply(tiny_flux, radius=64, min_tokens=0)
    assert torch.equal(tiny.sample(patched), tiny.sample(tiny_flux))


def test_small_pictures_stay_dense(tiny_flux):
    patched, _ = apply(tiny_flux, radius=1)
    assert torch.equal(tiny.sample(patched), tiny.sample(tiny_flux))


def test_the_weights_of_a_file_are_local_at_every_size(tiny_flux, down_4):
    """Nobody trained them for dense attention. A picture of 16 x 16 tokens is far below the 4096 of the default."""
    local, report = apply(tiny_flux, file=down_4)
    assert torch.equal(tiny.sample(local, size=(32, 32)), sampled(tiny_flux, down_4, min_tokens=0))
    assert report.endswith("below 4096 tokens: local too, as this file was trained")
    assert "dense" not in report


def test_who_asks_for_dense_attention_below_min_tokens_gets_it_and_is_told(tiny_flux, down_4):
    dense, report = apply(tiny_flux, file=down_4, below_min_tokens="dense")
    assert torch.equal(tiny.sample(dense, size=(32, 32)), tiny.sample(weights_of(dense, tiny_flux), size=(32, 32)))
    assert report.endswith("below 4096 tokens: dense, which this file was not trained for")


def test_without_a_file_small_pictures_can_be_local(tiny_flux):
    local, _ = apply(tiny_flux, radius=1, below_min_tokens="local")
    everywhere, _ = apply(tiny_flux, radius=1, min_tokens=0)
    assert torch.equal(tiny.sample(local), tiny.sample(everywhere))
    assert not torch.equal(tiny.sample(local), tiny.sample(tiny_flux))


def test_pooled_keys_stay_where_the_disc_covers_the_picture(tiny_flux, down_4):
    """Files with pooled cells are trained with those keys at every size: 4 x 4 tokens lie within the radius."""
    found = sampled(tiny_flux, down_4, radius=64, size=(8, 8))
    widest = sampled(tiny_flux, down_4, radius=7, size=(8, 8))  # covers 4 x 4 tokens as well
    assert torch.equal(found, widest)
    weights_alone = weights_of(apply(tiny_flux, file=down_4)[0], tiny_flux)
    assert not torch.allclose(found, tiny.sample(weights_alone), atol=1e-3)


def weights_of(patched, model):
    """`model` with the weights of a patched one alone."""
    weights_alone = model.clone()
    weights_alone.patches = patched.patches
    weights_alone.patches_uuid = patched.patches_uuid  # by which core knows that it has other weights to load
    return weights_alone


def sampled(model, file, *, size=(32, 32), **inputs):
    return tiny.sample(apply(model, file=file, **inputs)[0], size=size)


def test_models_that_it_cannot_help_are_refused(down_4):
    with pytest.raises(ValueError, match="Apply CLEAR does not know where the picture's tokens are in a PixArtSigma"):
        apply(FAMILIES["pixart"].load())
    with pytest.raises(ValueError, match=r"Apply CLEAR needs a FLUX\.1 model, got Chroma"):
        apply(FAMILIES["chroma"].load(), file=down_4)


def test_twice_is_refused(tiny_flux):
    patched, _ = apply(tiny_flux)
    with pytest.raises(ValueError, match="sparse already"):
        apply(patched)
