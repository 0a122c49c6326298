"""ComfyUI in this process: for the stages and the tables that are made with its own nodes."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

from dit_toolkit.scripts import places


@cache
def comfyui() -> SimpleNamespace:
    """ComfyUI's nodes and ours, in this process, on the CPU. Its folders are a base of their own under `.cache/`."""
    # ComfyUI has a nodes.py of its own. With the repository on sys.path, `import nodes` would find ours.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != places.ROOT]
    if str(places.comfyui()) not in sys.path:
        sys.path.append(str(places.comfyui()))
    from comfy.cli_args import args

    if args.base_directory is None:  # tests have one already
        args.cpu = True
        args.base_directory = str(places.prepare_base(places.CACHE / "in_context"))
    import comfy.patcher_extension
    import folder_paths
    import nodes  # ComfyUI's
    from comfy_extras.nodes_dataset import MakeTrainingDataset
    from comfy_extras.nodes_train import SaveLoRA, TrainLoraNode

    from dit_toolkit.host import embedded
    from dit_toolkit.host.model_files import offer_loras
    from dit_toolkit.nodes.in_context_lora import (
        PanelLatent,
        PanelLayout,
        PanelSets,
        PrepareTraining,
        SplitPanels,
    )

    offer_loras()
    return SimpleNamespace(
        comfy=comfy, folder_paths=folder_paths, nodes=nodes, embedded=embedded, PanelLayout=PanelLayout,
        PanelSets=PanelSets, PanelLatent=PanelLatent, SplitPanels=SplitPanels, PrepareTraining=PrepareTraining,
        MakeTrainingDataset=MakeTrainingDataset, TrainLora=TrainLoraNode, SaveLora=SaveLoRA,
    )  # fmt: skip
