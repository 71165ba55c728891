"""Predictors by name, and the one linear combination that all of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dit_accel.forecast.settings import Forecast
from dit_accel.forecast.weights import damped_weights, newton_weights, reuse_weights, taylor_weights

WEIGHTS: dict[str, Callable[[Sequence[float], float, int], list[float]]] = {
    "reuse": reuse_weights,
    "newton": newton_weights,
    "taylor": taylor_weights,
}


def weights_for(forecast: Forecast, u: Sequence[float], v: float) -> list[float]:
    """Weights of the anchors at coordinates u (oldest first, all different) for a value at v."""
    if forecast.predictor == "newton":
        return damped_weights(u, v, forecast.order, forecast.damping)
    return WEIGHTS[forecast.predictor](u, v, forecast.order)


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
