"""What every node of the pack owes the people who use it."""

import asyncio

import pytest

pytestmark = pytest.mark.comfy

from comfy_api.latest import io  # noqa: E402

from dit_toolkit.nodes import DiTToolkit  # noqa: E402
from dit_toolkit.scripts.places import ROOT  # noqa: E402

NODES = asyncio.run(DiTToolkit().get_node_list())
SCHEMAS = [node.GET_SCHEMA() for node in NODES]
PUBLIC_NAMES = ROOT / "tests" / "reference" / "public_names.txt"

every_node = pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.node_id)


def inputs_of(schema: io.Schema) -> list[io.Input]:
    """Its inputs, those too that an option of a DynamicCombo brings, and the kind that an Autogrow repeats."""
    found, left = [], list(schema.inputs)
    while left:
        entry = left.pop(0)
        found.append(entry)
        for option in getattr(entry, "options", None) or ():
            left += getattr(option, "inputs", ())
        template = getattr(entry, "template", None)
        if template is not None and hasattr(template, "input"):
            found.append(template.input)
    return found


def public_names() -> set[str]:
    """`node`, `node.input` and `node:output position` of all that saved workflows refer to."""
    names = set()
    for schema in SCHEMAS:
        names.add(schema.node_id)
        names.update(f"{schema.node_id}.{entry.id}" for entry in inputs_of(schema))
        names.update(f"{schema.node_id}:{place} {output.io_type}" for place, output in enumerate(schema.outputs))
    return names


def test_the_pack_has_nodes_with_ids_of_their_own():
    ids = [schema.node_id for schema in SCHEMAS]
    assert ids
    assert len(set(ids)) == len(ids)


@every_node
def test_it_can_be_found_and_read(schema):
    assert schema.node_id.startswith("DiT")
    assert schema.node_id.isalnum()
    assert schema.display_name
    assert schema.display_name != schema.node_id
    assert schema.category.startswith("DiT Toolkit/")
    assert len(schema.description) > 20
    assert schema.search_aliases


@every_node
def test_every_input_and_output_says_what_it_is(schema):
    silent = [entry.id for entry in inputs_of(schema) if not entry.tooltip]
    silent += [f"output {place}" for place, output in enumerate(schema.outputs) if not output.tooltip]
    assert not silent


@every_node
def test_defaults_are_allowed_values(schema):
    for entry in inputs_of(schema):
        default = getattr(entry, "default", None)
        if isinstance(entry, io.Int.Input | io.Float.Input):
            assert entry.min <= default <= entry.max, entry.id
        elif isinstance(entry, io.Combo.Input) and default is not None:
            assert default in entry.options, entry.id


@every_node
def test_it_has_a_help_page(schema):
    page = ROOT / "web" / "docs" / f"{schema.node_id}.md"
    text = page.read_text(encoding="utf-8")
    missing = [entry.id for entry in inputs_of(schema) if (entry.display_name or entry.id) not in text]
    assert not missing, f"{page.name} says nothing about {missing}"


def test_names_in_saved_workflows_are_never_taken_back():
    listed = set(PUBLIC_NAMES.read_text(encoding="utf-8").splitlines())
    gone, new = listed - public_names(), public_names() - listed
    assert not gone, f"saved workflows use what is gone: {sorted(gone)}"
    assert not new, f"add to {PUBLIC_NAMES.name}:\n" + "\n".join(sorted(new))
