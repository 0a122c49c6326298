"""Stage `video_vae`: the autoencoder of the small video model, in the layout of Wan 2.1's, which ComfyUI's VAE loader
takes.

Four frames of 8 x 8 pixels become 16 numbers; the first frame of a clip stands alone. The encoder is written down, not
trained: of every residual block only the shortcut is used, and the layers that make a clip smaller keep its principal
components. So latents can be made while the decoder still learns.
"""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from . import checkpoints, loop, world
from .optim import schedule
from .pictures import to_unit

PATCH, TIME, CHANNELS = 8, 4, 16
DOLLS = (0.0, 0.0, 3.0, 1.0)  # how often each difficulty of the world comes: a doll alone, or beside an object
UNIT = 1.15258426  # latents times this have a variance of 1: ComfyUI's scale for models below 48 heads
TOGETHER = 2  # clips in a step of the decoder
CHUNK = 50  # clips that a process renders at once
EVEN = 0.7  # how far weak components are raised: 0 leaves all as they are, 1 makes them alike
FILE = "tiny_cogvideox_vae.safetensors"


@dataclass(frozen=True)
class VideoVAERecipe:
    """What decides the weights, apart from the code."""

    pixels: int = 96
    width: int = 8  # of Wan's layout, which has 96
    clips: int = 900  # of dolls; and half as many of drawn poses
    frames: int = 9
    seed: int = 4
    decoder_steps: int = 1_600
    crop: int = 8  # latents a side that the decoder learns on


# ------------------------------------------------------------------------------------------------------------- clips


