"""A workflow's file -> its prompt in API format, which is what ComfyUI runs.

Three kinds of file: API format; UI format, as the page saves it, which comfy-cli converts with the node list of a
running server; a PNG that ComfyUI saved, which holds the first, the second or both.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import Refused

Prompt = dict[str, dict]  # node id -> {"class_type", "inputs", "_meta"}
PNG = b"\x89PNG\r\n\x1a\n"
CHUNK = 64_000_000  # bytes of a workflow inside a picture
VIRTUAL = {"Note", "MarkdownNote", "PrimitiveNode", "Reroute"}


@dataclass(frozen=True)
class Workflow:
    """What a file holds: the prompt, or the graph that one is made of, or both."""

    name: str
    prompt: Prompt | None
    graph: dict | None


def read(file: Path) -> Workflow:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise Refused(f"The workflow {file} cannot be read: {error.strerror}.") from None
    if data.startswith(PNG):
        texts = {name: _json(text, file) for name, text in _texts(data, file) if name in ("prompt", "workflow")}
        if not texts:
            raise Refused(f"{file.name} holds no workflow. Pictures that ComfyUI saved do, unless somebody removed it.")
        prompt, graph = texts.get("prompt"), texts.get("workflow")
        if prompt is not None and not is_prompt(prompt):
            raise Refused(f"{file.name} holds a prompt that is not in API format.")
        return Workflow(file.stem, prompt, graph if is_graph(graph) else None)
    found = _json(data, file)
    if is_graph(found):
        return Workflow(file.stem, None, found)
    if is_prompt(found):
        return Workflow(file.stem, found, None)
    raise Refused(f"{file.name} is no workflow: neither a file that ComfyUI's page saved, nor API format, nor a PNG.")


def is_prompt(found: Any) -> bool:
    return (
        isinstance(found, dict)
        and bool(found)
        and all(
            isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)
            for node in found.values()
        )
    )


def is_graph(found: Any) -> bool:
    return isinstance(found, dict) and isinstance(found.get("nodes"), list) and isinstance(found.get("links"), list)


def _json(text: bytes | str, file: Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused(f"{file.name} is damaged: its workflow is no JSON ({error}).") from None


def _texts(data: bytes, file: Path) -> Iterator[tuple[str, str]]:
    """The texts inside a PNG: tEXt, zTXt and iTXt chunks."""
    position = len(PNG)
    while position + 8 <= len(data):
        length, kind = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        chunk = data[position + 8 : position + 8 + length]
        position += length + 12
        if kind not in (b"tEXt", b"zTXt", b"iTXt"):
            continue
        name, _, rest = chunk.partition(b"\0")
        packed, encoding = kind == b"zTXt", "latin-1"
        if kind == b"zTXt":
            rest = rest[1:]
        elif kind == b"iTXt":
            packed, encoding = rest[:1] == b"\1", "utf-8"
            rest = rest[2:].split(b"\0", 2)[-1]
        try:
            yield name.decode("latin-1"), (_unpacked(rest) if packed else rest).decode(encoding)
        except (zlib.error, UnicodeDecodeError):
            raise Refused(f"{file.name} is damaged: a text in it cannot be read.") from None


def _unpacked(data: bytes) -> bytes:
    unpack = zlib.decompressobj()
    found = unpack.decompress(data, CHUNK)
    if unpack.unconsumed_tail:
        raise zlib.error("too long")
    return found


def highest_id(graph: dict | None) -> int:
    """Of its nodes, notes and those inside subgraphs included."""
    if graph is None:
        return 0
    rooms = [graph, *graph.get("definitions", {}).get("subgraphs", [])]
    ids = [node["id"] for room in rooms for node in room["nodes"] if isinstance(node.get("id"), int)]
    return max([graph.get("last_node_id") or 0, *ids])


# From the graph to the prompt


def converted(workflow: Workflow, known: dict) -> Prompt:
    """The prompt of a workflow, on a server whose nodes are `known` (its /object_info)."""
    prompt = workflow.prompt if workflow.prompt is not None else _convert(workflow.graph or {}, known)
    for node_id, node in prompt.items():
        if node["class_type"] not in known:
            raise Refused(
                f"ComfyUI does not know the node '{node['class_type']}' (number {node_id}). Install its pack."
            )
        node.setdefault("_meta", {}).setdefault(
            "title", known[node["class_type"]].get("display_name") or node["class_type"]
        )
    return prompt


def _convert(graph: dict, known: dict) -> Prompt:
    converter()
    for kind, where in types_of(graph):
        if kind not in known and kind not in VIRTUAL:
            raise Refused(f"ComfyUI does not know the node '{kind}' ({where}). Install its pack.")
    try:
        prompt = as_the_page(graph, known)
    except Exception as error:  # whatever a converter of others stumbles over
        raise Refused(
            f"comfy-cli cannot convert this workflow: {error}. Choose Workflow > Export (API) in ComfyUI's page, "
            "and use that file."
        ) from None
    if not prompt:
        raise Refused("Nothing in this workflow runs: all its nodes are muted, or notes.")
    return prompt


def converter() -> Callable[[dict, dict], Prompt]:
    try:
        from comfy_cli.workflow_to_api import convert_ui_to_api
    except ImportError:
        raise Refused(
            "A workflow as the page saves it needs comfy-cli: pip install comfy-cli. Or choose Workflow > "
            "Export (API) in ComfyUI's page, and use that file."
        ) from None
    return convert_ui_to_api


COMPARED = {"__value__": {"0": "", "1": ""}}  # what the page gives for the slider of Compare Images


def as_the_page(graph: dict, known: dict) -> Prompt:
    """comfy-cli's conversion, mended where it differs from that of ComfyUI's page. A test holds the two together."""
    mended = copy.deepcopy(graph)
    for node in mended["nodes"]:
        # Widgets that a subgraph shows of its nodes stand among its own values, empty. comfy-cli counts without them.
        shown, values = node.get("properties", {}).get("proxyWidgets"), node.get("widgets_values")
        if isinstance(shown, list) and isinstance(values, list) and len(shown) == len(values):
            pairs = list(zip(shown, values, strict=True))
            node["widgets_values"] = [value for (owner, _), value in pairs if str(owner) == "-1" or value is not None]
    with complaints(known) as said:
        prompt = converter()(mended, known)
    if said:
        raise ValueError("; ".join(said))
    for node_id, node in prompt.items():
        inputs = node["inputs"]
        if node["class_type"] == "CustomCombo" and (found := node_of(graph, node_id)):
            inputs.update(_choices(found, inputs))
        for name, spec in inputs_of(node, known).items():
            if name not in inputs or isinstance(inputs[name], list):
                continue
            if len(spec) > 1 and spec[1].get("forceInput"):  # takes a wire only, and has none
                del inputs[name]
            elif spec[:1] == ["IMAGECOMPARE"] and inputs[name] is None:
                inputs[name] = COMPARED
    return prompt


def node_of(graph: dict, node_id: str) -> dict | None:
    """The node of a graph that a prompt knows by this id: inside of subgraphs, one number for each on the way."""
    defined = {each["id"]: each["nodes"] for each in graph.get("definitions", {}).get("subgraphs", [])}
    nodes, node = graph["nodes"], None
    for number in node_id.split(":"):
        node = next((each for each in nodes if str(each["id"]) == number), None)
        if node is None:
            return None
        nodes = defined.get(node["type"], [])
    return node


def _choices(node: dict, inputs: dict) -> dict:
    """What Custom Combo holds beside its choice: the choice's place, and all that may be chosen."""
    values = node.get("widgets_values") or []
    if not isinstance(values, list) or len(values) < 3:
        return {}
    offered, choice = values[2:], inputs.get("choice")
    index = offered.index(choice) if choice in offered else values[1]
    return {"index": index} | {f"option{number}": value for number, value in enumerate(offered, 1)}


