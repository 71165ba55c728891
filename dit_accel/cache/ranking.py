"""Ranking: which blocks are recomputed while the others are forecast, by how far their own forecast has moved.

Sortblock (2508.00412): the cosine of a block's forecast and its last full residual, and a share of the blocks that a
polynomial of the time step gives. (The cosine so tells how far the forecast moved, not its error.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dit_accel.settings import Settings, setting


@dataclass(frozen=True)
class Ranking(Settings):
    """How many blocks are recomputed while the others are forecast."""

    coefficients: tuple[float, ...] = setting(
        (1.0,), "polynomial of the time step (1000 to 0) for the share, highest power first"
    )
    share: float = setting(0.5, "factor on it, the authors' beta (useful: 0.1 to 1)", minimum=0.0, maximum=1.0)


def recompute_share(ranking: Ranking, timestep: float) -> float:
    """pi = beta * polynomial(timestep), kept within 0 ... 1 because a quantile is asked for with it."""
    value = 0.0
    for coefficient in ranking.coefficients:
        value = value * timestep + coefficient
    return min(max(ranking.share * value, 0.0), 1.0)


def least_similar(similarities: Sequence[float], share: float) -> frozenset[int]:
    """Numbers of the blocks whose similarity is at or below the quantile `share`, so at least one of them.

    The quantile is interpolated between ranks (inferred). Double and single blocks are ranked apart: call this for
    each stream. A similarity that is no number means recompute, and takes no part in the ranking.
    """
    ranked = [value for value in similarities if math.isfinite(value)]
    bound = _quantile(ranked, share) if ranked else math.inf
    return frozenset(k for k, value in enumerate(similarities) if not math.isfinite(value) or value <= bound)


def _quantile(values: Sequence[float], share: float) -> float:
    """Linear between the ranks."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
