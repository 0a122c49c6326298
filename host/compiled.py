"""What has to be said to torch.compile below APPLY_MODEL."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch

try:
    from torch._dynamo.decorators import skip  # torch's own name for it is not public
except ImportError:  # what is public does it less well, see below
    skip = partial(torch.compiler.disable, recursive=False)

Function = TypeVar("Function", bound=Callable)


def untraced(function: Function) -> Function:
    """Mark a function that torch.compile must run as it is, each time it is called. What it calls may be compiled.

    TorchCompileModel drops every check on what is reached through a name that contains "transformer_options". Whatever
    was found there when a function was traced is repeated ever after: a counter stands still, `img_slice` keeps the
    length of the first prompt. So each function below APPLY_MODEL that looks into `transformer_options`, or into
    `args` for them, has to be marked, not only the one that calls it. `torch.compiler.disable(recursive=False)` does
    not do it: in torch 2.11 it leaves out a wrapper of the function, and traces the function.
    """
    marked: Any = function
    while isinstance(marked, partial):
        marked = marked.func
    marked = getattr(marked, "__func__", marked)  # a bound method
    if not hasattr(marked, "__code__"):
        marked = type(marked).__call__
    skip(marked)
    return function
