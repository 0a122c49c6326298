"""A plain-torch FLUX.1 transformer for training, with ComfyUI's key and attribute names.

ComfyUI's own blocks write in place, which autograd forbids; this one does not. Same maths: the tests hold the two to
each other on the shipped weights. The trained transformer has `live` latent channels; `export` pads its input and
output to FLUX.1's 16, with zeros.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dit_toolkit.models.tiny_text import ROWS

CHANNELS = 16
THETA = 10000
AXES = (16, 56, 56)


@dataclass(frozen=True)
class Size:
    """Widths of the transformer. Heads are always `hidden / 128`, as FLUX.1 has them."""

    live: int = 8
    hidden: int = 128
    double: int = 2
    single: int = 6
    text_dim: int = 128
    pooled_dim: int = 64
    words: int = ROWS  # of the text encoder's table

    asdict = asdict


def timestep_embedding(t: Tensor, dim: int = 256) -> Tensor:
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device, dtype=torch.float32) / (dim // 2))
    angles = 1000.0 * t.float()[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], -1)


def rope(ids: Tensor) -> Tensor:
    """Position ids `[B, L, 3]` -> rotations `[B, 1, L, 64, 2, 2]`."""
    parts = []
    for axis, dim in enumerate(AXES):
        omega = THETA ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim)
        angle = ids[..., axis, None].double() * omega
        parts.append(torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).unflatten(-1, (2, 2)))
    return torch.cat(parts, -3).float().unsqueeze(1)


def apply_rope(x: Tensor, pe: Tensor) -> Tensor:
    """Rotate pairs of `x`, `[B, H, L, d]`."""
    pairs = x.float().unflatten(-1, (-1, 1, 2))
    return (pe[..., 0] * pairs[..., 0] + pe[..., 1] * pairs[..., 1]).flatten(-2).type_as(x)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`[B, H, L, d]` -> `[B, L, H*d]`."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class RMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x), 1e-6)


class QKNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.query_norm, self.key_norm = RMSNorm(dim), RMSNorm(dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q).to(v), self.key_norm(k).to(v)


class MLPEmbedder(nn.Module):
    def __init__(self, dim_in: int, dim: int):
        super().__init__()
        self.in_layer, self.out_layer = nn.Linear(dim_in, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


@dataclass
class ModulationOut:
    shift: Tensor
    scale: Tensor
    gate: Tensor


class Modulation(nn.Module):
    def __init__(self, dim: int, double: bool):
        super().__init__()
        self.is_double, self.multiplier = double, 6 if double else 3
        self.lin = nn.Linear(dim, self.multiplier * dim)

    def forward(self, vec: Tensor) -> tuple[ModulationOut, ModulationOut | None]:
        out = self.lin(F.silu(vec))[:, None].chunk(self.multiplier, -1)
        return ModulationOut(*out[:3]), ModulationOut(*out[3:]) if self.is_double else None


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.num_heads = heads
        self.qkv, self.norm, self.proj = nn.Linear(dim, 3 * dim), QKNorm(dim // heads), nn.Linear(dim, dim)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.norm(q, k, v)
        return q, k, v


def mlp(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))


def modulate(x: Tensor, mod: ModulationOut) -> Tensor:
    return x * (1 + mod.scale) + mod.shift


ExtraKeys = tuple[Tensor, Tensor]  # keys and values of one block, `[B, H, Lc, d]`, already rotated


def attend(q: Tensor, k: Tensor, v: Tensor, pe: Tensor, extra: ExtraKeys | None) -> Tensor:
    q, k = apply_rope(q, pe), apply_rope(k, pe)
    if extra is not None:
        k, v = torch.cat([k, extra[0]], 2), torch.cat([v, extra[1]], 2)
    return attention(q, k, v)


class DoubleStreamBlock(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.num_heads, self.hidden_size = heads, dim
        for stream in ("img", "txt"):
            setattr(self, f"{stream}_mod", Modulation(dim, True))
            setattr(self, f"{stream}_norm1", nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6))
            setattr(self, f"{stream}_attn", SelfAttention(dim, heads))
            setattr(self, f"{stream}_norm2", nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6))
            setattr(self, f"{stream}_mlp", mlp(dim))

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor, extra=None) -> tuple[Tensor, Tensor]:
        (i1, i2), (t1, t2) = self.img_mod(vec), self.txt_mod(vec)
        iq, ik, iv = self.img_attn.split(modulate(self.img_norm1(img), i1))
        tq, tk, tv = self.txt_attn.split(modulate(self.txt_norm1(txt), t1))
        q, k, v = (torch.cat(pair, 2) for pair in ((tq, iq), (tk, ik), (tv, iv)))
        out = attend(q, k, v, pe, extra)
        txt_out, img_out = out[:, : txt.shape[1]], out[:, txt.shape[1] :]
        img = img + i1.gate * self.img_attn.proj(img_out)
        img = img + i2.gate * self.img_mlp(modulate(self.img_norm2(img), i2))
        txt = txt + t1.gate * self.txt_attn.proj(txt_out)
        txt = txt + t2.gate * self.txt_mlp(modulate(self.txt_norm2(txt), t2))
        return img, txt


class SingleStreamBlock(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.num_heads, self.hidden_size, self.hidden_dim = heads, dim, dim
        self.mlp_hidden_dim = self.mlp_hidden_dim_first = 4 * dim
        self.linear1, self.linear2 = nn.Linear(dim, 7 * dim), nn.Linear(5 * dim, dim)
        self.norm = QKNorm(dim // heads)
        self.pre_norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation = Modulation(dim, False)
        self.mlp_act = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor, vec: Tensor, pe: Tensor, extra=None) -> Tensor:
        mod, _ = self.modulation(vec)
        qkv, hidden = self.linear1(modulate(self.pre_norm(x), mod)).split([3 * x.shape[-1], self.mlp_hidden_dim], -1)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.norm(q, k, v)
        out = attend(q, k, v, pe, extra)
        return x + mod.gate * self.linear2(torch.cat([out, self.mlp_act(hidden)], -1))


class LastLayer(nn.Module):
    def __init__(self, dim: int, out: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, -1)
        return self.linear((1 + scale) * self.norm_final(x) + shift)


def patchify(latent: Tensor) -> Tensor:
    """`[B, C, 2h, 2w]` -> tokens `[B, h*w, C*4]`, channel order (c, row, column) as FLUX.1."""
    b, c, h, w = latent.shape
    return latent.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)


def unpatchify(tokens: Tensor, h: int, w: int) -> Tensor:
    """Tokens `[B, h*w, C*4]` -> `[B, C, 2h, 2w]`."""
    b, _, d = tokens.shape
    return tokens.reshape(b, h, w, d // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, d // 4, 2 * h, 2 * w)


def grid_ids(h: int, w: int, device=None) -> Tensor:
    """Position ids of a token grid, `[1, h*w, 3]`."""
    rows, cols = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, cols], -1).reshape(1, h * w, 3).float()


class Flux(nn.Module):
    def __init__(self, size: Size):
        super().__init__()
        dim, heads = size.hidden, size.hidden // 128
        self.size, self.hidden_size, self.num_heads = size, dim, heads
        self.img_in = nn.Linear(size.live * 4, dim)
        self.time_in, self.guidance_in = MLPEmbedder(256, dim), MLPEmbedder(256, dim)
        self.vector_in = MLPEmbedder(size.pooled_dim, dim)
        self.txt_in = nn.Linear(size.text_dim, dim)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(dim, heads) for _ in range(size.double))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(dim, heads) for _ in range(size.single))
        self.final_layer = LastLayer(dim, size.live * 4)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.zeros_(module.lin.weight)
        for embedder in (self.time_in, self.guidance_in, self.vector_in):
            nn.init.normal_(embedder.in_layer.weight, std=0.02)
            nn.init.normal_(embedder.out_layer.weight, std=0.02)
        for module in (self.final_layer.linear, self.final_layer.adaLN_modulation[1]):
            nn.init.zeros_(module.weight)

    def vec(self, t: Tensor, guidance: Tensor, pooled: Tensor) -> Tensor:
        """Modulation vector `[B, hidden]` at noise level `t` `[B]`."""
        return (
            self.time_in(timestep_embedding(t))
            + self.guidance_in(timestep_embedding(guidance))
            + self.vector_in(pooled)
        )

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        pooled: Tensor,
        guidance: Tensor,
        extra: list[ExtraKeys] | None = None,
    ) -> Tensor:
        """Velocity of `x`, both `[B, live, 2h, 2w]`. `extra`: keys and values per block, double blocks first."""
        h, w = x.shape[-2] // 2, x.shape[-1] // 2
        img, txt = self.img_in(patchify(x)), self.txt_in(context)
        vec = self.vec(t, guidance, pooled)
        ids = torch.cat([torch.zeros(1, txt.shape[1], 3, device=x.device), grid_ids(h, w, x.device)], 1)
        pe = rope(ids)
        extra_of = iter(extra) if extra is not None else iter([None] * (self.size.double + self.size.single))
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, pe, next(extra_of))
        joint = torch.cat([txt, img], 1)
        for block in self.single_blocks:
            joint = block(joint, vec, pe, next(extra_of))
        return unpatchify(self.final_layer(joint[:, txt.shape[1] :], vec), h, w)


def export(weights: dict[str, Tensor], live: int) -> dict[str, Tensor]:
    """Weights with `live` channels -> FLUX.1's layout with 16: zero columns in, zero rows out."""
    padded = dict(weights)
    width = CHANNELS * 4 - live * 4
    padded["img_in.weight"] = F.pad(weights["img_in.weight"], (0, width))
    padded["final_layer.linear.weight"] = F.pad(weights["final_layer.linear.weight"], (0, 0, 0, width))
    padded["final_layer.linear.bias"] = F.pad(weights["final_layer.linear.bias"], (0, width))
    return padded


def trim(weights: dict[str, Tensor], live: int) -> dict[str, Tensor]:
    """The inverse of `export`."""
    cut = dict(weights)
    cut["img_in.weight"] = weights["img_in.weight"][:, : live * 4]
    cut["final_layer.linear.weight"] = weights["final_layer.linear.weight"][: live * 4]
    cut["final_layer.linear.bias"] = weights["final_layer.linear.bias"][: live * 4]
    return cut
