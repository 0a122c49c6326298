"""DiT4SR where it can be seen: the embedded SD3.5 model and its patch, in tiles of 128 pixels as trained."""

from __future__ import annotations

from itertools import pairwise

import cv2
import numpy as np
import pytest
import torch

from dit_toolkit.host.accelerate.accelerate import psnr_db
from dit_toolkit.models.restore.dit4sr_tiles import starts
from dit_toolkit.nodes.step_cache import TaylorSeer
from dit_toolkit.tests.nodes.calling import run_node
from dit_toolkit.training import photographs
from dit_toolkit.training.degrade import FACTOR, enlarged
from dit_toolkit.training.measure.dit4sr import SIDE, TILES, Upscaler

pytestmark = pytest.mark.comfy

STEPS = 12
CELL, TILE = 8, TILES["tile"]


@pytest.fixture(scope="module")
def upscaler():
    return Upscaler(STEPS)


def flat() -> np.ndarray:
    return np.full((SIDE, SIDE, 3), (120, 140, 170), np.uint8)


def textured() -> np.ndarray:
    """Of a photograph that the patch was not trained on: fur, whiskers and an eye."""
    return photographs.photographs(held_out=True)[0][40 : 40 + SIDE, 40 : 40 + SIDE]


def small(picture: np.ndarray) -> np.ndarray:
    return cv2.resize(picture, (SIDE // FACTOR, SIDE // FACTOR), interpolation=cv2.INTER_AREA)


def drawn(upscaler: Upscaler, picture: np.ndarray, **settings) -> np.ndarray:
    """float `[256, 256, 3]` in 0..255."""
    return upscaler([small(picture)], [""], 1, tile_batch=9, **settings)[0].astype(np.float64)


@pytest.mark.parametrize("tap", ["prediction", "last block"])
def test_a_step_cache_leaves_the_picture(upscaler, monkeypatch, tap):
    """Half of the evaluations are forecast, in each tile from its own past. Without the photo it is another picture."""
    plain = drawn(upscaler, textured())
    lost = likeness(drawn(upscaler, textured(), strength=0.0), plain)
    monkeypatch.setattr(upscaler, "model", run_node(TaylorSeer, model=upscaler.model, tap=tap, interval=2)[0])
    kept = likeness(drawn(upscaler, textured()), plain)
    assert 35 < kept < 90
    assert lost < 20


def likeness(a: np.ndarray, b: np.ndarray) -> float:
    """PSNR in dB."""
    return psnr_db(torch.from_numpy(a / 255), torch.from_numpy(b / 255))


# Seams


def meeting(overlap: int) -> list[int]:
    """Lines where neighbouring tiles have as much weight as each other, in pixels from the border."""
    begins = starts(SIDE // CELL, TILE, overlap)
    return [CELL * (a + b + TILE) // 2 for a, b in pairwise(begins)]


def at_lines(values: np.ndarray, lines: list[int]) -> float:
    """Mean at these lines, over that at the other lines between latent pixels: 1 where they are like any other.

    Args:
        values: at each line of pixels; the first at line 1. Lines near others of `lines` and the border are left out.
    """
    others = [c for c in range(2 * CELL, SIDE - CELL, CELL) if all(abs(c - line) > CELL for line in lines)]
    return float(values[np.array(lines) - 1].mean() / values[np.array(others) - 1].mean())


def jumps(picture: np.ndarray) -> np.ndarray:
    """How much a picture changes across each line, mean of columns and rows."""
    return (np.abs(np.diff(picture, axis=1)).mean((0, 2)) + np.abs(np.diff(picture, axis=0)).mean((1, 2))) / 2


def bands(picture: np.ndarray) -> np.ndarray:
    """How large a picture is within a latent pixel of each line, mean of columns and rows."""
    size = (np.abs(picture).mean((0, 2)) + np.abs(picture).mean((1, 2))) / 2
    return np.array([size[max(line - CELL, 0) : line + CELL].mean() for line in range(1, SIDE)])


@pytest.mark.parametrize(
    "picture", [flat(), pytest.param(textured(), marks=pytest.mark.long)], ids=["flat", "textured"]
)
def test_no_seam_shows_where_tiles_meet(upscaler, picture):
    """Without an overlap it does: the measure sees a seam where there is one."""
    photo = enlarged(small(picture), SIDE, SIDE)  # what is in the picture is in it, too
    overlap = TILES["overlap"]
    tiles, hard, piece = (
        drawn(upscaler, picture, **settings) for settings in ({}, {"overlap": 0}, {"tile": 0, "overlap": 0})
    )
    found = {
        "jump": at_lines(jumps(tiles - photo), meeting(overlap)),
        "hard": at_lines(jumps(hard - photo), meeting(0)),
        "from the photo": at_lines(bands(tiles - photo), meeting(overlap)),
        "from one piece": at_lines(bands(tiles - piece), meeting(overlap)),
    }
    assert found["jump"] < 1.25
    assert found["hard"] > 1.6
    assert found["from the photo"] < 1.2
    assert found["from one piece"] < 1.2


def test_tiles_meet_in_the_middle_of_what_they_share():
    assert meeting(6) == [104, 168]
    assert meeting(0) == [128]
