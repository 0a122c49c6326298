"""The embedded default: tiny trained models in `weights/`, as ComfyUI's own MODEL, CLIP and VAE objects.

The transformers are ordinary FLUX.1, SD3.5 and CogVideoX files, and the autoencoder of videos is one in Wan 2.1's
layout: ComfyUI's own loaders read them. The text encoders and the autoencoders of pictures have layouts of their own
(`models/tiny_text.py`, `models/tiny_vae.py`). This module wraps them in ComfyUI's CLIP and VAE classes, so that its
memory management, prompt weights, hooks and tiling work with them too.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.utils
import numpy as np
import torch
from torch import Tensor

from ..models.checkpoint import about, checked_weight, require, shown
from ..models.tiny_text import PAD, SLOTS, VOCABULARY, TinyTextEncoder, word_ids
from ..models.tiny_vae import CHANNELS, PATCH, TinyVAE
from . import model_files
from .picture_files import read_picture

logger = logging.getLogger(__name__)

Base = Literal["FLUX.1", "SD3.5", "CogVideoX"]
ROOT = Path(__file__).resolve().parents[1]
WEIGHTS, EXAMPLES = ROOT / "weights", ROOT / "web" / "examples"
TOKENS = "t5xxl"  # the name CLIP Text Encode (Flux) looks for
REMEDY = "Install DiT Toolkit again."
WIDEST = 1024  # channels of any layer


class Files(NamedTuple):
    """The files of one base in the pack's `weights` folder."""

    model: str
    clip: str
    vae: str


FILES: dict[Base, Files] = {
    "FLUX.1": Files("tiny_flux.safetensors", "tiny_text_encoder.safetensors", "tiny_vae.safetensors"),
    "SD3.5": Files("tiny_sd3.safetensors", "tiny_sd3_text_encoder.safetensors", "tiny_sd3_vae.safetensors"),
    "CogVideoX": Files(
        "dynamictrl/tiny_dynamictrl.safetensors",
        "tiny_cogvideox_text_encoder.safetensors",
        "tiny_cogvideox_vae.safetensors",
    ),
}


def path_of(name: str) -> Path:
    """Where a file of the pack lies.

    Raises:
        FileNotFoundError: it is missing.
    """
    path = WEIGHTS / name
    if not path.is_file():
        raise FileNotFoundError(f"{name} is missing from the pack's 'weights' folder. {REMEDY}")
    return path


def _load(name: str, section: str, settings: Collection[str] = ()) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights in a file of the pack, and its metadata under `section`."""
    weights, metadata = model_files.read(str(path_of(name)), name, REMEDY)
    config = about(metadata, section, settings, name)
    with _intact(name):
        for key, tensor in weights.items():
            checked_weight(tensor, tensor.ndim, key, name)
    return weights, config


@contextmanager
def _intact(name: str) -> Iterator[None]:
    """Report an error while a shipped file becomes a model as damage of the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} is damaged. {REMEDY} ({model_files.in_one_line(error)})") from error


def _size(value: object) -> int:
    if not isinstance(value, int) or not 1 <= value <= WIDEST:
        raise ValueError(f"a size of {shown(value)}")
    return value


class EmbeddedTokenizer:
    """Prompt text to word ids with ComfyUI's `(word:1.2)` weights: always one row of `SLOTS` tokens."""

    def __init__(self, embedding_directory=None, tokenizer_data=None):
        pass

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs) -> dict[str, list]:
        words: list[tuple[int, float]] = []
        missed: list[str] = []
        for part, weight in comfy.sd1_clip.token_weights(comfy.sd1_clip.escape_important(text), 1.0):
            ids, unknown = word_ids(comfy.sd1_clip.unescape_important(part))
            words += [(i, weight) for i in ids]
            missed += unknown
        if missed:
            logger.info("The tiny text encoder does not know: %s", ", ".join(dict.fromkeys(missed)))
        if len(words) > SLOTS:
            logger.info("The tiny text encoder reads %d words; the last %d are cut off.", SLOTS, len(words) - SLOTS)
        row = (words + [(PAD, 1.0)] * SLOTS)[:SLOTS]
        if return_word_ids:
            return {TOKENS: [[(i, weight, position) for position, (i, weight) in enumerate(row)]]}
        return {TOKENS: [row]}

    def untokenize(self, pairs: list[tuple]) -> list[tuple]:
        return [(pair, VOCABULARY[pair[0]]) for pair in pairs]

    def state_dict(self) -> dict:
        return {}


