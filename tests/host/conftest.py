"""Tiny models for the tests of host/, loaded once, and a view of what they compute."""

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


@pytest.fixture(scope="session")
def file():
    """A random EasyControl LoRA for the tiny model."""
    from dit_toolkit.tests.host import tiny

    return tiny.lora_file()


@pytest.fixture
def encodings(monkeypatch):
    """Every condition that is run through the model, as the `Source` it is made from."""
    from dit_toolkit.host.easycontrol_run import Encoder

    seen, encode = [], Encoder.encode

    def counted(self, call, source):
        seen.append(source)
        return encode(self, call, source)

    monkeypatch.setattr(Encoder, "encode", counted)
    return seen
