"""Nodes as ComfyUI's executor calls them."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io


def run_node(node: type[io.ComfyNode], **values: Any) -> tuple:
    """What a node gives: with the defaults of its schema for what is not given, and an id of its own."""
    called = node.PREPARE_CLASS_CLONE({"hidden_inputs": {io.Hidden.unique_id: "12"}})
    return called.execute(**{**defaults(node), **values}).args


def defaults(node: type[io.ComfyNode]) -> dict[str, Any]:
    """By input; of a choice without a default, the first. What is connected has none."""
    found = {entry.id: getattr(entry, "default", None) for entry in node.GET_SCHEMA().inputs}
    found |= {
        entry.id: entry.options[0]
        for entry in node.GET_SCHEMA().inputs
        if isinstance(entry, io.Combo.Input) and found[entry.id] is None
    }
    return {name: value for name, value in found.items() if value is not None}