class EmbeddedTextEncoder(torch.nn.Module, comfy.sd1_clip.ClipTokenWeightEncoder):
    """`TinyTextEncoder` behind the interface of ComfyUI's text encoders."""

    def __init__(self, dim: int, pooled_dim: int, device=None, dtype=None, model_options=None):
        super().__init__()
        self.dtypes = {dtype}
        self.special_tokens = {"pad": PAD}
        self.execution_device = None
        self.transformer = TinyTextEncoder(
            dim, pooled_dim, operations=comfy.ops.manual_cast, device=device, dtype=dtype
        )

    def reset_clip_options(self) -> None:
        self.execution_device = None

    def set_clip_options(self, options: dict) -> None:
        self.execution_device = options.get("execution_device", self.execution_device)

    def encode(self, tokens: list[list[int]]) -> tuple[Tensor, Tensor]:
        device = self.execution_device or self.transformer.words.weight.device
        cond, pooled = self.transformer(torch.tensor(tokens, dtype=torch.long, device=device))
        return cond.float(), pooled.float()

    def encode_token_weights(self, token_weight_pairs: dict[str, list]) -> tuple:
        rows = [[(pair[0], pair[1]) for pair in row] for row in token_weight_pairs[TOKENS]]
        return super().encode_token_weights(rows)

    def load_sd(self, weights: dict[str, Tensor]):
        return self.transformer.load_state_dict(weights, strict=True, assign=getattr(self, "can_assign_sd", False))


class EmbeddedVAE(comfy.sd.VAE):
    """ComfyUI's VAE around `TinyVAE`."""

    def __init__(self, weights: dict[str, Tensor], live: int, widths: tuple[int, int, int], base: str):
        # ComfyUI's smallest autoencoder sets the defaults; the lines below replace what differs.
        super().__init__(sd={"pixel_space_vae": torch.ones(())}, dtype=torch.float32)
        self.downscale_ratio = self.upscale_ratio = PATCH
        self.latent_channels = CHANNELS
        self.memory_used_encode = lambda shape, dtype: (
            64 * shape[2] * shape[3] * comfy.model_management.dtype_size(dtype)
        )
        self.memory_used_decode = lambda shape, dtype: (
            160 * shape[2] * shape[3] * PATCH**2 * comfy.model_management.dtype_size(dtype)
        )
        offload = comfy.model_management.vae_offload_device()
        where = {"device": offload, "dtype": torch.float32}
        model = TinyVAE(live, widths, base, operations=comfy.ops.manual_cast, **where)
        self.first_stage_model = model.eval()
        comfy.model_management.archive_model_dtypes(model)
        self.patcher = comfy.model_patcher.CoreModelPatcher(model, load_device=self.device, offload_device=offload)
        model.load_state_dict({k: v.float() for k, v in weights.items()}, assign=self.patcher.is_dynamic())
        self.size = None
        self.model_size()


def load_model(base: Base = "FLUX.1"):
    """MODEL: the transformer, through ComfyUI's diffusion-model loader."""
    name = FILES[base].model
    weights, _ = _load(name, Path(name).stem)
    with _intact(name):
        model = comfy.sd.load_diffusion_model(str(WEIGHTS / name))
        require(model.model.diffusion_model.state_dict(), weights, name)  # core leaves missing weights as they are
    return model


def load_clip(base: Base = "FLUX.1") -> comfy.sd.CLIP:
    """CLIP: tokenizer and text encoder."""
    name = FILES[base].clip
    weights, config = _load(name, "tiny_text", ("dim", "pooled_dim", "slots"))
    target = comfy.supported_models_base.ClipTarget(EmbeddedTokenizer, EmbeddedTextEncoder)
    with _intact(name):
        target.params = {size: _size(config[size]) for size in ("dim", "pooled_dim")}
        return comfy.sd.CLIP(target, parameters=comfy.utils.calculate_parameters(weights), state_dict=[weights])


def load_vae(base: Base = "FLUX.1") -> comfy.sd.VAE:
    """VAE: the base's latent layout, 16 channels at an eighth of the size, and a quarter of a video's frames."""
    name = FILES[base].vae
    if base == "CogVideoX":
        weights, _ = _load(name, Path(name).stem)
        with _intact(name):
            vae = comfy.sd.VAE(sd=dict(weights))
            require(vae.get_sd(), weights, name)
            return vae
    weights, config = _load(name, "tiny_vae", ("live", "widths", "base"))
    with _intact(name):
        first, second, third = (_size(width) for width in config["widths"])
        return EmbeddedVAE(weights, _size(config["live"]), (first, second, third), config.get("base", "FLUX.1"))


def example_names() -> list[str]:
    """File names of the example pictures: outlines, garments, masks, painted subjects, photographs."""
    kinds = ("drawn", "garment", "mask", "painted", "photo", "worn")
    return sorted(path.name for kind in kinds for path in EXAMPLES.glob(f"{kind}_*"))


def load_example(name: str) -> Tensor:
    """An example picture as IMAGE, `[1, H, W, 3]` in 0..1, with the device and dtype of ComfyUI's Load Image."""
    if name not in example_names():
        raise FileNotFoundError(f"There is no example picture {name!r}. Choose one of: {', '.join(example_names())}.")
    picture = read_picture(EXAMPLES / name, name, REMEDY).convert("RGB")
    pixels = torch.from_numpy(np.array(picture, np.float32) / 255)[None]
    manage = comfy.model_management
    return pixels.to(device=manage.intermediate_device(), dtype=manage.intermediate_dtype())
