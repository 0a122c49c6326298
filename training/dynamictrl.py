"""Stages `cogvideox` and `dynamictrl`: a small video model in the layout of CogVideoX 1.5 image-to-video, and poses.

The base learns to bring a picture of a doll to life. As the authors do, DynamiCtrl then trains on all of it, together
with the pose-adaptive norms (DynamiCtrl, section 3.2, and the official training script): one whole transformer is what
it publishes. Some clips come without poses, so that strength 0 stays a base worth having.

Tokens are 16 x 16 pixels of eight frames: two latents a side, two in time.
"""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dit_toolkit.models.tiny_text import PAD, SLOTS, TinyTextEncoder

from . import checkpoints, loop, world
from .base import brief, run_stage
from .data import padded_ids
from .video_vae import CHANNELS, CHUNK, DOLLS, UNIT, VideoVAERecipe, clip_of, encode, frames, load_video_vae

FRAMES = 21  # 8 k + 5
OFS = 2.0  # what CogVideoX 1.5 image-to-video is told, always


@dataclass(frozen=True)
class VideoRecipe:
    """What decides the weights, apart from the autoencoder and the code."""

    heads: int = 3  # of 64 channels
    depth: int = 5
    time_dim: int = 64
    text_dim: int = 128
    pooled_dim: int = 64
    seed: int = 5
    pool: int = 3_200
    batch: int = 32
    base_steps: int = 450
    steps: int = 1_400  # of DynamiCtrl
    lr: float = 1.5e-3
    muon_lr: float = 0.015
    ema: float = 0.995
    drop: float = 0.1  # captions left empty
    brief: float = 0.25
    still: float = 0.05  # reference pictures left out, as the authors do
    free: float = 0.2  # clips without poses


# -------------------------------------------------------------------------------------------------------------- pool


