"""FoCa (2508.16211): a fixed interval, and the feature of the stack carried on as the solution of an ODE.

The weights are those of `dit_accel.forecast.foca`: BDF2's slope at the last computed steps, followed by Heun's step.
"""

from __future__ import annotations

from dit_accel.cache.block_cache import BlockCache
from dit_accel.cache.scope import Scope
from dit_accel.forecast.settings import Forecast

PUBLISHED_INTERVALS = {"flux": (5, 8)}


def cache(interval: int = 5, first: int = 3) -> BlockCache:
    """interval: N, from one full step to the next; first: full steps at the start."""
    scope = Scope(carrier="output")
    return BlockCache(None, warmup=first, tail=0, max_skips=interval - 1, probe_blocks=0, scope=scope)


def forecast() -> Forecast:
    """Over the last three computed steps."""
    return Forecast("foca")
