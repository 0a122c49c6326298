"""Nodes as ComfyUI's executor calls them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image
from torch import Tensor


def run_node(node: type[io.ComfyNode], **values: Any) -> tuple:
    """What a node gives: with the defaults of its schema for what is not given, and an id of its own."""
    return executed(node, **values).args


def executed(node: type[io.ComfyNode], **values: Any) -> io.NodeOutput:
    """The same with what it shows."""
    called = node.PREPARE_CLASS_CLONE({"hidden_inputs": {io.Hidden.unique_id: "12"}})
    return called.execute(**{**defaults(node), **values})


def shown_by(output: io.NodeOutput) -> Tensor | None:
    """The pictures on the node, `[N, H, W, 3]`: as the page would load them. None: it shows nothing."""
    if output.ui is None:
        return None
    files = output.ui.as_dict()["images"]
    assert {file["type"] for file in files} == {"temp"}
    folder = Path(folder_paths.get_temp_directory())
    loaded = [Image.open(folder / file["subfolder"] / file["filename"]).convert("RGB") for file in files]
    return torch.stack([torch.from_numpy(np.array(each)).float() / 255 for each in loaded])


def defaults(node: type[io.ComfyNode]) -> dict[str, Any]:
    """By input; of a choice without a default, the first. What is connected has none."""
    found = {entry.id: getattr(entry, "default", None) for entry in node.GET_SCHEMA().inputs}
    found |= {
        entry.id: entry.options[0]
        for entry in node.GET_SCHEMA().inputs
        if isinstance(entry, io.Combo.Input) and found[entry.id] is None
    }
    return {name: value for name, value in found.items() if value is not None}
