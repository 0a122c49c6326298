"""A device that only pretends: its tensors lie in main memory, say that they lie on a card, and count what would wait.

On a real card the program runs ahead and the card works through a queue. Whoever reads a value back, copies between the
two memories without pinning, or asks how many entries are true, waits until the queue is empty. Here the same calls are
noted, each with the code that made it.

`Card` is a tensor on that device. `Meter` is a mode: it sees every call of torch's functions, also those without a
tensor, such as `torch.zeros(..., device=card)`. The numbers are those of the CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy
import comfy.model_management
import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode

import dit_toolkit

CARD, HOST = torch.device("privateuseone", 0), torch.device("cpu")
PACK = tuple(str(Path(dit_toolkit.__path__[0]) / room) for room in ("host", "models", "nodes"))
CORE = str(Path(next(iter(comfy.__path__))))
BLOCKS = str(Path(CORE, "ldm"))  # code that is called from here is called in the middle of the model

READS = {  # functions that give the program a value of the tensor, or a size that depends on its values
    *("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "__complex__", "__contains__"),
    *("__format__", "__repr__", "__array__", "is_nonzero", "equal", "allclose"),
    *("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount"),
}
OF_DEVICE, OF_IS_CPU = Tensor.device.__get__, Tensor.is_cpu.__get__  # type: ignore[attr-defined]
MOVES = ("to", "cpu", "type_as")
IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "and", "or", "xor", "mod")}


class Card(Tensor):
    """A tensor on the card."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError("a tensor of the card outlived its meter")

    def record_stream(self, stream: Any) -> None:
        """Memory on this card is never used again before its time."""


@dataclass(frozen=True)
class Wait:
    """One call that would wait. `inside`: while the model's blocks ran. `evaluation`: -1 before the first."""

    what: str
    where: str  # file, function and line of the pack; empty where core made the call
    evaluation: int
    inside: bool


class Meter(TorchFunctionMode):
    """Everything inside runs with a card. `waits` are those of the pack; core's own are left out."""

    def __init__(self):
        super().__init__()
        self.waits: list[Wait] = []
        self.evaluation = -1
        self.pinned: set[int] = set()  # addresses of memory that core was asked to pin

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.__name__
        if name == "__get__":  # x.shape, x.device, x.mT
            return self.attribute(func, *args)
        on_card = any(isinstance(x, Card) for x in tensors_in((*args, *kwargs.values())))
        target = device_asked_for(func, args, kwargs)
        self.look(name, args, kwargs, on_card, target)
        if target == CARD:
            args = tuple(map(without_card, args))
            kwargs = {name: without_card(value) for name, value in kwargs.items()}
        out = plain(func, *args, **kwargs)
        if in_place(name):
            return out
        if target is not None and args and out is args[0] and on_card != (target == CARD):
            out = plain(out.clone)  # a copy between the memories shares none
        return placed(out, on_card if target is None else target == CARD)

    def attribute(self, func: Callable, x: Tensor, *kind: type) -> Any:
        on_card = isinstance(x, Card)
        if func == OF_DEVICE:
            return CARD if on_card else plain(func, x, *kind)
        if func == OF_IS_CPU:
            return not on_card
        return placed(plain(func, x, *kind), on_card)

    def look(self, name: str, args: tuple, kwargs: dict, on_card: bool, target: Any) -> None:
        """Note the call if it would wait."""
        if on_card and name in READS:
            self.note(name)
        elif on_card and (
            (name == "where" and len(args) == 1)
            or (name == "repeat_interleave" and any(isinstance(x, Card) for x in args[1:]))
        ):
            self.note(f"{name} of a size that the values decide")
        elif name in ("tensor", "as_tensor", "new_tensor"):
            made_of = args[1] if name == "new_tensor" else args[0]
            if not isinstance(made_of, Tensor) and any(isinstance(x, Card) for x in tensors_in((made_of,))):
                self.note(f"{name} of values on the card")
            elif (target == CARD or (name == "new_tensor" and on_card)) and not isinstance(made_of, Card):
                self.note(name)
        elif name in ("__getitem__", "__setitem__") and isinstance(args[0], Card):
            self.look_at_index(name, *args)
        elif name == "copy_" and isinstance(args[1], Tensor):
            self.look_at_copy(name, args[1], args[0], args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        elif name in MOVES and target is not None and isinstance(args[0], Card) != (target == CARD):
            self.look_at_copy(name, args[0], None, kwargs.get("non_blocking", False))

    def look_at_index(self, name: str, x: Tensor, index: Any, value: Any = None) -> None:
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, list | range) or (isinstance(part, Tensor) and not isinstance(part, Card)):
                self.note(f"{name} by an index in main memory")
            elif isinstance(part, Card) and part.dtype == torch.bool and (name == "__getitem__" or is_many(value)):
                self.note(f"{name} by a mask")
            elif isinstance(part, Card) and plain(lambda at: at.ndim == 0 and at.dtype != torch.bool, part):
                self.note(f"{name} by a number on the card")
        if isinstance(value, Tensor) and not isinstance(value, Card) and value.ndim:
            self.note(f"{name} from main memory")

    def look_at_copy(self, name: str, source: Tensor, into: Tensor | None, eager: bool) -> None:
        """Between the memories a copy waits, unless it is asked not to and the memory is pinned."""
        if into is not None and isinstance(source, Card) == isinstance(into, Card):
            return
        in_memory = into if isinstance(source, Card) else source
        pinned = in_memory is not None and plain(lambda x: x.untyped_storage().data_ptr(), in_memory) in self.pinned
        if not (eager and pinned):
            self.note(f"{name} to {'main memory' if isinstance(source, Card) else 'the card'}")

    def note(self, what: str) -> None:
        where, inside = nearest()
        if where:
            self.waits.append(Wait(what, where, self.evaluation, inside))

    def of(self, evaluation: int) -> list[Wait]:
        return [wait for wait in self.waits if wait.evaluation == evaluation]


