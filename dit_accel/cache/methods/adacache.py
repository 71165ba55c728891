"""AdaCache (2411.02397): at a computed step, how fast a residual changes says after how many steps to compute again.

The rate of change of the attention residual of chosen layers is looked up in a codebook, one answer for all blocks.
Reused: the attention and MLP outputs of every block. The paper's MoReg, which scales the rate by the motion between
frames, is left out: it needs the frames' layout, which is not known here for every model.
"""

from __future__ import annotations

from dit_accel.cache.block_cache import BlockCache
from dit_accel.cache.schedule import Schedule
from dit_accel.cache.scope import Scope
from dit_accel.cache.signal import Signal

Codebook = tuple[tuple[float, int], ...]
"""Pairs (bound, gap), bounds rising: a rate below the bound puts the next computed step `gap` steps ahead."""

CODEBOOK_100_STEPS: Codebook = ((0.03, 12), (0.05, 10), (0.07, 8), (0.09, 6), (0.11, 4), (1.0, 3))
CODEBOOK_30_STEPS_FAST: Codebook = ((0.08, 6), (0.16, 5), (0.24, 4), (0.32, 3), (0.40, 2), (1.0, 1))
CODEBOOK_30_STEPS_SLOW: Codebook = ((0.08, 3), (0.16, 2), (0.24, 1), (0.32, 1), (0.40, 1), (1.0, 1))


def cache(codebook: Codebook = CODEBOOK_100_STEPS) -> BlockCache:
    """The first step and the last two are always computed. The rate is that of the attention in the middle of the stack
    (Open-Sora's block 13 of 28; the choice for other models is not known)."""
    return BlockCache(
        None,
        warmup=1,
        tail=2,
        max_skips=None,
        probe_blocks=0,
        scope=Scope("layers"),
        signal=Signal("units", units="middle"),
        schedule=Schedule(codebook=codebook),
    )
