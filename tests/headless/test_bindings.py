"""Columns to inputs: what is set, what is refused, and what is named when something is misspelt."""

import pytest

from dit_toolkit.headless.bindings import File, Files, Template, apply, bind, loader_ids
from dit_toolkit.headless.errors import Refused
from dit_toolkit.tests.headless.world import KNOWN, prompt


def one(setting, columns=None):
    (binding,) = bind([setting], prompt(), KNOWN, columns)
    return binding


def value(setting, row, files=None):
    return one(setting).value(row, files, "row 1")


@pytest.mark.parametrize(
    ("text", "row", "made"),
    [
        ("{a}", {"a": 7}, 7),
        ("{a}", {"a": None}, None),
        ("a {a} on {b}", {"a": "doll", "b": 3}, "a doll on 3"),
        ("{{a}}", {}, "{a}"),
        ("fixed", {}, "fixed"),
        ("{a.__class__}", {"a.__class__": "text"}, "text"),  # a name, never an expression
        ("{a}{b}", {"a": "{b}", "b": "x"}, "{b}x"),  # a cell is not a template
    ],
)
def test_a_template_is_filled(text, row, made):
    assert Template(text).value(row) == made


@pytest.mark.parametrize("text", ["{a", "a}", "{a{b}}"])
def test_a_brace_that_stands_alone_is_refused(text):
    with pytest.raises(Refused, match="brace"):
        _ = Template(text).parts


@pytest.mark.parametrize(
    ("setting", "node", "field"),
    [
        ("Positive prompt.text={a}", "2", "text"),  # the one in a subgraph comes second
        ("#8:3.text={a}", "8:3", "text"),
        ("#3.text={a}", "3", "text"),
        ("KSampler.seed={a}", "6", "seed"),
        ("Sampler.seed={a}", "6", "seed"),
        ("Apply Control.mask={a}", "5", "mask"),
    ],
)
def test_a_node_is_found_by_title_number_or_kind(setting, node, field):
    binding = one(setting)
    assert (binding.node, binding.input) == (node, field)


@pytest.mark.parametrize(
    ("setting", "columns", "words"),
    [
        (
            "Positiv prompt.text={a}",
            ["a"],
            r"No node is named 'Positiv prompt'. Near misses: Positive prompt|#2 \(Positive",
        ),
        ("KSampler.sed={a}", ["a"], "'KSampler' has no input 'sed'. Near misses: seed"),
        ("KSampler.seed={sead}", ["seed", "a"], "no column 'sead'. Near misses: seed"),
        ("KSampler.model={a}", ["a"], "takes a wire"),
        ("KSampler seed", ["a"], "is not understood"),
    ],
)
def test_what_is_not_there_is_refused_with_near_misses(setting, columns, words):
    with pytest.raises(Refused, match=words):
        bind([setting], prompt(), KNOWN, columns)


def test_a_name_of_two_nodes_is_refused_with_their_numbers():
    two = prompt()
    two["2"]["_meta"]["title"] = "Words"
    with pytest.raises(Refused, match=r"2 nodes are 'Words': #2, #3\. Write its number"):
        bind(["Words.text={a}"], two, KNOWN, ["a"])


def test_an_input_is_set_once():
    with pytest.raises(Refused, match="one and the same"):
        bind(["KSampler.seed={a}", "#6.seed={b}"], prompt(), KNOWN, ["a", "b"])


@pytest.mark.parametrize(
    ("setting", "cell", "made"),
    [
        ("KSampler.seed={a}", "18446744073709551615", 2**64 - 1),
        ("KSampler.seed={a}", 7.0, 7),
        ("KSampler.seed={a}", "", None),
        ("KSampler.tiled={a}", "Yes", True),
        ("KSampler.tiled={a}", 0, False),
        ("KSampler.sampler={a}", "heun", "heun"),
        ("Apply Control.strength={a}", "0.5", 0.5),
        ("Positive prompt.text={a}", "", ""),
        ("Positive prompt.text={a}", 7, "7"),
        ("Positive prompt.text={a}", None, None),
    ],
)
def test_a_cell_becomes_what_the_input_takes(setting, cell, made):
    found = value(setting, {"a": cell})
    assert found == made
    assert type(found) is type(made)


@pytest.mark.parametrize(
    ("setting", "cell", "words"),
    [
        ("KSampler.seed={a}", "1.5", "needs a whole number, not '1.5'"),
        ("KSampler.seed={a}", "=1+1", "needs a whole number"),
        ("KSampler.seed={a}", -1, "must be from 0"),
        ("KSampler.steps={a}", "1000", "must be from 1 to 100"),
        ("KSampler.tiled={a}", "perhaps", "needs yes or no"),
        ("KSampler.sampler={a}", "heum", "no choice 'heum'. Near misses: heun"),
        ("Apply Control.strength={a}", "inf", "needs a number"),
    ],
)
def test_a_cell_that_the_input_does_not_take_is_refused(setting, cell, words):
    with pytest.raises(Refused, match=f"row 1: .*{words}"):
        value(setting, {"a": cell})


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "star one.png").write_bytes(b"picture")
    (tmp_path / "in" / "notes.txt").write_text("secret")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "secret.png")
    return Files(tmp_path / "in")


def test_a_file_is_known_by_its_content(folder, tmp_path):
    found = value("Load Image.image={a}", {"a": "star one.png"}, folder)
    assert found == value("Apply Control.image={a}", {"a": "./star one.png"}, folder)
    assert found.name.startswith("star_one_")
    (tmp_path / "in" / "star one.png").write_bytes(b"another")
    assert Files(tmp_path / "in").find("star one.png").name != found.name


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("../secret.png", "lies outside of"),
        ("link.png", "lies outside of"),
        ("/etc/hostname", "lies outside of"),
        ("notes.txt", "no picture, video or sound"),
        ("stars one.png", "Near misses: star one.png"),
        ("a\x1b" * 3000, r"file '(a\?){30}\.\.\.'"),
    ],
)
def test_a_file_that_may_not_or_cannot_be_read_is_refused(folder, cell, words):
    for setting in ("Load Image.image={a}", "Apply Control.image={a}", "Apply Control.mask={a}"):
        with pytest.raises(Refused, match=words):
            value(setting, {"a": cell}, folder)


def test_a_file_of_comfyuis_own_is_taken_as_it_is(folder):
    assert value("Load Image.image={a}", {"a": "old.png"}, folder) == "old.png"


def test_values_and_files_go_into_a_prompt_of_their_own(folder):
    before = prompt()
    bindings = bind(
        ["KSampler.seed={s}", "Load Image.image={p}", "Apply Control.mask={m}"], before, KNOWN, ["s", "p", "m"]
    )
    star = folder.find("star one.png")
    made, files = apply(before, bindings, [9, star, star], loader_ids(before, bindings))
    assert before == prompt()
    assert files == [star, star]
    assert made["6"]["inputs"]["seed"] == 9
    assert made["4"]["inputs"]["image"] == f"headless/{star.name}"
    assert made["9"] == {
        "class_type": "LoadImageMask",
        "_meta": {"title": "Apply Control.mask"},
        "inputs": {"image": f"headless/{star.name}", "channel": "red"},
    }
    assert made["5"]["inputs"]["mask"] == ["9", 0]


def test_an_empty_cell_leaves_what_the_workflow_says():
    bindings = bind(["KSampler.seed={s}", "Apply Control.image={p}"], prompt(), KNOWN, ["s", "p"])
    made, files = apply(prompt(), bindings, [None, None], loader_ids(prompt(), bindings))
    assert (made, files) == (prompt(), [])
    assert isinstance(File("a", "b"), File)
