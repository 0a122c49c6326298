"""The transformer of a MODEL: which module it is, of which class, and whose code runs in it.

All clones of a MODEL share one module. Other packs put a class or a function of their own into it with an object patch.
ComfyUI applies a clone's object patches when it loads the clone, and undoes them when it loads another one. So the live
module shows which branch of the workflow was sampled last, not what this MODEL is. The functions here ask the MODEL
instead: first its own object patches, then the module as it was before any patch.

While ComfyUI samples a MODEL, its patches are in place and the live module is right. So these functions take a MODEL
(`ModelPatcher`) or a running model: ComfyUI's `BaseModel`, or its transformer.

Some packs write into the module without an object patch, and leave their code there when their node is gone (CacheDiT).
`Stranger` shows that, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from comfy.model_patcher import ModelPatcher
from torch import nn

ROOT = __name__.rpartition(".host.")[0]  # our own package, whatever its folder is called
CORE = ("comfy", "comfy_api", "comfy_extras", "comfy_aimdo", "comfy_kitchen", "torch", ROOT)
PASSES = ("forward", "_forward", "forward_orig")  # the methods of ComfyUI's transformers that call the blocks
PATH = "diffusion_model"  # of the transformer, as object patches name it

Block = tuple[str, int]  # ("double", 3): list and number, as attention is told by block_type and block_index

REMOVE = "Remove one of the two."


@dataclass(frozen=True)
class Stranger:
    """Code of another pack that runs in place of ComfyUI's.

    pack: the folder of the pack, or its module if it has no folder.
    part: the replaced part of the model, in words.
    left: the code is in the module itself, and no object patch of this MODEL put it there. It may outlast its node.
    """

    pack: str
    part: str
    left: bool = False

    def __str__(self) -> str:
        return f"{self.pack} has put its own {self.part} into the model"

    @property
    def remedy(self) -> str:
        """What a user can do, in sentences."""
        again = " If its node is gone already, choose 'Unload Models and Execution Cache', or restart ComfyUI."
        return REMOVE + (again if self.left else "")


def transformer_of(model: Any) -> Any:
    """The transformer's module, as it was before torch.compile."""
    if isinstance(model, ModelPatcher):
        model = model.get_model_object(PATH)
    model = getattr(model, PATH, model)
    return getattr(model, "_orig_mod", model)


def class_of(model: Any, path: str = "") -> type:
    """The class of the transformer in the runs of a MODEL, or of the module at `path` below it."""
    name = f"{path}.__class__" if path else "__class__"
    patched = _patched(model, name)
    if isinstance(patched, type):
        return patched
    module = transformer_of(model)
    return type(module.get_submodule(path) if path else module)


def core_name(model: ModelPatcher) -> str:
    """ComfyUI's name for the kind of a MODEL, for messages: SDXL, Chroma, WAN21_T2V. Every model has one."""
    return type(model.model.model_config).__name__


def stranger(model: Any) -> Stranger | None:
    """The code that replaces the transformer's class or forward pass in a MODEL's runs. None: ComfyUI's own runs."""
    kind = class_of(model)
    if pack_of(kind):
        return Stranger(pack_of(kind), f"class of model ({kind.__name__})")
    own = getattr(_patcher(model), "object_patches", {})
    for name, code in passes(model):
        if pack_of(code):
            return Stranger(pack_of(code), "forward pass", left=f"{PATH}.{name}" not in own)
    return None


def passes(model: Any) -> Iterator[tuple[str, Callable]]:
    """Name and code of the methods that run the blocks in the runs of a MODEL."""
    kind, module = class_of(model), transformer_of(model)
    for name in PASSES:
        code = _patched(model, name)
        if not callable(code):  # ComfyUI's mark for an attribute that did not exist
            code = vars(module).get(name, getattr(kind, name, None))
        if code is not None:
            yield name, code


def stranger_in_blocks(base: Any) -> Stranger | None:
    """The code that replaces blocks of a running model."""
    for _, block in live_blocks(base):
        block = getattr(block, "_orig_mod", block)  # compiled
        for code in (type(block), vars(block).get("forward")):
            if code is not None and pack_of(code):
                return Stranger(pack_of(code), f"blocks ({type(block).__name__})", left=False)
    return None


def live_blocks(model: Any) -> Iterator[tuple[Block, Any]]:
    """The live blocks of any transformer by name, ("double", 3): the members of its own module lists."""
    for name, child in transformer_of(model).named_children():
        if isinstance(child, nn.ModuleList):
            for i, block in enumerate(child):
                yield (name.removesuffix("_blocks"), i), block


def pack_of(code: Any) -> str:
    """The pack that a function, a method, a class or a callable object comes from. Empty: ComfyUI, torch, or us."""
    module = module_of(code)
    if any(module == name or module.startswith(f"{name}.") for name in CORE):
        return ""
    folder = re.split(r"[/\\]", module.split(".")[0])[-1]  # ComfyUI imports a pack under the path of its folder
    return folder.replace("_x_", ".")


def module_of(code: Any) -> str:
    """The name of the module that defines a function, a method, a class or a callable object."""
    code = unwrapped(code)
    if isinstance(code, FunctionType):
        return code.__globals__.get("__name__", "")  # functools.wraps copies __module__
    return getattr(code if isinstance(code, type) else type(code), "__module__", "")


def unwrapped(code: Any) -> Any:
    """A function without its binding, partial arguments or compilation."""
    while True:
        if isinstance(code, MethodType):
            code = code.__func__
        elif isinstance(code, partial):
            code = code.func
        elif hasattr(code, "__wrapped__") and _is_torch(code):
            code = code.__wrapped__  # torch.compile, torch.no_grad
        else:
            return code


def _is_torch(code: Any) -> bool:
    return isinstance(code, FunctionType) and code.__globals__.get("__name__", "").startswith("torch.")


def _patcher(model: Any) -> Any:
    """The MODEL whose object patches apply: `model`, or the one that a BaseModel is sampled for."""
    return model if isinstance(model, ModelPatcher) else getattr(model, "current_patcher", None)


def _patched(model: Any, name: str) -> Any:
    """The object patch on a name below a MODEL's transformer, or the original that another MODEL's patch replaced."""
    if not isinstance(model, ModelPatcher):
        return None
    path = f"{PATH}.{name}"
    if path in model.object_patches:
        return model.object_patches[path]
    return model.object_patches_backup.get(path)
