"""How code below APPLY_MODEL keeps out of torch.compile's graphs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch

try:
    from torch._dynamo.decorators import skip  # not public in torch
except ImportError:  # the public way does less, see below
    skip = partial(torch.compiler.disable, recursive=False)

Function = TypeVar("Function", bound=Callable)


def untraced(function: Function) -> Function:
    """Mark a function that torch.compile must not trace. It may still compile what the function calls.

    TorchCompileModel drops every guard on values behind a name that contains "transformer_options". A traced function
    then repeats forever what it found there first: a counter stands still, `img_slice` keeps the length of the first
    prompt. So mark each function below APPLY_MODEL that reads `transformer_options`, or reads them from `args`, and not
    only its caller. `torch.compiler.disable(recursive=False)` is not enough: in torch 2.11 it skips a wrapper of the
    function, and traces the function.
    """
    marked: Any = function
    while isinstance(marked, partial):
        marked = marked.func
    marked = getattr(marked, "__func__", marked)  # a bound method
    if not hasattr(marked, "__code__"):
        marked = type(marked).__call__
    skip(marked)
    return function
