"""Predictors by name, and the one linear combination that all of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.forecast.chebyshev import blended_weights
from dit_accel.forecast.evidence import Evidence as Evidence
from dit_accel.forecast.evidence import aligned_weights, regressed_weights
from dit_accel.forecast.foca import HORIZON, foca_weights
from dit_accel.forecast.hermite import hermite_weights
from dit_accel.forecast.settings import Forecast
from dit_accel.forecast.weights import damped_weights, reuse_weights, table_weights, taylor_weights

Kind = tuple[torch.dtype, torch.device]
Limits = tuple[float, float]  # coordinates of the first and the last step of a run
UNIT: Limits = (0.0, 1.0)


@dataclass(frozen=True)
class Asked:
    """What a predictor is told. u: coordinates of the anchors, oldest first, all different; v: the one asked for;
    order: degree; limits: the ends of the run, which Chebyshev's polynomials are stretched to; evidence: the probe, for
    predictors that look at it; step: its number."""

    u: Sequence[float]
    v: float
    order: int
    limits: Limits = UNIT
    evidence: Evidence | None = None
    step: int = 0


def _foca(forecast: Forecast, asked: Asked) -> list[float]:
    return foca_weights(asked.u, asked.v, HORIZON if forecast.coordinate == "step" else None)


def _newton(forecast: Forecast, asked: Asked) -> list[float]:
    return damped_weights(asked.u, asked.v, asked.order, forecast.damping)


WEIGHTS: dict[str, Callable[[Forecast, Asked], list[float]]] = {
    "reuse": lambda forecast, asked: reuse_weights(asked.u, asked.v),
    "newton": _newton,
    "taylor": lambda forecast, asked: taylor_weights(asked.u, asked.v, asked.order),
    "hermite": lambda forecast, asked: hermite_weights(asked.u, asked.v, asked.order, forecast.scale),
    "chebyshev": lambda forecast, asked: blended_weights(
        asked.u, asked.v, asked.order, forecast.ridge, asked.limits, forecast.blend
    ),
    "foca": _foca,
    "aligned": lambda forecast, asked: aligned_weights(asked.u, asked.evidence),
    "regressed": lambda forecast, asked: regressed_weights(_newton(forecast, asked), asked.evidence, forecast.ridge),
    "learned": lambda forecast, asked: table_weights(forecast.table or (), asked.step, len(asked.u)),
}


def weights_for(
    forecast: Forecast,
    u: Sequence[float],
    v: float,
    limits: Limits = UNIT,
    evidence: Evidence | None = None,
    step: int = 0,
    order: int | None = None,
) -> list[float]:
    """Weights of the anchors at coordinates u (oldest first, all different) for a value at v; see `Asked`."""
    degree = forecast.order if order is None else order
    return WEIGHTS[forecast.predictor](forecast, Asked(u, v, degree, limits, evidence, step))


def combine(
    weights: Sequence[float], anchors: Sequence[Tensor], base: Tensor | None = None, kind: Kind | None = None
) -> Tensor:
    """base + sum_j w_j * anchors[j], all of one shape [*], summed in fp32.

    kind: dtype and device of the result; default those of the anchors.

    Weights reach 3 to 6 in size and cancel, so half-precision sums would drown the forecast in rounding.
    """
    dtype, device = kind or (anchors[-1].dtype, anchors[-1].device)
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    used = [(w, a) for w, a in zip(weights, anchors) if w != 0.0]
    if base is None:
        weight, anchor = used.pop()
        total = anchor.to(device, wide) * weight
    else:
        total = base.to(wide)
    for weight, anchor in used:
        total = torch.add(total, anchor.to(device, wide), alpha=weight)
    return total.to(dtype)
