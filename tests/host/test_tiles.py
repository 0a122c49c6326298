"""A picture that another node cuts into tiles: each is found again, and sees its own part of a condition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

pytestmark = pytest.mark.comfy

from comfy.patcher_extension import WrappersMP, add_wrapper_with_key  # noqa: E402

from dit_toolkit.host import embedded  # noqa: E402
from dit_toolkit.host.attention import EXTRA_KEYS  # noqa: E402
from dit_toolkit.host.control import freecus  # noqa: E402
from dit_toolkit.host.control.conditions_run import Encoder  # noqa: E402
from dit_toolkit.host.families import flux  # noqa: E402
from dit_toolkit.host.run import KEY, attach, chunk_of  # noqa: E402
from dit_toolkit.host.tiles import Tile, find, tiles_of  # noqa: E402
from dit_toolkit.models.accelerate.policies import Interval  # noqa: E402
from dit_toolkit.models.control.conditions import encode_condition  # noqa: E402
from dit_toolkit.models.control.positions import grid_ids, tokens_in_tile  # noqa: E402
from dit_toolkit.tests.host.accelerate.caching import cached, strip  # noqa: E402
from dit_toolkit.tests.host.tiny import close, controlled, latent, prompt, sample  # noqa: E402

SIZE, TILE = (12, 16), 8  # of the latent
CORNERS = [(0, 0), (0, 8), (4, 0), (4, 8)]  # rows overlap, columns do not


def in_tiles(model, at_once, corners=CORNERS, roll=0):
    """`model` as TiledDiffusion samples it: crops one after the other in the batch, each with all prompts."""

    def wrapper(apply_model, args):
        x = args["input"].roll(roll, -1)
        out, count = torch.zeros_like(x), torch.zeros_like(x)
        for start in range(0, len(corners), at_once):
            some = corners[start : start + at_once]
            crops = torch.cat([x[..., top : top + TILE, left : left + TILE] for top, left in some])
            conds = {name: repeated(value, len(some), x) for name, value in args["c"].items()}
            given = apply_model(crops, args["timestep"].repeat(len(some)), **conds)
            for (top, left), tile in zip(some, given.chunk(len(some)), strict=True):
                out[..., top : top + TILE, left : left + TILE] += tile
                count[..., top : top + TILE, left : left + TILE] += 1
        return (out / count).roll(-roll, -1)

    tiled = model.clone()
    tiled.set_model_unet_function_wrapper(wrapper)
    return tiled


def repeated(value, tiles, x):
    whole = torch.is_tensor(value) and value.shape[0] == x.shape[0]
    return value.repeat(tiles, *[1] * (value.ndim - 1)) if whole else value


@dataclass(frozen=True, eq=False)
class Look:
    """A description that hands every call's transformer_options to `seen`, as the model gets them."""

    seen: Callable
    innermost = True

    def bind(self, run, model_options):
        def apply_model(executor, *args, **kwargs):
            self.seen(args[0], args[5])
            return executor(*args, **kwargs)

        add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, apply_model, model_options, is_model_options=True)


def test_a_crop_is_found_where_it_was_cut():
    picture = torch.randn(16, 12, 20, generator=torch.Generator().manual_seed(0))
    for top, left in ((0, 0), (4, 12), (3, 5)):
        assert find(picture[:, top : top + 8, left : left + 8], picture) == Tile(top, left, (12, 20))
    video = picture.unflatten(0, (4, 4))
    assert find(video[..., 2:6, 7:9], video) == Tile(2, 7, (12, 20))


def test_what_is_no_crop_and_what_lies_in_two_places_is_not_found():
    picture = torch.randn(4, 12, 20, generator=torch.Generator().manual_seed(0))
    assert not find(picture[:, 1:9, 1:9] + 1e-3, picture).found
    assert not find(torch.zeros(4, 3, 3), torch.zeros(4, 12, 20)).found


def test_whole_pictures_are_no_tiles():
    x = latent(0, SIZE, 2)
    assert tiles_of(x.repeat(2, 1, 1, 1), x, 2, 0, 2) == [None]
    assert tiles_of(latent(0, (32, 32)), x, 1, 0, 1) == [None]  # larger than what was asked for
    assert tiles_of(x[..., :4], None, 1, 0, 2) == [None]


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("pictures", [1, 3])
def test_a_batch_of_tiles_is_tile_after_tile(prompts, pictures):
    x = latent(0, SIZE, pictures)
    batch = torch.cat([x[..., top : top + TILE, left : left + TILE].repeat(prompts, 1, 1, 1) for top, left in CORNERS])
    assert tiles_of(batch, x, prompts, 0, pictures) == [Tile(top, left, SIZE) for top, left in CORNERS]
    assert tiles_of(batch[1:], x, prompts, 0, pictures)[0].found == (prompts * pictures == 1)


def test_tokens_of_a_condition_in_a_tile_by_definition():
    """Token (i, j) of an 8 x 12 condition lies at (i / 2, j / 2) of a 4 x 6 picture."""
    inside = tokens_in_tile((8, 12), (4, 6), (1.0, 2.0), (2, 3))
    expected = [i * 12 + j for i in range(8) for j in range(12) if 1 <= i / 2 < 3 and 2 <= j / 2 < 5]
    assert inside.tolist() == expected


@pytest.mark.parametrize("own", [(5, 7), (1, 1), (64, 3)])
def test_tiles_of_one_size_have_as_many_tokens_wherever_they_lie(own):
    counts = {
        len(tokens_in_tile(own, (20, 30), (top, left), (8, 8)))
        for top in (0.0, 0.5, 3.0, 11.5, 12.0)
        for left in (0.0, 7.5, 22.0)
    }
    assert len(counts) == 1
    assert counts != {0}


