"""FoCa (2508.16211): the feature as the solution of an ODE; slope by BDF2 at the last computed steps, step by Heun.

F^ = F_0 + e / 2 * (d + d*), d the BDF2 slope at the last anchor, d* = (F* - F_0) / e that of the predicted F* = F_0 + e
d. The paper's code is not public. cache-dit's port takes differences that are not divided by the gap between computed
steps, which is right for a gap of one alone; here slopes are true ones, so that a straight line is continued straight.
"""

from __future__ import annotations

from collections.abc import Sequence

HORIZON = 3.0  # steps: beyond it the slope is not followed (cache-dit's port shrinks it there)


def foca_weights(u: Sequence[float], v: float, horizon: float | None = None) -> list[float]:
    """Weights of the anchors at coordinates u (all different) for a value at v; they sum to 1.

    horizon: largest distance that is extrapolated over, `None` for no limit.
    """
    slope = bdf2_slope(u)
    reach = v - u[-1]
    if horizon is not None:
        reach = max(-horizon, min(horizon, reach))
    newest = [0.0] * (len(u) - 1) + [1.0]
    return [weight + reach * s for weight, s in zip(newest, slope)]


def bdf2_slope(u: Sequence[float]) -> list[float]:
    """Weights of the anchors for the slope at the last one: second order on uneven nodes, first with two, none with
    one."""
    slope = [0.0] * len(u)
    if len(u) < 2:
        return slope
    gap = u[-1] - u[-2]
    if len(u) == 2:
        slope[-1], slope[-2] = 1 / gap, -1 / gap
        return slope
    earlier = u[-2] - u[-3]
    both = gap + earlier
    slope[-1] = (2 * gap + earlier) / (gap * both)
    slope[-2] = -both / (gap * earlier)
    slope[-3] = gap / (earlier * both)
    return slope
