"""What happens to a photograph on its way through cameras, phones and websites: a second-order degradation.

Blur, resize, noise and JPEG, twice, with a last sinc filter for ringing. Source: Real-ESRGAN, arXiv:2107.10833,
section 3; the ranges are those that DiT4SR trains with (SeeSR's). Filters, resizing and JPEG are OpenCV's. Left out:
generalised Gaussian and plateau-shaped kernels.
"""

from __future__ import annotations

import cv2
import numpy as np
from scipy.special import j1

FACTOR = 4
_RESIZE = (cv2.INTER_AREA, cv2.INTER_LINEAR, cv2.INTER_CUBIC)


def degraded(picture: np.ndarray, rng: np.random.Generator, factor: int = FACTOR) -> np.ndarray:
    """A small, worn copy of a picture, uint8 RGB `[H, W, 3]` -> `[H / factor, W / factor, 3]`."""
    height, width = (n // factor for n in picture.shape[:2])
    out = _blurred(picture.astype(np.float32), rng, 3.0)
    out = _resized(out, picture.shape[:2], _scale(rng, (0.2, 0.7, 0.1), 0.3, 1.5), rng)
    out = _jpeg(_noisy(out, rng, 15.0, 2.0), rng, 60, 95)
    if rng.random() < 0.5:
        out = _blurred(out, rng, 1.5)
    out = _resized(out, (height, width), _scale(rng, (0.3, 0.4, 0.3), 0.6, 1.2), rng)
    out = _noisy(out, rng, 12.0, 1.0)
    before = rng.random() < 0.5
    out = out if before else _jpeg(out, rng, 60, 100)
    out = _resized(out, (height, width), 1.0, rng)
    if rng.random() < 0.8:
        out = cv2.filter2D(out, -1, _sinc(rng), borderType=cv2.BORDER_REFLECT)
    out = _jpeg(out, rng, 60, 100) if before else out
    return np.clip(np.round(out), 0, 255).astype(np.uint8)


def enlarged(small: np.ndarray, height: int, width: int, method: int = cv2.INTER_CUBIC) -> np.ndarray:
    """A picture made larger by plain interpolation, uint8 `[height, width, 3]`."""
    return cv2.resize(small, (width, height), interpolation=method)


def _blurred(x: np.ndarray, rng: np.random.Generator, widest: float) -> np.ndarray:
    if rng.random() < 0.1:
        return cv2.filter2D(x, -1, _sinc(rng), borderType=cv2.BORDER_REFLECT)
    wide, narrow = (float(s) for s in rng.uniform(0.2, widest, 2))
    narrow = wide if rng.random() < 0.64 else narrow  # as often round as there
    angle = rng.uniform(0, np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    inverse = turn @ np.diag([wide**-2, narrow**-2]) @ turn.T
    where = np.mgrid[-10:11, -10:11].astype(np.float64)
    kernel = np.exp(-0.5 * np.einsum("iyx,ij,jyx->yx", where, inverse, where))
    return cv2.filter2D(x, -1, (kernel / kernel.sum()).astype(np.float32), borderType=cv2.BORDER_REFLECT)


def _sinc(rng: np.random.Generator) -> np.ndarray:
    """A circular low-pass filter, 21 x 21, cut off between a third of the way and the end."""
    cutoff = rng.uniform(np.pi / 3, np.pi)
    radius = np.hypot(*np.mgrid[-10:11, -10:11])
    radius[10, 10] = 1.0
    kernel = cutoff * j1(cutoff * radius) / (2 * np.pi * radius)
    kernel[10, 10] = cutoff**2 / (4 * np.pi)
    return (kernel / kernel.sum()).astype(np.float32)


def _scale(rng: np.random.Generator, shares: tuple[float, float, float], least: float, most: float) -> float:
    """Up, down or kept, with these shares."""
    way = rng.choice(3, p=shares)
    return float((rng.uniform(1, most), rng.uniform(least, 1), 1.0)[way])


def _resized(x: np.ndarray, size: tuple[int, ...], scale: float, rng: np.random.Generator) -> np.ndarray:
    height, width = (max(1, int(n * scale)) for n in size)
    return cv2.resize(x, (width, height), interpolation=int(rng.choice(_RESIZE)))


def _noisy(x: np.ndarray, rng: np.random.Generator, strongest: float, strongest_shot: float) -> np.ndarray:
    """Gaussian noise, or shot noise, whose variance grows with the light. In four of ten, all colours have the same."""
    x = np.clip(x, 0, 255)
    shape = (*x.shape[:2], 1 if rng.random() < 0.4 else 3)
    noise = rng.standard_normal(shape).astype(np.float32)
    if rng.random() < 0.5:
        return np.clip(x + rng.uniform(1, strongest) * noise, 0, 255)
    light = x if shape[2] == 3 else x.mean(2, keepdims=True)
    return np.clip(x + rng.uniform(0.05, strongest_shot) * np.sqrt(light) * noise, 0, 255)


def _jpeg(x: np.ndarray, rng: np.random.Generator, worst: int, best: int) -> np.ndarray:
    quality = int(rng.integers(worst, best + 1))
    bgr = cv2.cvtColor(np.clip(np.round(x), 0, 255).astype(np.uint8), cv2.COLOR_RGB2BGR)
    _, code = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.cvtColor(cv2.imdecode(code, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB).astype(np.float32)
