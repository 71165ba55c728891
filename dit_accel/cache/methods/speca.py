"""SpeCa (2509.11628): forecast as TaylorSeer does, run the last block on the forecast, and compute when they disagree.

e = mean |x^ - x| / (|x| + 1e-10), x^ the forecast of the last block's output and x what it gives on the forecast input.
It judges the *next* step: the bad one stays. The threshold falls over the run, max(base * decay^(i / T), floor). At
least `shortest` and at most `longest` forecasts follow a computed step. As published a step after a computed one is
forecast even among the first; here the first steps are computed. The paper drafts every layer; here the stack before
the last block.
"""

from __future__ import annotations

from dit_accel.cache.block_cache import BlockCache
from dit_accel.cache.schedule import Schedule
from dit_accel.cache.scope import Scope
from dit_accel.cache.signal import Signal
from dit_accel.forecast.settings import Forecast

# (threshold, decay, floor, shortest, longest, order)
PUBLISHED = {"flux": (7.0, 0.3, 0.1, 2, 8, 2), "dit-xl": (0.3, 0.05, 0.01, 3, 8, 4)}


def cache(
    threshold: float = 7.0, decay: float = 0.3, floor: float = 0.1, shortest: int = 2, longest: int = 8, first: int = 3
) -> BlockCache:
    """Defaults for FLUX. first: steps that are computed at the start."""
    return BlockCache(
        threshold,
        warmup=first,
        tail=0,
        max_skips=longest,
        probe_blocks=0,
        scope=Scope(carrier="output", last_blocks=1),
        signal=Signal("last block"),
        schedule=Schedule(shortest=shortest),
        decay=decay,
        floor=floor,
    )


def forecast(order: int = 2) -> Forecast:
    """order: of TaylorSeer's expansion."""
    return Forecast("taylor", order)
