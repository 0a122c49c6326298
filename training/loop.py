"""What the training loops share: where they run, in which precision, at which noise levels, and their plot."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import checkpoints
from .optim import Muon, schedule


def device_of() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fast_matrices(device: torch.device) -> torch.autocast:
    """bfloat16 matrix products where the processor has them (12 times float32 on AMX, 3 on AVX-512), else float32."""
    about = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fast = "amx_bf16" in about or "avx512_bf16" in about
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" or fast)


def compiled(module: nn.Module) -> nn.Module:
    """Compiled where products are fast; in plain float32 minutes of compiling gain nothing."""
    device = device_of()
    return torch.compile(module) if device.type == "cuda" or fast_matrices(device)._enabled else module


def noise_levels(rng: np.random.Generator, batch: int) -> Tensor:
    """Noise levels in 0..1: logit-normal(0, 1) shifted by e^0.6, and 15 % uniform."""
    t = 1 / (1 + np.exp(-rng.standard_normal(batch)))
    t = math.exp(0.6) * t / (1 + (math.exp(0.6) - 1) * t)
    t = np.where(rng.random(batch) < 0.15, rng.random(batch), t)
    return torch.from_numpy(np.clip(t, 1e-3, 1.0).astype(np.float32))


def plot(file: Path, losses: list[float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if len(losses) < 20:
        return
    window = max(1, len(losses) // 200)
    smooth = np.convolve(losses, np.ones(window) / window, "valid")
    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    axes.plot(np.arange(len(smooth)) + window, smooth)
    axes.set(xlabel="step", ylabel="loss", yscale="log", title=file.stem)
    figure.tight_layout()
    figure.savefig(file, dpi=90)
    pyplot.close(figure)


USUAL = partial(schedule, warm_up=30)


def learn(
    name: Path,
    module: nn.Module,
    steps: int,
    lr: float,
    loss_of: Callable[[int], Tensor],
    optimiser_of: Callable[..., torch.optim.Optimizer] = Muon,
    rate: Callable[[int, int], float] = USUAL,
) -> dict[str, Tensor]:
    """Train `module`, and return the average of its weights. Continues at the checkpoint `name`, if any.

    Args:
        loss_of: from the number of a step to its loss; runs in the precision of `fast_matrices`.
        rate: from a step, and how many there are, to its part of `lr`.
    """
    device = device_of()
    optimiser = optimiser_of(module.parameters(), lr=lr, weight_decay=0.0)
    average = {k: v.detach().clone() for k, v in module.state_dict().items()}
    start, losses = 0, []
    if name.exists():
        kept = torch.load(name, weights_only=True, map_location=device)
        module.load_state_dict(kept["model"])
        optimiser.load_state_dict(kept["optimiser"])
        average, start, losses = kept["ema"], kept["step"], kept["losses"]
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name.stem, mininterval=5)
    for step in bar:
        with fast_matrices(device):
            loss = loss_of(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = lr * rate(step, steps)
        with fast_matrices(device):
            optimiser.step()
        decay = min(0.995, (step + 1) / (step + 10))
        for key, value in module.state_dict().items():
            average[key].lerp_(value, 1 - decay)
        losses.append(loss.item())
        bar.set_postfix(loss=f"{np.mean(losses[-100:]):.4f}", refresh=False)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            state = {"model": module.state_dict(), "ema": average, "optimiser": optimiser.state_dict()}
            checkpoints.save(name, {**state, "step": step + 1, "losses": losses})
            plot(name.with_suffix(".png"), losses)
    return average
