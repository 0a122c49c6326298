"""Where the picture's tokens are, asked of the models themselves: which query answers to one patch of the latent."""

from dataclasses import dataclass, field

import pytest
import torch

pytestmark = pytest.mark.comfy

import comfy.sample  # noqa: E402

from dit_toolkit.host.accelerate.own_attention import OwnAttention, take_over  # noqa: E402
from dit_toolkit.host.run import attach  # noqa: E402
from dit_toolkit.host.token_grid import tokens  # noqa: E402
from dit_toolkit.models.accelerate.sparse_attention import Grid  # noqa: E402
from dit_toolkit.tests.host.families import ALL, FAMILIES, Family  # noqa: E402

KNOWN = {name: family for name, family in ALL.items() if family.grid is not None}


@dataclass(frozen=True, eq=False)
class Watch:
    """Keeps every attention call that may be taken over, and takes none."""

    calls: list[OwnAttention] = field(default_factory=list)

    def bind(self, run, model_options):
        take_over(model_options, self.calls.append)


def calls_of(family: Family, noise: torch.Tensor, model=None) -> list[OwnAttention]:
    watch = Watch()
    comfy.sample.sample(
        attach(family.load() if model is None else model, watch, Watch.bind),
        *(noise, 1, 1.0, "euler", "simple", family.prompt(3), family.prompt(4), torch.zeros_like(noise)),
        disable_pbar=True,
        seed=0,
    )
    return watch.calls


def noise_for(family: Family, **sizes) -> torch.Tensor:
    return torch.randn(1, *family.latent_shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("name", KNOWN)
def test_a_patch_of_the_latent_is_the_token_that_the_grid_names(name):
    family = KNOWN[name]
    noise, patch = noise_for(family), family.latent_shape[-1] // family.grid.width
    frame, row, column = (1 if noise.ndim == 5 and noise.shape[2] > 1 else 0), 2, 1
    changed = noise.clone()
    deep = noise.shape[2] // family.grid.frames  # latent frames of a token
    area = changed if noise.ndim == 4 else changed[:, :, frame * deep : (frame + 1) * deep]
    area[..., row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] += 5.0

    before, after = calls_of(family, noise), calls_of(family, changed)
    grid = before[0].grid
    assert grid == family.grid
    moved = (before[0].q - after[0].q).abs().sum((0, 1, 3))  # [L]
    assert int(moved.argmax()) == grid.before + (frame * grid.height + row) * grid.width + column
    outside = torch.ones(grid.length, dtype=torch.bool)
    outside[grid.before : grid.before + grid.picture] = False
    if name != "z_image":  # its padding attends to the picture in the refining blocks
        assert moved[outside].max() == 0 if outside.any() else True


@pytest.mark.parametrize("name", KNOWN)
def test_every_block_is_seen_once_and_under_one_name(name):
    family = KNOWN[name]
    calls = calls_of(family, noise_for(family))
    layers = [call.layer for call in calls]
    assert len(set(layers)) == len(layers)
    assert len(layers) == family.attentions
    if family.answers.kinds:
        assert (layers[0][:2] == ("double", 0)) == family.answers.numbered


def test_sd3s_second_attention_has_the_picture_alone():
    family = FAMILIES["sd35"]
    assert [call.grid for call in calls_of(family, noise_for(family))].count(Grid(4, 4)) == 1


@pytest.mark.parametrize(
    ("name", "size", "grid"),
    [
        ("flux", (7, 9), Grid(4, 5, before=5)),
        ("sd35", (7, 9), Grid(4, 5, before=6)),
        ("lumina2", (7, 9), Grid(4, 5, before=6)),
        ("qwen", (1, 7, 9), Grid(4, 5, before=6)),
        ("wan", (2, 7, 9), Grid(4, 5, 2)),
        ("cogvideox", (2, 7, 9), Grid(4, 5, 2, before=6)),
        ("ltx", (2, 3, 5), Grid(3, 5, 2)),
    ],
)
def test_odd_sizes_are_padded_up_as_the_models_do(name, size, grid):
    """HunyuanVideo takes none: core fails in its last layer."""
    family = FAMILIES[name]
    calls = calls_of(family, torch.randn(1, family.latent_shape[0], *size))
    assert {call.grid for call in calls} - {Grid(grid.height, grid.width)} == {grid}


def test_unknown_families_and_doubtful_calls_have_no_grid_and_say_why():
    latent = torch.zeros(1, 4, 34, 34)
    found = tokens(FAMILIES["pixart"].load().model.diffusion_model, latent, torch.zeros(1, 6, 8), {})
    assert not found.grids
    assert "PixArtMS is not among the families" in found.reason

    wan = FAMILIES["wan"].load().model.diffusion_model
    as_long = torch.zeros(1, 27, 8)
    found = tokens(wan, torch.zeros(1, 16, 3, 6, 6), as_long, {})
    assert not found.grids
    assert "not known for sure" in found.reason

    z_image = FAMILIES["z_image"].load().model.diffusion_model
    assert not tokens(z_image, torch.zeros(1, 16, 8, 8), torch.zeros(1, 6, 8), {"ref_latents": [latent]}).grids

    ltx = FAMILIES["ltx"].load().model.diffusion_model
    keyframes = {"keyframe_idxs": torch.zeros(1, 3, 9)}
    assert not tokens(ltx, torch.zeros(1, 128, 3, 3, 3), torch.zeros(1, 6, 8), keyframes).grids