def clip_of(scene: world.Scene, frames: int, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A doll in motion and its poses as they are drawn, uint8 `[frames, H, W, 3]` each."""
    from dit_toolkit.models.animate.pose_drawing import draw

    shown = world.moving(scene, frames, rng)
    poses = []
    for each in shown:
        points = world.openpose(next(thing for thing in each.things if thing.kind == "doll"))
        poses.append(draw(points[:, :2], points[:, 2], size, size, style="bold"))
    return np.stack([world.render(each, size).image for each in shown]), np.stack(poses)


def _clips(size: int, frames: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng, stream = np.random.default_rng(seed), world.scenes(seed, DOLLS)
    made = [clip_of(next(stream), frames, size, rng) for _ in range(count)]
    return np.stack([clip for clip, _ in made]), np.stack([poses for _, poses in made])


def _stock(recipe: VideoVAERecipe, workers: int) -> np.ndarray:
    """What the autoencoder learns on: two clips of dolls for one of drawn poses, uint8 `[N, frames, H, W, 3]`."""
    seeds = [recipe.seed * 1_000_003 + k for k in range(recipe.clips // CHUNK)]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        made = pool.imap(partial(_clips, recipe.pixels, recipe.frames, CHUNK), seeds)
        parts = [np.concatenate([clips, poses[::2]]) for clips, poses in tqdm(made, total=len(seeds), desc="clips")]
    return np.concatenate(parts)


# ------------------------------------------------------------------------------------------------------------- model


def wan_vae(recipe: VideoVAERecipe) -> Any:
    """ComfyUI's WanVAE with seeded weights; the blocks that stay unused are skipped, and their weights are zero."""
    from .comfyui import comfyui

    comfyui()
    from comfy.ldm.wan.vae import AttentionBlock, CausalConv3d, ResidualBlock, RMS_norm, WanVAE

    torch.manual_seed(recipe.seed)
    vae = WanVAE(
        dim=recipe.width, z_dim=CHANNELS, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
        temperal_downsample=[False, True, True],
    )  # fmt: skip
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
        elif isinstance(module, RMS_norm):
            nn.init.ones_(module.gamma)
    for name, module in vae.named_modules():
        if isinstance(module, ResidualBlock):
            nn.init.zeros_(module.residual[6].weight)
            if name.startswith("encoder"):
                module.forward = partial(_shortcut, module)
        elif isinstance(module, CausalConv3d) and name.startswith("decoder"):
            module.weight.data[:, :, :-1] = 0  # of other frames
        elif isinstance(module, AttentionBlock):
            nn.init.zeros_(module.proj.weight)
            module.forward = _as_it_is
    return vae


def _shortcut(block: Any, x: Tensor, feat_cache=None, feat_idx=(0,), final=False) -> Tensor:
    """What a residual block makes of `x` while its own weights are zero."""
    if feat_cache is not None:
        feat_idx[0] += 2
    return block.shortcut(x)


def _as_it_is(x: Tensor, feat_cache=None, feat_idx=(0,), final=False) -> Tensor:
    return x


def strongest(x: Tensor, count: int) -> Tensor:
    """The `count` strongest directions of rows `[N, D]`, about their mean, `[count, D]`."""
    x = (x - x.mean(0)).double()
    return torch.linalg.eigh(x.T @ x)[1].flip(1)[:, :count].T.float()


def _square(layer: Any, x: Tensor, count: int) -> Tensor:
    """Let a stride-2 convolution keep the `count` strongest of 2 x 2 positions of `x` `[N, C, h, w]`; what it gives."""
    c = x.shape[1]
    rows = rearrange(x, "n c (h i) (w j) -> (n h w) (c i j)", i=2, j=2)
    basis = strongest(rows[:: max(1, len(rows) // 200_000)], count)
    layer.weight.zero_()
    layer.weight[:count, :c, :2, :2] = basis.unflatten(1, (c, 2, 2))
    return F.conv2d(F.pad(x, (0, 1, 0, 1)), layer.weight[:count, :c], stride=2)


@torch.no_grad()
def begin(vae: Any, stock: np.ndarray) -> None:
    """Principal components of components: every layer that makes the clip smaller keeps the strongest of what it joins.

    Space, space, time, space, time. Sums of two frames keep the channels of one frame, so that a frame alone, which
    skips the steps in time, is read alike. The last activation is undone by a channel's negative beside it
    (silu(a) - silu(-a) = a), and the last norm by a constant that outweighs the rest.
    """
    encoder, layers = vae.encoder, [m for m in vae.encoder.downsamples if hasattr(m, "resample")]
    one, two, three = (layer.resample[1] for layer in layers)
    for block in encoder.downsamples:
        if isinstance(getattr(block, "shortcut", None), nn.Conv3d):
            block.shortcut.weight.zero_()
            nn.init.eye_(block.shortcut.weight[:, :, 0, 0, 0])
    encoder.conv1.weight.zero_()
    encoder.conv1.weight[range(3), range(3), 2, 1, 1] = 1.0
    x = frames(stock[:: max(1, len(stock) // 150)])[:, :, :5]
    clips = len(x)
    x = _square(one, rearrange(x, "b c t h w -> (b t) c h w"), one.weight.shape[0])
    width = two.weight.shape[0]
    x = rearrange(_square(two, x, width), "(b t) c h w -> b t c h w", b=clips)
    pairs = x[:, 1:].unflatten(1, (2, 2))
    total, change = (pairs[:, :, 0] + pairs[:, :, 1]) / 2, (pairs[:, :, 1] - pairs[:, :, 0]) / 2
    sums = width * 2 // 3
    turns = strongest(rearrange(change, "b p c h w -> (b p h w) c"), width - sums)
    time = layers[1].time_conv.weight
    time.zero_()
    time[range(sums), range(sums), 1] = time[range(sums), range(sums), 2] = torch.full((sums, 1, 1), 0.5)
    time[sums:, :, 2, 0, 0], time[sums:, :, 1, 0, 0] = turns / 2, -turns / 2
    both = torch.cat([total[:, :, :sums], torch.einsum("kc,bpchw->bpkhw", turns, change)], 2)
    x = torch.cat([x[:, :1].repeat(1, 2, 1, 1, 1), both], 1).flatten(0, 1)  # a frame alone counts as much as a pair
    x = _square(three, x, CHANNELS)  # [clips * 4, 16, h, w]
    twice, last, kept = 2 * CHANNELS, CHANNELS - 1, three.weight[:CHANNELS].clone()
    firm = 3 * x.pow(2).sum(1).mean().sqrt()

    def arranged(weight: Tensor, bias: Tensor, rows: Tensor) -> None:
        """15 components and their negatives, the constant, and the constant with the last component."""
        weight.zero_()
        bias.zero_()
        weight[:last], weight[CHANNELS : twice - 1], weight[twice - 1] = rows[:last], -rows[:last], rows[last]
        bias[last] = bias[twice - 1] = firm

    arranged(three.weight, three.bias, kept)
    x = rearrange(x, "(b t) c h w -> b t c h w", b=clips)[:, 2:]  # the two pairs
    basis = strongest(rearrange(x, "b t c h w -> (b h w) (t c)"), CHANNELS).unflatten(1, (2, CHANNELS))
    rows = torch.zeros(CHANNELS, twice, 3, 1, 1)
    rows[:, :last, 1:, 0, 0] = basis[..., :last].transpose(1, 2)
    rows[:, twice - 1, 1:, 0, 0], rows[:, last, 1:, 0, 0] = basis[..., last], -basis[..., last]
    arranged(layers[2].time_conv.weight, layers[2].time_conv.bias, rows)
    out = encoder.head[2].weight.zero_()
    slope = firm / 4
    out[range(last), range(last), 2, 1, 1] = slope
    out[range(last), range(CHANNELS, twice - 1), 2, 1, 1] = -slope
    out[last, twice - 1, 2, 1, 1], out[last, last, 2, 1, 1] = slope, -slope
    vae.conv1.weight.zero_()
    vae.conv1.weight[range(CHANNELS), range(CHANNELS), 0, 0, 0] = 1.0


def loss_of(out: Tensor, x: Tensor) -> Tensor:
    """Pixels, and their differences to the right and downward, so that outlines stay sharp."""
    edges = sum(F.l1_loss(out.diff(dim=axis), x.diff(dim=axis)) for axis in (-1, -2))
    return F.mse_loss(out, x) + 0.2 * F.l1_loss(out, x) + 0.2 * edges


def frames(clips: np.ndarray) -> Tensor:
    """uint8 `[B, T, H, W, 3]` to `[B, 3, T, H, W]` in -1..1."""
    return torch.from_numpy(to_unit(clips)).transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------- training


@torch.no_grad()
def fit_encoder(recipe: VideoVAERecipe, stock: np.ndarray) -> None:
    """Fit the encoder, if it is not there yet. Its latents have mean 0 and, times `UNIT`, a mean variance of 1."""
    path = checkpoints.work(recipe) / "encoder.pt"
    if path.exists():
        return
    vae = wan_vae(recipe)
    rng = np.random.default_rng(recipe.seed)
    stock = stock[rng.permutation(len(stock))[:200]]
    begin(vae, stock)
    z = encode(vae, frames(stock))
    mean, spread = z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4)).clamp(min=1e-4)
    scale = spread**-EVEN
    scale = scale / (scale * spread).square().mean().sqrt() / UNIT
    vae.conv1.weight[:CHANNELS] *= scale[:, None, None, None, None]
    vae.conv1.bias[:CHANNELS] = -mean * scale
    checkpoints.save(path, {n: p for n, p in vae.state_dict().items() if n.startswith(("encoder", "conv1"))})


def load_video_vae(recipe: VideoVAERecipe) -> Any:
    """The autoencoder with what is trained of it."""
    vae = wan_vae(recipe)
    for name in ("encoder", "decoder"):
        path = checkpoints.work(recipe) / f"{name}.pt"
        if path.exists():
            kept = torch.load(path, weights_only=True)
            vae.load_state_dict(kept.get("ema", kept), strict=False)
    return vae.requires_grad_(False).eval()


@torch.no_grad()
def encode(vae: Any, x: Tensor) -> Tensor:
    """What `vae.encode` gives, many times faster: most of its weights are zero, and here they are left out.

    Args:
        x: frames `[B, 3, T, H, W]` in -1..1, T = 4 k + 1.

    Returns:
        Latents `[B, 16, k + 1, H / 8, W / 8]`; times `UNIT` they have a variance of 1.
    """
    layers = [module for module in vae.encoder.downsamples if hasattr(module, "resample")]
    b, channels = len(x), 3
    x = rearrange(x, "b c t h w -> (b t) c h w")
    for layer in layers:
        conv = layer.resample[1]
        x = F.conv2d(x, conv.weight[:, :channels, :2, :2], conv.bias, stride=2)
        channels = x.shape[1]
        if layer.mode == "downsample3d":
            time = layer.time_conv
            x = x.unflatten(0, (b, -1))
            pairs = rearrange(x[:, 1:], "b (t two) c h w -> (b t) (two c) h w", two=2)
            pairs = F.conv2d(pairs, torch.cat([time.weight[:, :, 1], time.weight[:, :, 2]], 1), time.bias)
            x = torch.cat([x[:, :1], pairs.unflatten(0, (b, -1))], 1).flatten(0, 1)
    head = vae.encoder.head
    x = rearrange(F.silu(head[0](rearrange(x, "(b t) c h w -> b c t h w", b=b))), "b c t h w -> (b t) c h w")
    x = F.conv2d(x, head[2].weight[:, :, 2, 1:2, 1:2], head[2].bias)
    x = F.conv2d(x, vae.conv1.weight[:CHANNELS, :, 0], vae.conv1.bias[:CHANNELS])
    return rearrange(x, "(b t) c h w -> b c t h w", b=b)


def _plane(conv: Any, x: Tensor) -> Tensor:
    """A causal convolution that looks at no other frame, `[N, C, h, w]`: its last plane."""
    weight = conv.weight[:, :, -1]
    return F.conv2d(x, weight, conv.bias, padding=weight.shape[-1] // 2)


def _norm(norm: Any, x: Tensor) -> Tensor:
    return F.normalize(x, dim=1) * norm.scale * norm.gamma[..., 0]


def _residual(block: Any, x: Tensor) -> Tensor:
    norm1, _, conv1, norm2, _, _, conv2 = block.residual
    out = _plane(conv2, F.silu(_norm(norm2, _plane(conv1, F.silu(_norm(norm1, x))))))
    return out + (x if isinstance(block.shortcut, nn.Identity) else _plane(block.shortcut, x))


def decode(vae: Any, z: Tensor) -> Tensor:
    """What `vae.decode` gives while its convolutions look at no other frame.

    Every latent holds its own four frames, so the decoder needs no others; and what it learns on short clips holds for
    clips of any length, however ComfyUI takes them apart.

    Args:
        z: `[B, 16, T, h, w]`.

    Returns:
        Frames `[B, 3, 4 T - 3, 8 h, 8 w]`, the first of one latent, four of each other.
    """
    from comfy.ldm.wan.vae import Resample, ResidualBlock

    parts = []
    for part, alone in ((z[:, :, :1], True), (z[:, :, 1:], False)):
        x = _plane(vae.decoder.conv1, _plane(vae.conv2, rearrange(part, "b c t h w -> (b t) c h w")))
        for block in (*vae.decoder.middle, *vae.decoder.upsamples):
            if isinstance(block, ResidualBlock):
                x = _residual(block, x)
            elif isinstance(block, Resample):
                if block.mode == "upsample3d" and not alone:
                    x = rearrange(_plane(block.time_conv, x), "n (two c) h w -> (n two) c h w", two=2)
                x = block.resample(x)
        norm, _, conv = vae.decoder.head
        parts.append(rearrange(_plane(conv, F.silu(_norm(norm, x))), "(b t) c h w -> b c t h w", b=len(z)))
    return torch.cat(parts, 2)


def train_video_vae(recipe: VideoVAERecipe, workers: int) -> None:
    """The encoder, then the decoder. Noise on the latents makes the decoder forgive the transformer's errors."""
    stock = _stock(recipe, workers)
    fit_encoder(recipe, stock)
    vae = load_video_vae(recipe)
    own = nn.ModuleDict({"conv2": vae.conv2, "decoder": vae.decoder}).requires_grad_(True)

    def loss_at(step: int) -> Tensor:
        rng = np.random.default_rng((recipe.seed, 2, step))
        x = frames(stock[rng.integers(len(stock), size=TOGETHER)])
        with torch.autocast("cpu", enabled=False):  # colours are finer than bfloat16
            z = encode(vae, x)
            top, left = rng.integers(z.shape[-1] - recipe.crop + 1, size=2)
            z = z[..., top : top + recipe.crop, left : left + recipe.crop]
            side = PATCH * recipe.crop
            x = x[..., PATCH * top : PATCH * top + side, PATCH * left : PATCH * left + side]
            noise = torch.from_numpy(rng.standard_normal(tuple(z.shape), np.float32))
            return loss_of(decode(vae, z + rng.uniform(0, 0.2) / UNIT * noise), x)

    path, rate = checkpoints.work(recipe) / "decoder.pt", partial(schedule, flat=0.2)
    loop.learn(path, own, recipe.decoder_steps, 2e-3, loss_at, torch.optim.AdamW, rate)
    export_video_vae(recipe)


def export_video_vae(recipe: VideoVAERecipe) -> None:
    about = {"stage": "video_vae", "width": recipe.width}
    checkpoints.write(FILE, load_video_vae(recipe).state_dict(), {"dit_toolkit": json.dumps(about)})