def nearest() -> tuple[str, bool]:
    """The pack's code that calls, if no code of core lies between; and whether the model's blocks call that."""
    frame: Any = sys._getframe(2)
    where, inside, found = "", False, False
    while frame is not None:
        file = frame.f_code.co_filename
        if not found and file.startswith(PACK):
            name = Path(file).relative_to(Path(PACK[0]).parent).as_posix()
            where, found = f"{name}:{frame.f_lineno} {frame.f_code.co_name}", True
        elif file.startswith(CORE):
            found = True
            inside = inside or file.startswith(BLOCKS)
        frame = frame.f_back
    return where, inside


def plain(func: Callable, *args: Any, **kwargs: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def placed(out: Any, on_card: bool) -> Any:
    """A result, in one of the two memories."""
    if isinstance(out, Tensor):
        if isinstance(out, Card) == on_card:
            return out
        return plain(lambda: out.detach().as_subclass(Card if on_card else Tensor))
    if type(out) in (tuple, list):
        return type(out)(placed(x, on_card) for x in out)
    if isinstance(out, tuple) and type(out) is not torch.Size:  # torch's named tuples
        return type(out)([placed(x, on_card) for x in out])
    return out


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from tensors_in(value)


def without_card(x: Any) -> Any:
    return HOST if isinstance(x, torch.device) and x == CARD else x


def device_asked_for(func: Callable, args: tuple, kwargs: dict) -> torch.device | None:
    """Where the result shall lie, if the call says so."""
    name = func.__name__
    if name == "cpu":
        return HOST
    asked = kwargs.get("device")
    if asked is None and name in ("to", "type_as"):
        for each in (*args[1:], kwargs.get("other")):
            if isinstance(each, Tensor):
                return CARD if isinstance(each, Card) else HOST
            if isinstance(each, torch.device | str):
                asked = each
    return torch.device(asked) if asked is not None else None


def in_place(name: str) -> bool:
    return name == "__setitem__" or name in IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def is_many(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


@contextmanager
def metered(monkeypatch: pytest.MonkeyPatch) -> Iterator[Meter]:
    """A meter, and a core that believes in the card: it pins memory for it, and finds room on it."""
    from dit_toolkit.host.run import Run

    meter, management, begin = Meter(), comfy.model_management, Run.begin_evaluation

    def begins(self, *args, **kwargs):
        meter.evaluation += 1
        return begin(self, *args, **kwargs)

    def address(x: Tensor) -> int:
        return plain(lambda: x.untyped_storage().data_ptr())

    def pin(x: Tensor) -> bool:
        meter.pinned.add(address(x))
        return True

    def unpin(x: Tensor) -> bool:
        meter.pinned.discard(address(x))
        return True

    def unrecorded(function: Callable, *args: Any, use_reentrant: bool, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    def free(device: Any = None, torch_free_too: bool = False) -> Any:
        return (2**40, 2**40) if torch_free_too else 2**40

    with monkeypatch.context() as patch:
        patch.setattr(Run, "begin_evaluation", begins)
        patch.setattr(torch.utils.checkpoint, "checkpoint", unrecorded)  # which asks torch about the device
        patch.setattr(management, "load_models_gpu", lambda *args, **kwargs: None)
        patch.setattr(management, "get_free_memory", free)
        patch.setattr(management, "pin_memory", pin)
        patch.setattr(management, "unpin_memory", unpin)
        with meter:
            yield meter
