"""DynamiCtrl: the movement of a pose video, through an adaptive layer norm in every block of CogVideoX.

Source: DynamiCtrl, arXiv:2503.21246. What the paper leaves open follows the authors' published code. The base is
CogVideoX image-to-video. The pose video P passes the same VAE and the same patch embedding as the picture, and its
tokens c run beside the video's. In block i, with e the embedding of the timestep:

    shift, scale, gate = Linear_i(SiLU(e))                                 in this order
    n_i = LN_i(c_i) (1 + scale) + shift
    video part of norm1_i  <-  video part of norm1_i + s n_i
    c_i+1 = n_i + gate n_i

Attention, MLP and the text are the base model's. c depends on P and e only, never on the video, so guidance branches
of one pose share it.

Strength s is ours, 1 as published and 0 the base model. It scales what is added, not c itself.

Shapes: B batch, N tokens of the video, D hidden size, E size of e.
Precision: everything in the dtype of the tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-5  # of the layer norm


class PoseNorm(nn.Module):
    """The pose-adaptive layer norm of one block: what DynamiCtrl adds to it."""

    def __init__(self, dim: int, time_dim: int, *, operations: Any, **where: Any):
        super().__init__()
        self.linear = operations.Linear(time_dim, 3 * dim, **where)
        self.norm = operations.LayerNorm(dim, eps=EPS, **where)

    def forward(self, c: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """What block i adds, and the stream of the next block. Nothing is written in place.

        Args:
            c: the pose stream, `[B, N, D]`, or `[1, N, D]` where all of the batch has one pose.
            e: embedding of the timestep, `[B, E]`.

        Returns:
            `n` and the next `c`, each `[B, N, D]`.
        """
        shift, scale, gate = (part[:, None] for part in self.linear(F.silu(e)).chunk(3, dim=1))  # each [B, 1, D]
        n = torch.addcmul(shift, self.norm(c), 1 + scale)
        return n, torch.addcmul(n, gate, n)


class PoseBlock(nn.Module):
    """A block of the file, under the published name of its one part."""

    def __init__(self, dim: int, time_dim: int, **layers: Any):
        super().__init__()
        self.control_norm1 = PoseNorm(dim, time_dim, **layers)


class PoseNorms(nn.Module):
    """All that DynamiCtrl adds to a model: `blocks.{i}.control_norm1.{linear,norm}.{weight,bias}`.

    Args:
        dim: hidden size D of the model.
        time_dim: size E of the embedding of its timestep.
        blocks: how many it has.
        operations: layer classes, ComfyUI's or `torch.nn`.
    """

    def __init__(
        self,
        dim: int,
        time_dim: int,
        blocks: int,
        *,
        operations: Any,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        layers = {"operations": operations, "device": device, "dtype": dtype}
        self.blocks = nn.ModuleList(PoseBlock(dim, time_dim, **layers) for _ in range(blocks))

    def run(self, i: int, c: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """Block `i`, see `PoseNorm.forward`."""
        return self.blocks[i].control_norm1(c, e)  # type: ignore[union-attr]


# -------------------------------------------------------------------------------------------------- frames and sizes

PAIR = 8  # frames of a pair of latent frames: the VAE makes one of 4, and patches of CogVideoX 1.5 take two
FIRST = 5  # frames of the first pair: the VAE makes one latent frame of the first alone
SIDE = 16  # pixels along a side of a token
VAE_FRAMES = 4


def nearest_length(frames: int) -> int:
    """The nearest number of frames `8 k + 5`, whose latent frames are even; the longer one of two."""
    return FIRST + PAIR * max((frames - FIRST + PAIR // 2) // PAIR, 0)


def nearest_side(pixels: int) -> int:
    """The nearest multiple of 16 pixels, the larger one of two."""
    return max((pixels + SIDE // 2) // SIDE, 1) * SIDE


def latent_frames(frames: int) -> int:
    """Latent frames of a video of `4 k + 1` frames."""
    return (frames - 1) // VAE_FRAMES + 1


def latent_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """A mask of every frame as one of the latent frames: 1 where any pixel of any frame of a cell is.

    Args:
        mask: `[F, H, W]` in 0..1, `F = 4 k + 1`.
        size: height and width of the latent.

    Returns:
        `[1, 1, T, h, w]`.
    """
    cells = F.adaptive_max_pool2d(mask[:, None], size)[:, 0]  # [F, h, w]
    first, rest = cells[:1], cells[1:]
    rest = rest.unflatten(0, (-1, VAE_FRAMES)).amax(1) if len(rest) else rest
    return torch.cat([first, rest])[None, None]
