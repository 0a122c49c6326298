"""DiT4SR: the settings that hang on the MODEL."""

from __future__ import annotations

import math
from dataclasses import dataclass
from uuid import UUID

from torch import Tensor

from ...models.restore.dit4sr import CROSS_STREAM_SCALE
from ..families.family import require_latent
from ..part_of_run import WHOLE_RUN, PartOfRun

NODE = "Apply DiT4SR"


@dataclass(frozen=True, eq=False)
class DiT4SR:
    """The low-resolution stream on one MODEL. Neutral values: `strength` 0 is off, `strength` 1 is as published.

    adapter: uuid that all clones of the control weights have, on every device. name: the file's, for messages.
    latent: the enlarged low-resolution picture as a VAE gives it, `[N, C, h, w]`; N is 1, or one per picture.
    strength: how much of the stream reaches picture and text, see `models/restore/dit4sr.py`.
    part: of the run that the stream runs in. Tiles are cut in all of it.
    tile, overlap: of windows, in cells of the latent; `tile` 0 cuts none. tile_batch: windows side by side in a call.
    """

    adapter: UUID | None
    name: str
    latent: Tensor
    strength: float = 1.0
    cross_stream_scale: float = CROSS_STREAM_SCALE
    part: PartOfRun = WHOLE_RUN
    tile: int = 64
    overlap: int = 24
    tile_batch: int = 1

    def __post_init__(self):
        check_numbers(self.strength, self.cross_stream_scale)
        check_tiles(self.tile, self.overlap)
        if self.tile_batch < 1:
            raise ValueError(f"tile_batch must be at least 1, got {self.tile_batch}.")
        if self.latent.ndim != 4:
            raise ValueError(f"The picture's latent must be [N, C, h, w], got {list(self.latent.shape)}. Use its VAE.")
        require_latent(self.latent, f"{NODE}: the encoded picture")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the latent."""
        return self.latent.shape[-2], self.latent.shape[-1]


def check_numbers(strength: float, cross_stream_scale: float) -> None:
    if not 0 <= strength <= 1:  # NaN too
        raise ValueError(f"strength must be between 0 and 1, got {strength}.")
    if not math.isfinite(cross_stream_scale):
        raise ValueError(f"cross_stream_scale must be a finite number, got {cross_stream_scale}.")


def check_tiles(tile: int, overlap: int) -> None:
    """Windows begin and end at whole tokens, of 2 x 2 cells, and each lies ahead of the one before."""
    for title, value in (("tile", tile), ("overlap", overlap)):
        if value < 0 or value % 2:
            raise ValueError(f"{title} must be an even number of cells of the latent, 0 or more, got {value}.")
    if tile and overlap >= tile:
        raise ValueError(f"overlap ({overlap}) must be smaller than tile ({tile}).")
