"""Keys, digests, and the order of jobs."""

import itertools

import pytest

from dit_toolkit.headless.errors import Refused
from dit_toolkit.headless.line import Line
from dit_toolkit.headless.plan import Plan, checked_key, in_order
from dit_toolkit.tests.headless.world import KNOWN, prompt

SETTINGS = ["KSampler.seed={seed}", "Positive prompt.text={prompt}", "Load Model.file={model}"]


def planned(tmp_path, text, settings=SETTINGS, **options):
    (tmp_path / "jobs.csv").write_text(text)
    plan = Plan(prompt(), KNOWN, settings, tmp_path / "jobs.csv", **options)
    return plan, list(plan.rows())


@pytest.mark.parametrize("key", ["1", "Püppchen rot", "v1.2", "a_1", "x" * 120])
def test_a_key_that_is_a_file_name_is_taken(key):
    assert checked_key(f" {key} ", "row 1") == key


@pytest.mark.parametrize(
    "key",
    [
        "",
        None,
        "../a",
        "a/b",
        "a\\b",
        "C:a",
        "a\nb",
        "a\x7f",
        ".a",
        "-a",
        "~a",
        "a.",
        "con",
        "NUL.png",
        "a__2",
        "x" * 121,
        "é" * 61,
        "a\u202eb",
        'a"b',
        "a|b",
    ],
)
def test_a_key_that_leads_elsewhere_is_refused(key):
    with pytest.raises(Refused, match="row 1: the key"):
        checked_key(key, "row 1")


def test_the_key_is_what_is_asked_for_or_called_so_or_the_number(tmp_path):
    text = "name,id,seed,prompt,model\nx,7,1,a,a.safetensors\n"
    assert planned(tmp_path, text, key="name")[1][0].key == "x"
    assert planned(tmp_path, text)[1][0].key == "7"
    assert planned(tmp_path, text.replace("id", "number"))[1][0].key == "000001"
    with pytest.raises(Refused, match=r"no column 'nme'\. Near misses: name"):
        planned(tmp_path, text, key="nme")


def test_a_digest_changes_with_the_value_the_workflow_and_the_file_alone(tmp_path):
    text = "id,seed,prompt,model,note\n1,1,a,a.safetensors,{}\n"

    def digest(text, settings=SETTINGS):
        return planned(tmp_path, text, settings)[1][0].digest

    same = digest(text)
    assert digest(text.replace("{}", "other")) == same
    assert digest(text.replace("1,1,", "1,2,")) != same
    assert digest(text, SETTINGS[:2]) != same


def test_a_row_without_a_column_is_refused(tmp_path):
    (tmp_path / "jobs.jsonl").write_text('{"seed": 1}\n{"sead": 2}\n')
    plan = Plan(prompt(), KNOWN, SETTINGS[:1], tmp_path / "jobs.jsonl")
    with pytest.raises(Refused, match="row 2: there is no column 'seed'"):
        list(plan.rows())


def test_a_job_is_named_by_its_key_where_it_saves(tmp_path):
    plan, (row,) = planned(tmp_path, "id,seed,prompt,model\nred,5,a star,b.safetensors\n")
    job = plan.job(0, row.key, row.values)
    assert job.prompt["7"]["inputs"]["filename_prefix"] == "red"
    assert job.prompt["6"]["inputs"]["seed"] == 5
    assert plan.prompt == prompt()


# order


def slow_runs(plan, rows):
    """Node runs by definition: a node runs again if its own inputs differ from the last job's, or a source runs."""
    total, before = 0, None
    for row in rows:
        now = plan.job(0, row.key, row.values).prompt

        def again(node_id, now=now, before=before):
            if before is None or now[node_id]["inputs"] != before[node_id]["inputs"]:
                return True
            links = [each[0] for each in now[node_id]["inputs"].values() if isinstance(each, list)]
            return any(again(link) for link in links)

        total += sum(map(again, now))
        before = now
    return total


def table_of(rows):
    return "id,seed,prompt,model\n" + "".join(f"{n},{s},{p},{m}.safetensors\n" for n, (s, p, m) in enumerate(rows))


def test_the_order_spares_as_much_as_any(tmp_path):
    rows = [*itertools.product((1, 2), ("x", "y"), ("a", "b"))][::-1][:6]
    plan, listed = planned(tmp_path, table_of(rows))
    marks = [[] for _ in plan.ranked()]
    list(plan.marked(marks))
    order = in_order(marks, len(rows))
    assert sorted(order) == list(range(len(rows)))
    chosen = slow_runs(plan, [listed[at] for at in order])
    best = min(slow_runs(plan, [listed[at] for at in each]) for each in itertools.permutations(range(len(rows))))
    assert chosen == best < slow_runs(plan, listed)
    assert plan.runs(marks, order) == chosen
    assert plan.runs(marks, range(len(rows))) == slow_runs(plan, listed)


def test_rows_that_share_nothing_or_all_stay_as_they_are():
    assert list(in_order([[1, 2, 3], [4, 5, 6]], 3)) == [0, 1, 2]
    assert list(in_order([[1, 1, 1]], 3)) == [0, 1, 2]
    assert list(in_order([], 2)) == [0, 1]


# the line


def test_each_job_is_given_out_once_in_stretches():
    line = Line([5, 6, 7, 8, 9], 2)
    taken = {"a": [line.take("a")], "b": [line.take("b") for _ in range(3)]}
    taken["b"].append(line.take("b"))
    assert taken == {"a": [5], "b": [7, 8, 9, 6]}
    assert line.take("a") is None
    assert len(line) == 0


def test_a_job_that_came_back_goes_to_another_worker_first():
    line = Line([1, 2], 2)
    assert (line.take("a"), line.take("b")) == (1, 2)
    line.give_back(1, {"a"})
    assert line.take("a", {"a", "b"}) is None
    assert len(line) == 1
    assert line.take("b", {"a", "b"}) == 1
    line.give_back(1, {"a", "b"})
    assert line.take("a", {"a", "b"}) == 1


def test_a_worker_alone_tries_its_own_again():
    line = Line([1], 1)
    line.take("a")
    line.give_back(1, {"a"})
    assert line.take("a", {"a"}) == 1


def test_what_a_worker_leaves_is_anybodys():
    line = Line([1, 2, 3, 4], 2)
    line.take("a")
    line.leave("a")
    assert [line.take("b") for _ in range(4)] == [2, 3, 4, None] or len(line) == 0
