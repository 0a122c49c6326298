"""Which node of which prompt is running, and which of a report's runs lie before a node in the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from comfy_execution.utils import get_executing_context


class Origin(NamedTuple):
    """Who runs a sampler: the prompt's id, the node's id in it, and the item where a node is mapped over a list."""

    prompt: str | None = None
    node: str | None = None
    item: int | None = None


NOBODY = Origin()  # a script, without a prompt


class HasOrigin(Protocol):
    @property
    def origin(self) -> Origin: ...


RunT = TypeVar("RunT", bound=HasOrigin)
InputsOf = Callable[[str], Mapping[str, Any]]  # of a node by its id, as a prompt has them: values, or links


def running() -> Origin:
    """ComfyUI knows it in the thread of its nodes only, so ask when a run starts."""
    context = get_executing_context()
    return NOBODY if context is None else Origin(context.prompt_id, context.node_id, context.list_index)


def runs_before(runs: Sequence[RunT], link: Any, inputs_of: InputsOf, item: int | None) -> list[RunT]:
    """For each sampler that an input leads back to, its run, out of those of one report (the oldest first).

    Args:
        link: what is connected to the input, `[node id, output]`.
        item: of the node that asks.
    """
    nodes = samplers_before({run.origin.node for run in runs}, link, inputs_of)
    found = [run_of(runs, node, item) for node in nodes]
    return [run for run in runs if any(run is each for each in found)]


def samplers_before(samplers: Iterable[str | None], link: Any, inputs_of: InputsOf) -> list[str]:
    """The nodes among `samplers` that a link leads back to. Each way ends at its first."""
    samplers, found, seen, left = set(samplers), [], set(), [link]
    while left:
        link = left.pop()
        if not _is_link(link) or link[0] in seen:
            continue
        seen.add(link[0])
        if link[0] in samplers:
            found.append(link[0])
        else:
            left += inputs_of(link[0]).values()
    return found


def run_of(runs: Sequence[RunT], node: str, item: int | None) -> RunT:
    """A node's run for this item of a list, else its last, in the newest prompt that did not take it from the cache."""
    mine = [run for run in runs if run.origin.node == node]
    newest = [run for run in mine if run.origin.prompt == mine[-1].origin.prompt]
    return next((run for run in reversed(newest) if run.origin.item == item), newest[-1])


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)
