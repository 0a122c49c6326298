"""README, docs and model card say what the results files say, and every marked place names a figure that is there."""

import json

import pytest

from dit_toolkit.scripts.figures import results, tables
from dit_toolkit.scripts.figures.__main__ import BLOCK, NUMBER, filled
from dit_toolkit.scripts.places import ROOT

PAGES = tables.pages(ROOT)
FOUND = results.tree()
WITHOUT_COMFYUI = frozenset(tables.NEEDS_COMFYUI)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_says_what_its_results_files_say(page):
    text = page.read_text(encoding="utf-8")
    assert filled(text, FOUND, WITHOUT_COMFYUI) == text, "make figures"


@pytest.mark.comfy
@pytest.mark.parametrize("name", sorted(WITHOUT_COMFYUI))
def test_what_the_pack_says_of_itself_is_what_the_pages_say(name):
    shown = [match[3] for page in PAGES for match in BLOCK.finditer(page.read_text("utf-8")) if match[2] == name]
    assert shown == [tables.TABLES[name](FOUND) + "\n"], "make figures"


def test_every_table_stands_on_some_page():
    shown = {match[2] for page in PAGES for match in BLOCK.finditer(page.read_text(encoding="utf-8"))}
    assert shown == set(tables.TABLES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_mark_is_whole(page):
    """One that is mistyped would never be filled, and nobody would notice."""
    text = page.read_text(encoding="utf-8")
    assert text.count("<!-- figures:") == text.count("<!-- end -->") == len(BLOCK.findall(text))
    assert text.count("<!--=") == text.count("<!--/-->") == len(NUMBER.findall(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- figures: rice -->\n<!-- end -->", "no table 'rice'"),
        ("<!--= shipped/prompts/cfg 9/all as % -->1 %<!--/-->", "'cfg 9' is not among ground truth, autoencoder"),
        ("<!--= shipped/prompts as % -->1 %<!--/-->", "'shipped/prompts' is not a number"),
        ("<!--= shipped/prompts/cfg 2.5/all as parts -->1<!--/-->", "no way to write a number 'parts'"),
    ],
)
def test_a_place_that_names_no_figure_is_refused(text, message):
    with pytest.raises(KeyError, match=message):
        filled(text, FOUND)


def test_places_are_filled_and_what_is_around_them_stays():
    text = "a <!--= x/y as % -->0 %<!--/--> b <!--= x/z as 1 decimal --><!--/--> c"
    found = {"x": {"y": 0.975, "z": 1.25}}
    assert filled(text, found) == "a <!--= x/y as % -->97.5 %<!--/--> b <!--= x/z as 1 decimal -->1.2<!--/--> c"


def test_a_changed_result_changes_the_page(tmp_path):
    rows = json.loads((results.RESULTS / "quality-dynamictrl.json").read_text(encoding="utf-8"))
    rows["DynamiCtrl"]["pose error"] = 0.5
    (tmp_path / "quality-dynamictrl.json").write_text(json.dumps(rows))
    place = "<!-- figures: dynamictrl -->\n<!-- end -->"
    assert "| DynamiCtrl | 50.0 % |" in filled(place, results.tree(tmp_path))


def test_the_newest_results_of_a_cpu_count(tmp_path):
    for name in ("easycontrol-2025-01-02-cpu", "easycontrol-2026-01-01-cpu", "easycontrol-2027-01-01-nvidia-h100"):
        (tmp_path / f"{name}.json").write_text("{}")
    assert results.newest("easycontrol", tmp_path).stem == "easycontrol-2026-01-01-cpu"
    assert results.newest("dit4sr", tmp_path) is None


def test_the_cost_of_the_caches_appears_with_its_results(tmp_path):
    row = {"method": "MagCache", "computed": 0.3, "speedup": 3.0, "efficiency": 0.9, "extra_mb": 1.0}
    report = {"shape": {"width": 768}, "steps": 10, "rows": [{**row, "peer": "diffusers"}, {**row, "peer": None}]}
    (tmp_path / "cost-2026-01-01-cpu.json").write_text(json.dumps(report))
    assert "results file" in tables.race_cost({})
    found = results.tree(tmp_path)
    assert "| MagCache | diffusers | 0.30 | 3.00 | 0.90 |" in tables.race_cost(found)
    assert "| MagCache | ours |" in tables.race_cost(found)
    assert results.look_up("race cost/MagCache (diffusers)/efficiency", found) == 0.9


def test_the_tuned_race_appears_with_its_results(tmp_path):
    line = {"method": "MagCache", "peer": "diffusers", "choice": "tuned", "sampler": "euler", "steps": 28, "cfg": 2.5}
    at = {"half": 40.0, "third": 33.0, "quarter": None, "fifth": None, "seventh": None}
    report = {
        "pictures": {"calibration": 4, "judged": 6},
        "curves": [{**line, "at": at}, {**line, "at": at, "steps": 20}],
        "rows": [],
    }
    (tmp_path / "tuned-2026-01-01-cpu.json").write_text(json.dumps(report))
    assert "results file" in tables.race_curves({})
    found = results.tree(tmp_path)
    text = tables.race_curves(found)
    assert text.count("| MagCache | diffusers | tuned | **40.0** | **33.0** | | | |") == 1
    assert "**euler, 28 steps, cfg 2.5**" in text
    assert text.startswith("Settings were chosen on 4 pictures and judged on 6 others.")
    number = "race curves/euler, 28 steps, cfg 2.5/MagCache (diffusers), tuned/third"
    assert results.look_up(number, found) == 33.0
    with pytest.raises(KeyError, match="quarter"):
        results.look_up(number.replace("third", "quarter"), found)


def test_dynamictrls_costs_appear_with_their_results():
    times = {"milliseconds": 1.0, "relative": 1.0, "low": 0.9, "high": 1.1, "computed": 1.0}
    report = {
        "poses": [{"form": "base", "batch": 1, "bytes": 0, "streams": 0.0, **times}],
        "accelerators": [],
        "windows": [],
    }
    assert "results file" in tables.dynamictrl_cost({})
    assert "| base | 1 | 1.000 |" in tables.dynamictrl_cost({"dynamictrl cost": report})


def test_what_autotune_found_appears_with_its_results(tmp_path):
    row = {
        "model": "SD3.5",
        "sampler": "euler",
        "cfg": 3.0,
        "pictures": 4,
        "floor": 38.0,
        "computed": 0.21,
        "spent": 3.1,
    }
    picked = {"picked": "TaylorSeer, interval 5, by step, first_full 1, Newton, damped 2"}
    rows = [
        {**row, **picked, "judged_db": 35.0, "default_db": 33.0},
        {**row, **picked, "judged_db": 33.0, "default_db": None},
    ]
    (tmp_path / "autotune-2026-01-01-cpu.json").write_text(json.dumps(rows))
    assert "results file" in tables.autotune({})
    found = results.tree(tmp_path)
    assert found["autotune"]["4"] == {"of": 1, "won": 1, "lost": 0, "gain": 2.0}
    text = tables.autotune(found)
    assert "| SD3.5, euler, CFG 3 | 4 | 38 | interval 5, by step | 0.21 | **35.0** | 33.0 | 3.1 |" in text
    assert "| 0.21 | 33.0 | | 3.1 |" in text
