"""CG-Taylor (2508.02240): trust the forecast of the last block where the forecast of the first block came true.

Block 1 always runs; its output is compared with a Taylor forecast from the last computed steps. Both histories grow at
computed steps only, so the error is that of the whole span since then, not of one step, and is not summed.
Guidance: the conditional branch decides and the other does the same, from its own history.
"""

from __future__ import annotations

from dit_accel.cache.block_cache import BlockCache
from dit_accel.cache.scope import Scope
from dit_accel.cache.signal import Signal
from dit_accel.forecast.settings import Forecast

# (threshold, first, order of the first block's forecast); one more first step than the published bound (cnt > 4 makes
# 5). HunyuanVideo computes the first 6 steps (cnt > 5), but no threshold for it was found. The FLUX code also leaves
# the first-block history empty while it warms up, which looks accidental and is not repeated here.
PUBLISHED = {"flux-fast": (0.13, 5, 1), "flux": (0.03, 5, 1), "wan2.1": (0.36, 6, 3), "dit-xl": (0.008, 3, 3)}


def cache(threshold: float = 0.13, first: int = 5, first_block_order: int = 1) -> BlockCache:
    """threshold: tau on mean |p^ - p| / mean |p| of the first block's output; first: steps computed at the start."""
    return BlockCache(
        threshold,
        "forecast",
        warmup=first,
        tail=1,
        max_skips=None,
        scope=Scope(carrier="output"),
        signal=Signal("probe output", forecast_order=first_block_order),
        branches="first",
    )


def forecast(order: int = 1) -> Forecast:
    """order: of the last block's forecast."""
    return Forecast("taylor", order)
