"""Spectrum (2603.01623): the last block's output as Chebyshev polynomials of time, at computed steps ever farther
apart.

The weights are those of `dit_accel.forecast.chebyshev`. After a warm-up the window is 2 steps; each computed step
lengthens it by alpha, and of a window the last step is computed. Guidance: counters and forecasts of its own for each
branch.
"""

from __future__ import annotations

from dit_accel.cache.block_cache import BlockCache
from dit_accel.cache.schedule import Schedule
from dit_accel.cache.scope import Scope
from dit_accel.forecast.settings import Forecast

ALPHAS = (0.75, 3.0)  # 14 and 10 computed steps of 50


def cache(alpha: float = 0.75, warmup: int = 5) -> BlockCache:
    """alpha: by how much a computed step lengthens the window; warmup: steps computed at the start. No tail is
    guarded."""
    return BlockCache(
        None,
        warmup=warmup,
        tail=0,
        max_skips=1,
        probe_blocks=0,
        scope=Scope(carrier="output"),
        schedule=Schedule(growth=alpha),
    )


def forecast(history: int = 8, blend: float = 1.0) -> Forecast:
    """history: computed steps kept (100 as published, which is all of them: 14 outputs of the stack); blend: share of
    Chebyshev's weights, the rest a straight line (0.5 in the later code)."""
    return Forecast("chebyshev", 4, history=history, blend=blend)
