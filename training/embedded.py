"""The embedded default as plain torch modules: read from `weights/`, trained further, and sampled without ComfyUI."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dit_toolkit.models.tiny_text import PAD, TinyTextEncoder
from dit_toolkit.models.tiny_vae import TinyVAE

from . import checkpoints
from .flux import Flux, Size, trim

WIDTHS = (96, 48, 32)  # of the decoder


class Base(nn.Module):
    """Transformer and text encoder, trained together."""

    def __init__(self, size: Size):
        super().__init__()
        self.flux = Flux(size)
        self.text = TinyTextEncoder(size.text_dim, size.pooled_dim, rows=size.words, operations=nn)
        for name in ("words", "places"):
            nn.init.normal_(getattr(self.text, name).weight, std=0.3)

    def forward(self, x: Tensor, t: Tensor, ids: Tensor, guidance: Tensor, extra=None) -> Tensor:
        return self.flux(x, t, *self.text(ids), guidance, extra)


def load_shipped() -> tuple[Base, TinyVAE]:
    """The weights in `weights/`, as plain torch modules in float32."""
    vae_weights = load_file(checkpoints.WEIGHTS / "tiny_vae.safetensors")
    live = vae_weights["patch_in.weight"].shape[0]
    vae = TinyVAE(live, WIDTHS, operations=nn)
    vae.load_state_dict({k: v.float() for k, v in vae_weights.items()})
    model = Base(Size(live=live))
    flux = {k: v.float() for k, v in load_file(checkpoints.WEIGHTS / "tiny_flux.safetensors").items()}
    model.flux.load_state_dict(trim(flux, live))
    text = load_file(checkpoints.WEIGHTS / "tiny_text_encoder.safetensors")
    model.text.load_state_dict({k: v.float() for k, v in text.items()})
    return model.requires_grad_(False).eval(), vae.requires_grad_(False).eval()


@torch.no_grad()
def sample(
    model: Base, ids: Tensor, shape: tuple[int, int], seed: int, steps: int = 20, guidance: float = 3.5,
    cfg: float = 1.0, extra=None,
) -> Tensor:  # fmt: skip
    """Euler sampling on ComfyUI's `simple` schedule with Flux's shift 1.15. Live latents `[B, live, h, w]`."""
    b, live = ids.shape[0], model.flux.size.live
    x = torch.randn((b, live, *shape), generator=torch.Generator().manual_seed(seed))
    shift = math.exp(1.15)
    t = 1 - torch.arange(steps + 1) / steps
    sigmas = torch.where(t > 0, shift / (shift + (1 / t.clamp(min=1e-9) - 1)), torch.zeros(()))
    strength = torch.full((b,), guidance)
    for now, then in pairwise(sigmas):
        level = now.expand(b)
        v = model(x, level, ids, strength, extra)
        if cfg != 1.0:
            empty = model(x, level, torch.full_like(ids, PAD), strength, extra)
            v = empty + cfg * (v - empty)
        x = x + (then - now) * v
    return x
