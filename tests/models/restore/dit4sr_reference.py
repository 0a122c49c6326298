"""DiT4SR's transformer written the slow way from its description: token by token, head by head, in the published names.

It takes a flat dict of weights as the published files have them, and shares no line with the pack or with ComfyUI.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = Mapping[str, Tensor]
HEAD = 64  # channels of a head
PATCH = 2


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def layer_norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-6)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight


def rms_by_head(x: Tensor, weight: Tensor) -> Tensor:
    return torch.cat([rms_norm(part, weight) for part in x.split(HEAD, -1)], -1)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Over all heads of `[B, L, D]`; `bias` `[Lq, Lk]` is added to the logits."""
    heads = []
    for i in range(0, q.shape[-1], HEAD):
        part = slice(i, i + HEAD)
        logits = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(HEAD)
        logits = logits if bias is None else logits + bias
        heads.append(torch.softmax(logits, -1) @ v[..., part])
    return torch.cat(heads, -1)


def keys_of_lr(w: Weights, attention: str, variant: str, k_x: Tensor, n_lr: Tensor) -> Tensor:
    """`k_x`: the picture's key, normed already."""
    norm = w[f"{attention}.norm_k.weight"]
    if variant == "v1":
        return rms_by_head(k_x, norm)
    return rms_by_head(linear(w, f"{attention}.to_k_control", linear(w, f"{attention}.to_k", n_lr)), norm)


def attend(w: Weights, attention: str, variant: str, n_x: Tensor, n_lr: Tensor, n_txt: Tensor | None, strength: float):
    """Results for picture and low-resolution stream behind their output projections, and for the text before its."""
    q_norm, k_norm = w[f"{attention}.norm_q.weight"], w[f"{attention}.norm_k.weight"]
    q = [rms_by_head(linear(w, f"{attention}.to_q", n_x), q_norm)]
    k = [rms_by_head(linear(w, f"{attention}.to_k", n_x), k_norm)]
    v = [linear(w, f"{attention}.to_v", n_x)]
    q.append(rms_by_head(linear(w, f"{attention}.to_q_control", linear(w, f"{attention}.to_q", n_lr)), q_norm))
    k.append(keys_of_lr(w, attention, variant, k[0], n_lr))
    v.append(linear(w, f"{attention}.to_v_control", linear(w, f"{attention}.to_v", n_lr)))
    if n_txt is not None:
        q.append(rms_by_head(linear(w, f"{attention}.add_q_proj", n_txt), w[f"{attention}.norm_added_q.weight"]))
        k.append(rms_by_head(linear(w, f"{attention}.add_k_proj", n_txt), w[f"{attention}.norm_added_k.weight"]))
        v.append(linear(w, f"{attention}.add_v_proj", n_txt))
    n, total = n_x.shape[1], sum(x.shape[1] for x in q)
    bias = torch.zeros(total, total)
    bias[:n, n : 2 * n] = bias[2 * n :, n : 2 * n] = math.log(strength)  # how picture and text see the stream
    out = softmax_attention(torch.cat(q, 1), torch.cat(k, 1), torch.cat(v, 1), bias)
    a_x, a_lr, a_txt = out[:, :n], out[:, n : 2 * n], out[:, 2 * n :]
    return linear(w, f"{attention}.to_out.0", a_x), linear(w, f"{attention}.to_out_control", a_lr + n_lr), a_txt


def convolved(w: Weights, name: str, f_lr: Tensor, grid: tuple[int, int]) -> Tensor:
    """Depth-wise 3 x 3 over the grid of tokens, zeros around it, one cell after the other."""
    (rows, columns), kernel, bias = grid, w[f"{name}.weight"][:, 0], w[f"{name}.bias"]
    out = torch.zeros_like(f_lr)
    for r in range(rows):
        for c in range(columns):
            cell = bias.expand(f_lr.shape[0], -1).clone()
            for dr in (-1, 0, 1):
                for dc in (-1, 0, 1):
                    if 0 <= r + dr < rows and 0 <= c + dc < columns:
                        cell = cell + kernel[:, dr + 1, dc + 1] * f_lr[:, (r + dr) * columns + c + dc]
            out[:, r * columns + c] = cell
    return out


