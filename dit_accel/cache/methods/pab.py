"""PAB (2408.12588): inside a window of time steps the attention outputs of every block are reused, `interval` - 1 at a
time.

As published spatial, temporal and cross attention have intervals of their own (2, 4, 6), and the MLPs of a few blocks
are reused at listed steps; here all attention of a block has one. The ends of the window belong to it.
"""

from __future__ import annotations

from dit_accel.cache.block_cache import BlockCache
from dit_accel.cache.schedule import Schedule
from dit_accel.cache.scope import Scope


def cache(interval: int = 2, start: float = 800.0, end: float = 100.0) -> BlockCache:
    """interval: one of so many steps is computed; start, end: the window, diffusers' default."""
    return BlockCache(
        None,
        warmup=1,
        tail=0,
        max_skips=interval - 1,
        probe_blocks=0,
        scope=Scope("attention"),
        schedule=Schedule(interval=interval, window=(start, end)),
    )