def test_a_tile_sees_its_part_of_the_condition_at_its_place(tiny_flux, file):
    """Keys by definition: those of the whole condition, its positions counted from the tile, without what is beside."""
    condition, seen = latent(30, SIZE), []

    def look(x, options):
        (keys,) = options[EXTRA_KEYS]
        seen.extend((tuple(x.shape), part) for part in keys.conditions)

    model = attach(controlled(tiny_flux, file=file, condition=condition), Look(look), Look.bind)
    sample(in_tiles(model, 2), 1, size=SIZE)

    transformer, base = tiny_flux.model.diffusion_model, tiny_flux.model
    like = torch.empty(0)
    text = prompt()[0][1]
    vec = flux.modulation_vector(transformer, 0.0, torch.tensor([text["guidance"]]), text["pooled_output"], like)
    assert [shape for shape, _ in seen] == [(2, 16, TILE, TILE)] * 4
    for (top, left), (_, found) in zip(CORNERS, seen, strict=True):
        ids = grid_ids((6, 8)) - torch.tensor([0.0, top / 2, left / 2])
        keys = encode_condition(
            transformer, file.patchers[0].model, flux.latent_tokens(base, condition, 16), vec,
            flux.rotations(transformer, ids, {}), attention=flux.attention, apply_rope=flux.apply_rope,
        )  # fmt: skip
        inside = [i * 8 + j for i in range(6) for j in range(8) if 0 <= i - top // 2 < 4 and 0 <= j - left // 2 < 4]
        for block, (k, v) in flux.by_block(transformer, keys).items():
            close(found[block][0], k[:, :, inside])
            close(found[block][1], v[:, :, inside])


@pytest.mark.parametrize("settings", [{}, {"cfg": 3.0}, {"cfg": 3.0, "batch": 2}], ids=str)
def test_tiles_side_by_side_are_tiles_one_by_one(tiny_flux, file, settings):
    model = controlled(tiny_flux, file=file, condition=latent(30, SIZE))
    apart = sample(in_tiles(model, 1), 2, size=SIZE, **settings)
    close(sample(in_tiles(model, 2), 2, size=SIZE, **settings), apart, atol=1e-4)
    close(sample(in_tiles(model, 4), 2, size=SIZE, **settings), apart, atol=1e-4)
    assert (apart - sample(in_tiles(tiny_flux, 1), 2, size=SIZE, **settings)).abs().mean() > 0.01


@pytest.mark.parametrize("cache", ["off", "offload to CPU"])
def test_a_tile_is_the_same_wherever_keys_are_kept(tiny_flux, file, cache):
    models = [controlled(tiny_flux, file=file, condition=latent(30, SIZE), cache=kept) for kept in ("on GPU", cache)]
    close(*(sample(in_tiles(model, 2), 2, size=SIZE) for model in models))


def test_each_tile_is_encoded_once_a_run(tiny_flux, file, encodings):
    sample(in_tiles(controlled(tiny_flux, file=file), 2), 3, size=SIZE)
    assert len(encodings) == len(CORNERS)


def test_a_subject_beside_the_picture_lies_beside_each_tile(tiny_flux, file, monkeypatch):
    laid, find_place = [], Encoder.laid_out
    monkeypatch.setattr(Encoder, "laid_out", lambda *args: laid.append(find_place(*args)) or laid[-1])
    sample(in_tiles(controlled(tiny_flux, file=file, kind="subject"), 1), 1, size=SIZE)
    assert len(laid) == len(CORNERS)
    assert all(inside is None and torch.equal(ids, laid[0][0]) for ids, inside in laid)


def test_step_caches_keep_each_tile_apart(tiny_flux):
    """Together in a batch or one by one."""
    found = []
    for at_once in (1, 2, 4):
        model = cached(tiny_flux, Interval(2, 2), "last block", 1)
        found.append(sample(in_tiles(model, at_once), 6, size=SIZE, cfg=2.0))
        assert "." in strip(model)
    for other in found[1:]:
        close(other, found[0], atol=1e-4)


def test_a_tile_whose_place_is_not_known_is_refused(tiny_flux, file):
    """A node that rolls the picture before it cuts it."""
    model = in_tiles(controlled(tiny_flux, file=file), 1, roll=4)
    with pytest.raises(ValueError, match=r"^Apply EasyControl: another node cuts the picture of 128 x 96 pixels into"):
        sample(model, 1, size=SIZE)


def test_freecus_in_tiles_is_refused(tiny_flux):
    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(20))
    model = freecus.attach(tiny_flux, image, None, embedded.load_vae(), layers="all")
    with pytest.raises(
        ValueError, match=r"^Apply FreeCus works on whole pictures, and another node cuts this one into"
    ):
        sample(in_tiles(model, 1), 1, size=SIZE)


def test_a_prompt_for_an_area_is_no_tile(tiny_flux, file):
    """It has the condition as a picture of its own, as ControlNets have it."""
    area = prompt(5, area=(4, 4, 0, 4), strength=1.0)
    seen = []
    look = Look(lambda x, options: seen.extend(condition.tile for condition in chunk_of(options).conditions))
    sample(attach(controlled(tiny_flux, file=file), look, Look.bind), 2, positive=prompt() + area)
    assert len(seen) == 4
    assert set(seen) == {None}
