"""Forecast a feature at a skipped evaluation from its values at computed ones.

Source: TaylorSeer, arXiv:2503.06923. Derivatives are backward differences over the gap d between the last two full
computations, summed as a Taylor polynomial at distance a:

    D_0(k) = F(k),   D_{i+1}(k) = (D_i(k) - D_i(k - d)) / d,   F(k + a) ~ sum_i D_i(k) * a^i / i!

`taylor_weights` is that recursion, as the authors run it. It divides by the last gap at every order. So at even gaps it
is exact for straight lines, but not for parabolas: for `s^2`, even gaps N and distance a it is off by -N*a.
`newton_weights` is the polynomial through the same points, exact up to its degree at any spacing. `damped_weights`
follows its slope and bend in part only.

Shapes: both give the weights of a sum, one float for each point, so features may have any shape. `weighted_sum`
computes the sum. Units: TaylorSeer counts in evaluations; Newton's form takes any coordinate, such as sigma.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import factorial, log
from typing import Literal

import torch
from torch import Tensor

from .schedules import UNDAMPED, Damping, damping_of


def taylor_weights(points: Sequence[int], at: int, order: int, derivatives_from: int = 0) -> list[float]:
    """Weights of TaylorSeer's forecast.

    Args:
        points: evaluations with a computed feature, newest first, no two equal.
        at: the evaluation to forecast.
        order: highest derivative. 0 repeats the newest feature.
        derivatives_from: features from before this evaluation get no derivatives, as in the authors' code for FLUX,
            where it is `first_enhance - 1`.

    Returns:
        One weight for each of `points`; those behind the first `order + 1` are 0.
    """
    count = min(len(points), order + 1)
    # factors[j][i]: D_i at points[j], as coefficients of the features at `points`
    factors: dict[int, list[list[float]]] = {}
    for j in reversed(range(count)):
        rows = [[1.0 if k == j else 0.0 for k in range(len(points))]]
        if j + 1 < count and points[j] >= derivatives_from:
            gap = points[j] - points[j + 1]
            for i in range(min(order, len(factors[j + 1]))):
                rows.append([(a - b) / gap for a, b in zip(rows[i], factors[j + 1][i], strict=True)])
        factors[j] = rows
    ahead = at - points[0]
    terms = [ahead**i / factorial(i) for i in range(len(factors[0]))]
    return [sum(t * row[k] for t, row in zip(terms, factors[0], strict=True)) for k in range(len(points))]


def newton_weights(points: Sequence[float], at: float, order: int) -> list[float]:
    """Weights of the polynomial of degree `order` through the newest points, in Lagrange's form of Newton's polynomial.

    Args:
        points: coordinates of the computed features, newest first, no two equal.
        at: the coordinate to forecast.
        order: degree; lower if there are too few points.

    Returns:
        One weight for each of `points`; those behind the first `order + 1` are 0. They sum to 1.
    """
    used = points[: order + 1]
    weights = []
    for k, own in enumerate(used):
        weight = 1.0
        for j, other in enumerate(used):
            if j != k:
                weight *= (at - other) / (own - other)
        weights.append(weight)
    return weights + [0.0] * (len(points) - len(used))


def damped_weights(points: Sequence[float], at: float, order: int, damping: Damping) -> list[float]:
    """`newton_weights` that follow the slope, the bend and what is above it in part only.

    With `N_i` the polynomial of degree i:  `N_0 + slope * (N_1 - N_0 + bend * (N_2 - N_1 + N_3 - N_2 + ...))`.
    """
    held, line = (newton_weights(points, at, degree) for degree in (0, min(order, 1)))
    full = newton_weights(points, at, order)
    slope, bend = damping.slope, damping.bend
    return [h + slope * (a - h + bend * (f - a)) for h, a, f in zip(held, line, full, strict=True)]


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`sum_k weights[k] * tensors[k]`, summed in float32, in the dtype of the tensors.

    Weights of forecasts reach 1 to 15 with changing signs, so rounding in half precision would show. A float16 sum is
    clamped to float16's range. One tensor with weight 1 comes back bit for bit.
    """
    first = tensors[0]
    total = None
    for tensor, weight in zip(tensors, weights, strict=True):
        if weight == 0:
            continue
        part = tensor.to(torch.promote_types(first.dtype, torch.float32)) * weight
        total = part if total is None else total + part
    if total is None:
        return torch.zeros_like(first)
    if first.dtype == torch.float16:
        limit = torch.finfo(torch.float16).max
        total = total.clamp(-limit, limit)
    return total.to(first.dtype)


@dataclass(frozen=True)
class Point:
    """The point of a run at which a feature was computed."""

    index: int  # evaluation
    sigma: float
    step: float | None = None  # position in the schedule: 2.5 is half-way from sigmas[2] to sigmas[3]; None: as `index`


Form = Literal["taylor", "newton"]
Coordinate = Literal["index", "step", "sigma", "log sigma"]


@dataclass(frozen=True)
class Forecaster:
    """How stored features become a forecast. `order=0` repeats the newest one.

    coordinate: of the polynomial in Newton's form. TaylorSeer's recursion always counts evaluations. "step" is the same
        with samplers that evaluate once a step, and is right too with samplers that evaluate twice.
    derivatives_from: see `taylor_weights`.
    damped: ask for the damping of each run, in Newton's form: `for_run`.
    damping: that of this run.
    """

    order: int = 1
    form: Form = "taylor"
    coordinate: Coordinate = "index"
    derivatives_from: int = 0
    damped: bool = False
    damping: Damping = UNDAMPED

    def __post_init__(self):
        if self.order < 0:
            raise ValueError(f"order must be 0 or more, got {self.order}.")

    def for_run(self, count: int, guidance: float, multistep: bool = False) -> Forecaster:
        """Itself for a run with `count` computed evaluations, with no more points than its damping leaves a use for."""
        if not self.damped:
            return self
        damping = damping_of(count, guidance, multistep)
        most = 0 if damping.slope == 0 else 1 if damping.bend == 0 else self.order
        return replace(self, order=min(self.order, most), damping=damping)

    def coordinate_of(self, point: Point) -> float:
        """The coordinate of a point."""
        if self.form == "taylor" or self.coordinate == "index":
            return float(point.index)
        if self.coordinate == "step":
            return float(point.index if point.step is None else point.step)
        return point.sigma if self.coordinate == "sigma" else log(max(point.sigma, 1e-8))  # 0 has no logarithm

    def weights(self, points: Sequence[Point], at: Point) -> list[float]:
        """One weight for each of `points`, newest first, no two `too_near`."""
        if self.form == "taylor":
            return taylor_weights([p.index for p in points], at.index, self.order, self.derivatives_from)
        coordinates, here = [self.coordinate_of(p) for p in points], self.coordinate_of(at)
        if self.damping == UNDAMPED:
            return newton_weights(coordinates, here, self.order)
        return damped_weights(coordinates, here, self.order, self.damping)

    def too_near(self, a: Point, b: Point) -> bool:
        """Whether two points are too near each other for a meaningful difference."""
        x, y = self.coordinate_of(a), self.coordinate_of(b)
        return abs(x - y) <= 1e-5 * max(abs(x), abs(y), 1e-3)


FORECASTS: dict[str, Forecaster] = {  # by their names for users, all but the order
    "Newton, damped": Forecaster(form="newton", coordinate="step", damped=True),
    "Taylor (paper)": Forecaster(),
    "Newton, steps": Forecaster(form="newton", coordinate="step"),
    "Newton, sigma": Forecaster(form="newton", coordinate="sigma"),
    "Newton, log sigma": Forecaster(form="newton", coordinate="log sigma"),
}
