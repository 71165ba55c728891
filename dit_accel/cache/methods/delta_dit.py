"""Delta-DiT (2406.01125): what a range of blocks adds is kept for N steps, of the rear blocks early, of the front late.

The kept delta h^(l2) - h^(l1) is added to the fresh input of the range. Front blocks draw outlines and rear blocks
details, so before the stage boundary the front is computed, and after it the rear. No official code exists, and the
abstract names no default of N, boundary and length of the range: those here are ours. Which blocks are skipped at which
step is `dit_accel.cache.scope.ranges`.
"""

from __future__ import annotations

from dit_accel.cache.block_cache import BlockCache
from dit_accel.cache.schedule import Schedule
from dit_accel.cache.scope import Scope


def cache(interval: int = 3, blocks: int = 8, boundary: float | None = 0.5) -> BlockCache:
    """interval: N; blocks: length of the range; boundary: share of the run at which the late stage begins.

    A step is computed as a whole every N-th time, and where the delta of the range is not at hand: the first one behind
    the boundary (inferred: nothing says where its delta comes from).
    """
    return BlockCache(
        None,
        warmup=1,
        tail=0,
        max_skips=interval - 1,
        probe_blocks=0,
        scope=Scope(blocks=blocks, boundary=boundary),
        schedule=Schedule(interval=interval),
    )


# TaylorSeer's port to FLUX: all 38 single-stream blocks are the range, and there is no second stage.
FLUX_PORT = cache(3, 38, None)