def _clips(size: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`CHUNK` clips, their drawn poses, and their word ids."""
    rng, stream = np.random.default_rng(seed), world.scenes(seed, DOLLS)
    clips, poses, ids = [], [], []
    for _ in range(CHUNK):
        scene = next(stream)
        clip, drawn = clip_of(scene, FRAMES, size, rng)
        clips.append(clip)
        poses.append(drawn)
        ids.append(padded_ids(world.caption(world.moving(scene, 1, rng)[0])))
    return np.stack(clips), np.stack(poses), np.array(ids, np.uint8)


def pool_of(recipe: VideoRecipe, vae_recipe: VideoVAERecipe, workers: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents of clips and of their poses, float16 `[N, 16, 6, h, w]`, and word ids."""
    path = checkpoints.work(vae_recipe) / f"clips-{checkpoints.digest(recipe.seed, recipe.pool, FRAMES)}.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    vae, parts = load_video_vae(vae_recipe), []
    jobs = [recipe.seed * 1_000_003 + k for k in range(recipe.pool // CHUNK)]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        made = pool.imap(partial(_clips, vae_recipe.pixels), jobs)
        for clips, poses, ids in tqdm(made, total=len(jobs), desc="rendering the pool"):
            latents = ((UNIT * encode(vae, frames(each))).half() for each in (clips, poses))
            parts.append((*latents, torch.from_numpy(ids)))
    pools = tuple(torch.cat(part) for part in zip(*parts, strict=True))
    checkpoints.save(path, pools)
    return pools


# ------------------------------------------------------------------------------------------------------------- model


def transformer_of(recipe: VideoRecipe) -> Any:
    """ComfyUI's CogVideoX, as its loader builds it from such a file; its weights as they are before training."""
    from .comfyui import comfyui

    comfyui()
    import comfy.ops
    from comfy.ldm.cogvideo.model import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=recipe.heads, in_channels=2 * CHANNELS, time_embed_dim=recipe.time_dim,
        ofs_embed_dim=recipe.time_dim, text_embed_dim=recipe.text_dim, num_layers=recipe.depth, patch_size_t=2,
        use_rotary_positional_embeddings=True, sample_height=96, sample_width=170, sample_frames=81,
        dtype=torch.float32, operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or name == "proj_out.weight" or ".linear." in name:
            nn.init.zeros_(parameter)
        elif "norm" in name:
            nn.init.ones_(parameter)
        elif "embedding" in name:
            nn.init.normal_(parameter, std=0.05)
        else:
            nn.init.xavier_uniform_(parameter)
    return model


class PoseNorm(nn.Module):
    """The new layers of one block, named as in published files; they begin as a whisper."""

    def __init__(self, time_dim: int, dim: int):
        super().__init__()
        self.linear = nn.Linear(time_dim, 3 * dim)
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        nn.init.constant_(self.norm.weight, 0.2)

    def forward(self, c: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """What is added to the block's first norm, and the poses for the next block; both `[B, L, D]`."""
        shift, scale, gate = self.linear(F.silu(e))[:, None].chunk(3, dim=-1)
        n = self.norm(c) * (1 + scale) + shift
        return n, n + gate * n


class VideoModel(nn.Module):
    """Transformer and text encoder; with `posed`, the norms of the poses as well."""

    def __init__(self, recipe: VideoRecipe, posed: bool):
        super().__init__()
        self.recipe = recipe
        self.transformer = transformer_of(recipe)
        self.text = TinyTextEncoder(recipe.text_dim, recipe.pooled_dim, operations=nn)
        dim = 64 * recipe.heads
        self.norms = nn.ModuleList(PoseNorm(recipe.time_dim, dim) for _ in range(recipe.depth * posed))

    def forward(
        self, x: Tensor, picture: Tensor, t: Tensor, ids: Tensor, pose: Tensor | None = None, use: Tensor | None = None
    ) -> Tensor:
        """Velocity of `x`.

        Args:
            x: noisy latents `[B, 16, T, h, w]`.
            picture: latent of the reference in frame 0, zeros after it; as `x`.
            t: timesteps `[B]`.
            ids: words `[B, SLOTS]`.
            pose: latents of the drawn poses, as `x`.
            use: 1 where the poses are used, `[B]`.
        """
        model = self.transformer
        context, _ = self.text(ids)
        said = context.shape[1]
        e = self.embed_time(t)
        h = model.patch_embed(context, torch.cat([x, picture], 1).transpose(1, 2))
        txt, img = h[:, :said], h[:, said:]
        grid = (x.shape[-2] // 2, x.shape[-1] // 2, x.shape[-3] // 2)
        rotary = model._get_rotary_emb(*grid, device=x.device)
        c = None
        if pose is not None:
            c = model.patch_embed(context, torch.cat([pose, pose], 1).transpose(1, 2))[:, said:]
        for i, block in enumerate(model.blocks):
            added = None
            if c is not None:
                added, c = self.norms[i](c, e)
                added = added * use[:, None, None]
            img, txt = joint_block(block, img, txt, e, rotary, added)
        out = model.proj_out(model.norm_out(model.norm_final(img), temb=e))
        rows, columns, pairs = grid
        return rearrange(
            out, "b (t h w) (c pt ph pw) -> b c (t pt) (h ph) (w pw)", t=pairs, h=rows, w=columns, pt=2, ph=2, pw=2
        )

    def embed_time(self, t: Tensor) -> Tensor:
        from comfy.ldm.cogvideo.model import get_timestep_embedding

        model = self.transformer
        step = model.time_embedding_linear_1(get_timestep_embedding(t, model.time_proj_dim))
        ofs = model.ofs_embedding_linear_1(get_timestep_embedding(torch.full_like(t, OFS), model.ofs_proj_dim))
        return model.time_embedding_linear_2(F.silu(step)) + model.ofs_embedding_linear_2(F.silu(ofs))


def joint_block(block: Any, img: Tensor, txt: Tensor, e: Tensor, rotary: Any, added: Tensor | None) -> Any:
    """One of ComfyUI's blocks, `added` to the video part of its first norm. `img`, `txt`: `[B, L, D]`."""
    from comfy.ldm.cogvideo.model import apply_rotary_emb

    said = txt.shape[1]
    a, b, gate, text_gate = block.norm1(img, txt, e)
    if added is not None:
        a = a + added
    joined = torch.cat([b, a], 1)
    q, k, v = (layer(joined).unflatten(2, (-1, 64)) for layer in (block.q, block.k, block.v))
    q, k = (norm(x).transpose(1, 2) for norm, x in ((block.norm_q, q), (block.norm_k, k)))
    q, k = (torch.cat([x[:, :, :said], apply_rotary_emb(x[:, :, said:], rotary).to(x)], 2) for x in (q, k))
    out = F.scaled_dot_product_attention(q, k, v.transpose(1, 2).to(q)).transpose(1, 2).flatten(2)
    out = block.attn_out(out)
    img, txt = img + gate * out[:, said:], txt + text_gate * out[:, :said]
    a, b, gate, text_gate = block.norm2(img, txt, e)
    out = block.ff_out(F.gelu(block.ff_proj(torch.cat([b, a], 1)), approximate="tanh"))
    return img + gate * out[:, said:], txt + text_gate * out[:, :said]


def levels() -> tuple[Tensor, Tensor]:
    """How much of the picture and of the noise is left at each of 1,000 timesteps: scaled-linear, zero at the end.

    Source: CogVideoX's scheduler; Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", 3.1.
    """
    kept = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0).sqrt()
    kept = (kept - kept[-1]) * kept[0] / (kept[0] - kept[-1])
    return kept.float(), (1 - kept**2).sqrt().float()


# ---------------------------------------------------------------------------------------------------------- training


def batch_of(recipe: VideoRecipe, pools: tuple[Tensor, ...], step: int, device) -> tuple[Tensor, ...]:
    """Clips, pictures, noise, timesteps, words, poses and which are used. The same step gives the same batch."""
    rng = np.random.default_rng((recipe.seed, 11, step))
    rows = torch.from_numpy(rng.integers(len(pools[0]), size=recipe.batch))
    x0, pose, words = pools[0][rows].float(), pools[1][rows].float(), pools[2][rows].long()
    for row, roll in enumerate(rng.random(recipe.batch)):
        if roll < recipe.drop:
            words[row] = PAD
        elif roll < recipe.drop + recipe.brief:
            words[row] = torch.tensor(brief(words[row].tolist(), rng)[:SLOTS])
    noise = torch.from_numpy(rng.standard_normal(tuple(x0.shape), np.float32))
    first = x0[:, :, :1] / UNIT  # as the autoencoder gives it
    spread = torch.from_numpy(np.exp(rng.normal(-3, 0.5, (recipe.batch, 1, 1, 1, 1))).astype(np.float32))
    first = first + spread * torch.from_numpy(rng.standard_normal(tuple(first.shape), np.float32))
    first = first * torch.from_numpy(rng.random((recipe.batch, 1, 1, 1, 1)) >= recipe.still)
    picture = F.pad(first, (0, 0, 0, 0, 0, x0.shape[2] - 1))
    t = torch.from_numpy(rng.integers(1000, size=recipe.batch))
    use = torch.from_numpy((rng.random(recipe.batch) >= recipe.free).astype(np.float32))
    return tuple(part.to(device) for part in (x0, picture, noise, t, words, pose, use))


def _train(path, recipe: VideoRecipe, steps: int, model: VideoModel, pools: tuple[Tensor, ...], posed: bool) -> Any:
    device = loop.device_of()
    kept, lost = (part.to(device) for part in levels())

    def loss_of(model: VideoModel, step: int) -> Tensor:
        x0, picture, noise, t, words, pose, use = batch_of(recipe, pools, step, device)
        a, b = (part[t][:, None, None, None, None] for part in (kept, lost))
        poses = (pose, use) if posed else ()
        out = model(a * x0 + b * noise, picture, t.float(), words, *poses)
        return F.mse_loss(out.float(), a * noise - b * x0)

    return run_stage(path, recipe, steps, model, loss_of)


def base_of(recipe: VideoRecipe, vae_recipe: VideoVAERecipe) -> Path:
    """Where the base is kept. How long DynamiCtrl trains is nothing to it."""
    return checkpoints.work(vae_recipe) / f"cogvideox-{checkpoints.digest(replace(recipe, steps=0))}.pt"


def train_cogvideox(recipe: VideoRecipe, vae_recipe: VideoVAERecipe, workers: int) -> None:
    pools = pool_of(recipe, vae_recipe, workers)
    torch.manual_seed(recipe.seed)
    model = VideoModel(recipe, posed=False)
    words = load_file(checkpoints.WEIGHTS / "tiny_text_encoder.safetensors")  # it knows them already
    model.text.load_state_dict({key: value.float() for key, value in words.items()})
    path = base_of(recipe, vae_recipe)
    _train(path, recipe, recipe.base_steps, model, pools, posed=False)


def train_dynamictrl(recipe: VideoRecipe, vae_recipe: VideoVAERecipe, workers: int) -> None:
    pools = pool_of(recipe, vae_recipe, workers)
    torch.manual_seed(recipe.seed + 1)
    model = VideoModel(recipe, posed=True)
    base = base_of(recipe, vae_recipe)
    model.load_state_dict(torch.load(base, weights_only=True, map_location="cpu")["ema"], strict=False)
    path = checkpoints.work(vae_recipe) / f"dynamictrl-{checkpoints.digest(recipe, checkpoints.contents(base))}.pt"
    export_dynamictrl(_train(path, recipe, recipe.steps, model, pools, posed=True))


def export_dynamictrl(model: VideoModel) -> None:
    """The whole transformer, named as ComfyUI names it, with the pose norms in their blocks; and the text encoder."""
    about = {"stage": "dynamictrl", "recipe": asdict(model.recipe)}
    weights = dict(model.transformer.state_dict())
    for i, norm in enumerate(model.norms):
        weights |= {f"blocks.{i}.control_norm1.{key}": value for key, value in norm.state_dict().items()}
    checkpoints.write("dynamictrl/tiny_dynamictrl.safetensors", weights, {"dit_toolkit": json.dumps(about)})
    config = {"tiny_text": {"dim": model.recipe.text_dim, "pooled_dim": model.recipe.pooled_dim, "slots": SLOTS}}
    note = {"dit_toolkit": json.dumps(config)}
    checkpoints.write("tiny_cogvideox_text_encoder.safetensors", model.text.state_dict(), note)