@contextlib.contextmanager
def complaints(known: dict) -> Iterator[list[str]]:
    """What comfy-cli logs while it converts: nodes that it leaves out, values that it cannot place.

    A node that is known and takes no values may hold some all the same: what it showed last.
    """
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            shown = "Could not map widget_values" in record.getMessage() and {*(record.args or ())} & known.keys()
            if not shown:
                said.append(record.getMessage())

    listener, logger = Listener(logging.WARNING), logging.getLogger("comfy_cli.workflow_to_api")
    before = logger.propagate
    logger.propagate = False
    logger.addHandler(listener)
    try:
        yield said
    finally:
        logger.removeHandler(listener)
        logger.propagate = before


def inputs_of(node: dict, known: dict) -> dict[str, list]:
    """A node's inputs with their specifications; those that its node list does not spell out have none."""
    spec = known.get(node["class_type"], {}).get("input", {})
    declared = {**spec.get("required", {}), **spec.get("optional", {})}
    return {
        name: declared.get(name, []) for name in (*declared, *(each for each in node["inputs"] if each not in declared))
    }


def types_of(graph: dict) -> Iterator[tuple[str, str]]:
    """The types of its nodes that run, with where each is. Those of subgraphs are ids of definitions."""
    defined = graph.get("definitions", {}).get("subgraphs", [])
    ids = {each["id"] for each in defined}
    for nodes, name in ((graph["nodes"], ""), *((each["nodes"], each.get("name", "")) for each in defined)):
        for node in nodes:
            if node["type"] not in ids and node.get("mode", 0) not in (2, 4):
                yield node["type"], f"number {node['id']}" + (f" in the subgraph {name}" if name else "")


