"""Tensors that rest in main memory: pinned on core's account, copied beside the work, a name ahead of their use."""

from __future__ import annotations

from contextlib import contextmanager

import comfy.model_management as management
import pytest
import torch

from dit_toolkit.host.resting import Ahead, Resting, RestingKeys, Shelf
from dit_toolkit.tests.host.card import CARD, metered

pytestmark = pytest.mark.comfy


class Stream:
    """A queue of the card that notes what it is told."""

    def __init__(self, name, said):
        self.name, self.said = name, said

    def wait_stream(self, other):
        self.said.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def as_context(self, stream):
        assert stream is self
        self.said.append(f"{self.name} copies")
        yield


@pytest.fixture
def meter(monkeypatch):
    with metered(monkeypatch) as meter:
        yield meter


@pytest.fixture
def said(monkeypatch):
    """What is asked of the card's main queue, and of two that core offers for copies."""
    said: list[str] = []
    work, *aside = (Stream(name, said) for name in ("work", "first", "second"))
    monkeypatch.setattr(management, "current_stream", lambda device: work)
    monkeypatch.setattr(management, "get_offload_stream", lambda device: aside.append(aside.pop(0)) or aside[-1])
    return said


def on_card(*values):
    return torch.tensor(values).to(CARD)


def test_on_a_cpu_a_tensor_rests_where_it_is():
    shelf, x = Shelf(), torch.ones(3)
    assert shelf.put(x) is x
    assert Ahead(["x"], lambda name: [x], x.device).take("x")[0] is x


def test_values_go_and_come_without_a_wait(meter):
    shelf, x = Shelf(), on_card(1.0, 2.0)
    meter.waits.clear()
    rested = shelf.put(x)
    assert (rested.shape, rested.nbytes) == (x.shape, x.nbytes)
    (back,) = Ahead(["x"], lambda name: [rested], CARD).take("x")
    assert not meter.waits
    assert back.device == CARD
    assert back.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("why", ["memory that core cannot pin", "a device that cannot"])
def test_copies_run_ahead_only_where_core_says_that_they_can(meter, monkeypatch, why):
    """On some devices a tensor that is copied without waiting is read before it is there."""
    if why == "memory that core cannot pin":
        monkeypatch.setattr(management, "pin_memory", lambda x: False)
    else:
        monkeypatch.setattr(management, "device_supports_non_blocking", lambda device: False)
    shelf, x = Shelf(), on_card(1.0)
    meter.waits.clear()
    rested = shelf.put(x)
    Ahead(["x"], lambda name: [rested], CARD).take("x")
    assert [wait.what for wait in meter.waits] == ["copy_ to main memory", "copy_ to the card"]


def test_memory_is_used_again_and_given_back_at_the_end(meter):
    shelf = Shelf()
    first = shelf.put(on_card(1.0))
    memory = first.memory
    second = shelf.put(on_card(2.0))
    del first
    third = shelf.put(on_card(3.0))
    assert third.memory is memory
    assert second.memory is not memory
    assert shelf.put(on_card(1.0, 2.0)).memory.shape == (2,)
    assert len(meter.pinned) == 3
    shelf.close()
    assert not meter.pinned
    assert third.memory.tolist() == [3.0]  # what still rests is there


@pytest.mark.usefixtures("meter")
def test_each_copy_is_queued_behind_what_it_needs(said):
    """Out: behind the work that makes it. Back: behind the copy out, and behind the work, whose memory it may get."""
    rested = Shelf().put(on_card(1.0))
    assert said == ["first waits for work", "first copies"]
    said.clear()
    Ahead(["x"], lambda name: [rested], CARD).take("x")
    assert said == ["second waits for work", "second waits for first", "second copies", "work waits for second"]


@pytest.mark.usefixtures("meter")
def test_the_next_name_is_on_its_way_while_one_is_used(said):
    shelf = Shelf()
    rested = {name: [shelf.put(on_card(float(i)))] for i, name in enumerate("abc")}
    asked = []
    ahead = Ahead(list("abc"), lambda name: asked.append(name) or rested[name], CARD)
    said.clear()
    for name, so_far, waits in (("a", "ab", 1), ("b", "abc", 1), ("c", "abc", 1), ("c", "abc", 0), ("a", "abcab", 1)):
        said.clear()
        assert ahead.take(name)[0].tolist() == [float("abc".index(name))]
        assert asked == list(so_far)
        assert len([line for line in said if line.startswith("work waits")]) == waits
    assert set(ahead.coming) == {"a", "b"}  # no more than two at a time


@pytest.mark.usefixtures("meter")
def test_keys_are_a_mapping_by_block():
    shelf = Shelf()
    keys = {("double", i): (shelf.put(on_card(float(i))), shelf.put(on_card(-float(i)))) for i in range(3)}
    assert all(isinstance(x, Resting) for pair in keys.values() for x in pair)
    found = RestingKeys(keys, CARD)
    assert list(found) == list(keys)
    assert ("double", 1) in found
    assert ("single", 1) not in found
    assert [x.tolist() for x in found["double", 1]] == [[1.0], [-1.0]]
