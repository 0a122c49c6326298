"""Which masks are noticed as those of a background: by all four corners and the middle, and by nothing less."""

import logging

import pytest
import torch

pytestmark = pytest.mark.comfy

from dit_toolkit.nodes.freecus import ApplyFreeCus  # noqa: E402
from dit_toolkit.tests.nodes import test_inputs  # noqa: E402
from dit_toolkit.tests.nodes.calling import run_node  # noqa: E402
from dit_toolkit.tests.nodes.test_inputs import good  # noqa: E402

stand_ins = test_inputs.stand_ins


@pytest.mark.parametrize("without", [None, (0, 0), (0, -1), (-1, 0), (-1, -1)])
def test_a_mask_of_the_background_has_every_corner(stand_ins, caplog, without):
    mask = torch.ones(1, 32, 32)
    mask[:, 8:24, 8:24] = 0
    if without:
        mask[0, without[0], without[1]] = 0
    with caplog.at_level(logging.WARNING):
        run_node(ApplyFreeCus, **{**good(ApplyFreeCus, stand_ins), "subject": mask})
    assert ("put Invert Mask between" in caplog.text) == (without is None)
