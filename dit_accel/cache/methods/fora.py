"""FORA (2407.01425): compute every N-th step, and in between reuse the attention and MLP outputs of every block.

What is kept is the output before the gate, so that the gate of the present step applies. Static: nothing is measured,
nothing is warmed up, no last step is guarded, and both branches of guidance do the same.
"""

from __future__ import annotations

from dit_accel.cache.block_cache import BlockCache
from dit_accel.cache.schedule import Schedule
from dit_accel.cache.scope import Scope

# Rows of the tables in TaylorSeer's paper; the authors' own README runs DiT with an interval of 3.
PUBLISHED_INTERVALS = {"dit-xl": (3, 5), "flux": (3, 6), "hunyuan-video": (5,)}


def cache(interval: int = 3) -> BlockCache:
    """interval: N; 1 never skips."""
    return BlockCache(
        None,
        warmup=1,
        tail=0,
        max_skips=interval - 1,
        probe_blocks=0,
        scope=Scope("layers"),
        schedule=Schedule(interval=interval),
    )
