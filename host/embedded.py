"""The embedded default: tiny trained models in `weights/`, as ComfyUI's own MODEL, CLIP and VAE objects.

The transformer is an ordinary FLUX.1 file and goes through ComfyUI's own loader. The text encoder and the autoencoder
have layouts of their own (`models/tiny_text.py`, `models/tiny_vae.py`); here they are put behind ComfyUI's CLIP and
VAE classes, so that its memory management, prompt weights, hooks and tiling apply to them as to any other.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.utils
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..models.tiny_text import PAD, SLOTS, VOCABULARY, TinyTextEncoder, word_ids
from ..models.tiny_vae import CHANNELS, PATCH, TinyVAE

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS, EXAMPLES = ROOT / "weights", ROOT / "web" / "examples"
TOKENS = "t5xxl"  # the name CLIP Text Encode (Flux) looks for
KEY = "dit_toolkit"  # of the safetensors metadata: a JSON text that describes the file


def _load(name: str) -> tuple[dict[str, Tensor], dict]:
    path = WEIGHTS / name
    if not path.is_file():
        raise FileNotFoundError(f"{name} is missing from the pack's 'weights' folder. Install DiT Toolkit again.")
    weights, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    return weights, json.loads((metadata or {}).get(KEY, "{}"))


class EmbeddedTokenizer:
    """Prompt text to word ids with ComfyUI's `(word:1.2)` weights. One row of `SLOTS` tokens, whatever is typed."""

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
            return {TOKENS: [[(i, weight, place) for place, (i, weight) in enumerate(row)]]}
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

    def __init__(self, weights: dict[str, Tensor], live: int, widths: tuple[int, int, int]):
        # The host's smallest autoencoder, for its defaults; what differs is replaced below.
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
        model = TinyVAE(live, widths, operations=comfy.ops.manual_cast, device=offload, dtype=torch.float32)
        self.first_stage_model = model.eval()
        comfy.model_management.archive_model_dtypes(model)
        self.patcher = comfy.model_patcher.CoreModelPatcher(model, load_device=self.device, offload_device=offload)
        model.load_state_dict({k: v.float() for k, v in weights.items()}, assign=self.patcher.is_dynamic())
        self.size = None
        self.model_size()


def load_model():
    """MODEL: the transformer, through ComfyUI's diffusion-model loader."""
    path = WEIGHTS / "tiny_flux.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is missing from the pack's 'weights' folder. Install DiT Toolkit again.")
    return comfy.sd.load_diffusion_model(str(path))


def load_clip() -> comfy.sd.CLIP:
    """CLIP: tokenizer and text encoder."""
    weights, about = _load("tiny_text_encoder.safetensors")
    config = about["tiny_text"]
    target = comfy.supported_models_base.ClipTarget(EmbeddedTokenizer, EmbeddedTextEncoder)
    target.params = {"dim": config["dim"], "pooled_dim": config["pooled_dim"]}
    return comfy.sd.CLIP(target, parameters=comfy.utils.calculate_parameters(weights), state_dict=[weights])


def load_vae() -> EmbeddedVAE:
    """VAE: FLUX.1's latent layout, 16 channels at an eighth of the size."""
    weights, about = _load("tiny_vae.safetensors")
    config = about["tiny_vae"]
    return EmbeddedVAE(weights, config["live"], tuple(config["widths"]))


def example_names() -> list[str]:
    """File names of the example pictures: outlines, garments, masks, painted subjects, the photograph."""
    kinds = ("drawn", "garment", "mask", "painted", "photo")
    return sorted(path.name for kind in kinds for path in EXAMPLES.glob(f"{kind}_*"))


def load_example(name: str) -> Tensor:
    """An example picture as IMAGE, `[1, H, W, 3]` in 0..1, where and as ComfyUI's Load Image puts it."""
    if name not in example_names():
        raise FileNotFoundError(f"There is no example picture {name!r}. Choose one of: {', '.join(example_names())}.")
    with Image.open(EXAMPLES / name) as picture:
        pixels = torch.from_numpy(np.array(picture.convert("RGB"), np.float32) / 255)[None]
    manage = comfy.model_management
    return pixels.to(device=manage.intermediate_device(), dtype=manage.intermediate_dtype())
