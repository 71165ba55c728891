"""TaylorSeer (2503.06923): compute every N-th step after a few at the start, forecast the outputs in between (eq. 8).

The forecast is that of `dit_accel.forecast.weights.taylor_weights`, exact to degree 1 only, as published. The published
code forecasts the attention and MLP output of every block; its "Lite" form the last output alone, at a fraction of the
memory and no worse.
"""

from __future__ import annotations

from dit_accel.cache.block_cache import BlockCache
from dit_accel.cache.scope import Scope
from dit_accel.forecast.settings import Forecast


def cache(interval: int = 6, first: int = 3, lite: bool = False) -> BlockCache:
    """interval: N, from one full step to the next; first: full steps at the start. No last step is guarded."""
    scope = Scope("model", "output") if lite else Scope("layers")
    return BlockCache(None, warmup=max(1, first), tail=0, max_skips=interval - 1, probe_blocks=0, scope=scope)


def forecast(order: int = 1) -> Forecast:
    """order: of the expansion."""
    return Forecast("taylor", order)


# (interval, first, order). DiT takes them from the command line; its are rows of the paper's table, at 50 DDIM steps.
PUBLISHED = {
    "flux": (6, 3, 1),
    "flux-kontext": (6, 3, 1),
    "hunyuan-video": (5, 1, 1),
    "wan2.1": (5, 1, 1),
    "dit-xl": (3, 2, 3),
    "dit-xl-fast": (5, 2, 3),
}
