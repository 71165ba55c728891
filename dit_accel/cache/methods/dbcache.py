"""DBCache (cache-dit 1.5.3, no paper): the first blocks' residual against the last computed step, behind five checks.

The first blocks always run, the middle is skipped and the last blocks run on the approximation. The residual is
compared with that of the last computed step. Order of the checks: warm-up, mask, most skips in all, longest run of
them, sum of all changes, threshold. Unlike cache-dit's, the limits hold for a static mask too, a mask does not shorten
the warm-up and is stretched to the run, and a threshold of 1 or more is still compared with.
"""

from __future__ import annotations

from dit_accel.cache.block_cache import BlockCache
from dit_accel.cache.schedule import Schedule
from dit_accel.cache.scope import Scope


def cache(
    threshold: float = 0.08,
    first_blocks: int = 8,
    last_blocks: int = 0,
    warmup: int = 8,
    longest_run: int | None = None,
    schedule: Schedule | None = None,
) -> BlockCache:
    """Defaults of cache-dit; its other limits (most skips in all, sum of changes, warm-up interval, mask) are the
    schedule's. A static mask of cache-dit is `schedule.mask` with the threshold null."""
    return BlockCache(
        threshold,
        "anchor",
        warmup=warmup,
        tail=0,
        max_skips=longest_run,
        probe_blocks=first_blocks,
        scope=Scope(last_blocks=last_blocks),
        schedule=schedule or Schedule(),
    )


# The author's settings S, M and F for FLUX.1-dev at 50 steps.
FLUX_SLOW = cache(0.12, first_blocks=4, warmup=4, longest_run=4)
FLUX_MEDIUM = cache(0.24, first_blocks=1, warmup=4, longest_run=6)
FLUX_FAST = cache(0.8, first_blocks=1, warmup=8, longest_run=8, schedule=Schedule(warmup_interval=2))
# On FLUX the author gives single-stream blocks a higher threshold: their input already errs.
FLUX_DOUBLE_THRESHOLD, FLUX_SINGLE_THRESHOLD = 0.08, 0.16
