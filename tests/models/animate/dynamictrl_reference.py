"""DynamiCtrl's transformer written the slow way from its description, in the published names.

It takes a flat dict of weights as the published files have them, and shares no line with the pack or with ComfyUI.
Rotary positions of 1.5 are those of the published model: whole numbers along time, height and width. Those of 1.0 are
handed over, because ComfyUI's differ from the published ones there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = Mapping[str, Tensor]
HEAD, LATENT = 64, 16
TEXT_ROOM = 226  # places of the text in the table of positions


def random_weights(
    version: str = "1.5",
    *,
    blocks: int = 3,
    heads: int = 2,
    time: int = 32,
    text: int = 48,
    table: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """A whole published file of a small model."""
    dim, whole = HEAD * heads, version == "1.5"
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (dim, 256) if whole else (dim, 32, 2, 2),
        "patch_embed.proj.bias": (dim,),
        **linear_shapes("patch_embed.text_proj", text, dim),
        **linear_shapes("time_embedding.linear_1", dim, time),
        **linear_shapes("time_embedding.linear_2", time, time),
    }
    if table:
        shapes["patch_embed.pos_embedding"] = (1, TEXT_ROOM + 13 * 30 * 45, dim)
    if whole:
        shapes |= linear_shapes("ofs_embedding.linear_1", time, time) | linear_shapes(
            "ofs_embedding.linear_2", time, time
        )
    for i in range(blocks):
        block = f"transformer_blocks.{i}"
        for norm, parts in (("norm1", 6), ("control_norm1", 3), ("norm2", 6)):
            shapes |= linear_shapes(f"{block}.{norm}.linear", time, parts * dim)
            shapes |= vectors(f"{block}.{norm}.norm", dim)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes |= linear_shapes(f"{block}.attn1.{part}", dim, dim)
        shapes |= vectors(f"{block}.attn1.norm_q", HEAD) | vectors(f"{block}.attn1.norm_k", HEAD)
        shapes |= linear_shapes(f"{block}.ff.net.0.proj", dim, 4 * dim)
        shapes |= linear_shapes(f"{block}.ff.net.2", 4 * dim, dim)
    shapes |= vectors("norm_final", dim) | linear_shapes("norm_out.linear", time, 2 * dim)
    shapes |= vectors("norm_out.norm", dim) | linear_shapes("proj_out", dim, LATENT * (8 if whole else 4))

    if device == "meta":
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    generator = torch.Generator().manual_seed(seed)
    return {name: weight(name, shape, generator) for name, shape in shapes.items()}


def weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 1 + 0.1 * noise if name.endswith(".weight") else 0.1 * noise
    if name.endswith("pos_embedding"):
        return 0.5 * noise
    return noise / math.prod(shape[1:]) ** 0.5


def linear_shapes(name: str, into: int, out: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def vectors(name: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def layer_norm(w: Weights, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    normed = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + eps)
    return normed * w[f"{name}.weight"] + w[f"{name}.bias"]


def modulated(w: Weights, name: str, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return layer_norm(w, f"{name}.norm", x) * (1 + scale[:, None]) + shift[:, None]


def sinusoid(value: Tensor, size: int) -> Tensor:
    half = size // 2  # rounded as everybody rounds it: at timestep 999 the last digit of a frequency shows
    frequencies = torch.exp(-math.log(10000) * torch.arange(half) / half)
    angles = value[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


def embedding(w: Weights, dim: int, timestep: Tensor, ofs: float) -> Tensor:
    """e, `[B, E]`."""

    def mlp(name: str, x: Tensor) -> Tensor:
        return linear(w, f"{name}.linear_2", F.silu(linear(w, f"{name}.linear_1", x)))

    e = mlp("time_embedding", sinusoid(timestep, dim))
    if "ofs_embedding.linear_1.weight" in w:
        size = w["ofs_embedding.linear_1.weight"].shape[1]
        e = e + mlp("ofs_embedding", sinusoid(torch.full_like(timestep, ofs), size))
    return e


def patches(w: Weights, video: Tensor) -> Tensor:
    """A video `[B, C, T, h, w]` as tokens, token by token, with their positions where the model has a table."""
    b, _, frames, height, width = video.shape
    whole = w["patch_embed.proj.weight"].ndim == 2
    found = []
    for t in range(0, frames, 2 if whole else 1):
        for y in range(0, height, 2):
            for x in range(0, width, 2):
                if whole:  # channels first, then frame, row and column
                    cell = video[:, :, t : t + 2, y : y + 2, x : x + 2].reshape(b, -1)
                    found.append(linear(w, "patch_embed.proj", cell))
                else:
                    cell = video[:, :, t, y : y + 2, x : x + 2].reshape(b, -1)
                    found.append(cell @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"])
    tokens = torch.stack(found, 1)
    table = w.get("patch_embed.pos_embedding")
    return tokens if table is None else tokens + table[:, TEXT_ROOM : TEXT_ROOM + tokens.shape[1]]


def whole_positions(frames: int, height: int, width: int) -> Tensor:
    """The angles of 1.5, `[N, HEAD / 2]`: a quarter for time, three eighths each for rows and columns."""

    def angles(at: int, size: int) -> Tensor:
        return torch.tensor([at / 10000 ** (2 * i / size) for i in range(size // 2)])

    sizes = HEAD // 4, HEAD // 8 * 3, HEAD // 8 * 3
    return torch.stack(
        [
            torch.cat([angles(at, size) for at, size in zip((t, y, x), sizes, strict=True)])
            for t in range(frames)
            for y in range(height)
            for x in range(width)
        ]
    )


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """`[B, N, HEAD]`: each pair of neighbours turned by its angle."""
    turned = torch.polar(torch.ones_like(angles), angles)
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * turned).flatten(-2)


def attention(w: Weights, name: str, x: Tensor, text: int, angles: Tensor | None) -> Tensor:
    q, k, v = (linear(w, f"{name}.{part}", x) for part in ("to_q", "to_k", "to_v"))
    heads = []
    for i in range(0, x.shape[-1], HEAD):
        part = slice(i, i + HEAD)
        queries = layer_norm(w, f"{name}.norm_q", q[..., part], 1e-6)
        keys = layer_norm(w, f"{name}.norm_k", k[..., part], 1e-6)
        if angles is not None:
            queries = torch.cat([queries[:, :text], rotated(queries[:, text:], angles)], 1)
            keys = torch.cat([keys[:, :text], rotated(keys[:, text:], angles)], 1)
        heads.append(torch.softmax(queries @ keys.mT / HEAD**0.5, -1) @ v[..., part])
    return linear(w, f"{name}.to_out.0", torch.cat(heads, -1))


def block(w: Weights, i: int, x: Tensor, txt: Tensor, c: Tensor | None, e: Tensor, angles: Tensor | None, s: float):
    """One block of `[B, N, D]` video, text and pose stream."""
    name, text = f"transformer_blocks.{i}", txt.shape[1]
    shift, scale, gate, *of_text = linear(w, f"{name}.norm1.linear", F.silu(e)).chunk(6, -1)
    n_x = modulated(w, f"{name}.norm1", x, shift, scale)
    n_txt = modulated(w, f"{name}.norm1", txt, *of_text[:2])
    if c is not None:
        pose_shift, pose_scale, pose_gate = linear(w, f"{name}.control_norm1.linear", F.silu(e)).chunk(3, -1)
        n = modulated(w, f"{name}.control_norm1", c, pose_shift, pose_scale)
        n_x = n_x + s * n
        c = n + pose_gate[:, None] * n
    out = attention(w, f"{name}.attn1", torch.cat([n_txt, n_x], 1), text, angles)
    x, txt = x + gate[:, None] * out[:, text:], txt + of_text[2][:, None] * out[:, :text]
    shift, scale, gate, *of_text = linear(w, f"{name}.norm2.linear", F.silu(e)).chunk(6, -1)
    inner = torch.cat(
        [modulated(w, f"{name}.norm2", txt, *of_text[:2]), modulated(w, f"{name}.norm2", x, shift, scale)], 1
    )
    out = linear(w, f"{name}.ff.net.2", F.gelu(linear(w, f"{name}.ff.net.0.proj", inner), approximate="tanh"))
    return x + gate[:, None] * out[:, text:], txt + of_text[2][:, None] * out[:, :text], c


def forward(
    w: Weights,
    video: Tensor,
    text: Tensor,
    timestep: Tensor,
    pose: Tensor | None = None,
    *,
    strength: float = 1.0,
    ofs: float = 2.0,
    angles: Tensor | None = None,
) -> Tensor:
    """The prediction, `[B, 16, T, h, w]`.

    Args:
        video: noise and picture, `[B, 32, T, h, w]`. pose: `[B, 16, T, h, w]`, in the model's scale.
        angles: of the rotary positions, `[N, HEAD / 2]`; None: the whole numbers of 1.5, or none with a table.
    """
    whole = w["patch_embed.proj.weight"].ndim == 2
    frames, height, width = video.shape[2] // (2 if whole else 1), video.shape[3] // 2, video.shape[4] // 2
    x, txt = patches(w, video), linear(w, "patch_embed.text_proj", text)
    c = None if pose is None else patches(w, torch.cat([pose, pose], 1))
    e = embedding(w, x.shape[-1], timestep, ofs)
    if angles is None and "patch_embed.pos_embedding" not in w:
        angles = whole_positions(frames, height, width)
    blocks = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("transformer_blocks."))
    for i in range(blocks):
        x, txt, c = block(w, i, x, txt, c, e, angles, strength)
    x = layer_norm(w, "norm_final", x)
    shift, scale = linear(w, "norm_out.linear", F.silu(e)).chunk(2, -1)
    x = linear(w, "proj_out", modulated(w, "norm_out", x, shift, scale))
    if whole:
        cells = x.view(len(x), frames, height, width, LATENT, 2, 2, 2)  # last: frame, row, column of a token
        return cells.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(len(x), LATENT, 2 * frames, 2 * height, 2 * width)
    cells = x.view(len(x), frames, height, width, LATENT, 2, 2)
    return cells.permute(0, 4, 1, 2, 5, 3, 6).reshape(len(x), LATENT, frames, 2 * height, 2 * width)
