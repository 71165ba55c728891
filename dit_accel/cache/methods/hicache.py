"""HiCache (2508.16984): TaylorSeer's schedule, with its differences on scaled Hermite polynomials.

The weights are those of `dit_accel.forecast.hermite`: at the published scale of 0.5 half of the slope is left. As
published the outputs of the attention and MLP of every block are forecast.
"""

from __future__ import annotations

from dit_accel.cache.block_cache import BlockCache
from dit_accel.cache.methods import taylorseer
from dit_accel.forecast.settings import Forecast


def cache(interval: int = 6, first: int = 3) -> BlockCache:
    """interval: N, from one full step to the next; first: full steps at the start."""
    return taylorseer.cache(interval, first)


def forecast(order: int = 2, scale: float = 0.5) -> Forecast:
    """order: of the expansion; scale: sigma, smaller shrinks the forecast towards reuse."""
    return Forecast("hermite", order, scale=scale)
