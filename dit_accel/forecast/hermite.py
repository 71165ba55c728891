"""HiCache (2508.16984): TaylorSeer's differences on scaled Hermite polynomials instead of powers, which shrinks them.

F^ = sum_k D_k / k! * s^k H_k(s x), H_k the physicists' Hermite polynomials, x the steps since the last computed one and
the scale. Its first degree is 2 s^2 x: at the published s = 0.5 half of the slope is left, at sqrt(1/2) all of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from dit_accel.forecast.weights import taylor_differences

SCALE = 0.5  # published, for every model


def hermite_weights(u: Sequence[float], v: float, order: int, scale: float = SCALE) -> list[float]:
    """Weights of the anchors at coordinates u (oldest first, all different) for a value at v; they sum to 1."""
    x = v - u[-1]
    weights = [0.0] * len(u)
    for k, difference in enumerate(taylor_differences(u, order)):
        factor = 1.0 if k == 0 else scale**k * _hermite(k, scale * x) / math.factorial(k)
        weights = [w + factor * d for w, d in zip(weights, difference)]
    return weights


def _hermite(degree: int, x: float) -> float:
    """Physicists' Hermite polynomial by its recursion H_n+1 = 2 x H_n - 2 n H_n-1."""
    before, now = 0.0, 1.0
    for n in range(degree):
        before, now = now, 2 * x * now - 2 * n * before
    return now