# From the prompt back to the graph, so that saved pictures carry the values of their row


@dataclass(frozen=True)
class Spot:
    """Where a graph holds the value of one input: a node's list of widget values, and a place in it."""

    nodes: tuple[Any, ...]  # keys from the graph to the node
    place: Any

    def put(self, graph: dict, value: Any) -> None:
        node = graph
        for key in self.nodes:
            node = node[key]
        node["widgets_values"][self.place] = value


def spot_of(graph: dict, prompt: Prompt, known: dict, node_id: str, name: str, probe: Any) -> Spot | None:
    """Where the graph holds an input of the prompt. None where no single place does.

    Found by trial: a place counts if the value `probe` there changes this input of the prompt to it, and nothing else.
    """
    value = prompt[node_id]["inputs"].get(name)
    expected = copy.deepcopy(prompt)
    expected[node_id]["inputs"][name] = probe
    for spot in _spots(graph, prompt[node_id]["class_type"], value):
        tried = copy.deepcopy(graph)
        spot.put(tried, probe)
        if _same(quietly_converted(tried, known), expected):
            return spot
    return None


def _spots(graph: dict, kind: str, value: Any) -> Iterator[Spot]:
    defined = graph.get("definitions", {}).get("subgraphs", [])
    rooms = [(("nodes",), graph["nodes"])]
    rooms += [(("definitions", "subgraphs", number, "nodes"), each["nodes"]) for number, each in enumerate(defined)]
    ids = {each["id"] for each in defined}
    for keys, nodes in rooms:
        for number, node in enumerate(nodes):
            if node["type"] != kind and node["type"] not in ids:
                continue
            values = node.get("widgets_values") or []
            places = values.items() if isinstance(values, dict) else enumerate(values)
            for place, found in places:
                if found == value and type(found) is type(value):
                    yield Spot((*keys, number), place)


def quietly_converted(graph: dict, known: dict) -> Prompt | None:
    try:
        return as_the_page(graph, known)
    except Exception:  # a value that does not belong there
        return None


def _same(prompt: Prompt | None, other: Prompt) -> bool:
    """Whether ComfyUI would run the same."""
    return prompt is not None and essence(prompt) == essence(other)


def essence(prompt: Prompt) -> dict:
    """What of a prompt ComfyUI runs: all but titles."""
    return {node_id: (node["class_type"], node["inputs"]) for node_id, node in prompt.items()}
