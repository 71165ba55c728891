"""Spectrum (2603.01623): ridge regression of the anchors on Chebyshev polynomials of time, read at the step asked for.

C = (Phi^T Phi + lambda I)^-1 Phi^T H with Phi_jm = T_m(t_j), F^ = sum_m C_m T_m(t): the weights depend on times alone.
Two deviations from the published code: time runs over the whole run instead of a fixed 0 to 50, and the constant T_0 is
not shrunk, since a constant feature should stay as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

from dit_accel.forecast.weights import newton_weights

DEGREE, RIDGE = 4, 0.1  # published


def chebyshev_weights(
    u: Sequence[float], v: float, order: int = DEGREE, ridge: float = RIDGE, limits: tuple[float, float] = (0.0, 50.0)
) -> list[float]:
    """Weights of the anchors at coordinates u (all different) for a value at v; they sum to 1.

    order: degree, which falls to what the anchors allow; limits: the coordinates at the two ends of the run.
    """
    degree = min(order, len(u) - 1)
    table = [_polynomials(point, degree, limits) for point in (*u, v)]
    known, asked = table[:-1], table[-1]
    gram = [[sum(row[a] * row[b] for row in known) for b in range(degree + 1)] for a in range(degree + 1)]
    for m in range(1, degree + 1):
        gram[m][m] += ridge
    solved = _solve(gram, asked)
    return [sum(a * b for a, b in zip(row, solved)) for row in known]


def blended_weights(
    u: Sequence[float], v: float, order: int, ridge: float, limits: tuple[float, float], share: float
) -> list[float]:
    """share of Chebyshev's weights, the rest a straight line through the last two anchors (0.5 in the later code)."""
    smooth, straight = chebyshev_weights(u, v, order, ridge, limits), newton_weights(u, v, 1)
    return [share * a + (1 - share) * b for a, b in zip(smooth, straight)]


def _polynomials(point: float, degree: int, limits: tuple[float, float]) -> list[float]:
    """T_0 to T_degree at a point, limits mapped to -1 and 1."""
    low, high = limits
    x = (2 * point - low - high) / (high - low)
    values = [1.0, x]
    while len(values) <= degree:
        values.append(2 * x * values[-1] - values[-2])
    return values[: degree + 1]


def _solve(matrix: list[list[float]], right: Sequence[float]) -> list[float]:
    """x of matrix @ x = right by Gauss's elimination with pivots; at most five unknowns here."""
    rows = [[*row, value] for row, value in zip(matrix, right)]
    count = len(rows)
    for k in range(count):
        pivot = max(range(k, count), key=lambda n: abs(rows[n][k]))
        rows[k], rows[pivot] = rows[pivot], rows[k]
        for row in rows[k + 1 :]:
            factor = row[k] / rows[k][k]
            row[k:] = [a - factor * b for a, b in zip(row[k:], rows[k][k:])]
    found = [0.0] * count
    for k in reversed(range(count)):
        found[k] = (rows[k][-1] - sum(rows[k][m] * found[m] for m in range(k + 1, count))) / rows[k][k]
    return found
