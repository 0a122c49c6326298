"""Tiny models for the tests of host/, loaded once."""

import pytest


@pytest.fixture(scope="session")
def tiny_state():
    from dit_toolkit.tests.host import tiny

    return tiny.flux_state()


@pytest.fixture(scope="session")
def tiny_flux(tiny_state):
    """A MODEL as UNETLoader gives it. Nobody may change it: every test shares it."""
    from dit_toolkit.tests.host import tiny

    return tiny.load_flux(tiny_state)
