"""SD3 and SD3.5.

Tokens: text, picture; some blocks have a second attention over the picture alone. Values reach attention by head,
`[B, L, H, d]`, queries and keys flat. Blocks: img, txt; they make new tensors, and after the last one txt is None.
Attention does not know its block. Between blocks: ControlNet.
"""

from __future__ import annotations

from typing import Any

from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
from torch import Tensor

from ...models.accelerate.sparse_attention import Grid
from .family import Family, Grids, cells, double_blocks


def grids(transformer: Any, x: Tensor, text: int, conds: dict) -> Grids:
    """Joint attention, and that of the picture alone. Unknown if another network reads the text first."""
    if transformer.context_processor is not None:
        return ()
    picture = cells(x.shape[-2:], transformer.x_embedder.patch_size)
    return (Grid(*picture, before=text + transformer.register_length), Grid(*picture))


SD3 = Family(
    "SD3",
    (OpenAISignatureMMDITWrapper,),
    listed="SD3.5",
    grids=grids,
    kinds=double_blocks("joint_blocks", "img", "txt"),
    numbered=False,
)
