"""Image autoencoder of the embedded default: closed-form encoder, small convolutional decoder.

The encoder is a principal component analysis of 8 x 8 pixel patches: one strided convolution to the `live` strongest
components, each divided by a power of its standard deviation so that weak components keep a voice. The remaining of
the 16 latent channels are zero. The decoder is the transposed convolution plus a learned residual. Encoder and
decoder are convolutions only, so any size divisible by 8 works.

Latents leave `encode` and enter `decode` in the scale of the base model's autoencoder, `latent = z / scale + shift`, so
that ComfyUI's latent format for that model recovers `z` (about unit variance in the live channels).

Shapes: pictures `[B, 3, H, W]` in -1..1, latents `[B, 16, H/8, W/8]`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS = 16  # of FLUX.1's latents, and of SD3's
SCALES = {"FLUX.1": (0.3611, 0.1159), "SD3": (1.5305, 0.0609)}  # scale, shift: z = (latent - shift) * scale
PATCH = 8


class _Residual(nn.Module):
    def __init__(self, width: int, *, operations, **where):
        super().__init__()
        self.conv1 = operations.Conv2d(width, width, 3, padding=1, **where)
        self.conv2 = operations.Conv2d(width, width, 3, padding=1, **where)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class Decoder(nn.Module):
    """`[B, live, h, w]` -> residual `[B, 3, 8h, 8w]`, added to the linear reconstruction."""

    def __init__(self, live: int, widths: tuple[int, int, int] = (96, 48, 32), *, operations, device=None, dtype=None):
        super().__init__()
        where = {"device": device, "dtype": dtype}
        a, b, c = widths
        self.conv_in = operations.Conv2d(live, a, 3, padding=1, **where)
        self.blocks8 = nn.ModuleList(_Residual(a, operations=operations, **where) for _ in range(2))
        self.up4 = operations.Conv2d(a, 4 * b, 1, **where)
        self.block4 = _Residual(b, operations=operations, **where)
        self.up2 = operations.Conv2d(b, 4 * c, 1, **where)
        self.block2 = _Residual(c, operations=operations, **where)
        self.conv_out = operations.Conv2d(c, 12, 3, padding=1, **where)

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)
        for block in self.blocks8:
            h = block(h)
        h = self.block4(F.pixel_shuffle(self.up4(h), 2))
        h = self.block2(F.pixel_shuffle(self.up2(h), 2))
        return F.pixel_shuffle(self.conv_out(F.silu(h)), 2)


class TinyVAE(nn.Module):
    """Encoder and decoder.

    Args:
        live: channels that carry the picture.
        widths: of the decoder.
        base: whose latents it makes, a key of `SCALES`.
        operations: ComfyUI's layers, or `torch.nn`.
    """

    def __init__(
        self,
        live: int,
        widths: tuple[int, int, int] = (96, 48, 32),
        base: str = "FLUX.1",
        *,
        operations,
        device=None,
        dtype=None,
    ):
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.live = live
        self.scale, self.shift = SCALES[base]
        self.patch_in = operations.Conv2d(3, live, PATCH, stride=PATCH, **where)
        self.patch_out = operations.Conv2d(live, 3 * PATCH * PATCH, 1, **where)
        self.decoder = Decoder(live, widths, operations=operations, **where)

    def linear(self, z: Tensor) -> Tensor:
        """Reconstruction from the components alone, `[B, live, h, w]` -> `[B, 3, 8h, 8w]`."""
        return F.pixel_shuffle(self.patch_out(z), PATCH)

    def decode_live(self, z: Tensor) -> Tensor:
        """`[B, live, h, w]` of unit variance -> pictures in -1..1, unclamped."""
        return self.linear(z) + self.decoder(z)

    def encode(self, pictures: Tensor) -> Tensor:
        z = self.patch_in(pictures)
        z = F.pad(z, (0, 0, 0, 0, 0, CHANNELS - self.live))
        return z / self.scale + self.shift

    def decode(self, latents: Tensor) -> Tensor:
        return self.decode_live((latents[:, : self.live] - self.shift) * self.scale)


@torch.no_grad()
def fit_components(patches: Tensor, live: int, power: float = 0.3) -> dict[str, Tensor]:
    """Weights of `patch_in` and `patch_out` from sample patches.

    Args:
        patches: `[N, 3, 8, 8]` in -1..1.
        live: components to keep.
        power: variance of component i after scaling is proportional to its eigenvalue to this power; 0 is whitening.

    Returns:
        `patch_in.weight/bias`, `patch_out.weight/bias` and `eigenvalues` `[192]`, strongest first. The mean variance
        of the live channels over `patches` is 1.
    """
    flat = patches.flatten(1).double()
    mean = flat.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(flat.T))
    values, vectors = values.flip(0), vectors.flip(1)
    basis, kept = vectors[:, :live], values[:live]
    scale = kept ** ((power - 1) / 2)
    scale = scale / ((scale**2 * kept).mean().sqrt())
    forward = (basis * scale).T  # [live, 192]
    back = basis / scale  # [192, live]
    return {
        "patch_in.weight": forward.reshape(live, 3, PATCH, PATCH).float(),
        "patch_in.bias": (-forward @ mean).float(),
        "patch_out.weight": back.reshape(3 * PATCH * PATCH, live, 1, 1).float(),
        "patch_out.bias": mean.float(),
        "eigenvalues": values.float(),
    }
