"""The benchmark of DiT4SR: what it counts, what it draws, what it refuses."""

from __future__ import annotations

import json

import pytest
import torch

from dit_toolkit.benchmarks import dit4sr

pytestmark = pytest.mark.long

TILE, OVERLAP = 16, 8  # of 128 pixels
SIDES = (256, 320, 512)


@pytest.fixture(scope="module")
def random_model():
    return dit4sr.random_model(most=32)


def held(random_model, side, tile, **settings):
    return dit4sr.held(*random_model, (side, side), tile, OVERLAP, **settings)


@pytest.mark.comfy
def test_memory_is_flat_in_tiles_and_grows_without(random_model):
    """Counted, not timed: the same bytes each time."""
    tiles, pieces = ([held(random_model, side, tile) for side in SIDES] for tile in (TILE, 0))
    assert [row["calls"] for row in tiles] == [9, 16, 49]
    assert [row["calls"] for row in pieces] == [1, 1, 1]
    assert len({row["call"] for row in tiles}) == 1
    for row, side in zip(pieces[1:], SIDES[1:], strict=True):
        assert row["call"] / pieces[0]["call"] == pytest.approx((side / SIDES[0]) ** 2, rel=0.1)
    assert pieces[-1]["call"] > 10 * tiles[-1]["call"]
    assert held(random_model, SIDES[-1], TILE) == tiles[-1]


@pytest.mark.comfy
def test_the_stand_in_for_attention_hides_no_memory(random_model):
    """Core's own attention, of which the kernel is one operation."""
    from comfy.ldm.modules.attention import attention_pytorch

    def attend(func, *args, **kwargs):
        return attention_pytorch(*args, **kwargs)

    row, real = (held(random_model, 256, 0, **given) for given in ({}, {"attention": attend}))
    assert row["call"] == pytest.approx(real["call"], rel=0.1)


@pytest.mark.comfy
def test_a_call_is_what_it_holds_beyond_what_was_there():
    from dit_toolkit.benchmarks.race.measure import Memory

    class Squared(torch.nn.Module):
        def forward(self, x):
            return (x + 1) * 2

    module, memory = Squared(), Memory()
    calls = dit4sr.Calls(memory)
    with memory, calls.of(module):
        kept = torch.zeros(1000)
        module(torch.zeros(10))
        module(torch.zeros(10))
        after = kept + 1
    assert (calls.count, calls.peak) == (2, 2 * 40)
    assert memory.peak == 2 * 4000
    assert len(after) == 1000


@pytest.mark.comfy
def test_a_small_run_ends_in_rows_with_their_plot(random_model, tmp_path):
    stage = dit4sr.Stage(pictures=1, steps=6)
    rows = dit4sr.costs(stage, rounds=1)
    cost = {(row["form"], row["tap"], row["interval"]): row for row in rows}
    plain = cost[dit4sr.PLAIN, "", 1]
    assert (plain["computed"], plain["speedup"], plain["psnr_db"]) == (1, 1, None)
    assert cost[dit4sr.BASE, "", 1]["computed"] < cost[dit4sr.WHOLE, "", 1]["computed"] < 1
    for tap in ("prediction", "last block"):
        two, three = (cost[f"{dit4sr.PLAIN}, TaylorSeer", tap, by] for by in (2, 3))
        assert three["computed"] <= two["computed"] < 1
        assert 20 < three["psnr_db"] <= two["psnr_db"] < 90
    assert all(row["milliseconds"] > 0 for row in rows)
    assert dit4sr.cost_table(rows).count("\n") == len(rows) + 1

    memory = [held(random_model, side, tile) for side in SIDES[:2] for tile in (TILE, 0)]
    assert dit4sr.memory_table(memory).count("one piece") == 2
    data, plot = dit4sr.save({"date": "2026-01-31", "cost": rows, "memory": memory}, tmp_path)
    assert json.loads(data.read_text(encoding="utf-8"))["memory"] == memory
    assert (data.name, plot.name) == ("dit4sr-2026-01-31-cpu.json", "dit4sr-2026-01-31-cpu.png")
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("megapixels", "side"), [(1, 1024), (2, 1456), (4, 2048), (8, 2896), (16, 4096), (0.25, 512)])
def test_sizes_are_squares_of_whole_tokens(megapixels, side):
    assert dit4sr.square(megapixels) == (side, side)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--steps=0", "--steps must be at least 1"),
        ("--pictures=-1", "--pictures must be at least 1"),
        ("--rounds=x", "invalid int value"),
        ("--megapixels=100", "--megapixels must be from 0.25 to 64"),
        ("--part=all", "invalid choice"),
    ],
)
def test_the_benchmark_refuses_settings_that_cannot_be(argument, said, capsys):
    with pytest.raises(SystemExit):
        dit4sr.main([argument])
    assert said in capsys.readouterr().err
