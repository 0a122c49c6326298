"""Photographs that come with well-known Python packages, for the one feature that people judge on photographs.

| photograph | comes with | by, licence |
|---|---|---|
| astronaut | scikit-image | NASA, public domain |
| brick, grass, gravel | scikit-image | CC0 Textures, CC0 |
| camera | scikit-image | L. Varshney, CC0 |
| china | scikit-learn | danielbuechele, CC BY 2.0 |
| coins, moon | scikit-image | public domain |
| hubble_deep_field | scikit-image | NASA, public domain |
| motorcycle_left | scikit-image | D. Scharstein and others, CC0 |
| retina | scikit-image | Häggström, CC0 |
| rocket | scikit-image | SpaceX, CC0 |
| **chelsea** | scikit-image | S. van der Walt, CC0 |
| **coffee** | scikit-image | R. Michetti, CC0 |
| **flower** | scikit-learn | vultilion, CC BY 2.0 |
| **grace_hopper** | matplotlib | US Navy, public domain |

Those in bold are held out whole: nothing is trained on any part of them.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import cv2
import numpy as np

_SKIMAGE, _SKLEARN, _MATPLOTLIB = "skimage.data", "sklearn.datasets.images", "matplotlib.mpl-data.sample_data"
TRAINED_ON = {
    "astronaut.png": _SKIMAGE, "brick.png": _SKIMAGE, "camera.png": _SKIMAGE, "china.jpg": _SKLEARN,
    "coins.png": _SKIMAGE, "grass.png": _SKIMAGE, "gravel.png": _SKIMAGE, "hubble_deep_field.jpg": _SKIMAGE,
    "moon.png": _SKIMAGE, "motorcycle_left.png": _SKIMAGE, "retina.jpg": _SKIMAGE, "rocket.jpg": _SKIMAGE,
}  # fmt: skip
HELD_OUT = {
    "chelsea.png": _SKIMAGE, "coffee.png": _SKIMAGE, "flower.jpg": _SKLEARN, "grace_hopper.jpg": _MATPLOTLIB,
}  # fmt: skip


@cache
def photographs(held_out: bool = False) -> tuple[np.ndarray, ...]:
    """RGB uint8 `[H, W, 3]` each; grey ones with three equal channels."""
    return tuple(_read(name, where) for name, where in (HELD_OUT if held_out else TRAINED_ON).items())


def _read(name: str, where: str) -> np.ndarray:
    package, *folders = where.split(".")
    path = files(package).joinpath(*folders, name)
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def crop(rng: np.random.Generator, size: int) -> np.ndarray:
    """A random square of a photograph, `[size, size, 3]`: scaled down by 1 to 3, mirrored, its colours shifted."""
    pictures = photographs()
    picture = pictures[rng.choice(len(pictures), p=_shares())]
    side = min(int(size * rng.uniform(1, 3)), *picture.shape[:2])
    top, left = (int(rng.integers(n - side + 1)) for n in picture.shape[:2])
    cut = cv2.resize(picture[top : top + side, left : left + side], (size, size), interpolation=cv2.INTER_AREA)
    cut = cut[:, ::-1] if rng.random() < 0.5 else cut
    tint = rng.uniform(0.85, 1.15, 3) * rng.uniform(0.85, 1.15)
    return np.clip(255 * (cut / 255) ** rng.uniform(0.8, 1.25) * tint, 0, 255).round().astype(np.uint8)


@cache
def _shares() -> np.ndarray:
    """How often each is shown: coloured photographs four times as often as grey ones and as stars and tissue."""
    plain = ("brick.png", "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "moon.png", "retina.jpg")
    shares = np.array([1.0 if name in plain else 4.0 for name in TRAINED_ON])
    return shares / shares.sum()
