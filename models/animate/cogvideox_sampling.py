"""The steps of CogVideoX's own schedulers: "trailing" spacing of the timesteps, from pure noise on.

Source: "Common Diffusion Noise Schedules and Sample Steps are Flawed", arXiv:2305.08891, table 2, as diffusers counts
it for CogVideoX's DPM and DDIM schedulers.
"""

from __future__ import annotations

import numpy as np


def trailing(steps: int, timesteps: int = 1000) -> list[int]:
    """The timesteps of `steps` steps, falling: 25 of 1000 are 999, 959, ..., 39.

    Raises:
        ValueError: fewer than one step, or more than there are timesteps.
    """
    if not 1 <= steps <= timesteps:
        raise ValueError(f"steps must be from 1 to {timesteps}, got {steps}.")
    return [round(float(at)) - 1 for at in np.arange(timesteps, 0, -timesteps / steps)][:steps]
