"""Forecast weights: every predictor here is sum_j w_j * anchor_j, and only the weights differ.

u: coordinates of the anchors, oldest first, all different; v: the coordinate asked for. Plain floats, no framework.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def differ(a: float, b: float) -> bool:
    """False where two coordinates are the same place: solvers repeat sigmas, and two nodes there have no polynomial."""
    return abs(a - b) >= 1e-9


def reuse_weights(u: Sequence[float], v: float, order: int = 0) -> list[float]:
    """Order 0: the newest anchor as it is (FORA 2407.01425, FBCache)."""
    del v, order
    return [0.0] * (len(u) - 1) + [1.0]


def newton_weights(u: Sequence[float], v: float, order: int) -> list[float]:
    """Newton's divided differences through the newest `order + 1` anchors, at their true, uneven positions.

    The interpolating polynomial is unique, so its weights are Lagrange's: w_j = prod_{m != j} (v - u_m) / (u_j - u_m).
    Exact on polynomials up to `order`; the order falls to what the anchors allow.
    """
    first = max(0, len(u) - order - 1)
    nodes = u[first:]
    weights = [
        math.prod((v - other) / (node - other) for k, other in enumerate(nodes) if k != j)
        for j, node in enumerate(nodes)
    ]
    return [0.0] * first + weights


def damped_weights(u: Sequence[float], v: float, order: int, damping: float) -> list[float]:
    """Newton's weights with the highest difference scaled by 1 - damping: between two orders.

    Differences of high order carry the most noise; HiCache (2508.16984) shrinks them by its Hermite scale as well.
    """
    order = min(order, len(u) - 1)
    high = newton_weights(u, v, order)
    if not damping or order == 0:
        return high
    low = newton_weights(u, v, order - 1)
    return [(1 - damping) * h + damping * w for h, w in zip(high, low)]


def taylor_weights(u: Sequence[float], v: float, order: int) -> list[float]:
    """TaylorSeer (2503.06923, eq. 8) as published: differences over the last gap, summed as derivatives x^k / k!.

    Exact to degree 1 only: from order 2 on it adds backward differences as if they were derivatives, and divides by the
    last gap alone.
    """
    x = v - u[-1]
    weights = [0.0] * len(u)
    for k, difference in enumerate(taylor_differences(u, order)):
        factor = x**k / math.factorial(k)
        weights = [w + factor * d for w, d in zip(weights, difference)]
    return weights


def taylor_differences(u: Sequence[float], order: int) -> list[list[float]]:
    """TaylorSeer's D_0 to D_order at the last anchor, each as weights of the anchors.

    Its recursion D_0 = F, D_{k+1} = (D_k now - D_k before) / gap, written out; the order falls to what there is.
    """
    count = len(u)
    tables: list[list[list[float]]] = []  # tables[n][k]: weights of D_k after anchor n
    for n in range(count):
        unit = [1.0 if j == n else 0.0 for j in range(count)]
        table = [unit]
        for k in range(min(order, n)):
            before = tables[n - 1]
            gap = u[n] - u[n - 1]
            table.append([(a - b) / gap for a, b in zip(table[k], before[k])])
        tables.append(table)
    return tables[-1]


def table_weights(table: Sequence[Sequence[float]], step: int, count: int) -> list[float]:
    """Weights that were learned for each step (L2P 2604.26365), for the newest anchors, oldest of them first.

    Past the table's end its last row is taken; where fewer anchors are there than a row asks for, the newest is reused.
    """
    row = table[min(step, len(table) - 1)] if table else ()
    if not row or len(row) > count:
        return reuse_weights([0.0] * count, 0.0)
    return [0.0] * (count - len(row)) + [float(weight) for weight in row]
