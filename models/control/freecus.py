"""Carry a subject into a new picture without training: keys and values of the reference in the vital layers.

Source: FreeCus, arXiv:2507.15249, on FLUX.1-dev. Where the paper leaves a choice, we follow the authors' published
code. At every step the model denoises the reference too, at the picture's timestep and with the picture's prompt. The
picture attends to the tokens of the subject there, in a few *vital* layers:

    K = [s * K_text ; K_image ; s * K_ref],   V = [V_text ; V_image ; V_ref]

K_ref and V_ref are after QK norm and RoPE, at the reference's own positions, which are those of the picture. Queries,
image keys and all values stay unchanged.

**Adjusted dynamic shift.** The reference has a noise level sigma' below the picture's sigma, so that its details show:
the same linear schedule t, shifted the other way. With shift(mu, t) = e^mu / (e^mu + 1/t - 1),

    sigma = shift(mu, t),   sigma' = shift(-mu_ref, t) = 1 / (1 + e^(mu + mu_ref) * (1/sigma - 1))

mu_ref is 0.459375 for every size, because the authors' code computes it from a size already divided by the patch.

Where we differ: the authors first run all steps of the reference and store every layer. We run it step by step, with
the same result. The order of keys does not matter to attention, so ours puts the reference's last. Thin parts of a
subject, which the authors' rule for its tokens can miss, count here, see `subject_tokens`.

Shapes: B batch, H heads, L tokens (text first), d head size, S subject tokens, h and w of a latent.
Units: noise levels 0 (clean) to 1; mu is the logarithm of a factor on noise over signal.
Limits: the reference keeps its positions, so a subject tends to stay where it was. The authors have not tested several
references, or separate scales for text and subject.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Literal, get_args

from torch import Tensor
from torch.nn import functional as F

from .positions import GridSize

ShiftMode = Literal["reversed", "half", "twice", "linear", "normal"]

KEY_SCALE = 1.1  # s, on subject and text alike, in the authors' code
REFERENCE_SHIFT = 0.459375  # mu_ref
THIN = 1 / 8  # of a token's area: the least of a thin part that counts

# Of FLUX.1-dev's 57 layers, double blocks 0 to 18 first; found by Stable Flow, arXiv:2411.14430, and used by FreeCus.
VITAL_LAYERS = (0, 1, 2, 17, 18, 25, 28, 53, 54, 56)
PUBLISHED_DEPTH = (19, 38)

SHIFTS: Mapping[ShiftMode, float] = {"reversed": -1.0, "half": -0.5, "twice": -2.0, "linear": 0.0, "normal": 1.0}


def reference_sigma(
    sigma: float, shift: float, mode: ShiftMode = "reversed", reference_shift: float = REFERENCE_SHIFT
) -> float:
    """Noise level of the reference while the picture is at `sigma`; both 0 to 1.

    Args:
        shift: mu of the picture's own schedule.
        mode: shift of the reference's schedule: -mu_ref, half or twice of that, none, or +mu_ref.
        reference_shift: mu_ref.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in SHIFTS:
        raise ValueError(f"shift_mode must be one of {', '.join(get_args(ShiftMode))}, got '{mode}'.")
    noise_over_signal = math.exp(shift - SHIFTS[mode] * reference_shift)
    return sigma / (sigma + noise_over_signal * (1.0 - sigma))


def reference_latent(latent: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """The reference at a noise level, `[B, C, h, w]`: a mix of its latent `[1 or B, C, h, w]` and `noise`."""
    return sigma * noise + (1.0 - sigma) * latent


def in_bytes(mask: Tensor) -> Tensor:
    """A mask, 0 to 1, in steps of 1 / 255, rounded down like the authors' 8-bit masks.

    Background removal gives a probability that is never 0, so values below one step are no subject.
    """
    return (mask.float() * 255).floor() / 255


def subject_tokens(mask: Tensor, grid: GridSize) -> Tensor:
    """Numbers of the tokens that show the subject, `[S]`, in raster order.

    The authors' rule: a token counts if the mask, resized bilinearly to the token grid, is above 0 there. Soft values
    are no weights. With 16 pixels per token, the rule looks at the four pixels in a token's middle, so a thin part may
    fall between all of them. We add a rule: a token also counts if it and its eight neighbours have all failed, and its
    mean is at least `THIN`. Measured at 512 x 512, that adds nothing to discs of 24 pixels and more across, or to lines
    of 16.

    Args:
        mask: `[h, w]` of any size, 0 to 1, over the whole picture; `in_bytes`.
    """
    mask = mask[None, None].float()
    middle = F.interpolate(mask, grid, mode="bilinear", align_corners=False) > 0
    near = F.max_pool2d(middle.float(), 3, stride=1, padding=1) > 0
    thin = (F.adaptive_avg_pool2d(mask, grid) >= THIN) & ~near
    return (middle | thin).flatten().nonzero().flatten()


def subject_keys(k: Tensor, v: Tensor, tokens: Tensor, text: int, scale: float) -> tuple[Tensor, Tensor]:
    """The keys and values to attend to: `scale` * K and V of the subject, `[B, H, S, d]` each, in new memory.

    Args:
        k, v: of one layer of the reference pass, after QK norm and RoPE, `[B, H, L, d]`.
        tokens: of the subject, counted without the text; on the device of K.
        text: number of text tokens in front.
    """
    where = tokens + text
    return k.index_select(2, where) * scale, v.index_select(2, where)


def layers_from(text: str, double: int, single: int) -> tuple[int, ...]:
    """Layers by number, double blocks first, in order.

    Args:
        text: "published", "all", or numbers and ranges such as "0-2, 17, 25". The published layers are those of
            FLUX.1-dev; for a model of another depth "published" means all.

    Raises:
        ValueError: any other text, a range that runs backwards, or layers that the model does not have.
    """
    count = double + single
    wanted = text.strip().lower()
    if wanted == "published" and (double, single) == PUBLISHED_DEPTH:
        return VITAL_LAYERS
    if wanted in ("published", "all"):
        return tuple(range(count))
    found: set[int] = set()
    for part in wanted.split(","):
        numbers = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", part)
        if numbers is None:
            raise ValueError(f"layers must be 'published', 'all', or numbers such as '0-2, 17, 25', got '{text[:40]}'.")
        first = int(numbers[1])
        last = first if numbers[2] is None else int(numbers[2])
        if last < first:
            raise ValueError(f"layers holds the range {first}-{last}, which runs backwards. Write {last}-{first}.")
        if last >= count:
            raise ValueError(f"layers names {last}, the model has 0 to {count - 1} ({double} double, {single} single).")
        found.update(range(first, last + 1))
    return tuple(sorted(found))
