"""A view of what the tiny models of the tests compute."""

import pytest


@pytest.fixture
def encodings(monkeypatch):
    """Every condition that is run through the model, as the `Source` it is made from."""
    from dit_toolkit.host.control.conditions_run import Encoder

    seen, encode = [], Encoder.encode

    def counted(self, call, source, tile):
        seen.append(source)
        return encode(self, call, source, tile)

    monkeypatch.setattr(Encoder, "encode", counted)
    return seen