def block(
    w: Weights, name: str, variant: str, x: Tensor, lr: Tensor, txt: Tensor, vec: Tensor, grid: tuple[int, int],
    scale: float = 1.2, strength: float = 1.0,
):  # fmt: skip
    """The three streams behind one block, the text None behind the last. `name`: "transformer_blocks.3"."""
    active = F.silu(vec)[:, None]
    modulation = linear(w, f"{name}.norm1.linear", active)
    width = x.shape[-1]
    shift, gain, gate, shift_mlp, gain_mlp, gate_mlp, *second = modulation.split(width, -1)
    n_x, n_lr = (layer_norm(s) * (1 + gain) + shift for s in (x, lr))

    txt_modulation = linear(w, f"{name}.norm1_context.linear", active).split(width, -1)
    last = len(txt_modulation) == 2
    txt_gain, txt_shift = txt_modulation if last else (txt_modulation[1], txt_modulation[0])
    n_txt = layer_norm(txt) * (1 + txt_gain) + txt_shift

    y_x, y_lr, a_txt = attend(w, f"{name}.attn", variant, n_x, n_lr, n_txt, strength)
    after_x, after_lr = x + gate * y_x, lr + gate * y_lr
    if second:
        shift2, gain2, gate2 = second
        m_x, m_lr = (layer_norm(s) * (1 + gain2) + shift2 for s in (x, lr))
        y_x, y_lr, _ = attend(w, f"{name}.attn2", variant, m_x, m_lr, None, strength)
        after_x, after_lr = after_x + gate2 * y_x, after_lr + gate2 * y_lr

    f_x, f_lr = (
        F.gelu(linear(w, f"{name}.ff.net.0.proj", layer_norm(s) * (1 + gain_mlp) + shift_mlp), approximate="tanh")
        for s in (after_x, after_lr)
    )
    f_x = f_x + strength * scale * convolved(w, f"{name}.ff.control_conv", f_lr, grid)
    after_x = after_x + gate_mlp * linear(w, f"{name}.ff.net.2", f_x)
    after_lr = after_lr + gate_mlp * linear(w, f"{name}.ff.net.2", f_lr)
    if last:
        return after_x, after_lr, None

    _, _, txt_gate, txt_shift_mlp, txt_gain_mlp, txt_gate_mlp = txt_modulation
    txt = txt + txt_gate * linear(w, f"{name}.attn.to_add_out", a_txt)
    inner = linear(w, f"{name}.ff_context.net.0.proj", layer_norm(txt) * (1 + txt_gain_mlp) + txt_shift_mlp)
    txt = txt + txt_gate_mlp * linear(w, f"{name}.ff_context.net.2", F.gelu(inner, approximate="tanh"))
    return after_x, after_lr, txt


def embedded(w: Weights, x: Tensor) -> Tensor:
    """`[B, C, h, w]` to tokens `[B, N, D]`, row by row, with the middle of the table of positions."""
    kernel, bias = w["pos_embed.proj.weight"], w["pos_embed.proj.bias"]
    table = w["pos_embed.pos_embed"][0]
    side = math.isqrt(table.shape[0])
    rows, columns = x.shape[-2] // PATCH, x.shape[-1] // PATCH
    top, left = (side - rows) // 2, (side - columns) // 2
    tokens = []
    for r in range(rows):
        for c in range(columns):
            patch = x[:, :, PATCH * r : PATCH * (r + 1), PATCH * c : PATCH * (c + 1)]
            tokens.append(patch.flatten(1) @ kernel.flatten(1).T + bias + table[(top + r) * side + left + c])
    return torch.stack(tokens, 1)


