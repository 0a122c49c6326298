"""FLUX.1 with condition images by definition: diffusers' modules, driven by hand with one sequence under a mask.

Text, picture and conditions have separate projections here, and diffusers' own packing, positions and embeddings.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from dit_toolkit.tests.host.tiny import DOUBLE, POOLED, SINGLE, TEXT, WIDE


def random_transformer(diffusers):
    """diffusers' FLUX.1, of the width `WIDE`: two heads."""
    model = diffusers.FluxTransformer2DModel(
        num_layers=DOUBLE,
        num_single_layers=SINGLE,
        num_attention_heads=WIDE // 128,
        joint_attention_dim=TEXT,
        pooled_projection_dim=POOLED,
        guidance_embeds=True,
    ).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        is_norm = ".norm_" in name and "attn" in name
        weight.data = 1 + 0.1 * noise if is_norm else noise * 0.7 / weight.shape[-1] ** 0.5
    return model


def pack(x):
    """diffusers' `_pack_latents`."""
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)


def unpack(tokens, h, w):
    return tokens.view(1, h // 2, w // 2, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(1, 16, h, w)


def grid(h, w, row_step=1.0, column_step=1.0, offset=0.0):
    return torch.tensor([[0.0, i * row_step + offset, j * column_step] for i in range(h // 2) for j in range(w // 2)])


class Image:
    """A condition image: its latent in the model's scale, and its place. Plain tokens."""

    def __init__(self, x, ids):
        self.x, self.ids = x, ids

    def modules(self, model):
        """The transformer whose image stream its tokens go through."""
        return model

    def lora(self, block, part, x):
        """What is added to q, k, v, and to the output of proj."""
        return 0.0


def rotate(x, ids, pos_embed):
    """diffusers' rotation: interleaved pairs, cos and sin repeated."""
    cos, sin = (part[None, None].to(x) for part in pos_embed(ids))
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-imaginary, real], -1).flatten(-2) * sin


def velocity(model, noise, text, pooled, guidance, conditions):
    """One evaluation at noise level 1."""
    h, w = noise.shape[-2:]
    ids = torch.cat([torch.zeros(text.shape[1], 3), grid(h, w), *[c.ids for c in conditions]])
    one = torch.full((1,), 1000.0)
    vec, vec0 = (model.time_text_embed(t, 1000.0 * guidance, pooled) for t in (one, 0 * one))
    txt, img = model.context_embedder(text), model.x_embedder(pack(noise))
    states = [model.x_embedder(pack(c.x)) for c in conditions]
    lengths = [txt.shape[1] + img.shape[1], *[s.shape[1] for s in states]]
    mask = torch.block_diag(*[torch.ones(n, n) for n in lengths]).bool()
    mask[: lengths[0]] = True

    def heads(x):
        return x.unflatten(-1, (WIDE // 128, 128)).transpose(1, 2)

    def attend(parts):
        q, k, v = (torch.cat(group, 2) for group in zip(*parts, strict=True))
        q, k = rotate(q, ids, model.pos_embed), rotate(k, ids, model.pos_embed)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).flatten(2).split(lengths, 1)

    def image_projections(attn, x, name=None, c=None):
        q, k, v = attn.to_q(x), attn.to_k(x), attn.to_v(x)
        if c is not None:
            q, k, v = q + c.lora(name, "q", x), k + c.lora(name, "k", x), v + c.lora(name, "v", x)
        return attn.norm_q(heads(q)), attn.norm_k(heads(k)), heads(v)

    def image_tail(block, x, out, gates):
        gate, shift_mlp, scale_mlp, gate_mlp = gates
        x = x + gate[:, None] * out
        return x + gate_mlp[:, None] * block.ff(block.norm2(x) * (1 + scale_mlp[:, None]) + shift_mlp[:, None])

    for i, block in enumerate(model.transformer_blocks):
        name, attn = f"transformer_blocks.{i}", block.attn
        normed_txt, *txt_gates = block.norm1_context(txt, emb=vec)
        normed_img, *img_gates = block.norm1(img, emb=vec)
        parts = [
            (
                attn.norm_added_q(heads(attn.add_q_proj(normed_txt))),
                attn.norm_added_k(heads(attn.add_k_proj(normed_txt))),
                heads(attn.add_v_proj(normed_txt)),
            ),
            image_projections(attn, normed_img),
        ]
        gates = []
        for c, state in zip(conditions, states, strict=True):
            own = c.modules(model).transformer_blocks[i]
            normed, *own_gates = own.norm1(state, emb=vec0)
            gates.append(own_gates)
            parts.append(image_projections(own.attn, normed, name, c))
        main, *outs = attend(parts)
        txt_out, img_out = main[:, : txt.shape[1]], main[:, txt.shape[1] :]
        img = image_tail(block, img, attn.to_out[0](img_out), img_gates)
        gate, shift_mlp, scale_mlp, gate_mlp = txt_gates
        txt = txt + gate[:, None] * attn.to_add_out(txt_out)
        normed_txt = block.norm2_context(txt) * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
        txt = txt + gate_mlp[:, None] * block.ff_context(normed_txt)
        for j, (c, out) in enumerate(zip(conditions, outs, strict=True)):
            own = c.modules(model).transformer_blocks[i]
            out = own.attn.to_out[0](out)
            states[j] = image_tail(own, states[j], out + c.lora(name, "proj", out), gates[j])

    joined = torch.cat([txt, img], 1)
    for i, block in enumerate(model.single_transformer_blocks):
        name, rows = f"single_transformer_blocks.{i}", []
        streams = [(block, joined, None, vec)]
        for c, state in zip(conditions, states, strict=True):
            streams.append((c.modules(model).single_transformer_blocks[i], state, c, vec0))
        for own, x, c, emb in streams:
            normed, gate = own.norm(x, emb=emb)
            rows.append((own, x, gate, own.act_mlp(own.proj_mlp(normed)), image_projections(own.attn, normed, name, c)))
        outs = attend([row[4] for row in rows])
        joined, *states = [
            x + gate[:, None] * own.proj_out(torch.cat([out, mlp], 2))
            for (own, x, gate, mlp, _), out in zip(rows, outs, strict=True)
        ]
    return unpack(model.proj_out(model.norm_out(joined[:, txt.shape[1] :], vec)), h, w)
