"""Muon for matrices, in whatever precision is in force: torch's own insists on bfloat16, slow on most processors.

Source: Keller Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def orthogonalise(gradients: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration towards `U V^T` of each matrix, `[N, rows, columns]`."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = gradients / (gradients.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None])
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr: float = 0.015, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                by_shape.setdefault(tuple(p.shape), []).append(p)
            for (rows, columns), params in by_shape.items():
                updates = []
                for p in params:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(buffer, group["momentum"]))
                scale = group["lr"] * math.sqrt(max(1.0, rows / columns))
                for p, update in zip(params, orthogonalise(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.to(p), alpha=-scale)


def optimisers(model: nn.Module, lr: float, muon_lr: float) -> list[torch.optim.Optimizer]:
    """Muon on the blocks' matrices except modulation, AdamW on the rest."""
    matrices, rest = [], []
    for name, p in model.named_parameters():
        inner = "blocks." in name and p.ndim == 2 and not any(part in name for part in ("_mod.", "modulation.", "norm"))
        (matrices if inner else rest).append(p)
    return [Muon(matrices, lr=muon_lr), torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.97), weight_decay=0.01)]


def schedule(step: int, total: int, warm_up: int = 60, flat: float = 0.4, floor: float = 0.02) -> float:
    """Learning-rate factor: linear warm-up, flat, cosine to `floor`."""
    if step < warm_up:
        return (step + 1) / warm_up
    hold = max(warm_up, int(flat * total))
    if step < hold:
        return 1.0
    part = min(1.0, (step - hold) / max(1, total - hold))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * part))
