"""Predictors by name, and the one linear combination that all of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dit_accel.forecast.chebyshev import blended_weights
from dit_accel.forecast.hermite import hermite_weights
from dit_accel.forecast.settings import Forecast
from dit_accel.forecast.weights import damped_weights, reuse_weights, taylor_weights

Limits = tuple[float, float]  # coordinates of the first and the last step of a run
UNIT: Limits = (0.0, 1.0)

WEIGHTS: dict[str, Callable[[Forecast, Sequence[float], float, Limits], list[float]]] = {
    "reuse": lambda forecast, u, v, limits: reuse_weights(u, v),
    "newton": lambda forecast, u, v, limits: damped_weights(u, v, forecast.order, forecast.damping),
    "taylor": lambda forecast, u, v, limits: taylor_weights(u, v, forecast.order),
    "hermite": lambda forecast, u, v, limits: hermite_weights(u, v, forecast.order, forecast.scale),
    "chebyshev": lambda forecast, u, v, limits: blended_weights(
        u, v, forecast.order, forecast.ridge, limits, forecast.blend
    ),
}


def weights_for(forecast: Forecast, u: Sequence[float], v: float, limits: Limits = UNIT) -> list[float]:
    """Weights of the anchors at coordinates u (oldest first, all different) for a value at v.

    limits: the ends of the run, which Chebyshev's polynomials are stretched to.
    """
    return WEIGHTS[forecast.predictor](forecast, u, v, limits)


def combine(weights: Sequence[float], anchors: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
    """base + sum_j w_j * anchors[j], all of one shape [*], summed in fp32 and returned in the anchors' dtype.

    Weights reach 3 to 6 in size and cancel, so half-precision sums would drown the forecast in rounding.
    """
    dtype = anchors[-1].dtype
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    used = [(w, a) for w, a in zip(weights, anchors) if w != 0.0]
    if base is None:
        weight, anchor = used.pop()
        total = anchor.to(wide) * weight
    else:
        total = base.to(wide)
    for weight, anchor in used:
        total = torch.add(total, anchor.to(wide), alpha=weight)
    return total.to(dtype)
