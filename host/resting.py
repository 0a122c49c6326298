"""Tensors of a run that rest in main memory and come over to the GPU when they are used.

A copy between the two memories holds the program up until the GPU has done all that is queued, unless the main memory
is pinned. So a `Shelf` has core pin its memory, within core's limits and on core's account, and uses it again for the
next tensor of that shape: pinning takes long. Copies run on core's offload streams, beside the work of the model, and
`Ahead` starts each of them while the tensor before is in use. Core's rules decide what a device can do of this: without
pinned memory or streams, the same copies are made one after the other.

On a CPU a tensor rests where it is, and nothing is copied.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import comfy.model_management as management
import torch
from torch import Tensor

HOST = torch.device("cpu")


class Shelf:
    """The main memory of one run. `close` gives it back."""

    def __init__(self) -> None:
        self._free: dict[Hashable, list[tuple[Tensor, bool]]] = {}
        self._pinned: list[Tensor] = []
        self._lock = threading.RLock()  # with several GPUs, conditions run in threads

    def put(self, x: Tensor) -> Tensor | Resting:
        """`x` to rest. It may be dropped at once: the copy has its own hold on it."""
        return x if x.device == HOST else Resting(self, x)

    def take(self, like: Tensor) -> tuple[Tensor, bool]:
        """Main memory for a tensor like this one, and whether it is pinned."""
        with self._lock:
            free = self._free.get((like.shape, like.dtype))
            if free:
                return free.pop()
            memory = torch.empty(like.shape, dtype=like.dtype, device=HOST)
            pinned = management.pin_memory(memory)
            if pinned:
                self._pinned.append(memory)
            return memory, pinned

    def give_back(self, memory: Tensor, pinned: bool) -> None:
        with self._lock:
            self._free.setdefault((memory.shape, memory.dtype), []).append((memory, pinned))

    def close(self) -> None:
        """Unpin all memory, once nothing on its way needs it."""
        with self._lock:
            if self._pinned:
                management.synchronize()
            for memory in self._pinned:
                management.unpin_memory(memory)
            self._pinned.clear()
            self._free.clear()


class Resting:
    """One tensor in main memory, with the shape, size and dtype that it has on its device."""

    def __init__(self, shelf: Shelf, x: Tensor):
        self.shelf = shelf
        self.memory, self.pinned = shelf.take(x)
        self.written = _stream_behind_the_work(x.device)
        with _on(self.written):
            self.memory.copy_(x, non_blocking=self.pinned and management.device_supports_non_blocking(x.device))
        if self.written is not None:
            x.record_stream(self.written)

    def __del__(self) -> None:
        if hasattr(self, "memory"):
            self.shelf.give_back(self.memory, self.pinned)

    @property
    def shape(self) -> torch.Size:
        return self.memory.shape

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes

    def start(self, device: torch.device, stream: Any) -> Tensor:
        """A tensor on `device` that the values are on their way to, by `stream`."""
        out = torch.empty(self.memory.shape, dtype=self.memory.dtype, device=device)
        if stream is not None and self.written is not None:
            stream.wait_stream(self.written)
        with _on(stream):
            out.copy_(self.memory, non_blocking=self.pinned and management.device_supports_non_blocking(device))
        if stream is not None:
            out.record_stream(stream)
        return out


Kept = Tensor | Resting


class Ahead:
    """Brings kept tensors to a device by name. While one is in use, that behind it in the order is on its way.

    names: in the order of their use. A name that is asked for out of order is fetched at once.
    kept: the tensors of a name. They may change until they are fetched.
    """

    def __init__(self, names: Sequence[Hashable], kept: Callable[[Any], Sequence[Kept]], device: torch.device):
        self.kept, self.device = kept, device
        self.behind = dict(pairwise(names))
        self.coming: dict[Hashable, tuple[list[Tensor], Any]] = {}

    def take(self, name: Hashable) -> list[Tensor]:
        tensors, stream = self.coming.get(name) or self._start(name)
        management.sync_stream(self.device, stream)
        self.coming = {name: (tensors, None)}
        following = self.behind.get(name)
        if following is not None:
            self.coming[following] = self._start(following)
        return tensors

    def _start(self, name: Hashable) -> tuple[list[Tensor], Any]:
        kept = self.kept(name)
        stream = _stream_behind_the_work(self.device) if any(isinstance(x, Resting) for x in kept) else None
        return [x.start(self.device, stream) if isinstance(x, Resting) else x.to(self.device) for x in kept], stream


class RestingKeys(Mapping):
    """Keys and values by block that rest in main memory; a block that asks finds them on the device."""

    def __init__(self, keys: Mapping[Any, tuple[Any, Any]], device: torch.device):
        self.keys_by_block = keys
        self.ahead = Ahead(list(keys), keys.__getitem__, device)

    def __getitem__(self, block: Hashable) -> tuple[Tensor, Tensor]:
        if block not in self.keys_by_block:
            raise KeyError(block)
        k, v = self.ahead.take(block)
        return k, v

    @property
    def nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in self.keys_by_block.values())

    def __iter__(self):
        return iter(self.keys_by_block)

    def __len__(self) -> int:
        return len(self.keys_by_block)


def _stream_behind_the_work(device: torch.device) -> Any:
    """One of core's offload streams, behind what is queued on `device` so far; None where core has none."""
    stream = management.get_offload_stream(device)
    if stream is not None:
        stream.wait_stream(management.current_stream(device))
    return stream


def _on(stream: Any) -> AbstractContextManager:
    """Whatever runs inside is queued on this stream."""
    if stream is None:
        return nullcontext()
    return stream.as_context(stream) if hasattr(stream, "as_context") else stream
