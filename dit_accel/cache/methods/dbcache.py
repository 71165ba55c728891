"""DBCache (cache-dit 1.5.3, no paper): the first blocks' residual against the last computed step, behind five checks.

The first blocks always run, the middle is skipped and the last blocks run on the approximation. The residual is
compared with that of the last computed step. Order of the checks: warm-up, mask, most skips in all, longest run of
them, sum of all changes, threshold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class DbCacheSettings:
    """Defaults of cache-dit. A limit of -1, or a sum of `None`, is no limit.

    mask: 1 computes a step and 0 leaves it open, past its end all are open; static_mask: 0 skips without looking, so
    it must begin with 1. warmup_interval: the warm-up computes each step whose number it divides, and no other.
    """

    threshold: float = 0.08
    first_blocks: int = 8
    last_blocks: int = 0
    warmup: int = 8
    warmup_interval: int = 1
    most_skips: int = -1
    longest_run: int = -1
    most_change: float | None = None
    mask: tuple[int, ...] | None = None
    static_mask: bool = False


@dataclass(frozen=True)
class DbCacheState:
    """skips: of the whole run; run: in a row; change: sum of all changes measured, which no computed step resets."""

    skips: int = 0
    run: int = 0
    change: float = 0.0


# The author's settings S, M and F for FLUX.1-dev at 50 steps.
FLUX_SLOW = DbCacheSettings(0.12, first_blocks=4, warmup=4, longest_run=4)
FLUX_MEDIUM = DbCacheSettings(0.24, first_blocks=1, warmup=4, longest_run=6)
FLUX_FAST = DbCacheSettings(0.8, first_blocks=1, warmup=8, warmup_interval=2, longest_run=8)
# On FLUX the author gives single-stream blocks a higher threshold: their input already errs.
FLUX_DOUBLE_THRESHOLD, FLUX_SINGLE_THRESHOLD = 0.08, 0.16


def decide(
    settings: DbCacheSettings, state: DbCacheState, change: float | None, step: int
) -> tuple[bool, DbCacheState]:
    """Compute this step? change: relative L1 of the residual to the last computed step's, `None` without one.

    cache-dit measures only where no earlier check has decided, and sums what it measured, skipped or not.
    """
    computed = DbCacheState(state.skips, 0, state.change)
    # with a mask the warm-up is cut to the 1s it begins with, which it computes anyway
    if settings.mask is None and step < settings.warmup and step % settings.warmup_interval == 0:
        return True, computed
    if settings.mask is not None and step < len(settings.mask) and settings.mask[step] == 1:
        return True, computed
    if settings.mask is not None and settings.static_mask:
        return False, DbCacheState(state.skips + 1, state.run + 1, state.change)
    if 0 <= settings.most_skips <= state.skips or 0 <= settings.longest_run <= state.run:
        return True, computed
    if settings.most_change and state.change >= settings.most_change:
        return True, computed
    if change is None or not math.isfinite(change) or settings.threshold <= 0:
        return True, computed
    if settings.threshold >= 1:  # always similar, and then nothing is measured
        return False, DbCacheState(state.skips + 1, state.run + 1, state.change)
    if change < settings.threshold:
        return False, DbCacheState(state.skips + 1, state.run + 1, state.change + change)
    return True, DbCacheState(state.skips, 0, state.change + change)
