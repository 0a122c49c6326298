"""What the README says of model families is what the pack knows of them."""

import pytest

from dit_toolkit.scripts.families import table
from dit_toolkit.scripts.places import ROOT

pytestmark = pytest.mark.comfy


def test_the_table_in_the_readme_is_the_one_that_is_printed():
    assert table() in (ROOT / "README.md").read_text(encoding="utf-8"), "python -m scripts.families prints it"
