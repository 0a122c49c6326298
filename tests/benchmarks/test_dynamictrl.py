"""The benchmark of DynamiCtrl: what it counts, what it draws, what it refuses."""

from __future__ import annotations

import json

import pytest

from dit_toolkit.benchmarks import dynamictrl as bench

pytestmark = pytest.mark.long

SIZE, WINDOW = bench.SMALL, 4


@pytest.fixture(scope="module")
def poses():
    return bench.pose_costs(SIZE, rounds=1)


@pytest.fixture(scope="module")
def stage():
    """A random model: what is counted is the same, and nothing is decoded."""
    return bench.RandomStage(clips=1)


@pytest.fixture(scope="module")
def accelerators(stage):
    return bench.accelerations(stage, seeds=1, steps=8, rounds=1)


@pytest.fixture(scope="module")
def windows():
    return bench.window_costs(SIZE, WINDOW, rounds=1)


@pytest.mark.comfy
def test_poses_cost_one_stream_for_all_prompts_that_share_them(poses):
    """Counted, not timed: the same each time."""
    found = {(row["form"], row["batch"]): row for row in poses}
    assert all(row["calls"] == 1 and row["milliseconds"] > 0 for row in poses)
    for batch in (1, 2):
        assert found[bench.BASE, batch]["relative"] == 1
        for free in (bench.WITHOUT, bench.ZERO, bench.OUTSIDE):
            assert (found[free, batch]["computed"], found[free, batch]["bytes"]) == (1, 0)
    alone, shared, apart = (found[key] for key in ((bench.POSED, 1), (bench.SHARED, 2), (bench.APART, 2)))
    assert (alone["streams"], shared["streams"], apart["streams"]) == (1, 1, 2)
    assert alone["bytes"] == SIZE.stream
    assert 1 < shared["computed"] < apart["computed"]
    assert apart["computed"] == alone["computed"]


@pytest.mark.comfy
def test_accelerators_are_judged_against_a_run_that_skips_nothing(accelerators):
    plain, *others = accelerators
    assert (plain["form"], plain["evaluations"], plain["computed"], plain["psnr_db"]) == (bench.PLAIN, 8, 1, None)
    assert all(0 < row["worst_db"] <= row["psnr_db"] < 100 for row in others if row["form"] != "EasyCache")
    two, three, five = (row for row in others if row["form"] == bench.TAYLOR)
    assert five["computed"] <= three["computed"] <= two["computed"] < 1
    fewer = {row["evaluations"]: row for row in others if row["form"] == bench.FEWER}
    assert set(fewer) == {row["evaluations"] for row in (two, three, five)}
    for row in (two, three, five):
        assert row["computed"] == pytest.approx(fewer[row["evaluations"]]["computed"], rel=0.02)
    for row in others:
        if row["form"].startswith(("CLEAR", "Re-ttention")):
            assert (row["evaluations"], row["computed"]) == (8, 1)


@pytest.mark.comfy
def test_without_the_embedded_file_a_random_model_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(bench.places, "ROOT", tmp_path)
    stage = bench.stage_of(clips=1)
    assert stage.name == "random"
    drawn = bench.draw(stage, bench.plain_form(2), 0, 1)
    assert drawn.evaluations == 2
    assert stage.shown(drawn.latent).shape == (6, 12, 12, 3)


@pytest.mark.comfy
def test_the_embedded_model_draws_as_its_nodes_do():
    stage = bench.stage_of(clips=1)
    assert stage.name == "tiny_dynamictrl"
    drawn = bench.draw(stage, bench.plain_form(2), 0, 1)
    shown = stage.shown(drawn.latent)
    assert (drawn.evaluations, shown.shape) == (2, (21, 96, 96, 3))
    assert 0 <= shown.min() < 0.3 < 0.7 < shown.max() <= 1
    positive, negative, empty = stage.given[0]
    assert positive[0][1]["pooled_output"].shape == negative[0][1]["pooled_output"].shape
    assert empty.shape == drawn.latent.shape


@pytest.mark.comfy
def test_windows_cost_what_they_overlap(windows):
    one, whole, flush, half = windows
    assert [row["calls"] for row in windows] == [1, 1, 3, 5]
    assert (one["frames"], one["relative"]) == (WINDOW, 1)
    assert whole["computed"] < 1  # the text is there once for more frames
    assert flush["computed"] == 1
    assert half["computed"] == pytest.approx(5 / 3, rel=1e-3)


@pytest.mark.comfy
def test_a_run_ends_in_tables_and_files(poses, accelerators, windows, tmp_path):
    for rows, table in (
        (poses, bench.pose_table),
        (accelerators, bench.acceleration_table),
        (windows, bench.window_table),
    ):
        lines = table(rows).splitlines()
        assert len(lines) == len(rows) + 2
        assert len({line.count("|") for line in lines}) == 1
    report = {"date": "2026-01-31", "poses": poses, "accelerators": accelerators, "windows": windows}
    data, plot = bench.save(report, tmp_path)
    assert json.loads(data.read_text(encoding="utf-8")) == report
    assert (data.name, plot.name) == ("dynamictrl-2026-01-31-cpu.json", "dynamictrl-2026-01-31-cpu.png")
    assert plot.read_bytes().startswith(b"\x89PNG")
    bench.save({"date": "2026-02-01", **{part: [] for part in bench.PARTS}}, tmp_path)  # parts may be missing


def test_ratios_are_to_the_base_of_the_same_round():
    """A machine that slows down does not change them."""
    row = bench.times([2.0, 20.0, 200.0], [1.0, 10.0, 100.0])
    assert row == {"milliseconds": 20000, "relative": 2, "low": 2, "high": 2}
    assert bench.times([3.0], [2.0]) == {"milliseconds": 3000, "relative": 1.5, "low": 1.5, "high": 1.5}


def test_forms_take_turns_in_another_order_each_round():
    order = []
    taken = bench.in_turn("abc", lambda form: order.append(form) or len(order), 2)
    assert "".join(order) == "abcbca"
    assert taken == {"a": [1, 6], "b": [2, 4], "c": [3, 5]}


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--steps=0", "--steps must be at least 1"),
        ("--clips=-1", "--clips must be at least 1"),
        ("--seeds=0", "--seeds must be at least 1"),
        ("--rounds=x", "invalid int value"),
        ("--part=all", "invalid choice"),
    ],
)
def test_the_benchmark_refuses_settings_that_cannot_be(argument, said, capsys):
    with pytest.raises(SystemExit):
        bench.main([argument])
    assert said in capsys.readouterr().err
