"""Models that tests share: nobody may change them. `state_of` tells whether somebody did."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from types import FunctionType, MethodType
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

SHARED: dict[str, tuple[ModelPatcher, dict[str, Any]]] = {}  # each with its state when it was loaded


def share(name: str, model: ModelPatcher) -> ModelPatcher:
    """`model`, which every file of tests must leave as it is."""
    SHARED[name] = model, state_of(model)
    return model


def shared(load: Callable[[], ModelPatcher]) -> Callable[[], ModelPatcher]:
    """Load once, for all tests."""

    @wraps(load)
    def once() -> ModelPatcher:
        name = load.__name__
        return SHARED[name][0] if name in SHARED else share(name, load())

    return once


def changed() -> list[str]:
    """What differs in the shared models from what was loaded. What differs is reported once."""
    found = []
    for name, (model, before) in SHARED.items():
        after = state_of(model)
        found += [f"{name}: {part}" for part in before if before[part] != after[part]]
        SHARED[name] = model, after
    return found


def state_of(model: ModelPatcher) -> dict[str, Any]:
    """All that a MODEL is, as far as a feature could change it, as values that can be compared."""
    comfy.model_management.load_models_gpu([model])  # takes off what other clones have put on the weights
    modules = list(model.model.modules())
    return {
        "weights": {name: bits(weight) for name, weight in model.model.state_dict().items()},
        "options": fingerprint(model.model_options),
        "patches": fingerprint(model.patches),
        "object patches": fingerprint(model.object_patches),
        "wrappers": fingerprint(model.wrappers),
        "callbacks": fingerprint(model.callbacks),
        "attachments": fingerprint(model.attachments),
        "additional models": fingerprint(model.additional_models),
        "injections": fingerprint(model.injections),
        "hooks of modules": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules],
        "classes of modules": [type(module).__name__ for module in modules],
        "methods of modules": [
            f"{place}.{name}"
            for place, module in model.model.named_modules()
            for name, value in vars(module).items()
            if isinstance(value, FunctionType) or (isinstance(value, MethodType) and not is_own(value, name))
        ],
    }


def is_own(method: MethodType, name: str) -> bool:
    """The method that the module's class gives it anyway: monkeypatch puts it back on the module itself."""
    return method.__func__ is getattr(type(method.__self__), name, None)


def bits(value: Tensor) -> tuple:
    """Shape, type and the sum of all bits: any one number that changes shows."""
    data = value.detach().cpu().contiguous().flatten().view(torch.uint8)
    whole = data.numel() // 4 * 4
    return tuple(value.shape), value.dtype, int(data[:whole].view(torch.int32).sum()), int(data[whole:].sum())


def fingerprint(value: Any) -> Any:
    """Tensors by their bits, containers by what they hold, anything else by what it is."""
    match value:
        case Tensor():
            return bits(value)
        case Mapping():
            return {repr(key): fingerprint(each) for key, each in value.items()}
        case str():
            return value
        case Sequence():
            return [fingerprint(each) for each in value]
    return repr(value)
