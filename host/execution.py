"""Which node of which prompt is running, where it was queued, and which of a report's runs a link leads back to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from comfy_execution.utils import get_executing_context


class Origin(NamedTuple):
    """The node that runs a sampler: prompt id, node id, and the item's number if ComfyUI maps the node over a list."""

    prompt: str | None = None
    node: str | None = None
    item: int | None = None


NOBODY = Origin()  # a script, without a prompt


class Sender(NamedTuple):
    """Where a node of a prompt is on the page: the graph's id, the mark of the page's tab, and the kind of the node.

    The page makes a mark when it queues (`web/step_cache.js`): two tabs of one template have graphs of the same id. A
    program that queues may give none of the three.
    """

    workflow: str | None = None
    tab: str | None = None
    kind: str | None = None


NOWHERE = Sender()
MARK = "dit_toolkit.tab"  # in the graph's "extra"


class HasOrigin(Protocol):
    @property
    def origin(self) -> Origin: ...


RunT = TypeVar("RunT", bound=HasOrigin)
InputsOf = Callable[[str], Mapping[str, Any]]  # a node's inputs by its id: values or links


def running() -> Origin:
    """The node that runs now. Only ComfyUI's own thread knows it, so call this when a run starts."""
    context = get_executing_context()
    return NOBODY if context is None else Origin(context.prompt_id, context.node_id, context.list_index)


def sender_of(server: Any, prompt: str | None, node: str | None) -> Sender:
    """Where the page has `node` of a running prompt, as far as ComfyUI's server was told when it was queued."""
    running_prompts, _ = server.prompt_queue.get_current_queue_volatile()
    for _number, number, nodes, extra, *_rest in running_prompts:
        if number == prompt:
            graph = _within(extra, "extra_pnginfo", "workflow")
            found = _within(graph, "id"), _within(graph, "extra", MARK), _within(nodes, node, "class_type")
            return Sender(*(value if isinstance(value, str) else None for value in found))
    return NOWHERE


def runs_before(runs: Sequence[RunT], link: Any, inputs_of: InputsOf, item: int | None) -> list[RunT]:
    """The runs of the samplers that an input leads back to, among those of one report (the oldest first).

    Args:
        link: the input's link, `[node id, output]`.
        item: number of the item that the asking node works on, in a list.
    """
    nodes = samplers_before({run.origin.node for run in runs}, link, inputs_of)
    found = [run_of(runs, node, item) for node in nodes]
    return [run for run in runs if any(run is each for each in found)]


def samplers_before(samplers: Iterable[str | None], link: Any, inputs_of: InputsOf) -> list[str]:
    """The nodes among `samplers` that a link leads back to. Each path ends at the first one it meets."""
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
    """A node's run for this item of a list, else its last run, in the newest prompt that really ran it."""
    mine = [run for run in runs if run.origin.node == node]
    newest = [run for run in mine if run.origin.prompt == mine[-1].origin.prompt]
    return next((run for run in reversed(newest) if run.origin.item == item), newest[-1])


def _within(value: Any, *keys: str | None) -> Any:
    """`value[key][key]...`, or None where there is no such thing: programs send what they like."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)
