"""FBCache (ParaAttention, no paper): skip while the first block's residual is near that of the last computed step.

Relative L1 of h^1 - h^0 to the last computed step's; what all later blocks added is reused. No warm-up, no limit. A
change as large as the threshold computes (theirs skips).
"""

from __future__ import annotations

from dit_accel.cache.block_cache import BlockCache

FLUX_THRESHOLDS = (0.06, 0.08, 0.10, 0.12)  # ParaAttention's examples, slow to fast; diffusers' default is 0.05


def cache(threshold: float = 0.08) -> BlockCache:
    """ParaAttention's rule."""
    return BlockCache(threshold, "anchor", warmup=1, tail=0, max_skips=None)
