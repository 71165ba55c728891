"""Sortblock (2508.00412): of every K steps one is full, one is forecast, and in the rest the odd blocks are recomputed.

Block by block, the residual h^l - h^(l-1) is forecast linearly from its last two computed values. After the forecast
step the blocks are ranked by the cosine of forecast and last full residual (`dit_accel.cache.ranking`); a share of
them, given by a polynomial of the timestep, is recomputed until the next full
step. Counted from the last computed step, so the first step inside the window is forecast at once.
"""

from __future__ import annotations

from dit_accel.cache.block_cache import BlockCache
from dit_accel.cache.ranking import Ranking
from dit_accel.cache.schedule import Schedule
from dit_accel.cache.scope import Scope
from dit_accel.forecast.settings import Forecast

FLUX_COEFFICIENTS = (5.67621e-14, -1.36659e-10, 1.16246e-7, -3.97725e-5, 0.00361, 0.56088)
WAN_COEFFICIENTS = (-1.74367e-15, 1.20871e-11, -2.11429e-8, 1.49777e-5, -0.00453, 0.4971)


def cache(
    interval: int = 5,
    share: float = 0.5,
    coefficients: tuple[float, ...] = FLUX_COEFFICIENTS,
    start: float = 950.0,
    end: float = 50.0,
) -> BlockCache:
    """interval: K, 4 to 9; share: beta, 0 to 1; start, end: time steps outside which all is full. The authors give
    ranges (start 900 to 950, end 50 to 100); which value belongs to which model is not known here."""
    return BlockCache(
        None,
        warmup=1,
        tail=0,
        max_skips=interval - 1,
        probe_blocks=0,
        scope=Scope("block"),
        schedule=Schedule(window=(start, end)),
        ranking=Ranking(coefficients, share),
    )


def forecast() -> Forecast:
    """Linear prediction at the true positions of the last two computed values."""
    return Forecast("newton", 1)
