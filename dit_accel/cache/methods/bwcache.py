"""BWCache (2509.13789): when all blocks have changed little on average, the next tenth of the steps reuses them.

The mean over the blocks of the relative L1 of their outputs needs all of them, so it is known only after a computed
step and decides for the following ones. Where the first run began with k steps left, the last k / 2 are always
computed.
Written from notes on the paper: its code was not available, thresholds for models other than Open-Sora were not found,
nor was a word on guidance.
"""

from __future__ import annotations

from dit_accel.cache.block_cache import BlockCache
from dit_accel.cache.schedule import Schedule
from dit_accel.cache.scope import Scope
from dit_accel.cache.signal import Signal

OPEN_SORA_THRESHOLDS = (0.15, 0.20, 0.25)  # slow to fast


def cache(threshold: float = 0.15, reuse: float = 0.1) -> BlockCache:
    """threshold: of the mean change to the last computed step; reuse: length of a run of skips, as a share of all
    steps."""
    return BlockCache(
        threshold,
        warmup=1,
        tail=0,
        max_skips=None,
        probe_blocks=0,
        scope=Scope("block", "output"),
        signal=Signal("units"),
        schedule=Schedule(run=reuse, guard=0.5),
    )
