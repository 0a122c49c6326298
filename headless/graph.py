"""The page's graph with the values of each row in it, for the pictures to carry.

A picture that is dropped on the page opens as the workflow it was made with. Where a value cannot be written back for
certain, pictures carry the prompt alone: the page opens that too, and lays the nodes out anew.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .bindings import LOADERS, UPLOADED, Binding, File
from .plan import Job, Plan
from .workflow import Prompt, Spot, Workflow, essence, quietly_converted, spot_of

GAP = 60  # pixels between a node and the loader put before it
SIZE = [320, 360]


@dataclass(frozen=True)
class Graph:
    """`why_not`: the reason that pictures carry no graph, where they do not."""

    plan: Plan
    graph: dict | None
    spots: tuple[Spot | None, ...] = ()
    savers: tuple[tuple[str, Spot], ...] = ()
    why_not: str = ""

    @classmethod
    def of(cls, flow: Workflow, plan: Plan) -> Graph:
        if flow.graph is None:
            return cls(plan, None)
        graph, known, prompt = copy.deepcopy(flow.graph), plan.known, plan.prompt
        converted = quietly_converted(graph, known)
        if converted is None or essence(converted) != essence(prompt):
            return cls(plan, None, why_not="the file's graph and its prompt are not the same.")
        spots: list[Spot | None] = []
        for binding in plan.bindings:
            wired = binding.kind in LOADERS or isinstance(prompt[binding.node]["inputs"].get(binding.input), list)
            spot = (
                None if wired else spot_of(graph, prompt, known, binding.node, binding.input, _probe(binding, prompt))
            )
            if spot is None and binding.kind not in LOADERS:
                return cls(plan, None, why_not=f"{binding.label} could not be written back into it.")
            spots.append(spot)
        savers = []
        for node_id in plan.savers:
            if (node_id, "filename_prefix") in {(binding.node, binding.input) for binding in plan.bindings}:
                continue
            spot = spot_of(graph, prompt, known, node_id, "filename_prefix", "a name")
            if spot is None:
                return cls(plan, None, why_not=f"the file name of #{node_id} could not be written back into it.")
            savers.append((node_id, spot))
        made = cls(plan, graph, tuple(spots), tuple(savers))
        sample = [File("", "a.png") if binding.kind in LOADERS else None for binding in plan.bindings]
        job = made.job(0, "a", sample)
        if (
            job.graph is None
            or (tried := quietly_converted(job.graph, known)) is None
            or essence(tried) != essence(job.prompt)
        ):
            return cls(plan, None, why_not="a loader for pictures could not be put into it.")
        return made

    def job(self, position: int, key: str, values: Sequence[Any]) -> Job:
        job = self.plan.job(position, key, values)
        if self.graph is None:
            return job
        graph = copy.deepcopy(self.graph)
        for number, (binding, value, spot) in enumerate(zip(self.plan.bindings, values, self.spots, strict=True)):
            if value is None:
                continue
            value = f"{UPLOADED}/{value.name}" if isinstance(value, File) else value
            if spot is not None:
                spot.put(graph, value)
            elif not _put_loader(graph, binding, value, int(self.plan.loaders[number])):
                return job
        for node_id, spot in self.savers:
            spot.put(graph, job.prompt[node_id]["inputs"]["filename_prefix"])
        return Job(job.position, job.key, job.prompt, job.files, graph)


def _probe(binding: Binding, prompt: Prompt) -> Any:
    """Another value that the input could have."""
    value = prompt[binding.node]["inputs"].get(binding.input)
    if binding.choices:
        return next((choice for choice in binding.choices if choice != value), None)
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, (int, float)) else f"{value} "


def _put_loader(graph: dict, binding: Binding, name: str, new: int) -> bool:
    """A loader node with this file, wired to the input in place of what was. False inside subgraphs."""
    node = next((each for each in graph["nodes"] if str(each["id"]) == binding.node), None)
    slot = next((at for at, each in enumerate((node or {}).get("inputs", ())) if each["name"] == binding.input), None)
    if node is None or slot is None:
        return False
    entry, (kind, _, others) = node["inputs"][slot], LOADERS[binding.kind]
    link = 1 + max([graph.get("last_link_id") or 0, *(each[0] for each in graph["links"])])
    if (old := entry.get("link")) is not None:
        graph["links"] = [each for each in graph["links"] if each[0] != old]
        for each in graph["nodes"]:
            for output in each.get("outputs") or ():
                if old in (output.get("links") or ()):
                    output["links"] = [number for number in output["links"] if number != old]
    entry["link"] = link
    graph["links"].append([link, new, 0, node["id"], slot, binding.kind])
    x, y = _position(node)
    outputs = [{"name": binding.kind, "type": binding.kind, "links": [link]}]
    if kind == "LoadImage":
        outputs.append({"name": "MASK", "type": "MASK", "links": None})
    graph["nodes"].append(
        {
            "id": new,
            "type": kind,
            "title": binding.label,
            "pos": [x - SIZE[0] - GAP, y - SIZE[1] - GAP],
            "size": list(SIZE),
            "flags": {},
            "order": 0,
            "mode": 0,
            "inputs": [],
            "outputs": outputs,
            "properties": {"Node name for S&R": kind},
            "widgets_values": [name, *others.values(), "image"],
        }
    )
    graph["last_link_id"], graph["last_node_id"] = link, max(new, graph.get("last_node_id") or 0)
    return True


def _position(node: dict) -> tuple[float, float]:
    position = node.get("pos", [0, 0])
    return (position["0"], position["1"]) if isinstance(position, dict) else (position[0], position[1])
