"""Spectrum (2603.01623): ridge regression of the anchors on Chebyshev polynomials of time, read at the step asked for.

C = (Phi^T Phi + lambda I)^-1 Phi^T H with Phi_jm = T_m(t_j), F^ = sum_m C_m T_m(t): the weights depend on times alone.
Two deviations from the published code: time runs over the whole run instead of a fixed 0 to 50, and the constant T_0 is
not shrunk, since a constant feature should stay as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_accel.forecast.weights import newton_weights

DEGREE, RIDGE = 4, 0.1  # published


def chebyshev_weights(
    u: Sequence[float], v: float, order: int = DEGREE, ridge: float = RIDGE, limits: tuple[float, float] = (0.0, 50.0)
) -> list[float]:
    """Weights of the anchors at coordinates u (all different) for a value at v; they sum to 1.

    order: degree, which falls to what the anchors allow; limits: the coordinates at the two ends of the run.
    """
    degree = min(order, len(u) - 1)
    table = _polynomials([*u, v], degree, limits)
    known, asked = table[:-1], table[-1]
    shrink = ridge * torch.eye(degree + 1, dtype=table.dtype)
    shrink[0, 0] = 0.0
    return (known @ torch.linalg.solve(known.T @ known + shrink, asked)).tolist()


def blended_weights(
    u: Sequence[float], v: float, order: int, ridge: float, limits: tuple[float, float], share: float
) -> list[float]:
    """share of Chebyshev's weights, the rest a straight line through the last two anchors (0.5 in the later code)."""
    smooth, straight = chebyshev_weights(u, v, order, ridge, limits), newton_weights(u, v, 1)
    return [share * a + (1 - share) * b for a, b in zip(smooth, straight)]


def _polynomials(points: Sequence[float], degree: int, limits: tuple[float, float]) -> Tensor:
    """T_0 to T_degree at the points, limits mapped to -1 and 1 -> [N, degree + 1]."""
    low, high = limits
    x = (2 * torch.tensor(points, dtype=torch.float64) - low - high) / (high - low)
    columns = [torch.ones_like(x), x]
    while len(columns) <= degree:
        columns.append(2 * x * columns[-1] - columns[-2])
    return torch.stack(columns[: degree + 1], dim=1)