def conditioning(w: Weights, timestep: Tensor, pooled: Tensor) -> Tensor:
    """Noise level, 0 to 1000, and pooled text, as one vector."""
    angles = timestep[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    vec = torch.cat([angles.cos(), angles.sin()], 1)
    embedder = "time_text_embed.{}_embedder.linear_{}".format
    time = linear(w, embedder("timestep", 2), F.silu(linear(w, embedder("timestep", 1), vec)))
    return time + linear(w, embedder("text", 2), F.silu(linear(w, embedder("text", 1), pooled)))


def transformer(
    w: Weights, variant: str, x: Tensor, lr: Tensor, timestep: Tensor, text: Tensor, pooled: Tensor,
    scale: float = 1.2, strength: float = 1.0,
) -> Tensor:  # fmt: skip
    """The velocity `[B, C, h, w]`. `lr`: the low-resolution latent in the model's scale, like `x`."""
    height, width = x.shape[-2:]
    grid = height // PATCH, width // PATCH
    vec, txt = conditioning(w, timestep, pooled), linear(w, "context_embedder", text)
    img, low = embedded(w, x), embedded(w, lr)
    blocks = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("transformer_blocks."))
    for i in range(blocks):
        img, low, txt = block(w, f"transformer_blocks.{i}", variant, img, low, txt, vec, grid, scale, strength)
    gain, shift = linear(w, "norm_out.linear", F.silu(vec)[:, None]).chunk(2, -1)
    tokens = linear(w, "proj_out", layer_norm(img) * (1 + gain) + shift)
    out = torch.empty(x.shape[0], tokens.shape[-1] // PATCH**2, height, width)
    for number in range(tokens.shape[1]):
        r, c = divmod(number, grid[1])
        patch = tokens[:, number].view(-1, PATCH, PATCH, out.shape[1]).movedim(-1, 1)
        out[:, :, PATCH * r : PATCH * (r + 1), PATCH * c : PATCH * (c + 1)] = patch
    return out


def random_weights(
    blocks: int = 3, dual: tuple[int, ...] = (0, 1), text: int = 32, pooled: int = 24, side: int = 16, seed: int = 0,
    unused: bool = True,
) -> dict[str, Tensor]:  # fmt: skip
    """A whole published file with random weights: norms near 1, all others of the order that keeps scales."""
    generator = torch.Generator().manual_seed(seed)
    dim = HEAD * blocks
    w: dict[str, Tensor] = {}

    def add(name: str, out: int, width: int) -> None:
        w[f"{name}.weight"] = torch.randn(out, width, generator=generator) * 0.8 / width**0.5
        w[f"{name}.bias"] = torch.randn(out, generator=generator) * 0.1

    def norm(name: str) -> None:
        w[f"{name}.weight"] = 1 + 0.1 * torch.randn(HEAD, generator=generator)

    for i in range(blocks):
        name, last = f"transformer_blocks.{i}", i == blocks - 1
        add(f"{name}.norm1.linear", dim * (9 if i in dual else 6), dim)
        add(f"{name}.norm1_context.linear", dim * (2 if last else 6), dim)
        for attention in ("attn", "attn2") if i in dual else ("attn",):
            base = f"{name}.{attention}"
            for part in ("to_q", "to_k", "to_v", "to_out.0", *(f"to_{p}_control" for p in ("q", "k", "v", "out"))):
                add(f"{base}.{part}", dim, dim)
            norm(f"{base}.norm_q")
            norm(f"{base}.norm_k")
            if attention == "attn" or unused:
                for part in ("add_q_proj", "add_k_proj", "add_v_proj"):
                    add(f"{base}.{part}", dim, dim)
                norm(f"{base}.norm_added_q")
                norm(f"{base}.norm_added_k")
                if not last:
                    add(f"{base}.to_add_out", dim, dim)
        add(f"{name}.ff.net.0.proj", 4 * dim, dim)
        add(f"{name}.ff.net.2", dim, 4 * dim)
        w[f"{name}.ff.control_conv.weight"] = torch.randn(4 * dim, 1, 3, 3, generator=generator) * 0.3
        w[f"{name}.ff.control_conv.bias"] = torch.randn(4 * dim, generator=generator) * 0.1
        if not last:
            add(f"{name}.ff_context.net.0.proj", 4 * dim, dim)
            add(f"{name}.ff_context.net.2", dim, 4 * dim)
    w["pos_embed.proj.weight"] = torch.randn(dim, 16, PATCH, PATCH, generator=generator) * 0.12
    w["pos_embed.proj.bias"] = torch.randn(dim, generator=generator) * 0.1
    w["pos_embed.pos_embed"] = torch.randn(1, side * side, dim, generator=generator)
    add("time_text_embed.timestep_embedder.linear_1", dim, 256)
    add("time_text_embed.timestep_embedder.linear_2", dim, dim)
    add("time_text_embed.text_embedder.linear_1", dim, pooled)
    add("time_text_embed.text_embedder.linear_2", dim, dim)
    add("context_embedder", dim, text)
    add("norm_out.linear", 2 * dim, dim)
    add("proj_out", 16 * PATCH**2, dim)
    return w


def as_v1(w: Weights) -> dict[str, Tensor]:
    """The same file as training of v1 leaves it: the projection of keys stays where it began."""
    return {name: torch.zeros_like(weight) if ".to_k_control." in name else weight for name, weight in w.items()}
